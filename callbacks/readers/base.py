"""What every reader shares: it measures, moves nothing, and states beforehand what it needs of the model and the task.

A reader states three things: the activations it looks at (``sites``), what else it needs (``requirements``), and the
metrics it records (``records``). A run that lacks something is refused in one line when it is built.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from opsin.errors import ConfigError
from opsin.model.sites import SiteTable
from opsin.records.axes import Axes
from opsin.task import Task
from opsin.training.module import OpsinModule, callbacks_of, opsin_module
from opsin.training.observers import Observation


@dataclass(frozen=True)
class Requirement:
    """Something that a run must have, and the line that refuses a run without it.

    Args:
        field: reader, or setting of a reader, that the line names.
        lacking: function that says of a module what stands in the way, as the line shows it; None where nothing does.
        expected: what would do, as the line shows it.
    """

    field: str
    lacking: Callable[[OpsinModule], object | None]
    expected: str

    def check(self, module: OpsinModule) -> None:
        """Refuse a run that lacks it.

        Raises:
            ConfigError: names the field, what stands in the way and what would do.
        """
        value = self.lacking(module)
        if value is not None:
            raise ConfigError(self.field, value, self.expected)


class Reader(Callback):
    """A callback that measures: with or without it the weights are equal to the last bit.

    A subclass overrides what it needs: ``sites``, ``requirements`` and ``records`` state something, ``check`` compares
    settings with the run. From ``setup`` on the module is ``self._module``.
    """

    def sites(self, table: SiteTable) -> list[str]:
        """Names of the activations it looks at.

        Args:
            table: sites of the model, which gives layers and sizes; a site it lacks may be named, and refuses the run.
        """
        return []

    def requirements(self) -> list[Requirement]:
        """What it needs beside activations, with its settings as they are."""
        return []

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        """Metrics it records, and the axes of one member's values.

        Returns:
            Name to size of every axis, in the order of the values: ``{}`` for one number a member,
            ``{"layer": 2, "head": 8}`` for heads. ``neuron``, ``position``, ``frequency``, ``feature``, ``class`` and
            any other name in lower case become columns of ``metrics.csv``.
        """
        return {}

    def task_records(self, task: Task) -> dict[str, Axes]:
        """Further metrics, which depend on the task: its objective's measures, its references."""
        return {}

    def check(self, module: OpsinModule) -> None:
        """Compare settings with the run, whose requirements are met.

        Raises:
            ConfigError: a setting that does not fit the model, the task or the run.
        """

    def summarise(self, name: str, members: Sequence[Mapping[str, Any]]) -> None:
        """Add what was found to the run's summary: of several members as a list, of one as it is.

        Args:
            name: part of the summary that receives it.
            members: what was found of every member.
        """
        self._module.summary[name] = members[0] if len(members) == 1 else list(members)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._module = opsin_module(pl_module)
        if stage == "fit":
            refuse_repeated(callbacks_of(trainer))
            for requirement in (*self.requirements(), _activations(type(self).__name__, self.sites)):
                requirement.check(self._module)
            self.check(self._module)


class ProbeReader(Reader, ABC):
    """A reader that is shown the probe at a cadence: before the first step, every so many steps, and after the last.

    Args:
        every: optimizer steps between measurements.

    Raises:
        ConfigError: fewer than one step.
    """

    def __init__(self, every: int) -> None:
        self.every = check_count(f"{type(self).__name__}.every", every, "optimizer step")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._module.listen(self.every, self.measure, self.sites(self._module.sites))

    @abstractmethod
    def measure(self, seen: Observation) -> None:
        """Record what the probe shows.

        Args:
            seen: step, probe, and the activations that ``sites`` names.
        """


