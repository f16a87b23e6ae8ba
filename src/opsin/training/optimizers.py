"""The optimizer object that Lightning, its checkpoints and the learning-rate schedulers see.

The arithmetic of an update is in ``opsin.training.step``, fused with the loss and the gradient. This object
holds the state that arithmetic changes, and counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from opsin.errors import ConfigError


class MemberAdam(torch.optim.Optimizer):
    """Adam whose state carries the member axis and whose step is handed in as a closure.

    Args:
        named_parameters: names and tensors ``[M, ...]``.
        learning_rate: of every member, or one for each. Members of one rate and decay share a group of
            ``param_groups``, through which a scheduler changes each as it would change that of a run of its own; the
            parameters are all in the first.
        weight_decay: decoupled, likewise.
        clip: largest gradient norm of a member; None for no clipping.
        betas: decay of the running moments.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        learning_rate: float | Sequence[float],
        weight_decay: float | Sequence[float],
        clip: float | None,
        betas: tuple[float, float],
    ) -> None:
        named = list(named_parameters)
        self.names = [name for name, _ in named]
        members = named[0][1].shape[0]
        kinds, self._group_of = member_groups(learning_rate, weight_decay, members)
        (rate, decay), *others = kinds
        defaults = {"lr": rate, "weight_decay": decay, "clip": clip, "betas": betas, "steps": 0}
        super().__init__([tensor for _, tensor in named], defaults)
        for rate, decay in others:
            self.add_param_group({"params": [], "lr": rate, "weight_decay": decay})
        for parameter in self.parameters:
            zeros = [torch.zeros_like(parameter, requires_grad=False) for _ in range(2)]
            self.state[parameter] = {"exp_avg": zeros[0], "exp_avg_sq": zeros[1]}

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors it updates."""
        return self.param_groups[0]["params"]

    @property
    def steps(self) -> int:
        """Updates made so far."""
        return self.param_groups[0]["steps"]

    def adam_state(self) -> AdamState:
        """What the fused step changes in place."""
        states = [self.state[parameter] for parameter in self.parameters]
        return AdamState(self.names, self.parameters, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states])

    def hyper(self) -> Hyper:
        """Hyper-parameters of the next update."""
        group, like = self.param_groups[0], self.parameters[0]
        clip = float("inf") if group["clip"] is None else group["clip"]
        correction = [1 - beta ** (self.steps + 1) for beta in group["betas"]]
        own = [self.param_groups[place] for place in self._group_of]
        each = (tuple(g["lr"] for g in own), tuple(g["weight_decay"] for g in own), (clip,) * like.shape[0])
        rate, decay, clip = (_as_tensor(values, like.dtype, like.device) for values in each)
        return Hyper(rate, decay, clip, torch.tensor(correction, dtype=like.dtype, device=like.device))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update by calling the fused step.

        Raises:
            ValueError: no closure; this optimizer has no arithmetic of its own.
        """
        if closure is None:
            raise ValueError("MemberAdam.step: needs the fused training step as its closure")
        result = closure()
        self.param_groups[0]["steps"] += 1
        return result


def check_scheduler(scheduler: object, optimizer: MemberAdam, betas: Sequence[float]) -> None:
    """Refuse a schedule that members cannot share, and one that changes what the step was built with.

    Raises:
        ConfigError: it follows one loss, or cycles the betas.
    """
    members = optimizer.parameters[0].shape[0]
    if isinstance(scheduler, ReduceLROnPlateau) and members > 1:
        expected = f"a schedule that follows no loss: {members} members share it"
        raise ConfigError("model.lr_scheduler", "ReduceLROnPlateau", expected)
    if tuple(optimizer.param_groups[0]["betas"]) != tuple(betas):
        name = type(scheduler).__name__
        raise ConfigError("model.lr_scheduler", name, "one that leaves the betas alone: cycle_momentum: false")


def member_groups(
    learning_rate: float | Sequence[float], weight_decay: float | Sequence[float], members: int
) -> tuple[list[tuple[float, float]], list[int]]:
    """The different pairs of rate and decay, in the order of the first members that have them, and each member's."""
    pairs = list(zip(_for_each(learning_rate, members), _for_each(weight_decay, members), strict=True))
    kinds = list(dict.fromkeys(pairs))
    return kinds, [kinds.index(pair) for pair in pairs]


def _for_each(value: float | Sequence[float], members: int) -> list[float]:
    return [float(value)] * members if isinstance(value, (int, float)) else [float(v) for v in value]


@functools.lru_cache(maxsize=64)
def _as_tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@dataclass(frozen=True)
class AdamState:
    """Parameters (leaves that require grad) and their running moments, in the same order."""

    names: Sequence[str]
    parameters: Sequence[Tensor]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]


@dataclass(frozen=True)
class Hyper:
    """Optimizer hyper-parameters; tensors, so that changing them changes no graph.

    Args:
        learning_rate: per member.
        weight_decay: decoupled, per member.
        clip: largest gradient norm, per member; infinity for none.
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
    betas: tuple[float, float],
    eps: float,
    corrections: Mapping[str, Sequence[Tensor]] | None = None,
) -> None:
    """Adam with decoupled weight decay and per-member clipping, in place and elementwise over members.

    Kingma and Ba 2015, algorithm 1, eps outside the square root; decay as Loshchilov and Hutter 2019.

    Args:
        alive: members that are updated; the others stay as they are, bit for bit.
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
        first = betas[0] * mean + (1 - betas[0]) * gradient
        second = betas[1] * square + (1 - betas[1]) * gradient * gradient
        move = (first / correction[0]) / ((second / correction[1]).sqrt() + eps)
        moved = parameter * (1 - rate * decay) - rate * move
        for old, new in ((mean, first), (square, second), (parameter, moved)):
            old.copy_(torch.where(living, new, old))
