"""Whether the change of a curve was a phase change: what level it left, whether it had stayed there, how it ended.

``onset.find_transition`` locates a change between two levels. A smooth descent has one as well, since it passes every
level. A *phase change* leaves a plateau that was held: the curve stayed within ``LEAVING_SHARE`` of the way around the
level for at least ``HELD_FACTOR`` times as long as a straight line through it, as fast as the curve from there on,
would have. The level is the one that is named, if it was held; else that of a plateau of the curve itself.

Legend: N samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Real

from opsin.metrics.onset import (
    CREDIBLE_ERRORS,
    MOST_SAMPLES,
    WAYS,
    Direction,
    PlainRecord,
    Transition,
    averaged,
    find_transition,
    lasting_samples,
    level_and_error,
    monotone,
)

LEAVING_SHARE = WAYS[0]
"""Share of the way from the plateau to the best level at which a curve has left the plateau."""

CHANGE_SHARE = 0.25
"""Share of that way which makes a change a phase change and not a drift, while training and at the end."""

HELD_FACTOR = 1.5
"""Times as long as a straight line that a curve stays near a level which counts as held."""

FEWEST_HELD = 5
"""Samples that a stay has at least; fewer look level by chance."""

TREND_ERRORS = 4.0
"""Standard errors of its slope from which the last tenth of a curve counts as a trend."""

TREND_SHARE = 0.02
"""Share of the curve's range over which a trend carries it in that time, at least."""

STAY_SHARE = 0.35
"""Share of the time of a change that the curve spends near one level where the change has two steps."""

OWN_REACH = 0.35
"""Share of the way within which samples count to the level that a curve left."""

FEWEST_SCANNED = 32
"""Samples of the shortest beginning of a record that is searched for an early change."""

Verdict = Literal["phase change", "smooth", "not by the end"]
Trend = Literal["falling", "rising", "level"]


@dataclass(frozen=True)
class CurveReading(PlainRecord):
    """What a curve did.

    Args:
        verdict: a change that left a held plateau, one that left none, or no lasting change within the record.
        change: the change between the two levels; None without a phase change.
        steps: the changes that it consists of, in order: one, or several with plateaus between them.
        plateau: level that was left, in units of the curve; None where none was held.
        final: median of the last tenth of the record; None without samples.
        trend: whether the curve goes on changing at its end.
        direction: sign of the change, or of what there was of one.
    """

    verdict: Verdict
    change: Transition | None
    steps: tuple[Transition, ...]
    plateau: float | None
    final: float | None
    trend: Trend
    direction: Direction

    def to_dict(self) -> dict[str, Any]:
        """As nested dictionaries and lists of plain Python scalars."""
        return {**super().to_dict(), "steps": [step.to_dict() for step in self.steps]}


