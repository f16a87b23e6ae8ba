"""When a curve had gone half of its way: an order of changes that needs no plateau. Pure functions.

``opsin.metrics.phase_change`` says when a held plateau was left; a curve that sets out at once has left none, and its
half way can still be compared with that of others.

Legend: n records.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Real

FINAL_RECORDS = 0.1
"""Share of the records, from the end, whose mean is where a curve has come to."""

LASTING_RECORDS = 3
"""Records in a row that must be past the half way."""

LEAST_CHANGE = 3.0
"""Change from beginning to end, in standard deviations of the final records, below which there is none."""


def halfway(x: Real[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float | None:
    """The first record from which a curve is past the middle of its beginning and its end for some records.

    Args:
        x: training sequences at every record, ascending.
        y: values of the curve; those that are no numbers are left out.

    Returns:
        None where the curve has not changed beyond its own noise, or has fewer records than must last.
    """
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(y) < 2 * LASTING_RECORDS:
        return None
    final = y[-max(LASTING_RECORDS, math.ceil(FINAL_RECORDS * len(y))) :]
    change = final.mean() - y[0]
    if abs(change) <= LEAST_CHANGE * final.std() or change == 0:
        return None
    past = np.sign(change) * (y - (y[0] + change / 2)) >= 0
    lasting = np.lib.stride_tricks.sliding_window_view(past, LASTING_RECORDS).all(1)
    return float(x[lasting.argmax()]) if lasting.any() else None
