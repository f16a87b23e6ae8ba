"""Associative memories in weights, and what attention does with them. Pure functions.

A matrix W is a memory of pairs if W = sum_i x_i y_i^T of nearly orthonormal vectors: of all candidates the one stored
with x_i has the largest score x_i^T W y_j. Recall is the share of inputs for which that is so (Bietti et al. 2023,
"Birth of a Transformer: a memory viewpoint", section 4 and appendix A). Weights are stored inputs x outputs: what a
position writes into a matrix is a row vector x W.

Legend: M members, B batch, L positions (query side), K positions (key side), D width, n inputs, c candidates,
V vocabulary, P positions with a vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opsin.task import Batch


def recall(scores: Float[Tensor, "M n c"], right: Int[Tensor, " n"]) -> Float[Tensor, " M"]:
    """Share of inputs whose highest score is that of the right candidate; of equal ones each counts its part.

    A memory of zeros therefore recalls a share 1 / c.

    Args:
        scores: score of every candidate for every input.
        right: index of the right candidate of every input.

    Returns:
        From 0 to 1; nan for a member whose scores are no numbers.
    """
    highest = (scores == scores.amax(-1, keepdim=True)).to(scores.dtype)
    share = highest[:, torch.arange(len(right), device=scores.device), right] / highest.sum(-1)
    return share.mean(-1)


def above_chance(recalled: Float[Tensor, " M"], candidates: int) -> Float[Tensor, " M"]:
    """Recall of which chance is taken off: (R - 1/c) / (1 - 1/c), 0 for guessing and 1 for all.

    Args:
        recalled: R, the share of inputs that are recalled.
        candidates: c, number of candidates, at least 2.
    """
    return (recalled - 1 / candidates) / (1 - 1 / candidates)


@dataclass(frozen=True)
class BirthWeights:
    """The weights of the simplified transformer, heads without their axis; keys, values and outputs as D x D matrices.

    Args:
        embed: vectors e_v of the tokens.
        position: vectors p_t of the positions.
        key_0, value_0, output_0: matrices of the first layer.
        key_1, value_1, output_1: matrices of the second layer.
        unembed: read-out, its column v the vector u_v.
    """

    embed: Float[Tensor, "M V D"]
    position: Float[Tensor, "M P D"]
    key_0: Float[Tensor, "M D D"]
    value_0: Float[Tensor, "M D D"]
    output_0: Float[Tensor, "M D D"]
    key_1: Float[Tensor, "M D D"]
    value_1: Float[Tensor, "M D D"]
    output_1: Float[Tensor, "M D D"]
    unembed: Float[Tensor, "M D V"]


def previous_token_scores(weights: BirthWeights, positions: int) -> Float[Tensor, "M n c"]:
    """Scores p_{t+1}^T W_K1 p_s of the first layer's keys: query t + 1 in row t, key s in column s.

    Args:
        weights: weights of every member.
        positions: number of positions from the first on that are queries or keys, at least 2.
    """
    position = weights.position[:, :positions]
    return position[:, 1:] @ (position @ weights.key_0).mT


def lookup_scores(weights: BirthWeights, tokens: Int[Tensor, " n"]) -> Float[Tensor, "M n n"]:
    """Scores e_v^T W_K2 (W_O1 W_V1 e_v') of the second layer: token v as query against key v' the first layer wrote.

    Args:
        weights: weights of every member.
        tokens: tokens that are queries and keys.
    """
    embed = weights.embed[:, tokens]
    return embed @ (embed @ weights.value_0 @ weights.output_0 @ weights.key_1).mT


def copying_scores(weights: BirthWeights) -> Float[Tensor, "M V V"]:
    """Scores u_u^T W_O2 W_V2 e_v: logit of token u (column) where the second layer attends to token v (row)."""
    return weights.embed @ weights.value_1 @ weights.output_1 @ weights.unembed


def bigram_kl(logits: Float[Tensor, "M n V"], bigrams: Float[Tensor, "n V"]) -> Float[Tensor, " M"]:
    """Mean Kullback-Leibler divergence (nats) of softmax(logits) from the bigrams, KL(bigrams || model).

    Args:
        logits: what a map of the residual stream says after each of n tokens.
        bigrams: probabilities of the token after each of them.
    """
    p = bigrams.to(logits)
    return (-torch.special.entr(p) - p * logits.log_softmax(-1)).sum(-1).mean(-1)


# ---- attention --------------------------------------------------------------------------------------


def _share(hits: Bool[Tensor, "M B L"], rows: Bool[Tensor, "M B L"]) -> Float[Tensor, " M"]:
    """Share of rows that are hits; nan without rows."""
    return (hits & rows).sum((1, 2)) / rows.sum((1, 2))


def looks_back(pattern: Float[Tensor, "M B L K"], batch: Batch) -> Float[Tensor, " M"]:
    """Share of successors of triggers whose attention is highest at the position before them.

    Successors are keys that some later row should find.

    Args:
        pattern: attention of the first layer.
        batch: sequences with the truth of what each row should find.
    """
    found = pattern.argmax(-1) == batch.truth.previous
    return _share(found, batch.truth.match.any(2))


def finds_answer(pattern: Float[Tensor, "M B L K"], batch: Batch) -> Float[Tensor, " M"]:
    """Share of rows of repeated triggers whose attention is highest at a position that holds the right token.

    Args:
        pattern: attention of the second layer.
        batch: sequences of tokens that predict the next one at every position.
    """
    held = batch.tokens.gather(-1, pattern.argmax(-1))
    return _share(held == batch.targets, batch.truth.query)


def finds_successor(pattern: Float[Tensor, "M B L K"], batch: Batch) -> Float[Tensor, " M"]:
    """Share of rows of repeated triggers whose attention is highest right after an earlier occurrence of the trigger.

    Args:
        pattern: attention of the second layer.
        batch: sequences of tokens that predict the next one at every position.
    """
    key = pattern.argmax(-1)
    before = batch.tokens.gather(-1, (key - 1).clamp(min=0))
    return _share((key > 0) & (before == batch.tokens), batch.truth.query)