def read_curve(
    x: Real[np.ndarray, " N"],
    y: Real[np.ndarray, " _"],
    *,
    named: float | None = None,
    best: float | None = None,
    direction: Direction | None = None,
    n_bootstrap: int = 200,
) -> CurveReading:
    """What a curve did by the end of its record.

    Args:
        x: sequences seen ``[N]``, strictly ascending.
        y: values of the curve ``[N]``; samples that are not finite are ignored.
        named: level that the curve is expected to leave; None leaves it to the curve.
        best: level of a complete change: one counts from ``CHANGE_SHARE`` of the way there. None takes that share of
            the curve's range.
        direction: sign that the change must have; None for any.
        n_bootstrap: replicates of the bootstrap from which intervals come; 0 leaves the sampling resolution.

    Raises:
        ValueError: x and y differ in length, or x does not ascend.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if not len(y):
        return CurveReading("not by the end", None, (), None, None, "level", direction or "fall")
    final, trend = level_and_error(y[-2 * lasting_samples(len(y)) :])[0], _trend(x, y)
    smooth: Transition | None = None
    for change, last, estimated in _possible_changes(x, y, named, best, direction, n_bootstrap):
        if was_held(x[:last], y[:last], change, estimated):
            steps = _steps(x[:last], y[:last], change, n_bootstrap)
            return CurveReading("phase change", change, steps, change.before, final, trend, _way(change))
        smooth = smooth or change
    if smooth is not None:
        return CurveReading("smooth", None, (), None, final, trend, _way(smooth))
    way: Direction = "fall" if np.median(y[:3]) > final else "rise"
    verdict: Verdict = "not by the end"
    if named is None and direction in (None, way) and _began_elsewhere(y, final):
        verdict = "smooth"
    return CurveReading(verdict, None, (), None, final, trend, direction or way)


def _way(change: Transition) -> Direction:
    return "fall" if change.after < change.before else "rise"


def _began_elsewhere(y: np.ndarray, final: float) -> bool:
    """Whether a curve begins far from where it ends, although no change between two levels was found."""
    noise = 1.4826 * float(np.median(np.abs(np.diff(y)))) / math.sqrt(2) if len(y) > 1 else math.inf
    return abs(float(np.median(y[:3])) - final) >= max(0.5 * float(np.ptp(y)), CREDIBLE_ERRORS * noise)


def _possible_changes(
    x: np.ndarray,
    y: np.ndarray,
    named: float | None,
    best: float | None,
    direction: Direction | None,
    n_bootstrap: int,
) -> Iterator[tuple[Transition, int, bool]]:
    """Changes that may be it, how many samples they were found in, and whether their level is the curve's own."""
    n = len(y)
    least = max(CHANGE_SHARE * float(np.subtract(*np.quantile(y, [0.98, 0.02]))), 1e-12)
    if named is not None:
        smallest = least if best is None else CHANGE_SHARE * abs(named - best)
        change = find_transition(
            x, y, before=named, minimum_change=smallest, direction=direction, n_bootstrap=n_bootstrap
        )
        if change is not None:
            yield change, n, False
    last, change = n, None
    # a change early in a long record is seen only in a beginning of it
    while change is None and (last == n or (named is None and last >= FEWEST_SCANNED)):
        change = _from_own_level(x[:last], y[:last], least, direction, n_bootstrap)
        if change is not None and _goes_far(change, named, best):
            yield change, last, True
        last //= 2


def _goes_far(change: Transition, named: float | None, best: float | None) -> bool:
    """Whether a change passes the named level, not merely reaches it, and makes enough of the way to the best."""
    way = change.after - change.before
    passes = named is None or (change.after - named) / way > LEAVING_SHARE
    return passes and (best is None or abs(way) >= CHANGE_SHARE * abs(best - change.before))


def _from_own_level(
    x: np.ndarray, y: np.ndarray, least: float, direction: Direction | None, n_bootstrap: int
) -> Transition | None:
    """The change from the level that the curve itself was near before it."""
    rough = find_transition(x, y, minimum_change=least, direction=direction, n_bootstrap=0)
    if rough is None:
        return None
    level, error, reach = rough.before, 0.0, OWN_REACH * abs(rough.after - rough.before)
    # the most frequent level of a noisy curve is not the middle of its noise
    for _ in range(3):
        near = y[(x < rough.midpoint.value) & (np.abs(y - level) <= reach)]
        level, error = level_and_error(near) if len(near) > 2 else (level, error)
    return find_transition(
        x,
        y,
        before=level,
        before_error=error,
        minimum_change=least,
        direction=direction,
        n_bootstrap=n_bootstrap,
    )


def was_held(
    x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], change: Transition, own_level: bool = False
) -> bool:
    """Whether a curve stayed on the plateau that a change left.

    Args:
        x: training sequences seen at each sample.
        y: values of the curve.
        change: the change, as ``find_transition`` returned it for this curve.
        own_level: whether the level was estimated from the curve, which must then have stayed there lastingly.
    """
    duration = change.midpoint.value - change.onset.value
    fewest = max(FEWEST_HELD, lasting_samples(min(len(x), MOST_SAMPLES)) if own_level else 0)
    return stayed(x, y, (change.before, change.after), change.onset.value, duration, WAYS[1], fewest)


