"""The optimizer object that Lightning, its checkpoints and the learning-rate schedulers see.

The arithmetic of an update is in ``opsin.training.adam``; the step fuses it with the loss and the gradient. This object
holds the state that the arithmetic changes, and counts.

Legend: M members.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from opsin.errors import ConfigError
from opsin.records.schema import TRAIN_LOSS
from opsin.training.adam import AdamState, Hyper


class MemberAdam(torch.optim.Optimizer):
    """Adam whose state carries the member axis and whose step is handed in as a closure.

    Args:
        named_parameters: names of the parameters and their tensors ``[M, ...]``.
        learning_rate: one rate for all members, or one for each. Members of one rate and decay share a group of
            ``param_groups``, through which a scheduler changes each as it would change that of a run of its own; the
            parameters are all in the first.
        weight_decay: decoupled weight decay, one for all members or one for each.
        clip: largest gradient norm of a member; None for no clipping.
        betas: decay of the two running moments, in [0, 1).
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
        pairs, self._group_of = member_groups(learning_rate, weight_decay, members)
        (rate, decay), *further = pairs
        defaults = {"lr": rate, "weight_decay": decay, "clip": clip, "betas": betas, "steps": 0}
        super().__init__([tensor for _, tensor in named], defaults)
        for rate, decay in further:
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
        groups = [self.param_groups[index] for index in self._group_of]
        values = (tuple(g["lr"] for g in groups), tuple(g["weight_decay"] for g in groups), (clip,) * like.shape[0])
        rate, decay, clip = (_as_tensor(per_member, like.dtype, like.device) for per_member in values)
        return Hyper(rate, decay, clip, torch.tensor(correction, dtype=like.dtype, device=like.device))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update by calling the fused step.

        Args:
            closure: the fused training step, which changes parameters and moments in place.

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

    Args:
        scheduler: learning-rate scheduler that was built on the optimizer.
        optimizer: the optimizer whose rates it changes.
        betas: decay of the two running moments that the step was built with.

    Raises:
        ConfigError: it follows one loss or another metric, or cycles the betas.
    """
    members = optimizer.parameters[0].shape[0]
    if isinstance(scheduler, ReduceLROnPlateau) and members > 1:
        expected = f"a schedule that follows no loss: {members} members share it"
        raise ConfigError("model.lr_scheduler", "ReduceLROnPlateau", expected)
    monitor = getattr(scheduler, "monitor", TRAIN_LOSS)
    if monitor != TRAIN_LOSS:
        expected = f"{TRAIN_LOSS!r}: the rate follows the mean training loss of every Lightning batch"
        raise ConfigError("model.lr_scheduler.monitor", monitor, expected)
    if tuple(optimizer.param_groups[0]["betas"]) != tuple(betas):
        name = type(scheduler).__name__
        raise ConfigError("model.lr_scheduler", name, "one that leaves the betas alone: cycle_momentum: false")


def member_groups(
    learning_rate: float | Sequence[float], weight_decay: float | Sequence[float], members: int
) -> tuple[list[tuple[float, float]], list[int]]:
    """The different pairs of rate and decay, and which of them each member has.

    Args:
        learning_rate: one rate for all members, or one for each.
        weight_decay: one decay for all members, or one for each.
        members: M, models of the run.

    Returns:
        The pairs, in the order of the first members that have them, and the index of every member's pair.
    """
    per_member = list(zip(_for_each(learning_rate, members), _for_each(weight_decay, members), strict=True))
    pairs = list(dict.fromkeys(per_member))
    return pairs, [pairs.index(pair) for pair in per_member]


def _for_each(value: float | Sequence[float], members: int) -> list[float]:
    return [float(value)] * members if isinstance(value, (int, float)) else [float(v) for v in value]


@functools.lru_cache(maxsize=64)
def _as_tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
