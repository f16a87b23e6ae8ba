"""Which algorithm a model of in-context regression has: how far it is from every predictor, and when that changes.

Legend: M members, B batch, Q numbers of examples, C contexts, K queries of one context, d entries of an input,
R references.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from PIL.Image import Image
from torch import Tensor

from opsin.callbacks.readers.base import ProbeReader, Requirement, check_count
from opsin.callbacks.readers.run_folder import run_folder
from opsin.errors import ConfigError, log
from opsin.figures.in_context import Drawn, in_context_figure
from opsin.figures.style import as_image, save_figure
from opsin.metrics.compare import mean_interval
from opsin.metrics.in_context import (
    change_step,
    implicit_weights,
    linearity,
    phases,
    prediction_distance,
    weight_distance,
)
from opsin.model.sites import SiteTable
from opsin.records.axes import Axes
from opsin.task import Batch, Task
from opsin.training.module import OpsinModule
from opsin.training.objective import scored_logits
from opsin.training.observers import Observation
from opsin.training.probe import PROBE_SEED

PREFIX = "algorithm"
"""First part of the names of what is recorded."""

LEAST_SQUARES = "least_squares"
"""The reference whose expected error is infinite after some numbers of examples, where there is noise."""


@runtime_checkable
class InContextRegression(Protocol):
    """A task in which y is predicted from x and the examples (x, y) before it, at every number of examples.

    The last of its references is the best.

    Attributes:
        dimensions: d, entries of an input.
        examples: largest number of examples before a query.
    """

    dimensions: int
    examples: int

    @property
    def unbounded(self) -> tuple[int, ...]:
        """Numbers of examples after which the expected error of least squares is infinite."""

    def with_queries(self, batch: Batch, count: int, x: Float[Tensor, "K d"]) -> Batch:
        """Every context of a batch with each of K inputs as the query after ``count`` examples."""


class InContextAlgorithm(ProbeReader):
    """Measures which of the task's references a model of in-context regression predicts like, and when that changes.

    After Akyürek et al. 2022, "What learning algorithm is in-context learning?". On the probe, under the interventions
    in force, for every number of examples 0 .. n before the query (the axis ``examples``) and every reference NAME:

    - ``algorithm/error``: mean squared error over d;
    - ``algorithm/NAME/distance_by_examples``: squared prediction distance over d, and ``algorithm/NAME/distance``, its
      mean over the numbers of examples from 1 on. Of a task with noise those after which the expected error of least
      squares is infinite (d - 1, d, d + 1) enter no mean, and least squares is the nearest at none of them;
    - ``algorithm/nearest_by_examples``: number, from 0, of the reference that is nearest; ``algorithm/nearest``: the
      same by the mean distance. References are numbered in the order of ``references`` in the summary;
    - ``algorithm/NAME/weight_distance``: squared distance over d of the weights that model and reference imply by their
      answers to ``queries`` inputs after each of the first ``contexts`` of the probe;
    - ``algorithm/linearity``: share of the answers' squared size that these weights explain;
    - ``algorithm/change``: step from which on the model stays nearer to ``after`` than to ``before``, as it is known
      until then, between two measurements; not a number where the last measurement is not nearer, or none was nearer
      to ``before``. In a population ``compare: [algorithm/change]`` gives its mean over seeds and its differences.

    At the end the module's summary receives under ``algorithm`` the mean step of the change with its 95 % interval over
    the members (Student's), and of every member the step, the nearest reference over training, the nearest for every
    number of examples, and ``r_squared``, 1 less the distance from ``after`` over the mean square of its predictions,
    after all examples. ``in_context_algorithm.png`` in the run folder shows it; W&B has it too.

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
        before: reference that the model is expected to leave.
        after: reference that the model is expected to near; the task's best, which is its last, when None.
        contexts: sequences of the probe, the first ones, in which implied weights are fitted.
        queries: inputs that a context is asked about for that, more than the d entries of one.

    Raises:
        ConfigError: a number out of its range; when training starts, a task without in-context regression, or without
            these references.
    """

    name = "in_context_algorithm"

    def __init__(
        self,
        every: int = 100,
        before: str = "gradient_step",
        after: str | None = None,
        contexts: int = 8,
        queries: int = 16,
    ) -> None:
        super().__init__(every)
        self.before, self.after = before, after
        self.contexts = check_count("InContextAlgorithm.contexts", contexts, "sequence of the probe")
        self.queries = check_count("InContextAlgorithm.queries", queries, "input")

    # ---- what it needs and records --------------------------------------------------------------

    def sites(self, table: SiteTable) -> list[str]:
        return ["hook_logits"]

    def requirements(self) -> list[Requirement]:
        def lacking(module: OpsinModule) -> str | None:
            return None if isinstance(module.task, InContextRegression) else type(module.task).__name__

        expected = "a task of in-context regression, such as LinearRegression"
        return [Requirement("InContextAlgorithm", lacking, expected)]

    def check(self, module: OpsinModule) -> None:
        task, known = _regression(module.task), module.task.references()
        for setting, name in (("before", self.before), ("after", self._after(module.task))):
            if name not in known:
                raise ConfigError(f"InContextAlgorithm.{setting}", name, f"one of the task's: {', '.join(known)}")
        if self.before == self._after(module.task):
            raise ConfigError("InContextAlgorithm.before", self.before, "another reference than the one after it")
        if self.queries <= task.dimensions:
            expected = f"more than the {task.dimensions} entries of an input"
            raise ConfigError("InContextAlgorithm.queries", self.queries, expected)
        if self.contexts > module.probe_size:
            expected = f"at most the probe's sequences, model.probe_size {module.probe_size}"
            raise ConfigError("InContextAlgorithm.contexts", self.contexts, expected)
        if not _averaged_lengths(task):
            expected = f"more than {task.examples}: with noise the error of least squares is infinite after all of them"
            raise ConfigError(f"{type(module.task).__name__}.examples", task.examples, expected)

    def task_records(self, task: Task) -> dict[str, Axes]:
        by_examples = {"examples": _regression(task).examples + 1}
        found: dict[str, Axes] = {f"{PREFIX}/error": by_examples, f"{PREFIX}/linearity": by_examples}
        for name in task.references():
            found[f"{PREFIX}/{name}/distance_by_examples"] = by_examples
            found[f"{PREFIX}/{name}/weight_distance"] = by_examples
            found[f"{PREFIX}/{name}/distance"] = {}
        found[f"{PREFIX}/nearest_by_examples"] = by_examples
        return found | {f"{PREFIX}/nearest": {}, f"{PREFIX}/change": {}}

    def _after(self, task: Task) -> str:
        return list(task.references())[-1] if self.after is None else self.after

    # ---- measuring ------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = self._module
        self._folder = run_folder(trainer)
        self._predicted: dict[str, Tensor] = {}
        self._reference_weights: list[dict[str, Tensor]] = []
        if skipped := _regression(module.task).unbounded:
            counts = ", ".join(map(str, skipped))
            log.warning(f"opsin: least squares is no axis after {counts} examples: noise makes its error infinite")
        super().on_fit_start(trainer, pl_module)

    def measure(self, seen: Observation) -> None:
        task, step = _regression(self._module.task), seen.step
        outputs = scored_logits(seen.activations["hook_logits"], seen.batch)
        found = {f"{PREFIX}/error": prediction_distance(outputs, seen.batch.targets, task.dimensions)}
        distances = {
            name: prediction_distance(outputs, known, task.dimensions)
            for name, known in self._predictions(seen.batch).items()
        }
        means = {name: distance[:, _averaged_lengths(task)].mean(1) for name, distance in distances.items()}
        found |= {f"{PREFIX}/{name}/distance_by_examples": distance for name, distance in distances.items()}
        found |= {f"{PREFIX}/{name}/distance": mean for name, mean in means.items()}
        found[f"{PREFIX}/nearest"] = _nearest(torch.stack([*means.values()], -1))
        found[f"{PREFIX}/nearest_by_examples"] = _nearest(_with_bounds(task, distances))
        self._module.record(step, found | self._implied(seen.batch))
        self._module.record(step, {f"{PREFIX}/change": torch.tensor(self._changes())})

    def _predictions(self, batch: Batch) -> dict[str, Float[Tensor, "_ B Q 1"]]:
        """What every reference says of the probe; equal at every step and for every member, as the probe is."""
        if not self._predicted:
            one = _of_one_member(batch)
            self._predicted = {name: predict(one) for name, predict in self._module.task.references().items()}
        return self._predicted

    # ---- implied weights ------------------------------------------------------------------------

    def _implied(self, batch: Batch) -> dict[str, Float[Tensor, "M Q"]]:
        """Distances of the weights that model and references imply, and how linear the model is, by examples."""
        task = _regression(self._module.task)
        contexts = batch.map(lambda tensor: tensor[:, : self.contexts])
        x = _further_inputs(self._module.task, self.queries, contexts)
        names = list(self._module.task.references())
        rows: dict[str, list[Tensor]] = {name: [] for name in [*names, "linearity"]}
        for count in range(task.examples + 1):
            shown = task.with_queries(contexts, count, x)
            outputs = scored_logits(self._module.observe(shown, ["hook_logits"])["hook_logits"], shown)
            answers = self._by_context(outputs, count)
            weights = implicit_weights(answers, x)
            rows["linearity"].append(linearity(answers, x, weights))
            for name, known in self._implied_by_references(shown, count, x).items():
                rows[name].append(weight_distance(weights, known))
        found = {f"{PREFIX}/{name}/weight_distance": torch.stack(rows[name], 1) for name in names}
        return found | {f"{PREFIX}/linearity": torch.stack(rows["linearity"], 1)}

    def _implied_by_references(
        self, shown: Batch, count: int, x: Float[Tensor, "K d"]
    ) -> dict[str, Float[Tensor, "1 C d"]]:
        """Weights that every reference implies; equal at every step."""
        if count == len(self._reference_weights):
            one = _of_one_member(shown)
            predicted = {name: predict(one) for name, predict in self._module.task.references().items()}
            found = {name: implicit_weights(self._by_context(y, count), x) for name, y in predicted.items()}
            self._reference_weights.append(found)
        return self._reference_weights[count]

    def _by_context(self, outputs: Float[Tensor, "M B Q 1"], count: int) -> Float[Tensor, "M C K"]:
        """Answers to the query after so many examples."""
        return outputs[:, :, count, 0].unflatten(1, (self.contexts, self.queries))

    # ---- what came of it ------------------------------------------------------------------------

    def _changes(self) -> list[float]:
        """Step of the change of every member, as far as it is known."""
        steps, before = self._module.history[f"{PREFIX}/{self.before}/distance"].arrays()
        _, after = self._module.history[f"{PREFIX}/{self._after(self._module.task)}/distance"].arrays()
        return [change_step(steps, before[:, m], after[:, m]) for m in range(self._module.n_members)]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._module.summary[PREFIX] = self._summary()
        figure = in_context_figure(self._module.history, self._drawn())
        save_figure(figure, self._folder / f"{self.name}.png")

    def _summary(self) -> dict[str, Any]:
        module, names = self._module, list(self._module.task.references())
        changes = self._changes()
        series = [module.history[f"{PREFIX}/{name}/distance"].arrays() for name in names]
        distances = np.stack([values for _, values in series], -1)  # n M R
        by_examples = module.history[f"{PREFIX}/nearest_by_examples"].values[-1]
        r_squared = self._r_squared()
        members = [
            {
                "change": _number_or_none(change),
                "r_squared": _number_or_none(r_squared[member]),
                "nearest": [[names[number], step] for number, step in phases(series[0][0], distances[:, member])],
                "nearest_by_examples": [
                    None if math.isnan(index) else names[int(index)] for index in by_examples[member]
                ],
            }
            for member, change in enumerate(changes)
        ]
        mean = asdict(mean_interval(changes, 0.0))
        pair = {"before": self.before, "after": self._after(module.task)}
        return {"references": names, **pair, "change": mean, "members": members}

    def _r_squared(self) -> list[float]:
        """Share of the better reference's predictions after all examples that every member explains."""
        name, task = self._after(self._module.task), _regression(self._module.task)
        known = self._predictions(self._module.probe)[name]
        size = prediction_distance(known, torch.zeros_like(known), task.dimensions)[0, -1]
        distance = self._module.history[f"{PREFIX}/{name}/distance_by_examples"].values[-1][:, -1]
        return (1 - distance / float(size)).tolist()

    def _drawn(self, member: int | None = None) -> Drawn:
        """What the figure shows beside the records: of one member, or of all."""
        task, batch = self._module.task, _of_one_member(self._module.probe)
        compared, scale = _averaged_lengths(_regression(task)), _regression(task).dimensions
        errors = {
            name: float(prediction_distance(known, batch.targets, scale)[:, compared].mean())
            for name, known in self._predictions(self._module.probe).items()
        }
        chosen = slice(None) if member is None else slice(member, member + 1)
        return Drawn(errors, compared, mean_interval(self._changes()[chosen], 0.0), chosen)

    def picture(self, member: int) -> Image | None:
        """One member's figure; None before anything is measured."""
        if f"{PREFIX}/error" not in self._module.history:
            return None
        return as_image(in_context_figure(self._module.history, self._drawn(member)))


def _number_or_none(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _regression(task: Task) -> InContextRegression:
    assert isinstance(task, InContextRegression)
    return task


def _averaged_lengths(task: InContextRegression) -> list[int]:
    """Numbers of examples that enter means: from 1 on, and all predictors have a finite error."""
    return [count for count in range(1, task.examples + 1) if count not in task.unbounded]


def _of_one_member(batch: Batch) -> Batch:
    """The first member's part of a batch that is the same for all."""
    return batch.map(lambda tensor: tensor[:1])


def _with_bounds(task: InContextRegression, distances: dict[str, Tensor]) -> Float[Tensor, "M Q R"]:
    """All distances, infinite where the error of least squares is."""
    found = torch.stack([*distances.values()], -1)
    if LEAST_SQUARES in distances:
        found[:, list(task.unbounded), list(distances).index(LEAST_SQUARES)] = torch.inf
    return found


def _nearest(distances: Float[Tensor, "*s R"]) -> Float[Tensor, "*s"]:
    """Number of the nearest reference; no number where a distance is none."""
    return distances.argmin(-1).double().where(~distances.isnan().any(-1), torch.nan)


def _further_inputs(task: Task, count: int, like: Batch) -> Float[Tensor, "K d"]:
    """Inputs that no context of the probe holds, the same at every step."""
    further = task.batch(PROBE_SEED, 1, "eval/train", count)
    assert further.features is not None and like.features is not None
    return further.features[0, :, 0, 1:].to(like.features)
