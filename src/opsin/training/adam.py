"""The arithmetic of Adam, elementwise over members and in place.

Legend: M members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class AdamState:
    """Parameters and their running moments, in the same order.

    Args:
        names: name of every parameter, as ``init_parameters`` has it.
        parameters: the parameters ``[M, ...]``, leaves that require grad.
        exp_avg: running mean of the gradient of each.
        exp_avg_sq: running mean of the squared gradient of each.
    """

    names: Sequence[str]
    parameters: Sequence[Tensor]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]


@dataclass(frozen=True)
class Adam:
    """What of Adam never changes in a run, and so shapes the graph.

    Args:
        betas: decay of the two running moments, in [0, 1).
        eps: what is added to the square root of the second moment.
    """

    betas: tuple[float, float]
    eps: float


@dataclass(frozen=True)
class Hyper:
    """Optimizer hyper-parameters; tensors, so that changing them changes no graph.

    Args:
        learning_rate: learning rate of every member.
        weight_decay: decoupled weight decay of every member.
        clip: largest gradient norm of every member; infinity for none.
        correction: bias corrections 1 - beta1^t and 1 - beta2^t of this step.
    """

    learning_rate: Float[Tensor, " M"]
    weight_decay: Float[Tensor, " M"]
    clip: Float[Tensor, " M"]
    correction: Float[Tensor, "2"]


def member_norm(tensors: Sequence[Float[Tensor, "M ..."]]) -> Float[Tensor, " M"]:
    """2-norm over all tensors, per member."""
    return torch.stack([tensor.square().flatten(1).sum(-1) for tensor in tensors]).sum(0).sqrt()


def adam_update(
    state: AdamState,
    gradients: Sequence[Tensor],
    norm: Float[Tensor, " M"],
    hyper: Hyper,
    alive: Bool[Tensor, " M"],
    adam: Adam,
    corrections: Mapping[str, Sequence[Tensor]] | None = None,
) -> None:
    """Adam with decoupled weight decay and per-member clipping, in place and elementwise over members.

    Kingma and Ba 2015, algorithm 1, eps outside the square root; decay as Loshchilov and Hutter 2019.

    Args:
        state: parameters and their running moments.
        gradients: gradient of every parameter, in the order of the state.
        norm: gradient norm of every member, which is clipped.
        hyper: learning rate, decay, clipping and bias corrections of this step.
        alive: members that are updated; the others stay as they are, bit for bit.
        adam: what of the optimizer never changes.
        corrections: the two bias corrections of parameters that have their own, by name.
    """
    # a comparison, since the quotient of an overflown norm and no clipping is no number
    scale = torch.where(norm > hyper.clip, hyper.clip / norm, torch.ones_like(norm))
    for name, parameter, gradient, mean, square in zip(
        state.names, state.parameters, gradients, state.exp_avg, state.exp_avg_sq, strict=True
    ):
        rate, decay, shrink, living = (
            x.view(-1, *[1] * (gradient.dim() - 1)) for x in (hyper.learning_rate, hyper.weight_decay, scale, alive)
        )
        correction = (corrections or {}).get(name, hyper.correction)
        gradient = gradient * shrink
        first = adam.betas[0] * mean + (1 - adam.betas[0]) * gradient
        second = adam.betas[1] * square + (1 - adam.betas[1]) * gradient * gradient
        move = (first / correction[0]) / ((second / correction[1]).sqrt() + adam.eps)
        moved = parameter * (1 - rate * decay) - rate * move
        for old, new in ((mean, first), (square, second), (parameter, moved)):
            old.copy_(torch.where(living, new, old))
