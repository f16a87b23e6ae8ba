"""When something formed: the last lasting change of a finished curve, located with an uncertainty.

Curves are pairs (x, y): x counts the training sequences seen, y is a loss or the strength of a
head. Everything works on the *progress* z = (y - before) / (after - before), from 0 to 1 for both a
fall and a rise.

**Crossing.** A curve crosses the way ``a`` (0.1 onset, 0.5 midpoint, 0.9 end) where the sum of
``clip((a - z) / h, -1, 1)`` over the samples so far is greatest, h = min(a, 1 - a): the split with the
least time on the wrong side. That is exactly where the monotone regression of z under Huber's loss
passes ``a`` (switch relation: P. Groeneboom, "Estimating a monotone density", 1985): no smoothing
window smears a sharp onset, and a spike weighs no more than any other sample.

**Last lasting.** Time is counted in samples; a stay on one side lasts when it outweighs ``LASTING_SHARE`` of the
record. The midpoint is the last crossing that separates two lasting stays; the onset is the last such
crossing of its way before it, the end the last after it.

Legend: N samples, W samples or bins in the window of the change, P pools, R replicates.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, Real

Direction = Literal["fall", "rise"]

WAYS = (0.1, 0.5, 0.9)  # shares of the way from before to after: onset, midpoint, end
LASTING_SHARE = 0.05  # share of the record that a stay must outweigh to count as lasting
FEWEST_SAMPLES = 8  # fewer samples than this say nothing
MOST_SAMPLES = 400  # longer series are averaged into so many bins: first the record, then the window of the change
RESIDUAL_SCALE = 1.2  # a monotone fit follows correlated noise: residuals by so much larger cover the truth (tests)
CREDIBLE_ERRORS = 5.0  # a change must exceed so many standard errors of the difference of its levels


@dataclass(frozen=True)
class PlainRecord:
    """A record of numbers that becomes a dictionary, for JSON and checkpoints."""

    def to_dict(self) -> dict[str, Any]:
        """As nested dictionaries of plain Python scalars."""
        return asdict(self)


@dataclass(frozen=True)
class Estimate(PlainRecord):
    """A number of sequences, ``low <= value <= high``."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Transition(PlainRecord):
    """One lasting change: where 10, 50 and 90 % of the way between two levels (units of y) are crossed."""

    onset: Estimate
    midpoint: Estimate
    end: Estimate
    before: float
    after: float


