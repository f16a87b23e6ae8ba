"""What a head attends to: the right label, the token before, the first position. Pure functions of patterns.

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

    Args:
        pattern: attention of every head, from 0 to 1.
        truth: which rows are queries, and which keys hold the right and the wrong labels.
    """
    answerable = (truth.query & truth.match.any(-1)).to(pattern.dtype)  # M B L
    sign = truth.match.to(pattern.dtype) - truth.other.to(pattern.dtype)  # M B L K
    looked = (pattern * sign[:, :, None]).sum(-1)  # M B H L
    total = answerable.sum((1, 2))[:, None].clamp(min=1)
    return (looked * answerable[:, :, None]).sum((1, 3)) / total


def answer_attention(pattern: Float[Tensor, "M B H L K"], truth: Truth) -> Float[Tensor, "M H"]:
    """Attention at the query to all labels that are right, averaged over queries; between 0 and 1.

    Queries without a matching label in their context do not count. Reddy 2023, progress measure of the target's label.

    Args:
        pattern: attention of every head, from 0 to 1.
        truth: which rows are queries, and which keys hold the right labels.
    """
    answerable = (truth.query & truth.match.any(-1)).to(pattern.dtype)  # M B L
    looked = (pattern * truth.match.to(pattern.dtype)[:, :, None]).sum(-1)  # M B H L
    total = answerable.sum((1, 2))[:, None].clamp(min=1)
    return (looked * answerable[:, :, None]).sum((1, 3)) / total


def previous_token_strength(pattern: Float[Tensor, "M B H L K"], truth: Truth) -> Float[Tensor, "M H"]:
    """Attention from each label to the token before it, averaged over labels and batch; between 0 and 1.

    Args:
        pattern: attention of every head, from 0 to 1.
        truth: which positions are labels, and which token comes before each.
    """
    rows = truth.labels.nonzero().squeeze(-1)
    rows = rows[truth.previous[rows] != rows]
    return pattern[:, :, :, rows, truth.previous[rows]].mean((1, 3))


def attention_sink(pattern: Float[Tensor, "M B H L K"]) -> Float[Tensor, "M H"]:
    """Attention on the first position, averaged over the batch and all later rows; between 0 and 1.

    The first row does not count: with a causal mask it can attend to nothing else.
    """
    return pattern[:, :, :, 1:, 0].mean((1, 3))


def with_attention_sunk(pattern: Float[Tensor, "M B H L K"], head: int) -> Float[Tensor, "M B H L K"]:
    """A copy of the attention in which one head pays all of it to the first position.

    Args:
        pattern: attention of every head, from 0 to 1.
        head: index of the head that is changed, 0 .. H - 1.
    """
    forced = pattern.clone()
    forced[:, :, head] = 0
    forced[:, :, head, :, 0] = 1
    return forced
