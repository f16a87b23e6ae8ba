"""Onsets of synthetic curves whose true onset is known."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.metrics import onset as onset
from opsin.metrics.onset import Estimate, Transition, find_transition
from tests.helpers.curves import LN2, LN5, MIDDLE, correlated, head_curve, loss_curve, sigmoid


def parts(found: Transition) -> tuple[Estimate, Estimate, Estimate]:
    return found.onset, found.midpoint, found.end


def steps(*stays: tuple[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Noise-free stays (samples, level); x is 100 a sample from 100."""
    y = np.concatenate([np.full(n, level) for n, level in stays])
    return 100.0 * np.arange(1, len(y) + 1), y


CASES = {
    "sharp": (dict(width=2000), dict(before=LN2), 2000),
    "usual": (dict(), dict(before=LN2), 20_000),
    "wide": (dict(width=150_000), dict(before=LN2), 150_000),
    "unknown plateau": (dict(), dict(), 20_000),
    "correlated noise": (dict(memory=0.5), dict(before=LN2), 20_000),
    "few evaluations": (dict(n=200, spacing=4800, width=60_000, sd=0.08), dict(before=LN2), 60_000),
}


@pytest.mark.parametrize("case", CASES)
def test_intervals_of_a_loss_cover_the_truth(case: str) -> None:
    curve, known, width = CASES[case]
    found = [find_transition(*loss_curve(seed, **curve), minimum_change=0.2, seed=seed, **known) for seed in range(60)]
    truth = (MIDDLE - width / 2, MIDDLE, MIDDLE + width / 2)
    covered = [[e.low <= t <= e.high for e, t in zip(parts(f), truth, strict=True)] for f in found if f]
    assert len(covered) == 60
    assert (np.mean(covered, 0) >= 0.85).all(), np.mean(covered, 0)


def test_intervals_of_a_heads_rise_cover_the_truth() -> None:
    found = [find_transition(*head_curve(seed), minimum_change=0.3, direction="rise", seed=seed) for seed in range(60)]
    truth = (MIDDLE - 30_000, MIDDLE, MIDDLE + 30_000)
    covered = [[e.low <= t <= e.high for e, t in zip(parts(f), truth, strict=True)] for f in found if f]
    assert len(covered) == 60
    assert (np.mean(covered, 0) >= 0.85).all(), np.mean(covered, 0)


def test_intervals_are_informative() -> None:
    found = [find_transition(*loss_curve(seed), before=LN2, minimum_change=0.2) for seed in range(10)]
    widths = np.array([[e.high - e.low for e in parts(f)] for f in found if f])
    assert np.median(widths[:, 0]) < 30_000
    assert np.median(widths[:, 1]) < 8_000


def test_the_estimated_plateau_is_not_the_untrained_loss() -> None:
    found = find_transition(*loss_curve(3), minimum_change=0.2)
    assert found is not None
    assert found.before == pytest.approx(LN2, abs=0.02)
    assert found.after == pytest.approx(0.0, abs=0.02)


def test_a_sloping_plateau_does_not_pull_the_onset_forward() -> None:
    x, y = loss_curve(1, sd=0.05)
    sloped = y - 0.04 * np.minimum(x / MIDDLE, 1) * (x < MIDDLE)
    found = find_transition(x, sloped, before=LN2, minimum_change=0.2)
    assert found is not None
    assert abs(found.onset.value - (MIDDLE - 10_000)) < 10_000


def test_an_overshoot_is_not_the_end() -> None:
    found = find_transition(*head_curve(0, bump=0.08), minimum_change=0.3)
    assert found is not None
    assert found.end.value < 450_000


