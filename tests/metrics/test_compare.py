"""Claims about means over seeds and paired differences: known answers, honest intervals, no dependence on order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.metrics.compare import (
    bootstrap_interval,
    mean_curve,
    mean_interval,
    mean_over_run,
    paired_difference,
    student_quantile,
)

NUMBERS = st.floats(-1e4, 1e4).map(lambda x: round(x, 3))


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365)])
def test_students_quantiles_are_those_of_the_printed_tables(freedom, quantile):
    assert student_quantile(0.95, freedom) == pytest.approx(quantile, abs=5e-4)


def test_with_many_seeds_students_quantile_is_the_normal_one():
    assert student_quantile(0.95, 2000) == pytest.approx(1.96, abs=2e-3)


def test_the_interval_of_three_numbers_is_the_one_worked_out_by_hand():
    found = mean_interval([1.0, 2.0, 3.0])
    half = 4.30265 / math.sqrt(3)
    assert (found.count, found.value) == (3, 2.0)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=1e-4)


def test_an_interval_does_not_fall_below_what_the_quantity_can_be():
    assert mean_interval([0.1, 0.2], floor=0.0).low == 0.0
    assert mean_curve(np.array([[0.1, 0.2]]), floor=0.0)[1].tolist() == [0.0]


@pytest.mark.parametrize(
    ("values", "count", "value"), [([], 0, None), ([None, math.nan], 0, None), ([None, 3.0], 1, 3.0)]
)
def test_fewer_than_two_numbers_have_no_interval(values, count, value):
    found = mean_interval(values)
    assert (found.count, found.value, found.low, found.high) == (count, value, None, None)


def test_a_mean_curve_is_the_mean_and_interval_of_every_point_without_its_missing_seeds():
    values = np.random.default_rng(0).normal(size=(5, 4))
    values[1, 2] = values[2, :3] = values[3] = math.nan
    for row, *ends in zip(values, *mean_curve(values), strict=True):
        point = mean_interval(row.tolist())
        expected = [math.nan if end is None else end for end in (point.value, point.low, point.high)]
        assert ends == pytest.approx(expected, nan_ok=True)


def test_pairs_without_the_quantity_are_counted_and_not_compared():
    first = {1: 10.0, 2: None, 3: 7.0, 4: None, 5: 9.0, 6: math.nan}
    second = {1: 4.0, 2: 5.0, 3: None, 4: None, 5: 1.0, 7: 2.0}
    found = paired_difference(first, second)
    assert (found.pairs, found.known, found.only_first, found.only_second, found.neither) == (5, 2, 1, 1, 1)
    assert found.mean.value == pytest.approx((6 + 8) / 2)


def test_no_shared_seed_is_no_pair():
    assert paired_difference({1: 1.0}, {2: 1.0}).pairs == 0


def test_one_pair_has_a_difference_and_no_interval():
    found = paired_difference({3: 5.0}, {3: 2.0}).mean
    assert (found.value, found.low, found.high) == (3.0, None, None)


@given(st.lists(NUMBERS, min_size=2, max_size=8), st.randoms())
def test_the_bootstrap_does_not_depend_on_the_order_of_the_pairs_and_mirrors_their_negatives(differences, random):
    found = bootstrap_interval(differences, replicates=200)
    shuffled = random.sample(differences, len(differences))
    assert bootstrap_interval(shuffled, replicates=200) == found
    mirrored = bootstrap_interval([-d for d in shuffled], replicates=200)
    # a mean of 0 has no side to turn to
    assert found.value == 0 or (-mirrored.value, -mirrored.high, -mirrored.low) == (found.value, found.low, found.high)


def test_the_bootstrap_follows_the_units():
    differences = np.array([1.0, 4.0, 2.5, 9.0])
    plain, scaled = bootstrap_interval(differences), bootstrap_interval(1000 * differences + 50_000)
    assert (scaled.low, scaled.high) == pytest.approx((1000 * plain.low + 50_000, 1000 * plain.high + 50_000))


def test_equal_differences_leave_no_doubt():
    found = bootstrap_interval([3.0] * 4)
    assert (found.low, found.high) == (3.0, 3.0)


def test_with_many_pairs_the_bootstrap_is_the_normal_interval():
    differences = np.random.default_rng(1).normal(5, 2, 400)
    found = bootstrap_interval(differences)
    half = 1.96 * differences.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.04)


def test_with_skewed_pairs_the_longer_end_is_on_the_side_of_the_tail():
    found = bootstrap_interval([0.0, 0.1, 0.2, 0.1, 8.0, 0.3])
    assert found.high - found.value > 1.1 * (found.value - found.low)


@pytest.mark.parametrize("pairs", [3, 4, 6])
def test_for_normal_pairs_the_bootstrap_is_on_average_as_wide_as_students_interval(pairs):
    sets = np.random.default_rng(2).normal(size=(40, pairs))
    intervals = [(bootstrap_interval(differences), mean_interval(differences)) for differences in sets]
    assert np.mean([(a.high - a.low) / (b.high - b.low) for a, b in intervals]) == pytest.approx(1, abs=0.03)


def coverage(pairs: int, sets: int) -> tuple[float, float]:
    """How often the interval of normal differences holds their mean: of this bootstrap, and of the percentile one."""
    rng = np.random.default_rng(pairs)
    widened = plain = 0
    for differences in rng.normal(3, 2, (sets, pairs)):
        found = bootstrap_interval(differences)
        means = differences[rng.integers(0, pairs, (1000, pairs))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        widened += found.low <= 3 <= found.high
        plain += low <= 3 <= high
    return widened / sets, plain / sets


def test_with_four_pairs_the_interval_holds_the_truth_as_often_as_it_says_where_the_percentile_one_does_not():
    widened, plain = coverage(4, sets=400)
    assert 0.92 < widened < 0.98
    assert plain < 0.85


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairs", "widened", "plain"), [(2, 0.95, 0.52), (3, 0.95, 0.74), (4, 0.95, 0.80), (6, 0.94, 0.86), (8, 0.95, 0.89)]
)
def test_the_coverage_is_the_one_that_the_module_states(pairs, widened, plain):
    assert coverage(pairs, sets=2000) == pytest.approx((widened, plain), abs=0.02)


def test_the_mean_over_the_run_is_the_area_under_unequally_spaced_samples():
    assert mean_over_run(np.array([0, 10, 40]), np.array([1.0, 0.5, 0.1])) == pytest.approx((7.5 + 9.0) / 40)


@pytest.mark.parametrize("y", [[1.0], [1.0, math.nan]])
def test_a_curve_that_is_too_short_or_broken_has_no_mean(y):
    assert mean_over_run(np.arange(len(y)), np.array(y)) is None
