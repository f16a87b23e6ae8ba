"""Changes found by E. Page's cumulative sum ("Continuous inspection schemes", 1954), online and in a finished record.

A sample beyond a level adds to the sum and one before it takes away; the sum never falls below 0, and a change is one
that carries it to a limit. ``watch`` does so while a run goes on, sample by sample; ``first_lasting_fall`` in a record
that is complete. Neither gives an uncertainty: see ``opsin.metrics.onset``.

Legend: n points of a curve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Real

from opsin.metrics.onset import PlainRecord, lasting_samples


@dataclass(frozen=True)
class Watch(PlainRecord):
    """What ``watch`` remembers: floats and None, for a checkpoint; ``Watch(**state.to_dict())`` is the state."""

    last: float | None = None  # x of the last update
    excess: float = 0.0  # net number of updates beyond the level, from 0 to the patience
    since: float | None = None  # x of the first update of the present excess
    announced: float | None = None  # x that was announced


def watch(
    state: Watch, x: float, y: float, *, before: float, after: float, way: float = 0.5, patience: float = 10.0
) -> tuple[Watch, bool]:
    """One update of the online test for a change: causal, pure, a few floating-point operations.

    An update adds its distance beyond
    ``before + way * (after - before)``, between -1 and 1; the sum stops at 0 and announces at ``patience``.
    On the plateau every update pulls back, so a false alarm needs almost ``patience`` contrary samples in
    a row, and no spike weighs more than one; the delay after a sharp change is ``patience`` updates.

    Args:
        state: state that the last update returned; ``Watch()`` at the start.
        x: sequences seen, more than at the last update.
        y: value of the curve at x; one that is not finite is skipped.
        before, after: levels of the plateau and of a complete change, in units of y.
        way: share of the way from before to after that counts as changed, in (0, 1).
        patience: net number of updates beyond that level which announce a change, above 0.

    Returns:
        The new state, and True at the one update that announces. ``announced`` is then the x of the first
        update of the excess, for way = 0.5 the online estimate of ``Transition.midpoint``.

    Raises:
        ValueError: x does not ascend, before equals after, or way or patience is out of range.
    """
    if before == after or not 0 < way < 1 or patience <= 0:
        raise ValueError("watch: expected before != after, 0 < way < 1 and patience > 0")
    if state.last is not None and not x > state.last:
        raise ValueError(f"watch: x went from {state.last} to {x}, expected it to ascend")
    x, y = float(x), float(y)
    if not math.isfinite(y):
        return replace(state, last=x), False
    pull = (way - (y - before) / (after - before)) / min(way, 1 - way)
    excess = min(max(state.excess - min(max(pull, -1.0), 1.0), 0.0), patience)
    since = None if excess == 0.0 else x if state.since is None else state.since
    fires = state.announced is None and excess >= patience
    return Watch(x, excess, since, since if fires else state.announced), fires


def first_lasting_fall(x: Real[np.ndarray, " n"], y: Real[np.ndarray, " n"], below: float) -> float | None:
    """Where a curve first falls below a level to stay, whether or not it ever had a plateau.

    The samples below the level, less those above it, are counted from the first one below; the count never falls under
    0. The fall lasts when the count reaches ``LASTING_SHARE`` of the record, at least 3 samples; it happened at the
    first sample of that count.

    Args:
        x: sequences seen at each point, ascending.
        y: values of the curve; samples that are not finite are ignored.
        below: level that the curve falls below, in units of y.

    Returns:
        A number of sequences, or None where the curve did not lastingly fall within the record.
    """
    known = np.isfinite(y)
    x, y = x[known], y[known]
    total = np.concatenate([[0], np.cumsum(np.where(y < below, 1, -1))])
    least = np.minimum.accumulate(total)
    lasted = np.flatnonzero(total - least >= lasting_samples(len(y)))
    if not len(lasted):
        return None
    return float(x[np.flatnonzero(total[: lasted[0]] == least[: lasted[0]])[-1]])
