"""Closed loop: the strength of an intervention as a function of what the run has measured so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Feedback:
    """Strength from a tracked quantity.

    Args:
        metric: name of the quantity, as in ``metrics.csv``.
    """

    metric: str
