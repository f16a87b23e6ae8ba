"""The mathematics that models share: linear maps, norms, activations and attention, of all members at once.

Legend: M members, B batch, L positions (query side), K positions (key side), D width, H heads, E head width, I and O
input and output of a linear map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from opsin.task import Batch, Layout

NORM_EPS = 1e-5
MASKED_SCORE = -1e20
# at up to this many scores a pair the compiler fuses multiply-and-sum better than it calls matmul
BROADCAST_POSITIONS = 8

Activation = Literal["gelu_tanh", "gelu", "relu", "relu_squared", "square", "silu"]

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
    "relu": torch.relu,
    "relu_squared": lambda x: torch.relu(x).square(),
    "square": torch.square,
    "silu": functional.silu,
}
"""Nonlinearities of neurons, elementwise."""

GATES = ("gelu_tanh", "gelu", "relu", "silu")
"""Nonlinearities that gate another linear map (Shazeer 2020): GEGLU, ReGLU and SwiGLU."""


# ---- linear maps ------------------------------------------------------------------------------------


def linear(
    x: Float[Tensor, "M B L I"], weight: Float[Tensor, "M I O"], bias: Float[Tensor, "M O"] | None = None
) -> Float[Tensor, "M B L O"]:
    """Every member's activation through its own weight."""
    members, batch, length, _ = x.shape
    flat = x.reshape(members, batch * length, -1)
    out = torch.bmm(flat, weight) if bias is None else torch.baddbmm(bias[:, None], flat, weight)
    return out.view(members, batch, length, -1)


def looked_up(tokens: Int[Tensor, "M B Nt"], table: Float[Tensor, "M T D"]) -> Float[Tensor, "M B Nt D"]:
    """The rows of every member's table that its tokens name."""
    member = torch.arange(table.shape[0], device=table.device)[:, None, None]
    return table[member, tokens]


def in_order(features: Float[Tensor, "M B Nf D"], tokens: Float[Tensor, "M B Nt D"], layout: Layout) -> Tensor:
    """What stands at feature positions and at token positions as one sequence, ``[M, B, L, D]``."""
    stacked = (*layout.features, *layout.tokens)
    order = [stacked.index(position) for position in range(layout.positions)]
    return torch.cat([features, tokens], dim=2)[:, :, order]


def one_hot_tokens(batch: Batch, count: int, dtype: torch.dtype) -> Float[Tensor, "M B Nt T"]:
    """Every token as a vector that is 1 at its number and 0 elsewhere."""
    return functional.one_hot(batch.tokens.long(), count).to(dtype)


# ---- norms ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """What a normalisation does.

    Args:
        kind: LayerNorm (Ba et al. 2016), or RMSNorm (Zhang and Sennrich 2019), which subtracts no mean.
        weight: whether what is normalised is multiplied by a learned weight, channel by channel.
        bias: whether a learned bias is added, channel by channel.
    """

    kind: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    weight: bool = True
    bias: bool = True

    def normalise(
        self, x: Float[Tensor, "M B L D"], tap: Callable[[Tensor], Tensor] = lambda scale: scale
    ) -> Float[Tensor, "M B L D"]:
        """Each position over its own scale, before weight and bias.

        Args:
            x: activation that is normalised over its last axis.
            tap: function that the scale passes, ``[M, B, L, 1]``.
        """
        centred = x - x.mean(-1, keepdim=True) if self.kind == "LayerNorm" else x
        scale = tap((centred.square().mean(-1, keepdim=True) + NORM_EPS).sqrt())
        return centred / scale


def scaled_and_shifted(
    x: Float[Tensor, "M B L D"], weight: Float[Tensor, "M D"] | None, bias: Float[Tensor, "M D"] | None
) -> Float[Tensor, "M B L D"]:
    """What is normalised times the weight of a norm, plus its bias, where it has them."""
    if weight is not None:
        x = x * weight[:, None, None]
    return x if bias is None else x + bias[:, None, None]


# ---- attention --------------------------------------------------------------------------------------


def future_of(x: Float[Tensor, "M B L ..."]) -> Bool[Tensor, "L K"]:
    """Whether a key stands after the query."""
    length = x.shape[2]
    return torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)


def raw_scores(q: Float[Tensor, "M B L H E"], k: Float[Tensor, "M B K H E"]) -> Float[Tensor, "M B H L K"]:
    """Inner product of every query with every key, head by head."""
    q, k = q.transpose(2, 3), k.transpose(2, 3)
    if q.shape[3] * k.shape[3] <= BROADCAST_POSITIONS**2:
        return (q[..., :, None, :] * k[..., None, :, :]).sum(-1)
    return q @ k.transpose(-1, -2)


def attended(pattern: Float[Tensor, "M B H L K"], v: Float[Tensor, "M B K H E"]) -> Float[Tensor, "M B L H E"]:
    """Sum of the values, weighted by a pattern, head by head."""
    if pattern.shape[-2] * pattern.shape[-1] <= BROADCAST_POSITIONS**2:
        return (pattern.permute(0, 1, 3, 4, 2)[..., None] * v[:, :, None]).sum(3)
    return (pattern @ v.transpose(2, 3)).transpose(2, 3)


def fan_in_scale(fan_in: int, scale: float = 1.0) -> float:
    """Standard deviation of a weight that keeps the size of what it reads: ``scale`` over the root of the fan-in."""
    return scale / math.sqrt(fan_in)
