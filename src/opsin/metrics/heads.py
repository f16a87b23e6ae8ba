"""What a head attends to, measured against the task's truth. Pure functions of patterns.

Legend: M members, B batch, H heads, L positions (query side), K positions (key side).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from opsin.task import Truth


def induction_strength(pattern: Float[Tensor, "M B H L K"], truth: Truth) -> Float[Tensor, "M H"]:
    """Attention at the query to the right label minus to the wrong ones, averaged over queries.

    Between -1 and 1; queries without a matching label in their context do not count. Singh et al.
    2024 ("What needs to go right for an induction head?"), section 3, induction strength.
    """
    answerable = (truth.query & truth.match.any(-1)).to(pattern.dtype)  # M B L
    sign = truth.match.to(pattern.dtype) - truth.other.to(pattern.dtype)  # M B L K
    looked = (pattern * sign[:, :, None]).sum(-1)  # M B H L
    total = answerable.sum((1, 2))[:, None].clamp(min=1)
    return (looked * answerable[:, :, None]).sum((1, 3)) / total


def previous_token_strength(pattern: Float[Tensor, "M B H L K"], truth: Truth) -> Float[Tensor, "M H"]:
    """Attention from each label to the token before it, averaged over labels and batch; between 0 and 1."""
    rows = truth.labels.nonzero().squeeze(-1)
    rows = rows[truth.previous[rows] != rows]
    return pattern[:, :, :, rows, truth.previous[rows]].mean((1, 3))
