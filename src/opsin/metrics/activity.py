"""Which neurons are ever active, and whether position or tokens explain when. Pure functions of activations.

A neuron is *active* where its pre-activation is above 0: where a ReLU, whose neurons Voita et al. 2023 ("Neurons in
large language models: Dead, n-gram, positional") count, would let something through, and a GELU lets more through than
it holds back. Like theirs, these counts ask only whether a neuron is active, not how strongly.

Legend: M members, B batch, L positions, N neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def dead(active: Bool[Tensor, "M B L N"]) -> Bool[Tensor, "M N"]:
    """Neurons that are active nowhere (Voita et al. 2023)."""
    return ~active.flatten(1, 2).any(1)


def always_on(active: Bool[Tensor, "M B L N"]) -> Bool[Tensor, "M N"]:
    """Neurons that are active everywhere."""
    return active.flatten(1, 2).all(1)


def explained_by(active: Bool[Tensor, "M B L N"], groups: Int[Tensor, "M B L"]) -> Float[Tensor, "M N"]:
    """Share of the variance of a neuron's being active that the group of a token explains; at most 1.

    One minus the variance within groups over the variance of all, each divided by its degrees of freedom (Kelley 1935,
    epsilon squared), so that a neuron which does not care has 0 on average, however many groups there are. 0 where
    nothing varies or every token has a group of its own.

    Args:
        active: whether each neuron is active, at every token.
        groups: number of the group that every token is in, 0 or more: its position, its own number, or that of its
            pair with the token before.
    """
    members, _, _, neurons = active.shape
    stride = int(groups.max()) + 1
    offset = torch.arange(members, device=groups.device)[:, None, None] * stride
    names, group, counts = torch.unique((groups + offset).flatten(), return_inverse=True, return_counts=True)
    member = names // stride
    x = active.reshape(-1, neurons).double()
    sums = x.new_zeros(len(names), neurons).index_add_(0, group, x)
    within_groups = x.new_zeros(members, neurons).index_add_(0, member, sums - sums.square() / counts[:, None])
    tokens, kinds = groups[0].numel(), torch.bincount(member, minlength=members)[:, None]
    total = active.flatten(1, 2).double().sum(1)
    overall = (total - total.square() / tokens) / (tokens - 1)
    within = within_groups / (tokens - kinds).clamp(min=1)
    meaningful = (overall > 0) & (kinds < tokens)
    return torch.where(meaningful, 1 - within / overall.where(overall > 0, 1.0), 0.0)


def by_position(active: Bool[Tensor, "M B L N"]) -> Float[Tensor, "M N"]:
    """Share of the variance that the position explains (after the positional neurons of Voita et al. 2023)."""
    members, batch, length, _ = active.shape
    return explained_by(active, torch.arange(length, device=active.device).expand(members, batch, -1))


def by_tokens(active: Bool[Tensor, "M B L N"], tokens: Int[Tensor, "M B L"], before: int) -> Float[Tensor, "M N"]:
    """Share of the variance that the current token and some before it explain (after their n-gram neurons).

    Args:
        active: whether each neuron is active, at every token.
        tokens: tokens of the input, one at every position.
        before: how many tokens before the current one count; positions that have fewer are left out.
    """
    length, size = tokens.shape[-1], int(tokens.max()) + 1
    grams: Sequence[Tensor] = [tokens[..., back : length - before + back] for back in range(before + 1)]
    group = grams[0]
    for later in grams[1:]:
        group = group * size + later
    return explained_by(active[:, :, before:], group)