@given(st.integers(10, 300), st.integers(20, 300), st.floats(0.3, 2.0), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_noise_free_step_is_found_in_its_gap(n: int, m: int, size: float, rises: bool) -> None:
    x, y = steps((n, 0.0 if rises else size), (m, size if rises else 0.0))
    found = find_transition(x, y, minimum_change=0.2, direction="rise" if rises else "fall")
    if min(n, m) >= 0.11 * (n + m):  # enough of either level to know it
        assert found is not None
        spacing = 100 * math.ceil((n + m) / onset.MOST_SAMPLES)
        for estimate in parts(found):
            assert estimate.low <= 100 * n + spacing and estimate.high >= 100 * n
            assert 100 * n - spacing <= estimate.value <= 100 * (n + 1) + spacing
            assert 100 <= estimate.high - estimate.low <= 2 * spacing


@given(st.integers(0, 10_000), st.floats(2_000, 200_000), st.floats(0.0, 0.15), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_transition_is_in_order_and_no_finer_than_the_samples(
    seed: int, width: float, sd: float, known: bool
) -> None:
    x, y = loss_curve(seed, n=300, spacing=3200, width=width, sd=sd)
    found = find_transition(x, y, before=LN2 if known else None, minimum_change=0.2, n_bootstrap=30)
    assert found is not None
    assert x[0] <= found.onset.value <= found.midpoint.value <= found.end.value <= x[-1]
    for estimate in parts(found):
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.high - estimate.low >= 3200


@given(st.floats(0.1, 10), st.floats(-5, 5), st.floats(0.5, 100))
@settings(max_examples=25, deadline=None)
def test_units_do_not_matter(scale: float, offset: float, stretch: float) -> None:
    x, y = loss_curve(5, n=300, spacing=3200)
    plain = find_transition(x, y, before=LN2, minimum_change=0.2)
    other = find_transition(x * stretch, offset - scale * y, before=offset - scale * LN2, minimum_change=0.2 * scale)
    assert plain is not None and other is not None
    for a, b in zip(parts(plain), parts(other), strict=True):
        assert b.value == pytest.approx(a.value * stretch, rel=1e-6)


@given(st.lists(st.integers(0, 64), min_size=1, max_size=60))
def test_the_crossing_is_where_the_monotone_regression_passes(values: list[int]) -> None:
    z = np.array(values) / 64  # within h of one half, where Huber's loss is squares
    means, sizes = onset.monotone(z)
    split = onset._samples_before(z[None], 0.5, np.zeros((1, 1)), 0, len(z))
    assert int(split[0]) == int(sizes[means <= 0.5 + 1e-9].sum())


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60))
def test_pools_ascend_and_keep_the_sum(values: list[float]) -> None:
    means, sizes = onset.monotone(np.array(values))
    assert (np.diff(means) > 0).all() and sizes.sum() == len(values)
    assert float(means @ sizes) == pytest.approx(sum(values), abs=1e-9)


def test_no_plateau_means_the_first_crossing() -> None:
    x = 100.0 * np.arange(1, 401)
    found = find_transition(x, LN5 * np.exp(-x / 4000), before=LN2, after=0.0, minimum_change=0.2)
    assert found is not None
    assert found.onset.value == pytest.approx(4000 * math.log(LN5 / (0.9 * LN2)), abs=100)
    assert found.midpoint.value == pytest.approx(4000 * math.log(LN5 / (0.5 * LN2)), abs=100)


def test_a_decay_without_a_plateau_starts_at_its_first_level() -> None:
    x = 100.0 * np.arange(1, 401)
    found = find_transition(x, LN5 * np.exp(-x / 6000), minimum_change=0.2)
    assert found is not None
    assert found.before > 1.2
    assert found.onset.value < found.midpoint.value < 8000


def test_a_curve_that_starts_beyond_the_level_crossed_at_its_first_sample() -> None:
    found = find_transition(*steps((100, 0.0)), before=LN2, minimum_change=0.2)
    assert found is not None
    assert found.onset.value == found.onset.low == 100.0


@pytest.mark.parametrize(
    ("stays", "crossing"),
    [
        (((100, 0.7), (30, 0.0), (100, 0.7), (100, 0.0)), 230),
        (((100, 0.7), (60, 0.0), (25, 0.7), (100, 0.0)), 185),
        (((100, 0.7), (60, 0.0), (6, 0.7), (100, 0.0)), 100),
        (((100, 0.7), (6, 0.0), (60, 0.7), (100, 0.0)), 166),
    ],
    ids=["long return", "return shorter than the dip", "spike", "short dip"],
)
def test_the_last_lasting_crossing_counts(stays: tuple[tuple[int, float], ...], crossing: int) -> None:
    found = find_transition(*steps(*stays), before=0.7, minimum_change=0.2)
    assert found is not None
    for estimate in parts(found):
        assert estimate.value == pytest.approx(100 * (crossing + 0.5), abs=60)


def test_each_way_has_its_own_last_lasting_crossing() -> None:
    x, y = steps((80, 1.0), (60, 0.7), (40, 1.0), (40, 0.0), (20, 0.3), (80, 0.0))
    found = find_transition(x, y, before=1.0, minimum_change=0.2)
    assert found is not None
    assert found.onset.value == pytest.approx(18_050, abs=60)
    assert found.midpoint.value == pytest.approx(18_050, abs=60)
    assert found.end.value == pytest.approx(24_050, abs=60)


