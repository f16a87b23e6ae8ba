"""How far a model's predictions are from those of the predictors that its task knows, over training.

Legend: M members, B batch, Q scored positions, V outputs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from opsin.callbacks.readers.base import ProbeReader, Requirement
from opsin.errors import ConfigError
from opsin.model.sites import SiteTable
from opsin.objective import entry_mean
from opsin.records.axes import Axes
from opsin.task import Task
from opsin.training.module import OpsinModule
from opsin.training.objective import scored_logits
from opsin.training.observers import Observation


class ReferenceDistance(ProbeReader):
    """Measures on the probe how far the model's outputs are from those of the task's references.

    Which predictor a model is nearest to says what it computes: chance, a bigram, least squares, Bayes' rule; and the
    order in which it nears them says how it came there (Akyürek et al. 2022, "What learning algorithm is in-context
    learning?"). The distance is the objective's: the Kullback-Leibler divergence of classes (nats), the squared
    difference of numbers. Read-only, under the interventions in force.

    Recorded and logged are, ``[M]`` each, ``reference/NAME/DISTANCE`` for every reference NAME of the task, where
    DISTANCE is ``kl`` or ``squared_distance``: the mean over scored positions by the batch's weights. At the end the
    module's summary receives under ``references`` the loss of each reference on the probe, ``loss``, and the model's
    final distance from it, for several members as a list.

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
        references: names of the references that are compared; all of the task when None.

    Raises:
        ConfigError: fewer than one step; when training starts, a task without references or without one of these names,
            or an objective without a distance.
    """

    def __init__(self, every: int = 100, references: list[str] | None = None) -> None:
        super().__init__(every)
        if references == []:
            raise ConfigError("ReferenceDistance.references", [], "names of references, or null for all of the task")
        self.references = references
        self._predicted: dict[str, Tensor] = {}

    def sites(self, table: SiteTable) -> list[str]:
        return ["hook_logits"]

    def requirements(self) -> list[Requirement]:
        def without_distance(module: OpsinModule) -> str | None:
            objective = module.task.objective
            return None if objective.distance_name else type(objective).__name__

        def without_references(module: OpsinModule) -> str | None:
            return None if module.task.references() else type(module.task).__name__

        return [
            Requirement("ReferenceDistance", without_references, "a task with references"),
            Requirement("ReferenceDistance", without_distance, "an objective with a distance"),
        ]

    def check(self, module: OpsinModule) -> None:
        task, known = module.task, module.task.references()
        few = task.batch(0, 0, "eval/train", 2)
        shape = [1, 2, len(task.layout.scored), task.n_outputs]
        for name in self._names(task):
            if name not in known:
                expected = f"references of {type(task).__name__}: {', '.join(known)}"
                raise ConfigError("ReferenceDistance.references", name, expected)
            if (found := list(known[name](few).shape)) != shape:
                expected = f"{shape}, one output of a model for every scored position"
                raise ConfigError(f"{type(task).__name__}.references.{name}", f"shape {found}", expected)

    def task_records(self, task: Task) -> dict[str, Axes]:
        return {_metric(task, name): {} for name in self._names(task)}

    def _names(self, task: Task) -> list[str]:
        return list(task.references()) if self.references is None else self.references

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._predicted = {}
        super().on_fit_start(trainer, pl_module)

    def measure(self, seen: Observation) -> None:
        task, batch = self._module.task, seen.batch
        outputs = scored_logits(seen.activations["hook_logits"], batch)
        found = {}
        for name in self._names(task):
            distance = task.objective.distance(outputs, self._prediction(name))
            found[_metric(task, name)] = entry_mean(distance, batch)
        self._module.record(seen.step, found)

    def _prediction(self, name: str) -> Float[Tensor, "M B Q V"]:
        """What a reference says of the probe; equal at every step, as the probe is fixed."""
        if name not in self._predicted:
            with torch.no_grad():
                self._predicted[name] = self._module.task.references()[name](self._module.probe)
        return self._predicted[name]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, rows = self._module, []
        for member in range(module.n_members):
            rows.append({name: self._row(name, member) for name in self._names(module.task)})
        self.summarise("references", rows)

    def _row(self, name: str, member: int) -> dict[str, float | None]:
        """Loss of one reference on the probe, and one member's final distance from it."""
        module, task = self._module, self._module.task
        loss = float(task.objective.member_loss(self._prediction(name), module.probe)[member])
        metric = _metric(task, name)
        distance = float(module.history[metric].values[-1][member])
        finite = {"loss": loss, str(task.objective.distance_name): distance}
        return {key: value if abs(value) < float("inf") else None for key, value in finite.items()}


def _metric(task: Task, name: str) -> str:
    return f"reference/{name}/{task.objective.distance_name}"
