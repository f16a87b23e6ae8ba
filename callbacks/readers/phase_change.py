"""When the phase change happened: in the loss and in every head, announced while training and written to the run.

Legend: M members, n records of a metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer

from opsin.callbacks.readers.base import Reader
from opsin.callbacks.readers.heads import InductionHeads
from opsin.errors import ConfigError
from opsin.interventions.selection import check_share
from opsin.metrics.cusum import Watch, watch
from opsin.metrics.onset import Transition, find_transition
from opsin.records.schema import TRAIN_LOSS
from opsin.task import EXACT, Task
from opsin.training.module import OpsinModule
from opsin.training.observers import Event

PHASE_CHANGE = "phase change"
"""Kind of the announced events."""

LEAVING_SHARE = 0.1
"""Share of the way from the plateau to the best loss at which the loss has left the plateau."""

CHANGE_SHARE = 0.25
"""Share of that way which makes a fall a phase change and not a drift, while training and at the end."""

FINAL_SHARE = 0.05
"""Share of the record whose mean is the final loss."""

BEST_LOSS_SEQUENCES = 128
"""Sequences over which the best loss is measured."""


class PhaseChange(Reader):
    """Onset, midpoint and end of the loss drop and of each head's rise, each with an uncertainty.

    While training, the first lasting fall of a member's loss by a quarter of the way from the plateau to the best loss
    (that of the task's exact predictor, the objective's lowest where it has none) is announced as an ``Event`` of kind
    ``"phase change"``. At the end of training the module's summary receives, for one member at its top and for several
    as a list under ``members``:

    - ``onset``, ``midpoint``, ``end``: ``{"value", "low", "high"}`` in sequences, 95 % intervals; None
      where the loss did not lastingly change,
    - ``plateau``, ``final_loss``: in the objective's unit; the latter the mean of the last 5 % of the record,
    - ``heads``: for each ``"layer:head"`` its final induction ``strength`` and, if it formed,
      ``onset``, ``midpoint`` and ``end`` of its rise; None if it did not. Empty without ``InductionHeads``,
    - ``strongest_heads``: heads that formed, strongest first,
    - ``evaluations``: last value of every metric of each evaluation set.

    Args:
        metric: loss in which the change is looked for: ``train/loss``, or ``val/SET/loss`` of an evaluation set.
        plateau: loss before the change; None takes the task's best strategy without look-up.
        head_threshold: final induction strength from which a head counts as formed.

    Raises:
        ConfigError: a value out of its range or, when training starts, a metric that is no loss of the run.
    """

    def __init__(self, metric: str = TRAIN_LOSS, plateau: float | None = None, head_threshold: float = 0.3) -> None:
        if plateau is not None and not math.isfinite(plateau):
            raise ConfigError("PhaseChange.plateau", plateau, "a finite loss, or null")
        check_share("PhaseChange.head_threshold", head_threshold)
        if head_threshold == 0:
            raise ConfigError("PhaseChange.head_threshold", head_threshold, "more than 0")
        self.metric, self.plateau, self.head_threshold = metric, plateau, head_threshold
        self._forget(0)

    def _forget(self, members: int) -> None:
        self._records_read = 0
        # two tests of each member: when it left the plateau, and whether that grew into a change
        self._leaving, self._passing = [Watch()] * members, [Watch()] * members

    @property
    def state_key(self) -> str:
        return self._generate_state_key(metric=self.metric, plateau=self.plateau, head_threshold=self.head_threshold)

    def state_dict(self) -> dict[str, Any]:
        return {
            "taken": self._records_read,
            "leaving": [state.to_dict() for state in self._leaving],
            "passing": [state.to_dict() for state in self._passing],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._records_read = state_dict["taken"]
        self._leaving = [Watch(**state) for state in state_dict["leaving"]]
        self._passing = [Watch(**state) for state in state_dict["passing"]]

    def member_state(self, state: dict[str, Any], member: int) -> dict[str, Any]:
        """The state of a run that has this member alone."""
        return {**state, **{name: [state[name][member]] for name in ("leaving", "passing")}}

    def check(self, module: OpsinModule) -> None:
        losses = [TRAIN_LOSS, *(f"val/{name}/loss" for name in module.task.evaluations)]
        if self.metric not in losses:
            raise ConfigError("PhaseChange.metric", self.metric, "one of " + ", ".join(losses))
        _check_levels(module.task, self.metric, self.plateau)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            task = self._module.task
            level = task.plateau if self.plateau is None else self.plateau
            assert level is not None
            best = best_loss(task, self.metric, level)
            assert best is not None
            self._level, self._best = level, best
            self._forget(self._module.n_members)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._read_new_records(self._module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = self._module
        self._read_new_records(module)
        rows = [self._member_summary(module, member) for member in range(module.n_members)]
        module.summary.update(rows[0] if module.n_members == 1 else {"members": rows})

    # ---- while training -------------------------------------------------------------------------

    def _read_new_records(self, module: OpsinModule) -> None:
        if self.metric not in module.history:
            return
        series = module.history[self.metric]
        for index in range(self._records_read, len(series.steps)):
            # counted as read before it is announced: a handler may save a checkpoint
            self._records_read = index + 1
            for member, loss in enumerate(series.values[index].tolist()):
                if math.isfinite(loss):
                    self._update(module, member, series.steps[index], loss)

    def _update(self, module: OpsinModule, member: int, step: int, loss: float) -> None:
        x = float(step * module.history.batch_size)
        levels = {"before": self._level, "after": self._best}
        self._leaving[member], _ = watch(self._leaving[member], x, loss, way=LEAVING_SHARE, **levels)
        self._passing[member], fires = watch(self._passing[member], x, loss, way=CHANGE_SHARE, **levels)
        if fires:
            # a sample beyond the further way is beyond the nearer one, so that test is in excess, too
            where = f" in member {member}" if module.n_members > 1 else ""
            left = f"the loss left its plateau at about {self._leaving[member].since:,.0f} sequences"
            message = f"{PHASE_CHANGE}{where}: {left}"
            module.announce(Event(PHASE_CHANGE, step, member, f"{message} (noticed at {x:,.0f})"))

    # ---- at the end -------------------------------------------------------------------------------

    def _member_summary(self, module: OpsinModule, member: int) -> dict[str, Any]:
        x, loss = _curve(module, self.metric, (member,))
        least = CHANGE_SHARE * (self._level - self._best)
        change = find_transition(x, loss, before=self._level, minimum_change=least, direction="fall")
        heads = self._heads(module, member)
        formed = [name for name, head in heads.items() if head["strength"] >= self.head_threshold]
        last = max(1, math.ceil(FINAL_SHARE * len(loss)))
        return {
            **module.ended.get(member, {}),
            **_transition_times(change),
            "plateau": float(self._level),
            "final_loss": float(loss[-last:].mean()) if len(loss) else None,
            "heads": heads,
            "strongest_heads": sorted(formed, key=lambda name: -heads[name]["strength"]),
            "evaluations": _last_evaluations(module, member),
        }

    def _heads(self, module: OpsinModule, member: int) -> dict[str, dict[str, Any]]:
        if InductionHeads.metric not in module.history:
            return {}
        _, layers, heads = module.history[InductionHeads.metric].values[-1].shape
        return {
            f"{layer}:{head}": self._head(*_curve(module, InductionHeads.metric, (member, layer, head)))
            for layer in range(layers)
            for head in range(heads)
        }

    def _head(self, x: np.ndarray, strength: np.ndarray) -> dict[str, Any]:
        # half the threshold: a head is not untrained at exactly 0, so one that just formed rose by less
        least = 0.5 * self.head_threshold
        formed = strength[-1] >= self.head_threshold
        rise = find_transition(x, strength, minimum_change=least, direction="rise") if formed else None
        return {"strength": float(strength[-1]), **_transition_times(rise)}


def best_loss(task: Task, metric: str, plateau: float) -> float | None:
    """Loss of the best predictor the task knows, on the sequences of a metric; the objective's lowest without one.

    Also the lowest where the best is not below the plateau, for example on a set that the predictor was not made for.
    None where there is no lowest either.

    Args:
        task: task whose exact predictor is asked.
        metric: ``train/loss``, or ``val/SET/loss`` of an evaluation set.
        plateau: loss before the phase change, in the objective's unit.
    """
    name = metric.split("/")[1] if metric.startswith("val/") else "train"
    batch = task.batch(0, 0, f"eval/{name}", BEST_LOSS_SEQUENCES)
    exact = task.exact(batch)
    if exact is None:
        return task.objective.lowest
    loss = float(task.objective.member_loss(exact, batch))
    return loss if loss < plateau else task.objective.lowest


def _check_levels(task: Task, metric: str, chosen: float | None) -> None:
    """Refuse a plateau that there is none of, or that nothing lies below."""
    level, lowest, name = task.plateau if chosen is None else chosen, task.objective.lowest, type(task).__name__
    if level is None:
        raise ConfigError("PhaseChange.plateau", None, f"a loss: {name} names no baselines")
    if lowest is not None and level <= lowest:
        no_plateau = ": this task needs no look-up, so that its loss has no plateau of its own"
        expected = f"a loss above {lowest:g}" + (no_plateau if chosen is None else ", or null")
        raise ConfigError("PhaseChange.plateau", chosen, expected)
    if best_loss(task, metric, level) is None:
        expected = f"a task with a reference {EXACT!r} below the plateau: this loss has no lower bound"
        raise ConfigError("PhaseChange", f"{name} with {type(task.objective).__name__}", expected)


def _curve(module: OpsinModule, metric: str, index: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Sequences seen and values ``[n]`` of one member or head; empty if the metric was never recorded."""
    if metric not in module.history:
        return np.zeros(0), np.zeros(0)
    steps, values = module.history[metric].arrays()
    curve = np.moveaxis(values, 0, -1)[index]
    # a member that has ended has no numbers after its end
    known = np.isfinite(curve)
    return module.history.sequences(steps)[known], curve[known]


def _transition_times(change: Transition | None) -> dict[str, Mapping[str, float] | None]:
    names = ("onset", "midpoint", "end")
    return {name: None if change is None else getattr(change, name).to_dict() for name in names}


def _last_evaluations(module: OpsinModule, member: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name in module.task.evaluations:
        start = f"val/{name}/"
        for key in module.history.names():
            if key.startswith(start):
                found.setdefault(name, {})[key.removeprefix(start)] = float(module.history[key].values[-1][member])
    return found
