"""The optimizer object that Lightning, its checkpoints and the learning-rate schedulers see.

The arithmetic of an update is in ``opsin.step``, fused with the loss and the gradient. This object
holds the state that arithmetic changes, and counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from opsin.step import AdamState, Hyper


class MemberAdam(torch.optim.Optimizer):
    """Adam whose state carries the member axis and whose step is handed in as a closure.

    Args:
        named_parameters: names and tensors ``[M, ...]``.
        learning_rate: of every member; a scheduler may change it through ``param_groups``.
        weight_decay: decoupled.
        clip: largest gradient norm of a member; None for no clipping.
        betas: decay of the running moments.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        learning_rate: float,
        weight_decay: float,
        clip: float | None,
        betas: tuple[float, float],
    ) -> None:
        named = list(named_parameters)
        self.names = [name for name, _ in named]
        defaults = {"lr": learning_rate, "weight_decay": weight_decay, "clip": clip, "betas": betas, "steps": 0}
        super().__init__([tensor for _, tensor in named], defaults)
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
        rate, decay, clip = (
            _each_member(value, like.shape[0], like.dtype, like.device)
            for value in (group["lr"], group["weight_decay"], clip)
        )
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


@functools.lru_cache(maxsize=64)
def _each_member(value: float, members: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((members,), value, dtype=dtype, device=device)
