"""Adam (Kingma and Ba 2015, algorithm 1), with weight decay in the gradient or beside it.

With g the clipped gradient, t the number of the update, eta the learning rate and lambda the weight decay:

    m <- beta1 m + (1 - beta1) g                 exp_avg
    v <- beta2 v + (1 - beta2) g^2               exp_avg_sq
    w <- w - eta (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

``Adam`` adds lambda w to g first (coupled, an L2 penalty); ``AdamW`` multiplies w by 1 - eta lambda instead (decoupled,
Loshchilov and Hutter 2019). With betas of 0 both move every weight by eta in the direction of -sign(g): sign descent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.optimizers.base import Optimizer, Tensors, zeros_like

RUNNING_MEANS = ("exp_avg", "exp_avg_sq")
"""Running means of the gradient and of its square, under torch's names."""

SHORT_FORM: Mapping[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
"""Settings of AdamW that a recipe may give as settings of ``model`` where it names no class, and their defaults."""


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay, as ``torch.optim.AdamW``; what the settings of ``model`` give without a class.

    Args:
        learning_rate: step size of an update; a list has one for each member.
        weight_decay: share of a weight that an update takes away, times the rate; a list has one for each member.
        betas: decay of the two running means, in [0, 1); a list of pairs has one for each member.
        eps: number added to the square root of the second running mean; a list has one for each member.
    """

    learning_rate: float | list[float] = 1e-3
    weight_decay: float | list[float] = 0.0
    betas: tuple[float, float] | list[tuple[float, float]] = (0.9, 0.999)
    eps: float | list[float] = 1e-8

    hyper_names: ClassVar[tuple[str, ...]] = ("learning_rate", "weight_decay", "betas", "eps")

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay"):
            self.check_hyper(name, "0 or more", 0)
        self.check_hyper("betas", "two numbers of 0 or more and less than 1", 0, 1)
        self.check_hyper("eps", "more than 0", 0, above=True)

    def start(self, name: str, parameter: Float[Tensor, "M ..."]) -> dict[str, Tensor]:
        return zeros_like(parameter, *RUNNING_MEANS)

    def derived(self, hyper: Tensors) -> dict[str, Tensor]:
        return adam_derived(hyper)

    def clock(self, hyper: Tensors, updates: Float[Tensor, "..."]) -> dict[str, Tensor]:
        return adam_clock(hyper, updates)

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Tensors, hyper: Tensors, clock: Tensors
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return adamw_update(parameter, gradient, state, hyper, clock)


@dataclass(frozen=True)
class Adam(AdamW):
    """Adam with coupled weight decay, as ``torch.optim.Adam``.

    Args:
        learning_rate: step size of an update; a list has one for each member.
        weight_decay: factor of the weights in the gradient (L2 penalty); a list has one for each member.
        betas: decay of the two running means, in [0, 1); a list of pairs has one for each member.
        eps: number added to the square root of the second running mean; a list has one for each member.
    """

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Tensors, hyper: Tensors, clock: Tensors
    ) -> tuple[Tensor, dict[str, Tensor]]:
        move, moments = adam_move(gradient + hyper["weight_decay"] * parameter, state, hyper, clock)
        return parameter - hyper["learning_rate"] * move, moments


def adam_derived(hyper: Tensors) -> dict[str, Tensor]:
    """What the arithmetic of Adam wants beside its hyper-parameters.

    Args:
        hyper: every hyper-parameter but the learning rate in double precision, by name.
    """
    return {"weights": 1 - hyper["betas"], "log_betas": hyper["betas"].log()}


def adam_clock(hyper: Tensors, updates: Float[Tensor, "..."]) -> dict[str, Tensor]:
    """The two bias corrections, 1 - beta^t.

    Args:
        hyper: hyper-parameters and what is derived from them, by name.
        updates: number of this update, from 1.
    """
    return {"corrections": -torch.expm1(updates * hyper["log_betas"])}


def adam_move(gradient: Tensor, state: Tensors, hyper: Tensors, clock: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
    """The move of a weight at a learning rate of 1, and the running means after it.

    Args:
        gradient: gradient ``[M, ...]`` of every member's loss.
        state: the two running means before the update, by name.
        hyper: hyper-parameters and what is derived from them, by name.
        clock: bias corrections of this update.
    """
    (beta1, beta2), (weight1, weight2) = hyper["betas"], hyper["weights"]
    mean = beta1 * state["exp_avg"] + weight1 * gradient
    square = beta2 * state["exp_avg_sq"] + weight2 * gradient * gradient
    correction1, correction2 = clock["corrections"]
    move = (mean / correction1) / ((square / correction2).sqrt() + hyper["eps"])
    return move, {"exp_avg": mean, "exp_avg_sq": square}


def adamw_update(
    parameter: Tensor, gradient: Tensor, state: Tensors, hyper: Tensors, clock: Tensors
) -> tuple[Tensor, dict[str, Tensor]]:
    """One update of AdamW, with the arguments of ``Optimizer.update``."""
    move, moments = adam_move(gradient, state, hyper, clock)
    rate = hyper["learning_rate"]
    return parameter * (1 - rate * hyper["weight_decay"]) - rate * move, moments
