"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024), as torch has it.

With g the clipped gradient of a matrix, mu the momentum, eta the rate, lambda the decoupled weight decay and NS some
Newton-Schulz iterations X <- a X + (b A + c A^2) X, A = X X^T, from X / |X|:

    m <- mu m + (1 - mu) g                                  momentum_buffer
    w <- (1 - eta lambda) w - eta s NS(m),  or with Nesterov's momentum  NS(mu m + (1 - mu) g)

with s = sqrt(max(1, outputs / inputs)) (``original``), or 0.2 sqrt(max(outputs, inputs)) (``match_rms_adamw``, Liu et
al. 2025, at which the rates of AdamW do). It is for the weights between hidden layers; everything else follows AdamW.

Legend: M members, I inputs and O outputs of a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.optimizers.adam import RUNNING_MEANS, adam_clock, adam_derived, adamw_update
from opsin.optimizers.base import Optimizer, Tensors, zeros_like

MOST_ITERATIONS = 99


@dataclass(frozen=True)
class Muon(Optimizer):
    """Momentum made orthogonal for matrices, as ``torch.optim.Muon``, and AdamW for all other parameters.

    Args:
        learning_rate: step size of a matrix; a list has one for each member.
        weight_decay: share of a weight that an update takes away, times the rate; a list has one for each member.
        momentum: decay of a matrix's running mean, in [0, 1); a list has one for each member.
        adamw_ratio: step size of all other parameters over that of a matrix; a list has one for each member.
        adamw_weight_decay: decoupled decay of all other parameters; a list has one for each member.
        betas: decay of AdamW's two running means, in [0, 1); a list of pairs has one for each member.
        eps: number added to the square root of AdamW's second running mean; a list has one for each member.
        nesterov: whether the gradient is seen ahead of the momentum.
        adjust: how a matrix's step depends on its shape, ``original`` or ``match_rms_adamw``.
        iterations: number of Newton-Schulz iterations, at most 99.
        coefficients: the numbers a, b and c of an iteration.
        least_norm: smallest norm that a matrix is divided by.
        precision: type of number that iterations are computed in: the one of the weights, or torch's own bfloat16,
            matrix by matrix, whose rounding depends on the kernel.
        adamw: parts of the names of matrices that follow AdamW all the same.
    """

    learning_rate: float | list[float] = 1e-3
    weight_decay: float | list[float] = 0.1
    momentum: float | list[float] = 0.95
    adamw_ratio: float | list[float] = 1.0
    adamw_weight_decay: float | list[float] = 0.0
    betas: tuple[float, float] | list[tuple[float, float]] = (0.9, 0.999)
    eps: float | list[float] = 1e-8
    nesterov: bool = True
    adjust: Literal["original", "match_rms_adamw"] = "original"
    iterations: int = 5
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    least_norm: float = 1e-7
    precision: Literal["weights", "bfloat16"] = "weights"
    adamw: tuple[str, ...] = ("embed",)

    hyper_names: ClassVar[tuple[str, ...]] = (
        *("learning_rate", "weight_decay", "momentum"),
        *("adamw_ratio", "adamw_weight_decay", "betas", "eps"),
    )

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "adamw_ratio", "adamw_weight_decay"):
            self.check_hyper(name, "0 or more", 0)
        self.check_hyper("momentum", "0 or more and less than 1", 0, 1)
        self.check_hyper("betas", "two numbers of 0 or more and less than 1", 0, 1)
        for name in ("eps", "least_norm"):
            self.check_hyper(name, "more than 0", 0, above=True)
        self.check_hyper("iterations", f"from 1 to {MOST_ITERATIONS}", 1, MOST_ITERATIONS + 1)
        self.check_hyper("coefficients", "three finite numbers", -math.inf)
        for name, known in (("adjust", ("original", "match_rms_adamw")), ("precision", ("weights", "bfloat16"))):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"Muon.{name}", value, " or ".join(map(repr, known)))

    def start(self, name: str, parameter: Float[Tensor, "M ..."]) -> dict[str, Tensor]:
        matrix = parameter.dim() == 3 and not any(part in name for part in self.adamw)
        return zeros_like(parameter, *(("momentum_buffer",) if matrix else RUNNING_MEANS))

    def derived(self, hyper: Tensors) -> dict[str, Tensor]:
        return {**adam_derived(hyper), "entering": 1 - hyper["momentum"]}

    def clock(self, hyper: Tensors, updates: Float[Tensor, "..."]) -> dict[str, Tensor]:
        return adam_clock(hyper, updates)

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Tensors, hyper: Tensors, clock: Tensors
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if "momentum_buffer" not in state:
            rate, decay = hyper["adamw_ratio"] * hyper["learning_rate"], hyper["adamw_weight_decay"]
            settings = {**hyper, "learning_rate": rate, "weight_decay": decay}
            return adamw_update(parameter, gradient, state, settings, clock)
        momentum, entering, rate = hyper["momentum"], hyper["entering"], hyper["learning_rate"]
        buffer = momentum * state["momentum_buffer"] + entering * gradient
        ahead = momentum * buffer + entering * gradient if self.nesterov else buffer
        move = self._orthogonal(ahead).to(parameter.dtype)
        decayed = parameter * (1 - rate * hyper["weight_decay"])
        return decayed - rate * self._scale(*parameter.shape[1:]) * move, {"momentum_buffer": buffer}

    def _scale(self, inputs: int, outputs: int) -> float:
        """What the rate of a matrix is multiplied by; it is stored as inputs x outputs."""
        return (
            math.sqrt(max(1, outputs / inputs)) if self.adjust == "original" else 0.2 * math.sqrt(max(outputs, inputs))
        )

    def _orthogonal(self, matrix: Float[Tensor, "M I O"]) -> Float[Tensor, "M I O"]:
        # as torch.nn.Linear has it: an iteration works on the shorter side
        turned = matrix.transpose(1, 2)
        if self.precision == "weights":
            return self._iterated(turned).transpose(1, 2)
        # one by one, since another kernel would round otherwise
        return torch.stack([self._iterated(one.bfloat16()) for one in turned]).transpose(1, 2)

    def _iterated(self, matrix: Float[Tensor, "... O I"]) -> Float[Tensor, "... O I"]:
        """Newton-Schulz iterations: singular values come near 1, singular vectors stay."""
        tall = matrix.shape[-2] > matrix.shape[-1]
        x = matrix.mT if tall else matrix
        x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=self.least_norm)
        a, b, c = self.coefficients
        add = torch.baddbmm if x.dim() == 3 else torch.addmm
        for _ in range(self.iterations):
            gram = x @ x.mT
            x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x
