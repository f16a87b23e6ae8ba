"""Claims about the half way of a curve."""

import numpy as np
import pytest

from opsin.metrics.halfway import halfway

X = np.arange(0, 1000, 10)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_line_is_half_way_in_its_middle_and_a_step_where_it_is(sign):
    final = X[-10:].mean()
    assert halfway(X, sign * X.astype(float)) == np.ceil(final / 20) * 10
    assert halfway(X, sign * (X >= 430).astype(float)) == 430


def test_a_curve_that_stays_and_one_that_is_noise_have_none():
    assert halfway(X, np.ones(100)) is None
    noise = np.random.Generator(np.random.Philox(0)).normal(size=100)
    assert halfway(X, noise) is None
    assert halfway(X[:5], X[:5].astype(float)) is None


def test_a_peak_of_one_record_is_not_lasting_and_numbers_that_are_none_are_left_out():
    y = (X >= 430).astype(float)
    y[7], y[50] = 1.0, np.nan
    assert halfway(X, y) == 430
