"""How far a model is as sure as it should be, and what calibrating it afterwards would change. Pure functions.

Predictions are given as logits or as log-probabilities, whose softmax is the same. All numbers are per member; in the
fits too no member meets another. Fits are deterministic: they start where nothing is changed, or at the best
temperature, and have a fixed number of steps.

Legend: M members, B batch, Q scored positions, V outputs, ... the other axes of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

TEMPERATURES = (0.01, 100.0)
"""Lowest and highest temperature that is looked for: of a model that is never wrong the best one is 0."""

HALVINGS = 36
"""Times that the interval of log-temperatures is halved: to about 1e-10."""


# ---- how far from calibrated ------------------------------------------------------------------------


def expected_calibration_error(
    logits: Float[Tensor, "M B Q V"], targets: Int[Tensor, "M B Q"], bins: int = 15
) -> Float[Tensor, " M"]:
    """Distance of confidence from accuracy, between 0 and 1.

    Predictions are put into bins of equal width by the probability of the most likely output, (0, 1/bins], ...; the
    error is the mean over predictions of |accuracy - mean confidence| of their bin. Guo et al. 2017 ("On calibration of
    modern neural networks"), equation 3.

    Args:
        logits: predictions, as logits or log-probabilities.
        targets: right answers, numbers of outputs.
        bins: number of bins; Guo et al. 2017 take 15.
    """
    confidence, answer = logits.double().softmax(-1).flatten(1, 2).max(-1)
    right = (answer == targets.flatten(1)).double()
    bin_index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(len(logits), bins, dtype=torch.float64, device=logits.device)
    gaps.scatter_add_(1, bin_index, right - confidence)
    return (gaps.abs().sum(1) / confidence.shape[1]).to(logits.dtype)


def brier_score(logits: Float[Tensor, "M B Q V"], targets: Int[Tensor, "M B Q"]) -> Float[Tensor, " M"]:
    """Mean squared distance of the probabilities from the answer, summed over outputs: between 0 and 2 (Brier 1950).

    Args:
        logits: predictions, as logits or log-probabilities.
        targets: right answers, numbers of outputs.
    """
    probabilities = logits.softmax(-1)
    answer = torch.nn.functional.one_hot(targets, logits.shape[-1])
    return (probabilities - answer).square().sum(-1).mean((1, 2))


def mean_entropy(logits: Float[Tensor, "M B Q V"]) -> Float[Tensor, " M"]:
    """Entropy of the predictions, nats; outputs ruled out (-inf) count as 0."""
    return torch.special.entr(logits.softmax(-1)).sum(-1).mean((1, 2))


def mean_loss(logits: Float[Tensor, "M B Q V"], targets: Int[Tensor, "M B Q"]) -> Float[Tensor, " M"]:
    """Negative log-likelihood of the answers, nats, mean over predictions.

    Args:
        logits: predictions, as logits or log-probabilities.
        targets: right answers, numbers of outputs.
    """
    return _surprise(logits, targets).mean((1, 2))


def _surprise(logits: Float[Tensor, "M B Q V"], targets: Int[Tensor, "M B Q"]) -> Float[Tensor, "M B Q"]:
    return -logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


# ---- calibrating afterwards -------------------------------------------------------------------------


def fit_temperature(logits: Float[Tensor, "M B Q V"], targets: Int[Tensor, "M B Q"]) -> Float[Tensor, " M"]:
    """The temperature that logits should be divided by: temperature scaling (Guo et al. 2017, section 4.2).

    The loss is convex in 1 / T, and its slope is the mean expected logit minus the mean logit of the answers; its zero
    is found by halving, in double precision, between the ``TEMPERATURES``. nan where logits are not finite.

    Args:
        logits: predictions on held-out sequences, as logits or log-probabilities.
        targets: right answers of the held-out sequences, numbers of outputs.
    """
    z = logits.detach().double()
    answer = z.gather(-1, targets[..., None]).mean((1, 2, 3))
    low, high = (torch.full_like(answer, math.log(limit)) for limit in TEMPERATURES)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        expected = (z * (z / _wide(middle.exp())).softmax(-1)).sum(-1).mean((1, 2))
        # an expected logit above the answers' says that the distribution is too sharp
        too_sharp = expected > answer
        low, high = torch.where(too_sharp, middle, low), torch.where(too_sharp, high, middle)
    return ((low + high) / 2).exp().where(answer.isfinite() & expected.isfinite(), torch.nan).to(logits.dtype)


def at_temperature(logits: Float[Tensor, "M B Q V"], temperature: Float[Tensor, " M"]) -> Float[Tensor, "M B Q V"]:
    """Every member's logits divided by that member's temperature."""
    return logits / _wide(temperature)


@dataclass(frozen=True)
class VectorScaling:
    """A scale and a shift for every output.

    Args:
        scale: factor of every logit, 1 for no change.
        shift: what is added to every scaled logit.
    """

    scale: Float[Tensor, "M V"]
    shift: Float[Tensor, "M V"]

    def __call__(self, logits: Float[Tensor, "M B Q V"]) -> Float[Tensor, "M B Q V"]:
        """The calibrated logits."""
        return logits * self.scale[:, None, None] + self.shift[:, None, None]


def fit_vector_scaling(
    logits: Float[Tensor, "M B Q V"], targets: Int[Tensor, "M B Q"], steps: int = 150, rate: float = 0.05
) -> VectorScaling:
    """A scale and a shift per output: vector scaling (Guo et al. 2017, section 4.2), by negative log-likelihood.

    Starts at the best temperature and takes ``steps`` steps of Adam, their size falling from ``rate`` to 0 along a
    cosine. The shift of an output that is never the answer has no finite best value: the number of steps bounds it.

    Args:
        logits: predictions on held-out sequences, as logits or log-probabilities.
        targets: right answers of the held-out sequences, numbers of outputs.
        steps: number of steps that the optimizer takes.
        rate: step size of the optimizer at its first step.
    """
    z = logits.detach().flatten(1, 2)
    answer = torch.nn.functional.one_hot(targets.flatten(1), z.shape[-1]).to(z.dtype)
    scale = (1 / fit_temperature(logits, targets))[:, None].repeat(1, z.shape[-1])
    shift = torch.zeros_like(scale)
    wanted, wanted_logit = answer.mean(1), (answer * z).mean(1)

    def slope() -> list[Tensor]:
        p = (z * scale[:, None] + shift[:, None]).softmax(-1)
        return [(p * z).mean(1) - wanted_logit, p.mean(1) - wanted]

    _descend([scale, shift], slope, steps, rate)
    return VectorScaling(scale, shift)


@dataclass(frozen=True)
class NeuralClamping:
    """A perturbation that is added to every input, and a temperature.

    Args:
        perturbation: what is added to the input of every sequence, in units of the input.
        temperature: what the logits of the perturbed input are divided by, above 0.
    """

    perturbation: Float[Tensor, "M ..."]
    temperature: Float[Tensor, " M"]


def fit_neural_clamping(
    logits_at: Callable[[Tensor], Tensor],
    perturbation: Float[Tensor, "M ..."],
    targets: Int[Tensor, "M B Q"],
    focus: float = 1.0,
    penalty: float = 0.01,
    steps: int = 100,
    rate: float = 0.01,
) -> NeuralClamping:
    """A universal input perturbation and a temperature, learned together: Neural Clamping.

    Tang, Chen and Ho 2022 ("Neural Clamping: Joint Input Perturbation and Temperature Scaling for Neural Network
    Calibration"): a focal loss of the calibrated predictions and a penalty on the size of the perturbation. Here they
    are the mean of -(1 - p)^focus log p of the answers, and ``penalty`` times the squared 2-norm; the form of the
    penalty, the default strengths, the start and the optimizer are choices of this project. The focal loss asks for
    less sure predictions than the answers warrant (its minimum is a calibrated model only where ``focus`` is 0), so
    that a well calibrated model can lose by it.

    Starts at no perturbation and the best temperature, and takes ``steps`` steps of Adam, their size falling from
    ``rate`` to 0 along a cosine; the temperature is learned by its logarithm.

    Args:
        logits_at: logits ``[M, B, Q, V]`` of the held-out sequences when a perturbation is added to their input;
            differentiable.
        perturbation: perturbation to start from, zeros in the shape of one sequence's input.
        targets: right answers of the held-out sequences, numbers of outputs.
        focus: exponent of the focal loss, 0 (the negative log-likelihood) or at least 1.
        penalty: factor of the squared 2-norm of the perturbation in the loss, nats per squared unit of the input.
        steps: number of steps that the optimizer takes.
        rate: step size of the optimizer at its first step.
    """
    delta = perturbation.detach().clone()
    with torch.no_grad():
        heat = fit_temperature(logits_at(delta), targets).log()
    leaves = [delta.requires_grad_(), heat.requires_grad_()]

    def slope() -> Sequence[Tensor]:
        with torch.enable_grad():
            surprise = _surprise(at_temperature(logits_at(delta), heat.exp()), targets)
            wrong = -torch.expm1(-surprise)  # 1 - p
            loss = (wrong**focus * surprise).mean((1, 2)) + penalty * delta.square().flatten(1).sum(1)
            # members do not mix, so the gradient of the sum holds the gradient of each
            return torch.autograd.grad(loss.sum(), leaves)

    _descend(leaves, slope, steps, rate)
    return NeuralClamping(delta.detach(), heat.detach().exp())


def _descend(leaves: Sequence[Tensor], slope: Callable[[], Sequence[Tensor]], steps: int, rate: float) -> None:
    """Move tensors ``[M, ...]`` against their slope, in place; elementwise, so that members do not meet."""
    optimizer = torch.optim.Adam(leaves, rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        for leaf, gradient in zip(leaves, slope(), strict=True):
            leaf.grad = gradient
        optimizer.step()


def _wide(values: Float[Tensor, " M"]) -> Float[Tensor, "M 1 1 1"]:
    return values[:, None, None, None]
