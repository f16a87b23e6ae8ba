"""Claims about fitted power laws, on points that lie on one."""

import numpy as np
import pytest

from opsin.metrics.power_law import fit_power_law

X = np.array([4.0, 8.0, 16.0, 64.0])


def test_points_on_a_power_law_have_its_exponent_and_scale():
    law = fit_power_law(X, (3 * X**-0.5)[:, None])
    assert law.exponent.value == pytest.approx(-0.5) and law.scale == pytest.approx(3) and law.points == 4
    assert law.exponent.low is None
    np.testing.assert_allclose(law(X), 3 * X**-0.5)


def test_every_seed_has_its_own_line_and_the_interval_is_that_of_their_exponents():
    law = fit_power_law(X, np.stack([X**-0.4, 2 * X**-0.6], 1))
    assert law.exponent.value == pytest.approx(-0.5) and law.scale == pytest.approx(2**0.5)
    # Student's quantile with one degree of freedom, times the standard error of two numbers 0.2 apart
    assert law.exponent.high - law.exponent.value == pytest.approx(12.7062 * 0.1, rel=1e-4)


def test_points_where_a_seed_has_no_positive_number_are_left_out():
    y = np.stack([X**-1.0, X**-1.0], 1)
    y[2, 0], y[3, 1] = 0.0, np.nan
    assert fit_power_law(X, y) is None
    y[3, 1] = 1 / 64
    law = fit_power_law(X, y)
    assert law.points == 3 and law.exponent.value == pytest.approx(-1)
