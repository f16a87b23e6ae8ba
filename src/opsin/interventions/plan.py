"""The plan: every intervention of a run as one row, checked and ordered once, before training.

A row says what is overwritten (an ``Intervention``), where (a mask), from what the value is made (input addresses) and
which row of the gates says how strongly. Changes of weights are rows of the same kind and come after them. The plan
never changes while training; gates and supplied tensors do. ``build_plan.py`` makes it, ``apply.py`` runs it.

Legend: M members, I rows of a plan, S steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions.donors import Donor
from opsin.interventions.feedback import HeadFeedback
from opsin.interventions.identity import identity
from opsin.interventions.intervention import Intervention, Source, Supply, Value
from opsin.interventions.schedules import Schedule
from opsin.interventions.weights import WeightChange
from opsin.model.parameters import NamedWeight
from opsin.records.axes import Axes
from opsin.records.history import History
from opsin.task import Task


@dataclass(frozen=True)
class InputAddress:
    """Where one need of a value is found while the plan acts.

    Args:
        kind: an earlier pass, a pass nested in this one, this pass itself, the pass that asks for this one, a weight,
            a supply or the clock.
        index: number of the pass or the supply in the plan.
        name: name of the site or the weight.
        detach: whether gradient stops at it.
        weight: how the weight is stored; None for what is no weight.
    """

    kind: Literal["pass", "nested", "this", "asking", "weight", "supply", "clock"]
    index: int = 0
    name: str = ""
    detach: bool = False
    weight: NamedWeight | None = None

    def describe(self, supplies: Sequence[Supply]) -> str:
        """The need as ``opsin sites`` prints it; nothing for weights and the clock, which the value implies."""
        texts = {
            "pass": f"pass {self.index + 1} {self.name}",
            "nested": f"pass {self.index + 1} {self.name}",
            "this": f"this pass {self.name}",
            "asking": f"the asking pass {self.name}",
        }
        return str(supplies[self.index]) if self.kind == "supply" else texts.get(self.kind, "")


@dataclass(frozen=True)
class PlannedIntervention:
    """One row: an intervention with everything that is fixed about it before training.

    Args:
        gate: index of the row, in the gates and in all that is counted.
        name: name of its writer, numbered where the run has several of its kind.
        intervention: what is overwritten, by what, when.
        mask: 1 at selected entries and 0 elsewhere, broadcastable to the site.
        inputs: where the needs of its value are found, in order.
        always: whether it is in force at every step, in another pass than the run's own.
    """

    gate: int
    name: str
    intervention: Intervention
    mask: Tensor
    inputs: tuple[InputAddress, ...] = ()
    always: bool = False

    @property
    def schedule(self) -> Schedule:
        """When it acts, and how strongly."""
        return self.intervention.schedule

    @property
    def target(self) -> str:
        """Name of the site."""
        return self.intervention.site

    @property
    def writer(self) -> str:
        """Name of the callback that asks for it, without a number."""
        return self.intervention.writer

    def identity(self, members: bool = True) -> str:
        """What it does, as text."""
        return identity(self.intervention, members)


@dataclass(frozen=True)
class PlannedChange:
    """One row: a change of weights with everything that is fixed about it before training.

    Args:
        gate: index of the row, in the gates and in all that is counted.
        name: name of its writer, numbered where the run has several of its kind.
        change: which weights are changed, how, when.
        mask: 1 at selected entries and 0 elsewhere, broadcastable to the parameter.
    """

    gate: int
    name: str
    change: WeightChange
    mask: Tensor

    @property
    def schedule(self) -> Schedule:
        """When it acts, and how strongly."""
        return self.change.schedule

    @property
    def target(self) -> str:
        """Name of the weight."""
        return self.change.weight

    @property
    def writer(self) -> str:
        """Name of the callback that asks for it, without a number."""
        return self.change.writer

    def identity(self, members: bool = True) -> str:
        """What it does, as text."""
        return identity(self.change, members)


PlannedRow = PlannedIntervention | PlannedChange
"""One row of a plan."""


@dataclass(frozen=True)
class PlannedPass:
    """One forward pass of every step.

    Args:
        groups: rows of the pass in order of application; those that put one value into different entries of a site,
            side by side, are one group and act at once.
        keeps: names of the sites that other passes, or later values of this one, take from it.
        donor: index of the donor whose weights it runs; None for the model that is trained.
        nested: whether it runs inside each pass that takes from it, once that one comes to need it.
    """

    groups: tuple[tuple[PlannedIntervention, ...], ...]
    keeps: tuple[str, ...] = ()
    donor: int | None = None
    nested: bool = False

    @property
    def rows(self) -> tuple[PlannedIntervention, ...]:
        """Its rows, in order of application."""
        return tuple(row for group in self.groups for row in group)


@dataclass(frozen=True)
class Plan:
    """All interventions of a run, pass by pass in order of application, and its changes of weights.

    Args:
        passes: forward passes of a step; the run's own, whose logits count, comes last.
        donors: models other than the trained one.
        supplies: tensors that writers hand over.
        changes: changes of weights in order of application; their gates follow those of the interventions.
    """

    passes: tuple[PlannedPass, ...]
    donors: tuple[Donor, ...] = ()
    supplies: tuple[Supply, ...] = ()
    changes: tuple[PlannedChange, ...] = ()

    @property
    def interventions(self) -> tuple[PlannedIntervention, ...]:
        """Every row that overwrites an activation, by its gate."""
        return tuple(row for planned in self.passes for row in planned.rows)

    @property
    def rows(self) -> tuple[PlannedRow, ...]:
        """Every row, by its gate."""
        return (*self.interventions, *self.changes)

    def gates(self, first: int, count: int, members: int, history: History) -> Float[np.ndarray, "S I M"]:
        """Strength of every row at steps ``first .. first + count - 1``.

        Args:
            first: number of the first of these optimizer steps.
            count: S, how many steps.
            members: M, models of the run.
            history: what the run has measured so far, with its batch size.
        """
        strengths = [row.schedule.gates(first, count, members, history) for row in self.rows]
        return np.stack(strengths, axis=1) if strengths else np.zeros((count, 0, members))

    def covered_members(self, members: int) -> Bool[np.ndarray, "I M"]:
        """Which members each row selects.

        Args:
            members: M, models of the run.
        """
        covered = [row.mask.flatten(1).amax(1).expand(members).numpy() > 0 for row in self.rows]
        return np.stack(covered) if covered else np.zeros((0, members), dtype=bool)

    def check_task(self, task: Task) -> None:
        """Refuse donors of other sizes, and values that mean nothing on a task.

        Args:
            task: task that the members learn.

        Raises:
            ConfigError: names the donor, or the writer.
        """
        for donor in self.donors:
            donor.check(task)
        for row in self.interventions:
            if row.intervention.value.needs_classes and not task.objective.predicts_classes:
                found = f"{type(task).__name__} with {type(task.objective).__name__}"
                raise ConfigError(row.name, found, "a task that predicts classes")

    @property
    def feedback(self) -> bool:
        """Whether the strength of some row depends on what the run has measured."""
        return any(row.schedule.feedback is not None for row in self.rows)

    @property
    def loops(self) -> dict[str, PlannedRow]:
        """Every feedback by the name under which the run records what it does: the first row that follows it."""
        found: dict[str, PlannedRow] = {}
        for row in self.rows:
            feedback = row.schedule.feedback
            if feedback is None:
                continue
            label = f"{row.name}/{feedback.head}" if isinstance(feedback, HeadFeedback) else row.name
            if label in found and found[label].schedule.feedback != feedback:
                label = f"{label}/{row.target}"
            found.setdefault(label, row)
        return found

    def check_feedback(self, recorded: Mapping[str, Axes]) -> None:
        """Refuse feedback from what the run does not measure.

        Args:
            recorded: metrics of the run, and the axes of one member's values.

        Raises:
            ConfigError: names the setting.
        """
        for row in self.rows:
            if row.schedule.feedback is not None:
                row.schedule.feedback.check(row.writer, recorded)

    def pass_identity(self, number: int, members: bool = True) -> str:
        """What one pass does, as text: the donor whose weights it runs, and its interventions.

        Args:
            number: index of the pass in the plan.
            members: whether selected members count.
        """
        planned = self.passes[number]
        donor = None if planned.donor is None else self.donors[planned.donor]
        return identity((donor, [row.intervention for row in planned.rows]), members)

    def other_passes(self) -> list[str]:
        """What the passes beside the run's own are; runs with equal ones may be members of one run."""
        return [self.pass_identity(number) for number in range(len(self.passes) - 1)]

    def row_identities(self, members: bool = True) -> list[str]:
        """What every row does, as text: an intervention of another pass is the same only in the same pass.

        Args:
            members: whether selected members count.
        """
        found = []
        for number, planned in enumerate(self.passes):
            within = "" if planned is self.passes[-1] else self.pass_identity(number, members)
            found += [within + row.identity(members) for row in planned.rows]
        return found + [row.identity(members) for row in self.changes]

    def describe(self) -> list[dict[str, str]]:
        """One line per row, in order of application: what ``opsin sites`` prints."""
        lines = []
        for number, planned in enumerate(self.passes, 1):
            model = f" (of {self.donors[planned.donor].name})" if planned.donor is not None else ""
            lines += [self._describe(row, f"{number}{model}") for row in planned.rows]
        return lines + [row.change.describe(row.name) for row in self.changes]

    def _describe(self, row: PlannedIntervention, where: str) -> dict[str, str]:
        item = row.intervention
        sources = ", ".join(filter(None, (address.describe(self.supplies) for address in row.inputs)))
        return {
            "pass": where,
            "writer": row.name,
            "site": item.site,
            "selection": str(item.selection),
            "value": _shown(item.value) + (f" from {sources}" if sources else ""),
            "gradient": item.value.gradient,
            "schedule": str(item.schedule),
        }

    def digest(self) -> str:
        """A short hash of everything the plan says; equal plans have equal digests."""
        parts = (*(row.intervention for row in self.interventions), *(row.change for row in self.changes))
        return hashlib.sha256(identity(parts).encode()).hexdigest()[:16]


def _shown(value: Value) -> str:
    """A value without what its row says already, and without the passes it is taken from, which have their own."""
    settings = {f.name: getattr(value, f.name) for f in fields(value) if f.repr}  # type: ignore[arg-type]
    settings = {name: setting for name, setting in settings.items() if not isinstance(setting, (Source, Supply))}
    inside = ", ".join(f"{name}={setting!r}" for name, setting in settings.items())
    name = getattr(value, "identity_name", type(value).__name__)
    return f"{name}({inside})" if inside else name
