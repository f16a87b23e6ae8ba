"""Progress measures: what the loss would be under interventions that training does not have.

Legend: M members, S sets of interventions.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from opsin.callbacks.readers.base import ProbeReader
from opsin.callbacks.readers.phase_change import best_loss
from opsin.errors import ConfigError, log
from opsin.interventions.build_plan import Writer
from opsin.metrics.onset import find_transition
from opsin.metrics.phase_change import CHANGE_SHARE
from opsin.model.sites import SiteTable
from opsin.records.axes import Axes
from opsin.records.schema import BASE_LINE, TRAIN_LOSS
from opsin.task import Task
from opsin.training.objective import step_metrics
from opsin.training.observers import Observation
from opsin.training.progress_measures import MeasuredSets, build_measures, measure, measure_constants

SETS_FIELD = "ProgressMeasures.measures"


class ProgressMeasures(ProbeReader):
    """Evaluates the current weights on the probe under sets of interventions that training does not have.

    A measure is the loss of the model with some of its parts made perfect, or taken away: it falls when the
    other parts have formed, long before the loss itself may show it (progress measures of Nanda et al. 2023,
    "Progress measures for grokking via mechanistic interpretability", by the clamps of Singh et al. 2024,
    "What needs to go right for an induction head?"). Read-only: the weights are the same with and without it.

    Recorded and logged are, ``[M]`` each, ``progress/NAME/loss`` and what the objective measures while training (of
    classes ``progress/NAME/accuracy``), of every set and of the base line ``none``. The base line and the measures are
    those of the weights alone: interventions that training has do not act here. Random values are drawn as in the last
    step. At the end the module's summary receives under ``progress``, for one member a mapping and for several a list
    of them, for each NAME:

    - ``onset``: ``{"value", "low", "high"}`` in sequences, a 95 % interval: when the loss under the set left the
      task's plateau; None where it did not lastingly fall by a quarter of the way to the best loss (``PhaseChange``),
      or where one of the two is not known,
    - ``final_loss``: loss of the final weights, in the objective's unit.

    Cost: S sets and the base line are one forward pass, run eagerly on (S + 1) x M members, and one more
    such pass for each different pass that values of any set are taken from.

    Args:
        measures: writers of each set by its name, every one always in force. A set that changes no activation of the
            probe is named in a warning at the first measurement.
        every: optimizer steps between measurements; the first and the last state are always measured.

    Raises:
        ConfigError: no set or an empty one, a name that cannot stand in a metric's, or something that overwrites no
            activation; when training starts, a writer with a schedule, or with a tensor that it renews while
            training, whatever else a run with such writers would refuse, and a second ProgressMeasures.
    """

    def __init__(self, measures: dict[str, list[Callback]], every: int = 100) -> None:
        super().__init__(every)
        if not measures:
            raise ConfigError(SETS_FIELD, measures, "at least one name with a list of writers")
        self.measures = {name: _writers_of_set(name, callbacks) for name, callbacks in measures.items()}

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        return {_loss_metric(name): {} for name in (BASE_LINE, *self.measures)}

    def task_records(self, task: Task) -> dict[str, Axes]:
        measured = [metric.removeprefix("train/") for metric in step_metrics(task)[1:-1]]
        return {f"progress/{name}/{measure}": {} for name in (BASE_LINE, *self.measures) for measure in measured}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        module = self._module
        self._planned = build_measures(
            self.measures, module.sites, module.n_members, module.task.batch_size, SETS_FIELD
        )
        self._planned.plan.check_task(module.task)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._idle_checked = False
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the module's own constants are made between its two hooks
        self._constants = measure_constants(self._planned, self._module.constants)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = [self._member_summary(member) for member in range(self._module.n_members)]
        self.summarise("progress", rows)

    def measure(self, seen: Observation) -> None:
        module = self._module
        clock = module.gates.at(max(seen.step - 1, 0)).clock
        parameters = module.parameters_by_name()
        inputs = module.network, parameters, self._constants, seen.batch, clock
        found = measure(self._planned, *inputs, module.task.objective)
        values: dict[str, torch.Tensor] = {}
        for index, name in enumerate(self._planned.names):
            values[_loss_metric(name)] = found.loss[index]
            values |= {f"progress/{name}/{measure}": x[index] for measure, x in found.measures.items()}
        module.record(seen.step, values)
        if not self._idle_checked:
            self._warn_of_idle_sets(found, seen.step)

    def _warn_of_idle_sets(self, found: MeasuredSets, step: int) -> None:
        idle = self._planned.covers() & ~found.changed.cpu()
        for name, members in zip(self._planned.names, idle, strict=True):
            if members.any():
                where = f" of member {int(members.int().argmax())}" if len(members) > 1 else ""
                log.warning(
                    f"opsin: {SETS_FIELD}.{name}: changed no activation{where} on the probe after {step:,} steps"
                )
        self._idle_checked = True

    def _member_summary(self, member: int) -> dict[str, dict[str, Any]]:
        task, history = self._module.task, self._module.history
        plateau = task.plateau
        best = None if plateau is None else best_loss(task, TRAIN_LOSS, plateau)
        rows = {}
        for name in self._planned.names:
            steps, values = history[_loss_metric(name)].arrays()
            x, loss = history.sequences(steps), values[:, member]
            fall = None
            if plateau is not None and best is not None:
                least = CHANGE_SHARE * (plateau - best)
                fall = find_transition(x, loss, before=plateau, minimum_change=least, direction="fall")
            rows[name] = {"onset": fall and fall.onset.to_dict(), "final_loss": float(loss[-1])}
        return rows


def _loss_metric(name: str) -> str:
    return f"progress/{name}/loss"


def _writers_of_set(name: str, callbacks: list[Callback]) -> list[Writer]:
    """The writers of one set."""
    if name == BASE_LINE or not re.fullmatch(r"[\w.+-]+", name):
        expected = f"a name of letters, digits, '_', '.', '+' and '-', other than {BASE_LINE}, the base line"
        raise ConfigError(SETS_FIELD, name, expected)
    if not callbacks:
        raise ConfigError(f"{SETS_FIELD}.{name}", callbacks, "at least one writer")
    writers: list[Writer] = []
    for callback in callbacks:
        if not isinstance(callback, Writer):
            raise ConfigError(f"{SETS_FIELD}.{name}", type(callback).__name__, "callbacks that overwrite activations")
        writers.append(callback)
    return writers
