"""Closed loop: the strength of an intervention as a function of what the run has measured so far.

Legend: M members, S optimizer steps, C candidates (heads).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from jaxtyping import Bool, Float

from opsin.errors import ConfigError
from opsin.records.axes import Axes, find_number, sizes_in_words, split_number
from opsin.records.history import History, Series
from opsin.records.schema import ROW_AXES, number_name

T = TypeVar("T", bound=Any)
Mode = Literal["while", "start", "stop", "scale"]
PER_HEAD = ("own", "strongest")
HEAD = re.compile(r"\d+:\d+")
HEAD_AXES = ROW_AXES[1:]


@dataclass(frozen=True)
class Reading:
    """What a feedback made of the history at one step, for each member.

    Args:
        strength: strength of the intervention, in [0, 1].
        value: number in the record that it follows from; NaN before the first record.
        measured_at: steps finished when that was measured; NaN before the first record.
        beaten: with head ``strongest``: whether another head was stronger.
    """

    strength: Float[np.ndarray, " M"]
    value: Float[np.ndarray, " M"]
    measured_at: Float[np.ndarray, " M"]
    beaten: Bool[np.ndarray, " M"]

    def describe(self, metric: str, member: int) -> str:
        """The reading of one member, for people.

        Args:
            metric: name of the metric that is read.
            member: number of the member in the run.
        """
        strength, value, at = (values[member] for values in (self.strength, self.value, self.measured_at))
        was = "is not measured yet" if np.isnan(at) else f"was {value:.4g} after step {at:,.0f}"
        beaten = ", less than another head's" if self.beaten[member] else ""
        return f"strength {strength:.3g} from now on, as {metric} {was}{beaten}"


@dataclass(frozen=True)
class Feedback:
    """Strength from a tracked quantity: act when it is past a level.

    The strength at optimizer step k (the first step is 0) follows from the last record of the metric
    labelled with at most k finished steps, so from a measurement of weights that step k or an earlier
    one started from. It is a pure function of the records, for each member from its own, and the same
    after a resume. Before the first record it is 0, with mode ``stop`` 1. Window, ramps and pulses of
    the schedule multiply it.

    Whenever it changes, the run records the metrics ``feedback/WRITER/strength`` (this factor alone,
    without the window), ``feedback/WRITER/value`` and ``feedback/WRITER/measured_at`` (what it follows
    from, and the steps finished when that was measured), labelled with the step from which it holds, and
    announces an event of kind ``feedback`` when it leaves or reaches 0. With head ``own`` or
    ``strongest`` every head has its own, ``feedback/WRITER/LAYER:HEAD/strength``.

    Args:
        metric: what is read, named as in ``metrics.csv``: ``induction_strength``, ``train/loss``,
            ``val/SET/loss`` or anything else that the run records; ``METRIC/I:J`` for one number of a metric with
            further axes, by its indices.
        head: for a metric with one value per head: ``"layer:head"`` reads that head; ``own`` lets every
            head that the writer acts on follow its own value; ``strongest`` acts, among the heads that
            the writer acts on, on none but the one whose value is the largest in the same record (the
            first of equal ones), which may be another head at the next record. Else None.
        above: the condition: the value is more than this.
        below: or: the value is less than this; exactly one of the two.
        mode: ``while`` acts as long as the condition holds; ``start`` from the first record on in which
            it held (of a head that is ``strongest`` there); ``stop`` until that record; ``scale`` with a
            strength that grows linearly from 0 at the level to 1 at ``full``.
        full: mode ``scale``: the value from which the strength is 1, past the level.
    """

    metric: str
    head: str | None = None
    above: float | None = None
    below: float | None = None
    mode: Mode = "while"
    full: float | None = None

    def __post_init__(self) -> None:
        name = "schedule.feedback"
        if self.head is not None and self.head not in PER_HEAD and not HEAD.fullmatch(self.head):
            raise ConfigError(f"{name}.head", self.head, "'own', 'strongest' or a head as layer:head")
        if (self.above is None) == (self.below is None):
            levels = {"above": self.above, "below": self.below}
            raise ConfigError(name, levels, "above or below, and not both")
        if not math.isfinite(self.level):
            raise ConfigError(f"{name}.{self._side}", self.level, "a finite number")
        if self.mode not in get_args(Mode):
            raise ConfigError(f"{name}.mode", self.mode, f"one of {', '.join(get_args(Mode))}")
        self._check_full(f"{name}.full")

    def _check_full(self, name: str) -> None:
        if self.mode != "scale":
            if self.full is not None:
                raise ConfigError(name, self.full, f"nothing: mode {self.mode} has strength 0 and 1 only")
            return
        side = "more" if self.above is not None else "less"
        past = self.full is not None and math.isfinite(self.full) and (self.full - self.level) * self._sign > 0
        if not past:
            raise ConfigError(name, self.full, f"a finite number {side} than {self._side} = {self.level:g}")

    @property
    def _head_as_written(self) -> str | None:
        """Head as the user wrote it."""
        return self.head

    @property
    def level(self) -> float:
        """What the value must be past."""
        return self.below if self.above is None else self.above  # type: ignore[return-value]

    @property
    def _side(self) -> str:
        return "below" if self.above is None else "above"

    @property
    def _sign(self) -> int:
        return -1 if self.above is None else 1

    def check(self, writer: str, recorded: Mapping[str, Axes]) -> None:
        """Refuse what the run does not measure.

        Args:
            writer: name of the callback, for messages.
            recorded: metrics of the run, and the axes of one member's values.

        Raises:
            ConfigError: an unknown metric, a head for a metric that has none or the reverse, or no such head or index.
        """
        name = f"{writer}.schedule.feedback"
        if find_number(self.metric, recorded) is not None:
            if self.head is not None:
                expected = f"null: {self.metric} has one value per member"
                raise ConfigError(f"{name}.head", self._head_as_written, expected)
            return
        metric = self.metric if self.metric in recorded else split_number(self.metric)[0]
        if metric not in recorded:
            raise ConfigError(f"{name}.metric", self.metric, f"what this run records: {', '.join(recorded)}")
        if self.metric not in recorded or tuple(recorded[metric]) != HEAD_AXES:
            axes = recorded[metric]
            expected = f"{number_name(metric, (0,) * len(axes))} or so: one number by its {sizes_in_words(axes)}"
            raise ConfigError(f"{name}.metric", self.metric, expected if axes else f"{metric}, one value per member")
        self._check_head(name, tuple(recorded[metric].values()))

    def _check_head(self, name: str, shape: tuple[int, ...]) -> None:
        expected = f"layer:head with layer 0 to {shape[0] - 1} and head 0 to {shape[1] - 1}, own or strongest"
        if self.head is None or (self.head in PER_HEAD and not isinstance(self, HeadFeedback)):
            raise ConfigError(f"{name}.head", self.head, f"{expected}; the latter two where heads are selected")
        if any(index >= size for index, size in zip(_pair(self.head), shape, strict=True)):
            raise ConfigError(f"{name}.head", self.head, expected)

    # ---- what it makes of a history ---------------------------------------------------------------

    def strengths(self, first: int, count: int, members: int, history: History) -> Float[np.ndarray, "S M"]:
        """Strength at steps ``first .. first + count - 1``, from the records that the history holds now."""
        series = followed_series(self.metric, history)
        begin, end = (bisect_right(series.steps, step) for step in (first, first + count - 1))
        strengths = np.tile(self._strength(series, begin - 1, members), (count, 1))
        for index in range(begin, end):
            strengths[series.steps[index] - first :] = self._strength(series, index, members)
        return strengths

    def reading(self, step: int, members: int, history: History) -> Reading:
        """Strength at one step, and what it follows from."""
        series = followed_series(self.metric, history)
        index = bisect_right(series.steps, step) - 1
        strength = self._strength(series, index, members)
        if index < 0:
            unknown = np.full(members, np.nan)
            return Reading(strength, unknown, unknown, np.zeros(members, dtype=bool))
        values = series.values[index]
        measured_at = np.full(members, float(series.steps[index]))
        return Reading(strength, self._value(values), measured_at, ~self._chosen(values))

    def _strength(self, series: Series, index: int, members: int) -> Float[np.ndarray, " M"]:
        """Strength that follows from the record at ``index``; -1 stands before the first."""
        if index < 0:
            return np.full(members, float(self.mode == "stop"))
        if self.mode in ("start", "stop"):
            has_held = series.first(self.holds) <= series.steps[index]
            return (has_held == (self.mode == "start")).astype(float)
        values = series.values[index]
        if self.mode == "while":
            return self.holds(values).astype(float)
        assert self.full is not None
        share = (self._value(values) - self.level) / (self.full - self.level)
        # a value that is no number is past nothing
        return np.where(self._chosen(values) & (share > 0), np.minimum(share, 1.0), 0.0)

    def holds(self, values: Float[np.ndarray, "M ..."]) -> Bool[np.ndarray, " M"]:
        """In which members a record fulfils the condition."""
        return self._chosen(values) & (self._sign * (self._value(values) - self.level) > 0)

    def _value(self, values: Float[np.ndarray, "M ..."]) -> Float[np.ndarray, " M"]:
        # a metric with one number a member may be called as if it were one of many
        index: tuple[Any, ...] = (slice(None), *self._index[: values.ndim - 1])
        return values[index].astype(np.float64)

    @cached_property
    def _index(self) -> tuple[int, ...]:
        """Index of the number that is read among those of a member."""
        return split_number(self.metric)[1] if self.head is None else _pair(self.head)

    def _chosen(self, values: Float[np.ndarray, "M ..."]) -> Bool[np.ndarray, " M"]:
        """In which members this head is the one that may act."""
        return np.ones(len(values), dtype=bool)

    def __str__(self) -> str:
        past = f"{self._side} {self.level:g}"
        full = "" if self.full is None else f" 0 at {self.level:g} and 1 at {self.full:g}"
        return {
            "while": f"while {self._subject} is {past}",
            "start": f"from when {self._subject} is {past}",
            "stop": f"until {self._subject} is {past}",
            "scale": f"in proportion to {self._subject},{full}",
        }[self.mode]

    @property
    def _subject(self) -> str:
        of = {None: "", "own": " of the head itself", "strongest": " of the strongest head"}
        return self.metric + of.get(self.head, f" of head {self.head}")


@dataclass(frozen=True)
class HeadFeedback(Feedback):
    """A feedback with head ``own`` or ``strongest``, as one head that the writer acts on follows it.

    Args:
        rivals: with ``strongest`` all heads that the writer acts on, this one among them; else none.
    """

    rivals: tuple[str, ...] = ()

    def _chosen(self, values: Float[np.ndarray, "M ..."]) -> Bool[np.ndarray, " M"]:
        if not self.rivals:
            return super()._chosen(values)
        candidates: Float[np.ndarray, "M C"] = np.stack([values[:, i, j] for i, j in map(_pair, self.rivals)], 1)
        strongest = np.where(np.isnan(candidates), -np.inf, candidates).argmax(1)
        return strongest == self.rivals.index(str(self.head))

    @property
    def _head_as_written(self) -> str:
        return "strongest" if self.rivals else "own"

    @property
    def _subject(self) -> str:
        return super()._subject + (f", as the strongest of {len(self.rivals)}," if self.rivals else "")


def followed_series(metric: str, history: History) -> Series:
    """The records of what is followed; none before the first.

    Args:
        metric: name of a metric, or of one number of it, ``METRIC/I:J``.
        history: what the run has measured so far.
    """
    name = metric if metric in history else split_number(metric)[0]
    return history[name] if name in history else Series()


def _pair(head: str) -> tuple[int, int]:
    layer, index = head.split(":")
    return int(layer), int(index)


def by_head(items: Sequence[T], layer_of: Callable[[T], int | None]) -> list[T]:
    """What one writer asks for, with one item for each head where the feedback goes by the head.

    Args:
        items: interventions, or changes of weights.
        layer_of: the block that an item acts in.

    Raises:
        ConfigError: feedback that goes by the head, and no heads selected.
    """
    chosen = [(item, _chosen_heads(item, layer_of(item))) for item in items]
    rivals: dict[Feedback, set[str]] = defaultdict(set)
    for item, heads in chosen:
        rivals[item.schedule.feedback].update(heads)
    return [part for item, heads in chosen for part in (_follow(item, heads, rivals) if heads else [item])]


def _chosen_heads(item: Any, layer: int | None) -> dict[str, int]:
    """Names and numbers of the heads that go by their own values; none where the feedback is another, or none."""
    feedback, heads = item.schedule.feedback, item.selection.heads
    if feedback is None or feedback.head not in PER_HEAD:
        return {}
    if heads is None:
        expected = "a head as layer:head: this writer acts on something that is no selection of heads"
        raise ConfigError(f"{item.writer}.schedule.feedback.head", feedback.head, expected)
    return {f"{layer}:{head}": head for head in heads}


def _follow(item: Any, heads: Mapping[str, int], rivals: Mapping[Feedback, set[str]]) -> list[Any]:
    """One item for each head, each with a feedback of its own."""
    feedback = item.schedule.feedback
    shared = {field.name: getattr(feedback, field.name) for field in fields(feedback)}
    competing = tuple(sorted(rivals[feedback], key=_pair)) if feedback.head == "strongest" else ()
    return [
        replace(
            item,
            selection=replace(item.selection, heads=(head,)),
            schedule=replace(item.schedule, feedback=HeadFeedback(**shared | {"head": name}, rivals=competing)),
        )
        for name, head in heads.items()
    ]