def find_transition(
    x: Real[np.ndarray, " N"],
    y: Real[np.ndarray, " _"],
    *,
    before: float | None = None,
    before_error: float = 0.0,
    after: float | None = None,
    minimum_change: float,
    direction: Direction | None = None,
    n_bootstrap: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Transition | None:
    """The last lasting change of a curve, or None where there is no credible one.

    Args:
        x: sequences seen ``[N]``, strictly ascending, any spacing.
        y: values of the curve ``[N]``; samples that are not finite are ignored.
        before: level before the change (a task's plateau). None estimates it: of the levels near which
            the curve spent ``LASTING_SHARE`` of the record, twice as long as near some level between it and the final
            one, that of the greatest time x distance from the final; else the median of the first ``LASTING_SHARE``.
        before_error: standard error of ``before``, in units of y; 0 where the level is exact.
        after: level of a complete change. None, or one towards which the curve made less than 90 % of the way,
            means the curve's own final level, the median of the last 2 ``LASTING_SHARE``.
        minimum_change: smallest ``|after - before|`` that counts, above 0, in units of y.
        direction: sign that the change must have; None for any.
        n_bootstrap: R, replicates of the moving-block bootstrap (H. Kuensch, 1989); 0 leaves only the sampling
            resolution.
        level: coverage of the intervals, in (0, 1).
        seed: seed of the replicates, at least 0; an equal seed gives equal intervals.

    Returns:
        onset <= midpoint <= end, no interval narrower than the gap between the samples (or bins) around it. None:
        fewer than ``FEWEST_SAMPLES`` finite samples, or the change is below ``minimum_change`` or ``CREDIBLE_ERRORS``
        standard errors, of the wrong sign, or did not last.

    Raises:
        ValueError: x and y differ in length, x does not ascend, or an argument is out of range.
    """
    if minimum_change <= 0 or n_bootstrap < 0 or seed < 0 or not 0 < level < 1:
        raise ValueError("onset: expected minimum_change > 0, n_bootstrap >= 0, seed >= 0 and 0 < level < 1")
    x, y = _finite(x, y)
    known = None if before is None else (before, before_error)
    levels = _levels(averaged(x, y)[1], known, after, minimum_change, direction) if len(x) >= FEWEST_SAMPLES else None
    if levels is None:
        return None
    (start, final), errors = levels
    rng = np.random.Generator(np.random.Philox(seed))
    drawn = rng.standard_normal((n_bootstrap, 2)) * errors / (final - start)
    estimates = _locate(x, (y - start) / (final - start), drawn, rng, level)
    return None if estimates is None else Transition(*estimates, start, final)


def _locate(
    x: np.ndarray, z: np.ndarray, drawn: Float[np.ndarray, "R 2"], rng: np.random.Generator, level: float
) -> tuple[Estimate, Estimate, Estimate] | None:
    """The three crossings, given replicated errors of the two levels; None if the change did not last."""
    coarse = averaged(x, z)[1]
    window = _window(coarse)
    if window is None:
        return None
    first, last, end_from = (i * len(x) // len(coarse) for i in window)  # from bins to samples
    fine, z = averaged(x[first:last], z[first:last])
    x, low = fine, int(np.searchsorted(fine, x[end_from]))
    values, gaps = _three_crossings(x, z[None], np.zeros((1, 3)), low)
    shifts = drawn @ np.array([[1 - way for way in WAYS], WAYS])  # an error of a level moves a way by its share
    replicates, _ = _three_crossings(x, _replicates(z, len(drawn), rng), shifts, low)
    onset, midpoint, end = (_estimate(x, values[0, i], int(gaps[0, i]), replicates[:, i], level) for i in range(3))
    return onset, midpoint, end


def monotone(y: Float[np.ndarray, " N"]) -> tuple[Float[np.ndarray, " P"], Int[np.ndarray, " P"]]:
    """Means (ascending) and sizes of the pools of the least-squares monotone fit (R. Barlow et al., 1972), O(N)."""
    means: list[float] = []
    sizes: list[int] = []
    for value in y.tolist():
        size = 1
        while means and means[-1] >= value:
            left = sizes.pop()
            value = (value * size + means.pop() * left) / (size + left)
            size += left
        means.append(value)
        sizes.append(size)
    return np.array(means), np.array(sizes)


def averaged(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most ``MOST_SAMPLES`` runs of neighbouring samples, equally long to within one."""
    if len(x) <= MOST_SAMPLES:
        return x, y
    edges = np.linspace(0, len(x), MOST_SAMPLES + 1).astype(int)
    counts = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / counts, np.add.reduceat(y, edges[:-1]) / counts


def _finite(x: Real[np.ndarray, " N"], y: Real[np.ndarray, " _"]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"onset: x has shape {x.shape}, y {y.shape}, expected one length")
    if not (np.isfinite(x).all() and (np.diff(x) > 0).all()):
        raise ValueError("onset: x does not ascend strictly")
    return x[np.isfinite(y)], y[np.isfinite(y)]


def _levels(
    y: np.ndarray,
    before: tuple[float, float] | None,
    after: float | None,
    minimum_change: float,
    direction: Direction | None,
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """The two levels of a credible change and their standard errors (0 if given); None without one."""
    final, final_error = level_and_error(y[-2 * lasting_samples(len(y)) :])
    start, start_error = before if before is not None else _plateau(y, final, minimum_change, direction)
    change = final - start
    if abs(change) < max(minimum_change, CREDIBLE_ERRORS * math.hypot(start_error, final_error)):
        return None
    if direction not in (None, "rise" if change > 0 else "fall"):
        return None
    if after is not None and after != start and change / (after - start) >= WAYS[-1]:
        return (float(start), float(after)), (start_error, 0.0)
    return (float(start), final), (start_error, final_error)


def lasting_samples(n: int) -> int:
    """How many of the n samples of a record make a lasting stay: ``LASTING_SHARE`` of them, at least 3."""
    return max(3, math.ceil(LASTING_SHARE * n))


def level_and_error(y: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """Median and its standard error, widened for noise that is correlated from sample to sample."""
    centred = y - y.mean()
    power = float(centred @ centred)
    correlation = min(max(float(centred[1:] @ centred[:-1]) / power, 0.0), 0.9) if power > 0 else 0.0
    variance = power / max(len(y) - 1, 1) / len(y) * (1 + correlation) / (1 - correlation)
    return float(np.median(y)), 1.25 * math.sqrt(variance)  # 1.25: median against mean


def _plateau(y: np.ndarray, final: float, minimum_change: float, direction: Direction | None) -> tuple[float, float]:
    """Level and standard error of the plateau that was left for the final level."""
    grid = np.linspace(y.min(), y.max(), 65)
    noise = 1.4826 * float(np.median(np.abs(np.diff(y)))) / math.sqrt(2)
    width = max(noise, 0.02 * float(grid[-1] - grid[0]), 1e-12)
    time = np.exp(-0.5 * ((grid[:, None] - y) / width) ** 2).sum(1)  # samples spent near each level
    nearest = int(np.abs(grid - final).argmin())
    valley = np.concatenate([np.minimum.accumulate(time[nearest::-1])[::-1], np.minimum.accumulate(time[nearest:])[1:]])
    # a mere slow spot of a decay towards the final level has no emptier level between: not a plateau
    stays = (time >= lasting_samples(len(y))) & (valley <= 0.5 * time) & (np.abs(grid - final) >= minimum_change)
    stays &= (direction is None) | ((grid > final) == (direction == "fall"))
    if not stays.any():
        return level_and_error(y[: lasting_samples(len(y))])
    # time x distance: neither the brief untrained level nor a late, lower shelf hides the main plateau
    best = grid[np.where(stays, time * np.abs(grid - final), -1.0).argmax()]
    away = np.abs(y - best)
    return level_and_error(y[away <= away.min() + 2 * width])


def _window(z: Float[np.ndarray, " N"]) -> tuple[int, int, int] | None:
    """Samples from and up to which the change happens, generously, and from which it can end; None if none lasted."""
    stay = lasting_samples(len(z))
    from_middle, middle, lasted = _last_full(z, WAYS[1], stay)
    if not lasted:
        return None
    from_onset, onset, _ = _last_full(z[: middle + 1], WAYS[0], stay)
    from_end, end, _ = _last_full(z[middle + 1 :], WAYS[2], stay)
    end += middle + 1
    margin = 2 * (end - onset) + 2 * stay
    first, last = max(onset - margin, from_onset, from_middle), min(end + margin + 1, len(z))
    return first, last, (from_end + middle + 1 if from_end else 0)


def _last_full(z: Float[np.ndarray, " N"], way: float, capacity: int) -> tuple[int, int, bool]:
    """Where the stay before the lasting crossing starts and ends (-1: crossed from the start); whether it lasted.

    A bucket, full at first, drains by up to one a sample beyond ``way`` and fills before it; overflowing, it
    forgets older stays. The crossing follows its last full moment; it lasted if it has run empty since.
    """
    fill, empty, start, last, lasted = float(capacity), 0, 0, -1, False
    for i, step in enumerate(_pull(z, way).tolist()):
        fill = min(max(fill + step, 0.0), float(capacity))
        if fill == capacity:
            start, last, lasted = empty, i, False
        elif fill == 0.0:
            empty, lasted = i + 1, True
    return start, last, lasted


def _pull(z: np.ndarray, way: float, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """Huber's score of every sample ``[..., N]`` against the way: positive before it, negative beyond it."""
    return np.clip((way + shift - z) / min(way, 1 - way), -1.0, 1.0)


def _estimate(x: Float[np.ndarray, " W"], value: float, gap: int, replicates: np.ndarray, level: float) -> Estimate:
    """A crossing and its interval: at least the gap it lies in, at most the window."""
    left, right = float(x[max(gap - 1, 0)]), float(x[min(max(gap, 1), len(x) - 1)])
    low = high = value = float(value)
    if len(replicates):
        low, middle, high = np.quantile(replicates, [(1 - level) / 2, 0.5, (1 + level) / 2]).tolist()
        # the replicates' own bias repeats that of the value, so the interval is moved, not added to it
        low, high = max(value + low - middle, float(x[0])), min(value + high - middle, float(x[-1]))
    return Estimate(value, min(low, left, value), max(high, right, value))


def _three_crossings(x: np.ndarray, z: np.ndarray, shifts: np.ndarray, end_from: int) -> tuple[np.ndarray, np.ndarray]:
    """x of the three crossings ``[R, 3]`` of z ``[R, W]``, in order, and the index of the first sample beyond each."""
    n = z.shape[1]
    middle = _samples_before(z, WAYS[1], shifts[:, 1:2], 0, n)
    onset = _samples_before(z, WAYS[0], shifts[:, 0:1], 0, middle[:, None])
    end = _samples_before(z, WAYS[2], shifts[:, 2:3], np.maximum(middle, end_from)[:, None], n)
    gaps = np.stack([onset, middle, end], 1)
    left, right = np.clip(gaps - 1, 0, n - 1), np.clip(gaps, 0, n - 1)
    z_left, z_right = np.take_along_axis(z, left, 1), np.take_along_axis(z, right, 1)
    rise = np.where(z_right > z_left, z_right - z_left, 1.0)
    share = np.clip((np.array(WAYS) + shifts - z_left) / rise, 0.0, 1.0)
    return x[left] + share * (x[right] - x[left]), gaps


def _samples_before(
    z: np.ndarray, way: float, shift: np.ndarray, low: np.ndarray | int, high: np.ndarray | int
) -> np.ndarray:
    """How many samples lie before the crossing, from ``low`` to ``high``; the last of equals."""
    n = z.shape[1]
    total = np.pad(np.cumsum(_pull(z, way, shift), axis=1), ((0, 0), (1, 0)))
    before = np.arange(n + 1)
    total = np.where((before >= low) & (before <= high), total, -np.inf)
    return n - total[:, ::-1].argmax(1)


def _replicates(z: Float[np.ndarray, " W"], count: int, rng: np.random.Generator) -> Float[np.ndarray, "R W"]:
    """The monotone fit plus blocks of its residuals, drawn from anywhere and scaled to the noise near each sample."""
    n = len(z)
    means, sizes = monotone(z)
    block = math.ceil(n ** (1 / 3))
    # the steps between long pools are ramped over a few blocks: bare, they would catch every replicate
    last = np.cumsum(sizes) - 0.5
    ramp = np.minimum(sizes / 2, 4 * block)
    knots = np.stack([last - sizes + ramp, last - ramp + 1e-6], 1).ravel()
    fit = np.interp(np.arange(n), knots, np.repeat(means, 2))
    residual = z - np.repeat(means, sizes)
    # noise differs along the curve; a pool of s samples has used up one of its s degrees of freedom
    reach = max(3, n // 8)
    near = np.ones(2 * reach + 1)
    power = np.convolve(residual**2, near)[reach : reach + n]
    freedom = np.convolve(np.repeat(1 - 1 / sizes, sizes), near)[reach : reach + n]
    scale = np.sqrt(power / np.maximum(freedom, 1.0)) + 1e-12
    unit = residual / scale
    unit /= max(math.sqrt(float((unit**2).mean())), 1e-9)
    blocks = math.ceil(n / block)
    samples = rng.integers(0, n - block + 1, size=(count, blocks, 1)) + np.arange(block)
    return fit + RESIDUAL_SCALE * scale * unit[samples.reshape(count, blocks * block)[:, :n]]