def test_an_incomplete_change_counts_once_it_has_lasted() -> None:
    lasted = find_transition(*steps((200, 0.7), (50, 0.35)), before=0.7, after=0.0, minimum_change=0.2)
    assert lasted is not None
    assert lasted.after == 0.35
    assert find_transition(*steps((200, 0.7), (8, 0.35)), before=0.7, after=0.0, minimum_change=0.2) is None


def test_a_complete_change_keeps_the_level_that_was_given() -> None:
    found = find_transition(*steps((200, 0.7), (50, 0.02)), before=0.7, after=0.0, minimum_change=0.2)
    assert found is not None
    assert (found.before, found.after) == (0.7, 0.0)


@pytest.mark.parametrize("before", [LN2, None])
def test_no_change_is_found_where_there_is_none(before: float | None) -> None:
    for seed in range(100):
        y = LN2 + 0.15 * correlated(np.random.default_rng(seed), 600, 0.3)
        assert find_transition(np.arange(600.0), y, before=before, minimum_change=0.1) is None


def test_a_change_smaller_than_asked_or_of_the_wrong_sign_is_none() -> None:
    x, y = steps((100, 0.7), (100, 0.4))
    assert find_transition(x, y, minimum_change=0.4) is None
    assert find_transition(x, y, minimum_change=0.2, direction="rise") is None
    assert find_transition(x, y, minimum_change=0.2, direction="fall") is not None


def test_missing_values_are_as_if_they_were_not_sampled() -> None:
    x, y = loss_curve(7, n=300, spacing=3200)
    holes = np.random.default_rng(0).random(300) < 0.3
    with_nan = np.where(holes, np.nan, y)
    assert find_transition(x, with_nan, minimum_change=0.2) == find_transition(x[~holes], y[~holes], minimum_change=0.2)


def test_unequal_spacing_is_allowed() -> None:
    x = np.unique(np.geomspace(100, 1e6, 300).round())
    found = find_transition(x, 1 - sigmoid(x, 4e5, 5e4), minimum_change=0.2)
    assert found is not None
    for estimate, truth in zip(parts(found), (375_000, 400_000, 425_000), strict=True):
        assert estimate.low <= truth <= estimate.high


@pytest.mark.parametrize("y", [np.zeros(50), np.ones(3), np.empty(0), np.full(50, np.nan)])
def test_constant_short_and_empty_curves_have_no_transition(y: np.ndarray) -> None:
    assert find_transition(np.arange(float(len(y))), y, minimum_change=0.1) is None


@pytest.mark.parametrize(
    ("x", "y", "named"),
    [
        (np.arange(10.0), np.arange(9.0), "length"),
        (np.array([0.0, 2, 1] + [5] * 7), np.zeros(10), "ascend"),
        (np.zeros(10), np.zeros(10), "ascend"),
    ],
)
def test_broken_axes_are_refused(x: np.ndarray, y: np.ndarray, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        find_transition(x, y, minimum_change=0.1)


@pytest.mark.parametrize("broken", [dict(minimum_change=0.0), dict(level=1.0), dict(n_bootstrap=-1), dict(seed=-1)])
def test_arguments_out_of_range_are_refused(broken: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        find_transition(np.arange(10.0), np.zeros(10), **{"minimum_change": 0.1, **broken})


def test_a_seed_gives_one_answer_and_leaves_the_global_generator_alone() -> None:
    x, y = loss_curve(0, n=300, spacing=3200)
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    first, second, other = (find_transition(x, y, minimum_change=0.2, seed=s) for s in (1, 1, 2))
    assert first == second != other
    assert (np.random.get_state()[1] == state).all()


def test_a_transition_is_json() -> None:
    found = find_transition(*steps((100, 0.7), (100, 0.0)), minimum_change=0.2)
    assert found is not None
    record = json.loads(json.dumps(found.to_dict()))
    assert record["onset"] == found.onset.to_dict() and set(record) == {"onset", "midpoint", "end", "before", "after"}


def test_a_curve_of_thirty_thousand_steps_costs_milliseconds() -> None:
    x, y = loss_curve(0, n=30_000, spacing=32)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        find_transition(x, y, before=LN2, minimum_change=0.2, n_bootstrap=0)
        best = min(best, time.perf_counter() - start)
    assert best < 0.02