def refuse_repeated(callbacks: Sequence[Callback]) -> None:
    """Refuse a callback that stands twice among others, where the two would keep or record the same.

    Args:
        callbacks: all callbacks of the run.

    Raises:
        ConfigError: names their class.
    """
    seen: dict[str, Callback] = {}
    for callback in callbacks:
        keeps = is_overridden("state_dict", callback, Callback) or isinstance(callback, Reader)
        if keeps and callback.state_key in seen:
            expected = "one of them, or two with different settings: both would write the same"
            raise ConfigError("trainer.callbacks", f"{type(callback).__name__} twice", expected)
        if keeps:
            seen[callback.state_key] = callback


# ---- requirements of several readers ----------------------------------------------------------------


def needs_neurons(reader: str, expected: str = "one with them: transformer.mlp_ratio a number") -> Requirement:
    """A model with MLPs."""

    def lacking(module: OpsinModule) -> str | None:
        return None if module.sites.size("N") else "a model without MLPs"

    return Requirement(reader, lacking, expected)


def needs_layer_norm(reader: str) -> Requirement:
    """A model whose read-out passes a LayerNorm."""

    def lacking(module: OpsinModule) -> str | None:
        norm = module.sites.norms.get("ln_final")
        if norm is None:
            return "a model without LayerNorm"
        return None if norm.kind == "LayerNorm" else f"a model whose last norm is an {norm.kind}"

    return Requirement(reader, lacking, "one with it: transformer.norm true")


def needs_classes(reader: str) -> Requirement:
    """A task whose outputs are logits of classes, one of which is right."""

    def lacking(module: OpsinModule) -> str | None:
        task, objective = module.task, module.task.objective
        return None if objective.predicts_classes else f"{type(task).__name__} with {type(objective).__name__}"

    return Requirement(reader, lacking, "a task that predicts classes")


def needs_labels(reader: str) -> Requirement:
    """A task that looks something up: some positions are labels."""

    def lacking(module: OpsinModule) -> str | None:
        return None if module.task.layout.labels else f"{type(module.task).__name__} without labels"

    return Requirement(reader, lacking, "a task with labels: positions that induction looks at")


def needs_evaluation_set(reader: str, name: str) -> Requirement:
    """A task with an evaluation set of this name."""

    def lacking(module: OpsinModule) -> str | None:
        sets = module.task.evaluations
        return None if name in sets else f"{type(module.task).__name__} with {', '.join(sets)}"

    return Requirement(reader, lacking, f"a task with an evaluation set {name!r}")


def _activations(reader: str, sites: Callable[[SiteTable], Sequence[str]]) -> Requirement:
    """A model with every activation that a reader looks at."""

    def lacking(module: OpsinModule) -> str | None:
        missing = [site for site in sites(module.sites) if site not in module.sites.sites]
        return f"a model without {', '.join(missing)}" if missing else None

    return Requirement(reader, lacking, "one with these activations (`opsin sites` lists those of a model)")


LARGEST_COUNT = 2**62
"""Largest number of steps or sequences that a reader can count."""

MOST_PER_DECADE = 1_000
"""Largest number of files or pictures in each tenfold of steps."""

# ---- settings of several readers --------------------------------------------------------------------


def check_count(field: str, value: int, unit: str = "", most: int = LARGEST_COUNT) -> int:
    """A number that is at least 1.

    Args:
        field: reader and setting, for the message.
        value: number that the user wrote.
        unit: what is counted, for the message.
        most: largest number that there may be.

    Raises:
        ConfigError: a number below 1, or one too large.
    """
    if value < 1:
        raise ConfigError(field, value, f"at least 1 {unit}".rstrip())
    if value > most:
        raise ConfigError(field, value, f"at most {most:,}")
    return value


def log_spaced(last: int, per_decade: int) -> set[int]:
    """Step 0 and steps from 1 to ``last``, ``per_decade`` in each tenfold, rounded; fewer where they coincide.

    Args:
        last: largest step that may be among them.
        per_decade: steps in each tenfold, at least 1.
    """
    steps, index = {0}, 0
    while (step := round(10 ** (index / per_decade))) <= last:
        steps.add(step)
        index += 1
    return steps
