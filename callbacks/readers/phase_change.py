"""Whether and when there was a phase change: in the loss, other measures and every head, announced while training.

Legend: M members, n records of a metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from lightning.pytorch import LightningModule, Trainer

from opsin.callbacks.readers.base import Reader
from opsin.callbacks.readers.heads import InductionHeads
from opsin.errors import ConfigError
from opsin.interventions.selection import check_share
from opsin.metrics.cusum import Watch, watch
from opsin.metrics.onset import Direction, Transition, find_transition
from opsin.metrics.phase_change import CHANGE_SHARE, LEAVING_SHARE, CurveReading, read_curve, stayed
from opsin.records.axes import find_number, number_names
from opsin.records.schema import TRAIN_LOSS
from opsin.task import Task
from opsin.training.module import OpsinModule, callbacks_of
from opsin.training.monitors import nearest_metric
from opsin.training.observers import Event, recorded_metrics

PHASE_CHANGE = "phase change"
"""Kind of the announced events."""

FINAL_SHARE = 0.05
"""Share of the record whose mean is the final loss."""

BEST_LOSS_SEQUENCES = 128
"""Sequences over which the best loss is measured where a set has no fixed size."""

RECORDS_GROW_BY = 1.05
"""Growth of the record, as a factor, after which a curve without a named level is looked at again."""

FEWEST_LOOKED_AT = 20
"""Records of the first such look."""


@dataclass(frozen=True)
class WatchedMeasure:
    """A recorded number in whose curve a change is looked for.

    Args:
        name: metric as in ``metrics.csv``, with ``/LAYER:HEAD`` after that of a head, ``/I:J`` by whatever axes it has.
        metric: name of the metric without the index.
        index: layer and head, or the index along other axes; empty for a metric with one number a member.
        direction: sign of the change; None for either.
        level: level that the curve should leave, in its unit; None leaves it to the curve.
        best: level of a complete change; None where none is known.
    """

    name: str
    metric: str
    index: tuple[int, ...]
    direction: Direction | None
    level: float | None
    best: float | None

    def read(self, x: np.ndarray, y: np.ndarray, n_bootstrap: int = 200) -> CurveReading:
        """What the curve of one member did.

        Args:
            x: training sequences seen at each record.
            y: values of the member's curve.
            n_bootstrap: replicates from which the intervals come.
        """
        levels = {"named": self.level, "best": self.best}
        return read_curve(x, y, **levels, direction=self.direction, n_bootstrap=n_bootstrap)


@dataclass
class _Follower:
    """How far a measure has been read, and what is remembered of each member.

    Two tests of each member: when it left the named level, and whether that grew into a change.
    """

    leaving: list[Watch]
    passing: list[Watch]
    announced: list[bool]
    records_read: int = 0

    @classmethod
    def of(cls, members: int) -> _Follower:
        return cls([Watch()] * members, [Watch()] * members, [False] * members)

    def to_dict(self) -> dict[str, Any]:
        return {
            "taken": self.records_read,
            "leaving": [state.to_dict() for state in self.leaving],
            "passing": [state.to_dict() for state in self.passing],
            "announced": list(self.announced),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> _Follower:
        passing = [Watch(**state) for state in saved["passing"]]
        # a checkpoint of an earlier version announced whatever passed
        announced = saved.get("announced", [state.announced is not None for state in passing])
        return cls([Watch(**state) for state in saved["leaving"]], passing, list(announced), saved["taken"])


class PhaseChange(Reader):
    """Onset, midpoint and end of a phase change in any recorded measure, with uncertainties, or what there was instead.

    A phase change leaves a plateau that was held; a smooth descent, which passes every level, is none
    (``opsin.metrics.phase_change``). The level is the task's best strategy without look-up, or ``plateau``; where the
    curve stayed on another level than that, or none is named, it is the curve's own. While training, a member's first
    lasting change by a quarter of the way (to the best loss: that of the task's exact predictor, the objective's lowest
    where it has none; without either, of the range of the curve) is announced as an ``Event`` of kind
    ``"phase change"``. At the end of training the module's summary receives, for one member at its top and for several
    as a list under ``members``:

    - ``onset``, ``midpoint``, ``end``: ``{"value", "low", "high"}`` in sequences, 95 % intervals of this run's curve,
      which say nothing of other seeds; None without a phase change,
    - ``plateau``, ``final_loss``: in the objective's unit; the latter the mean of the last 5 % of the record (of the
      training loss where ``metric`` is no loss),
    - ``changes``: for each measure its ``verdict`` (``phase change``, ``smooth``, ``not by the end``), ``trend`` at the
      end (``falling``, ``rising``, ``level``), ``final`` level, ``plateau``, ``direction``, ``change`` and its
      ``steps``: one, or several with plateaus between them,
    - ``delays``: for each measure of ``beside`` that changed, midpoint less that of ``metric`` in ``sequences``, and
      their ``ratio``,
    - ``heads``: for each ``"layer:head"`` its final induction ``strength`` and, if it formed,
      ``onset``, ``midpoint`` and ``end`` of its rise; None if it did not. Empty without ``InductionHeads``,
    - ``strongest_heads``: heads that formed, strongest first,
    - ``evaluations``: last value of every metric of each evaluation set.

    Args:
        metric: measure in which the change is looked for, as in ``metrics.csv``; ``METRIC/LAYER:HEAD`` for a head,
            ``METRIC/I:J`` for one number of a metric with other axes.
        plateau: level before the change, in the measure's unit; None takes the task's best strategy without look-up.
        head_threshold: final induction strength from which a head counts as formed.
        direction: whether ``metric`` falls or rises; None takes that in which the objective's measures improve, and
            either for what the objective does not know.
        beside: further measures, whose changes are looked for in the same way and compared with that of ``metric``.

    Raises:
        ConfigError: a value out of its range or, when training starts, a measure that the run does not record.
    """

    def __init__(
        self,
        metric: str = TRAIN_LOSS,
        plateau: float | None = None,
        head_threshold: float = 0.3,
        direction: Direction | None = None,
        beside: list[str] | None = None,
    ) -> None:
        if plateau is not None and not math.isfinite(plateau):
            raise ConfigError("PhaseChange.plateau", plateau, "a finite level, or null")
        check_share("PhaseChange.head_threshold", head_threshold)
        if head_threshold == 0:
            raise ConfigError("PhaseChange.head_threshold", head_threshold, "more than 0")
        if direction not in (None, *get_args(Direction)):
            raise ConfigError("PhaseChange.direction", direction, "fall, rise, or null")
        self.metric, self.plateau, self.head_threshold, self.direction = metric, plateau, head_threshold, direction
        self.beside = list(beside or ())
        for index, name in enumerate(self.beside):
            if name in [metric, *self.beside[:index]]:
                raise ConfigError("PhaseChange.beside", name, "a measure that is not watched already")
        self._followers: dict[str, _Follower] = {}

    @property
    def state_key(self) -> str:
        chosen = {"direction": self.direction, "beside": self.beside}
        further = {name: value for name, value in chosen.items() if value}
        settings = {"metric": self.metric, "plateau": self.plateau, "head_threshold": self.head_threshold}
        return self._generate_state_key(**settings, **further)

    def state_dict(self) -> dict[str, Any]:
        states = {name: follower.to_dict() for name, follower in self._followers.items()}
        return {**states.pop(self.metric), **({"beside": states} if states else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = {self.metric: state_dict, **state_dict.get("beside", {})}
        self._followers = {name: _Follower.from_dict(state) for name, state in states.items()}

    def member_state(self, state: dict[str, Any], member: int) -> dict[str, Any]:
        """The state of a run that has this member alone."""
        lists = {name: [values[member]] for name, values in state.items() if isinstance(values, list)}
        beside = {name: self.member_state(row, member) for name, row in state.get("beside", {}).items()}
        return {**state, **lists, **({"beside": beside} if beside else {})}

    def check(self, module: OpsinModule) -> None:
        self._measures = self._watched(module)

    def _watched(self, module: OpsinModule) -> list[WatchedMeasure]:
        recorded = recorded_metrics(self._callbacks, module.sites, module.task, validates=True)
        found = []
        for name in (self.metric, *self.beside):
            number = find_number(name, recorded)
            if number is None:
                field = "metric" if name == self.metric else "beside"
                raise ConfigError(f"PhaseChange.{field}", name, nearest_metric(name, number_names(recorded)))
            main = name == self.metric
            chosen = (self.plateau, self.direction) if main else (None, None)
            found.append(_measure(module.task, name, *number, *chosen))
        return found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._callbacks = callbacks_of(trainer)
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            members = self._module.n_members
            self._followers = {measure.name: _Follower.of(members) for measure in self._measures}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._read_new_records(self._module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = self._module
        self._read_new_records(module)
        rows = [self._member_summary(module, member) for member in range(module.n_members)]
        module.summary.update(rows[0] if module.n_members == 1 else {"members": rows})

    # ---- while training -------------------------------------------------------------------------

    def _read_new_records(self, module: OpsinModule) -> None:
        for measure in self._measures:
            if measure.metric in module.history:
                self._follow(module, measure, self._followers[measure.name])

    def _follow(self, module: OpsinModule, measure: WatchedMeasure, follower: _Follower) -> None:
        series = module.history[measure.metric]
        for row in range(follower.records_read, len(series.steps)):
            # counted as read before it is announced: a handler may save a checkpoint
            follower.records_read = row + 1
            for member, value in enumerate(np.moveaxis(series.values[row], 0, -1)[measure.index].tolist()):
                if math.isfinite(value) and not follower.announced[member]:
                    left = _left_at(module, measure, follower, member, row, value)
                    if left is not None:
                        follower.announced[member] = True
                        _announce(module, measure, member, series.steps[row], left)

    # ---- at the end -------------------------------------------------------------------------------

    def _member_summary(self, module: OpsinModule, member: int) -> dict[str, Any]:
        watched = self._measures
        readings = [item.read(*_curve(module, item.metric, (member, *item.index))) for item in watched]
        (main, reading), is_loss = (watched[0], readings[0]), _is_loss(watched[0].metric)
        _, loss = _curve(module, main.metric if is_loss else TRAIN_LOSS, (member,))
        plateau = main.level if reading.plateau is None else reading.plateau
        heads = self._heads(module, member)
        formed = [name for name, head in heads.items() if head["strength"] >= self.head_threshold]
        last = max(1, math.ceil(FINAL_SHARE * len(loss)))
        return {
            **module.ended.get(member, {}),
            **_transition_times(reading.change),
            "plateau": float(plateau) if is_loss and plateau is not None else None,
            "final_loss": float(loss[-last:].mean()) if len(loss) else None,
            "changes": {item.name: found.to_dict() for item, found in zip(watched, readings, strict=True)},
            "delays": _delays(watched, readings),
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


# ---- measures -----------------------------------------------------------------------------------------


def _is_loss(metric: str) -> bool:
    return metric.rpartition("/")[2] == "loss"


def _measure(
    task: Task, name: str, metric: str, index: tuple[int, ...], plateau: float | None, direction: Direction | None
) -> WatchedMeasure:
    """What is known of a measure: its direction, the level it should leave, and the best there is."""
    if not _is_loss(metric):
        return WatchedMeasure(name, metric, index, direction or _improves(task, metric), plateau, None)
    lowest = task.objective.lowest
    if plateau is not None and lowest is not None and plateau <= lowest and direction != "rise":
        raise ConfigError("PhaseChange.plateau", plateau, f"a loss above {lowest:g}, or null")
    level = task.plateau if plateau is None else plateau
    if level is not None and lowest is not None and level <= lowest:
        level = None
    known = level is not None and direction != "rise"
    best = best_loss(task, metric, level) if known and level is not None else None
    return WatchedMeasure(name, metric, index, direction or "fall", level, best)


def _improves(task: Task, metric: str) -> Direction | None:
    """Direction in which a measure of the objective improves; None for what is none."""
    name = metric.rpartition("/")[2]
    ways: dict[str, Direction] = {"up": "rise", "down": "fall"}
    return next((ways[measure.better] for measure in task.objective.measures if measure.name == name), None)


def _left_at(
    module: OpsinModule, measure: WatchedMeasure, follower: _Follower, member: int, row: int, value: float
) -> float | None:
    """Sequences after which a held plateau was left, where the newest record says that one was; else None."""
    x = float(module.history[measure.metric].steps[row] * module.history.batch_size)
    if measure.level is not None and measure.best is not None and follower.passing[member].announced is None:
        levels = {"before": measure.level, "after": measure.best}
        follower.leaving[member], _ = watch(follower.leaving[member], x, value, way=LEAVING_SHARE, **levels)
        follower.passing[member], fires = watch(follower.passing[member], x, value, way=CHANGE_SHARE, **levels)
        return _left_named_level(module, measure, follower, member, row) if fires else None
    # no level to compare each record with: the curve is read whole, ever more rarely
    if not _is_looked_at(row + 1):
        return None
    reading = measure.read(*_curve(module, measure.metric, (member, *measure.index), row + 1), n_bootstrap=0)
    return None if reading.change is None else reading.change.onset.value


def _left_named_level(
    module: OpsinModule, measure: WatchedMeasure, follower: _Follower, member: int, row: int
) -> float | None:
    # a sample beyond the further way is beyond the nearer one, so that both tests are in excess
    left, passed = follower.leaving[member].since, follower.passing[member].since
    assert measure.level is not None and measure.best is not None and left is not None and passed is not None
    curve = _curve(module, measure.metric, (member, *measure.index), row + 1)
    return left if stayed(*curve, (measure.level, measure.best), left, passed - left, CHANGE_SHARE) else None


def _is_looked_at(count: int) -> bool:
    """Whether a curve of so many records is read whole; the same however records come."""
    looks = math.floor(math.log(count) / math.log(RECORDS_GROW_BY))
    before = math.floor(math.log(max(count - 1, 1)) / math.log(RECORDS_GROW_BY))
    return count >= FEWEST_LOOKED_AT and looks > before


def _announce(module: OpsinModule, measure: WatchedMeasure, member: int, step: int, left: float) -> None:
    where = f" in member {member}" if module.n_members > 1 else ""
    curve = "the loss" if _is_loss(measure.metric) else measure.name
    noticed = f"{float(step * module.history.batch_size):,.0f}"
    message = f"{PHASE_CHANGE}{where}: {curve} left its plateau at about {left:,.0f} sequences (noticed at {noticed})"
    module.announce(Event(PHASE_CHANGE, step, member, message))


def _delays(measures: Sequence[WatchedMeasure], readings: Sequence[CurveReading]) -> dict[str, dict[str, float]]:
    """Midpoint of every further change against that of the first measure."""
    first, found = readings[0].change, {}
    for measure, reading in zip(measures[1:], readings[1:], strict=True):
        if first is not None and reading.change is not None:
            now, then = reading.change.midpoint.value, first.midpoint.value
            found[measure.name] = {"sequences": now - then, "ratio": now / then}
    return found


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
    batch = task.batch(0, 0, f"eval/{name}", task.set_size(f"eval/{name}") or BEST_LOSS_SEQUENCES)
    exact = task.exact(batch)
    if exact is None:
        return task.objective.lowest
    loss = float(task.objective.member_loss(exact, batch))
    return loss if loss < plateau else task.objective.lowest


def _curve(
    module: OpsinModule, metric: str, index: tuple[int, ...], count: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences seen and the first values ``[n]`` of one member or head; empty if the metric was never recorded."""
    if metric not in module.history:
        return np.zeros(0), np.zeros(0)
    steps, values = module.history[metric].arrays()
    steps, curve = steps[:count], np.moveaxis(values, 0, -1)[index][:count]
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