def stayed(
    x: Real[np.ndarray, " N"],
    y: Real[np.ndarray, " N"],
    levels: tuple[float, float],
    left: float,
    duration: float,
    way: float,
    fewest: int = FEWEST_HELD,
) -> bool:
    """Whether a curve was near a level for longer than one that merely passes it.

    Args:
        x: training sequences seen at each sample.
        y: values of the curve.
        levels: the level, and that of a complete change.
        left: x at which the level was left, ``LEAVING_SHARE`` of the way.
        duration: sequences from there to the further share of the way.
        way: that further share, above ``LEAVING_SHARE``.
        fewest: samples (of at most 400, into which longer records are averaged) that a stay has at least.
    """
    before, after = levels
    x, z = averaged(np.asarray(x, dtype=np.float64), (y.astype(np.float64) - before) / (after - before))
    until = int(np.searchsorted(x, left, side="right"))
    if until < fewest:
        return False
    # clipped, so that what lies far off weighs no more than anything else
    z = np.clip(z[:until], -2 * LEAVING_SHARE, 2 * LEAVING_SHARE)
    means, sizes = monotone(z)
    near = np.abs(np.repeat(means, sizes)) <= LEAVING_SHARE
    if near.sum() < fewest:
        return False
    spent = float(np.diff(x[:until], prepend=2 * x[0] - x[1])[near].sum())
    speed = (way - LEAVING_SHARE) / duration if duration > 0 else math.inf
    return spent >= HELD_FACTOR * 2 * LEAVING_SHARE / speed and _steepest(x[:until][near], z[near]) <= speed / 2


def _steepest(x: np.ndarray, z: np.ndarray) -> float:
    """Slope of a straight line through the samples, plus two standard errors."""
    slope, error = _slope(x, z)
    return slope + 2 * error


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope of a straight line and its standard error, widened for noise that is correlated from sample to sample."""
    centred = x - x.mean()
    power = float(centred @ centred)
    slope = float(centred @ y) / power
    residual = y - y.mean() - slope * centred
    square = float(residual @ residual)
    correlation = min(max(float(residual[1:] @ residual[:-1]) / square, 0.0), 0.9) if square > 0 else 0.0
    variance = square / max(len(x) - 2, 1) / power * (1 + correlation) / (1 - correlation)
    return slope, math.sqrt(variance)


def _trend(x: np.ndarray, y: np.ndarray) -> Trend:
    """Whether the last tenth of the record has a credible slope that matters."""
    size = 2 * lasting_samples(len(y))
    if len(y) < 2 * size:
        return "level"
    late, values = averaged(x[-size:], y[-size:])
    slope, error = _slope(late, values)
    travelled = abs(slope) * float(late[-1] - late[0])
    if abs(slope) < TREND_ERRORS * error or travelled < TREND_SHARE * float(np.ptp(y)):
        return "level"
    return "falling" if slope < 0 else "rising"


def _steps(x: np.ndarray, y: np.ndarray, change: Transition, n_bootstrap: int) -> tuple[Transition, ...]:
    """The change itself, or the changes before and after each plateau on its way."""
    split = _stay_between(x, y, change)
    if split is None:
        return (change,)
    where, level = split
    least = LEAVING_SHARE * abs(change.after - change.before)
    early, late = (x[:where], y[:where]), (x[where:], y[where:])
    first = find_transition(*early, before=change.before, minimum_change=least, n_bootstrap=n_bootstrap)
    second = find_transition(*late, before=level, after=change.after, minimum_change=least, n_bootstrap=n_bootstrap)
    if first is None or second is None:
        return (change,)
    return _steps(*early, first, n_bootstrap) + _steps(*late, second, n_bootstrap)


def _stay_between(x: np.ndarray, y: np.ndarray, change: Transition) -> tuple[int, float] | None:
    """Sample in the middle of a stay on the way of a change, and its level; None where there is none."""
    inside = np.flatnonzero((x >= change.onset.value) & (x <= change.end.value))
    if len(inside) < lasting_samples(len(x)):
        return None
    times, values = x[inside], y[inside]
    z = (values - change.before) / (change.after - change.before)
    means, sizes = monotone(z)
    fit = np.repeat(means, sizes)
    grid = np.linspace(0.2, 0.8, 25)
    near = np.abs(fit - grid[:, None]) <= 0.05
    spent = (near * np.diff(times, prepend=times[0])).sum(1)
    best = int(spent.argmax())
    stay = inside[near[best]]
    if spent[best] < STAY_SHARE * (times[-1] - times[0]) or len(stay) < lasting_samples(len(x)):
        return None
    return int(stay[len(stay) // 2]), float(np.median(y[stay]))
