"""Stochastic gradient descent with momentum (Sutskever et al. 2013), as torch has it.

With g the clipped gradient plus lambda w (coupled weight decay), mu the momentum, tau the dampening and eta the rate:

    b <- mu b + (1 - tau) g,  b <- g at the first update       momentum_buffer
    w <- w - eta b,  or with Nesterov's momentum  w <- w - eta (g + mu b)

Without momentum b is g, whatever the dampening.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.optimizers.base import Optimizer, Tensors, zeros_like


@dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent with momentum and coupled weight decay, as ``torch.optim.SGD``.

    Args:
        learning_rate: step size of an update; a list has one for each member.
        momentum: share of the last update that is kept, in [0, 1); a list has one for each member.
        dampening: share of the gradient that does not enter the momentum, at most 1; a list has one for each member.
        weight_decay: factor of the weights in the gradient (L2 penalty); a list has one for each member.
        nesterov: whether the gradient is seen ahead of the momentum (Nesterov 1983).
    """

    learning_rate: float | list[float] = 1e-3
    momentum: float | list[float] = 0.0
    dampening: float | list[float] = 0.0
    weight_decay: float | list[float] = 0.0
    nesterov: bool = False

    hyper_names: ClassVar[tuple[str, ...]] = ("learning_rate", "momentum", "dampening", "weight_decay")

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay"):
            self.check_hyper(name, "0 or more", 0)
        self.check_hyper("momentum", "0 or more and less than 1", 0, 1)
        self.check_hyper("dampening", "from 0 to 1", 0, 1 + 1e-12)
        if self.nesterov:
            self._check_nesterov()

    def _check_nesterov(self) -> None:
        for name, expected in (("momentum", "more than 0 beside nesterov"), ("dampening", "0 beside nesterov")):
            value = getattr(self, name)
            numbers = value if isinstance(value, list) else [value]
            if any((number > 0) != (name == "momentum") for number in numbers):
                raise ConfigError(f"SGD.{name}", value, expected)

    def start(self, name: str, parameter: Float[Tensor, "M ..."]) -> dict[str, Tensor]:
        return zeros_like(parameter, "momentum_buffer")

    def derived(self, hyper: Tensors) -> dict[str, Tensor]:
        momentum, dampening = hyper["momentum"], hyper["dampening"]
        return {"damped": torch.where(momentum == 0, torch.zeros_like(dampening), dampening)}

    def clock(self, hyper: Tensors, updates: Float[Tensor, "..."]) -> dict[str, Tensor]:
        return {"share": torch.where(updates <= 1, torch.ones_like(hyper["damped"]), 1 - hyper["damped"])}

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Tensors, hyper: Tensors, clock: Tensors
    ) -> tuple[Tensor, dict[str, Tensor]]:
        gradient = gradient + hyper["weight_decay"] * parameter
        buffer = hyper["momentum"] * state["momentum_buffer"] + clock["share"] * gradient
        move = gradient + hyper["momentum"] * buffer if self.nesterov else buffer
        return parameter - hyper["learning_rate"] * move, {"momentum_buffer": buffer}
