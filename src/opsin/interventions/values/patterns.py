"""Attention that a task knows, as values: patterns that heads are clamped to and scores that they may not have.

Legend: M members, B batch, L positions (query side), K positions (key side), H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opsin.batch import scored_rows
from opsin.interventions.intervention import Overwrite, Value
from opsin.task import Batch, Truth

# low enough to vanish in the softmax, far above the causal mask so that a row of nothing else stays finite
DISALLOWED_SCORE = -1e9


@dataclass(frozen=True)
class PreviousToken(Value):
    """Attention ``strength`` on the previous token and the rest on oneself; the first row attends to itself.

    Reference option ``prev_token_heads`` (Singh et al. 2024, figure 5 and appendix). Gradient stops.

    Args:
        strength: attention paid to the previous token, in [0, 1].
        labels_only: whether only rows that hold a label are overwritten.
    """

    strength: float = 1.0
    labels_only: bool = False

    def __call__(self, x: Float[Tensor, "M B H L K"], batch: Batch, *inputs: Tensor) -> Overwrite:
        pattern = previous_token_pattern(batch.truth, self.strength, x)
        rows = batch.truth.labels[:, None] if self.labels_only else None
        return Overwrite(pattern.expand_as(x), rows)


@dataclass(frozen=True)
class Induction(Value):
    """At each query, attention ``strength`` on every matching label and the rest on each other label.

    Reference option ``induction_heads``. Rows are not renormalised: they sum to 1 for one match and
    one other label. Gradient stops.

    Args:
        strength: attention paid to every matching label, in [0, 1].
    """

    strength: float = 1.0

    def __call__(self, x: Float[Tensor, "M B H L K"], batch: Batch, *inputs: Tensor) -> Overwrite:
        truth = batch.truth
        pattern = self.strength * truth.match.to(x.dtype) + (1 - self.strength) * truth.other.to(x.dtype)
        return Overwrite(pattern[:, :, None].expand_as(x), truth.query[:, :, None, :, None])


@dataclass(frozen=True)
class Match(Value):
    """At each query, attention by similarity of the raw inputs that precede the labels.

    Reference option ``match_heads``: at temperature 0 the weight is 1 on every label whose input is
    the most similar (ties all get 1), above 0 a softmax of cosine over temperature. Gradient stops.

    Args:
        temperature: temperature of the softmax; 0 for the hard maximum.
    """

    temperature: float = 0.0

    def __call__(self, x: Float[Tensor, "M B H L K"], batch: Batch, *inputs: Tensor) -> Overwrite:
        pattern = match_pattern(batch, self.temperature).to(x.dtype)
        return Overwrite(pattern[:, :, None].expand_as(x), batch.truth.query[:, :, None, :, None])


@dataclass(frozen=True)
class Disallowed(Value):
    """Scores so low that nothing is attended there; the rest of the row shares what was paid.

    Reference options ``disallow_prev_token_heads`` and ``final_layer_silence_non_label_attn``. Gradient stops.

    Args:
        what: ``previous_token``: the token before, in every row but the first. ``non_labels``: in
            rows whose prediction is scored, every key that holds no label, the row's own included.
        labels_only: whether only rows that hold a label are overwritten.
    """

    # what digests of plans in checkpoints are made from
    identity_name: ClassVar[str] = "Disallow"

    what: Literal["previous_token", "non_labels"]
    labels_only: bool = False

    def __call__(self, x: Float[Tensor, "M B H L K"], batch: Batch, *inputs: Tensor) -> Overwrite:
        where = disallowed_entries(self.what, batch)
        if self.labels_only:
            where = where & batch.truth.labels[:, None]
        return Overwrite(x.new_full((), DISALLOWED_SCORE).expand_as(x), where)


def disallowed_entries(attention: Literal["previous_token", "non_labels"], batch: Batch) -> Bool[Tensor, "L K"]:
    """Entries of the scores that ``Disallowed`` overwrites."""
    truth, length = batch.truth, batch.layout.positions
    position = torch.arange(length, device=truth.previous.device)
    if attention == "previous_token":
        return (truth.previous[:, None] == position) & (truth.previous != position)[:, None]
    return scored_rows(batch)[:, None] & ~truth.labels


def previous_token_pattern(truth: Truth, strength: float, like: Tensor) -> Float[Tensor, "L K"]:
    """Attention ``strength`` on the previous token and the rest on oneself.

    Args:
        truth: what the task knows of the positions.
        strength: attention paid to the previous token, in [0, 1].
        like: a tensor of the precision and device that the pattern gets.
    """
    length = truth.previous.shape[0]
    oneself = torch.eye(length, dtype=like.dtype, device=like.device)
    return oneself + strength * (oneself[truth.previous] - oneself)


def match_pattern(batch: Batch, temperature: float) -> Float[Tensor, "M B L K"]:
    """Attention of a perfect match head; zero at keys that are no label and in rows that are no query."""
    candidate = batch.truth.match | batch.truth.other
    similarity = batch.similarity().masked_fill(~candidate, -torch.inf)
    if temperature == 0:
        best = similarity == similarity.amax(-1, keepdim=True)
        return (best & candidate).to(similarity.dtype)
    return (similarity / temperature).softmax(-1).masked_fill(~candidate, 0.0)
