"""What the step of any optimizer changes in place, what it is told, and the update of all parameters.

The arithmetic is the optimizer's own, in ``opsin.optimizers``. Around it are what all have in common: gradients clipped
per member, and members that have ended, which stay as they are.

Legend: M members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opsin.optimizers.base import Optimizer, Tensors


@dataclass(frozen=True)
class OptimizerState:
    """Parameters and what the optimizer keeps of them, in the same order.

    Args:
        names: name of every parameter, as ``init_parameters`` has it.
        parameters: the parameters ``[M, ...]``, leaves that require grad.
        kept: state of every parameter by name, each tensor of the parameter's shape.
    """

    names: Sequence[str]
    parameters: Sequence[Tensor]
    kept: Sequence[Mapping[str, Tensor]]

    def tensors(self) -> list[Tensor]:
        """All tensors in one row: each parameter and, after it, its state."""
        rows = zip(self.parameters, self.kept, strict=True)
        return [tensor for parameter, kept in rows for tensor in (parameter, *kept.values())]


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of one step; tensors, so that changing them changes no graph.

    Args:
        values: hyper-parameters of every member and what is derived from them, by name.
        clip: largest gradient norm of every member; infinity for none.
        clock: what of an update depends on how many there have been, by name.
    """

    values: Mapping[str, Float[Tensor, "... M"]]
    clip: Float[Tensor, " M"]
    clock: Mapping[str, Float[Tensor, "... M"]]

    def of_members(self, chosen: Tensor) -> Hyper:
        """The hyper-parameters of some members.

        Args:
            chosen: numbers of the members, in the order of their slots.
        """
        values, clock = ({name: x[..., chosen] for name, x in part.items()} for part in (self.values, self.clock))
        return Hyper(values, self.clip[chosen], clock)


def member_norm(tensors: Sequence[Float[Tensor, "M ..."]]) -> Float[Tensor, " M"]:
    """2-norm over all tensors, per member."""
    return torch.stack([tensor.square().flatten(1).sum(-1) for tensor in tensors]).sum(0).sqrt()


def with_trailing_axes(tensors: Tensors, axes: int) -> dict[str, Tensor]:
    """Tensors ``[..., M]`` with an axis of 1 for each axis that a parameter has beside the members'.

    Args:
        tensors: hyper-parameters, or what follows from them, by name.
        axes: number of axes of the parameter of one member.
    """
    return {name: x.view(*x.shape, *[1] * axes) for name, x in tensors.items()}


def update_members(
    state: OptimizerState,
    gradients: Sequence[Tensor],
    norm: Float[Tensor, " M"],
    hyper: Hyper,
    alive: Bool[Tensor, " M"],
    optimizer: Optimizer,
    clocks: Mapping[str, Tensors] | None = None,
) -> None:
    """One update of every parameter, clipped per member, in place.

    Args:
        state: parameters and what the optimizer keeps of them.
        gradients: gradient of every parameter, in the order of the state.
        norm: gradient norm of every member, which is clipped.
        hyper: hyper-parameters, clipping and clock of this step.
        alive: members that are updated; the others stay as they are, bit for bit.
        optimizer: the optimizer whose arithmetic moves the parameters.
        clocks: clock of parameters that have their own, by name.
    """
    # a comparison, since the quotient of an overflown norm and no clipping is no number
    scale = torch.where(norm > hyper.clip, hyper.clip / norm, torch.ones_like(norm))
    parts = {"scale": scale, "alive": alive}
    shaped: dict[int, tuple[dict[str, Tensor], ...]] = {}
    for name, parameter, gradient, kept in zip(state.names, state.parameters, gradients, state.kept, strict=True):
        axes = gradient.dim() - 1
        if axes not in shaped:
            shaped[axes] = (
                with_trailing_axes(hyper.values, axes),
                with_trailing_axes(hyper.clock, axes),
                with_trailing_axes(parts, axes),
            )
        values, clock, common = shaped[axes]
        at = (clocks or {}).get(name, clock)
        moved, changed = optimizer.update(parameter, gradient * common["scale"], kept, values, at)
        for old, new in ((parameter, moved), *((kept[key], changed[key]) for key in kept)):
            old.copy_(torch.where(common["alive"], new, old))
