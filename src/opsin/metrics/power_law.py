"""Power laws: the exponent of y = c x ** b, by least squares between logarithms. Pure functions.

Legend: n points, S seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from opsin.metrics.compare import Mean, mean_interval

FEWEST_POINTS = 3
"""Points from which a line is fitted."""


@dataclass(frozen=True)
class PowerLaw:
    """A line between logarithms, fitted to every seed by itself.

    Args:
        exponent: b, mean over seeds with Student's interval.
        scale: c, of the mean line: y at x = 1.
        points: number of points that each seed was fitted to.
    """

    exponent: Mean
    scale: float
    points: int

    def __call__(self, x: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
        """The mean line at some x."""
        assert self.exponent.value is not None
        return self.scale * x**self.exponent.value


def fit_power_law(x: Float[np.ndarray, " n"], y: Float[np.ndarray, "n S"]) -> PowerLaw | None:
    """The line through all points at which every seed has a positive number.

    Args:
        x: positive numbers, such as widths.
        y: what each seed has there; nan or 0 where the point is left out.

    Returns:
        None with fewer than ``FEWEST_POINTS`` such points.
    """
    known = (x > 0) & (np.nan_to_num(y) > 0).all(1)
    if known.sum() < FEWEST_POINTS:
        return None
    slopes, heights = np.polyfit(np.log(x[known]), np.log(y[known]), 1)
    return PowerLaw(mean_interval(slopes.tolist()), float(np.exp(heights.mean())), int(known.sum()))
