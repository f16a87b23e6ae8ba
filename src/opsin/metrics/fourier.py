"""Fourier structure of a model that learns an operation modulo p: pure measures of weights and activations.

Nanda et al. 2023, "Progress measures for grokking via mechanistic interpretability": a network that adds modulo p keeps
a few *key frequencies* k of its embedding, computes cos w(a + b) and sin w(a + b) with w = 2 pi k / p, and reads out
cos w(a + b - c) for every c. For another operation its answer stands in the place of a + b; measures of logits suppose
that each answer occurs equally often. p is odd.

Legend: M members, P = p numbers modulo p, F = (p - 1) / 2 frequencies, two waves (cosine, sine) of each, B pairs (a, b)
of the table, D width, N neurons.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def fourier_basis(modulus: int) -> Float[Tensor, "F two P"]:
    """Cosine and sine of every frequency k = 1 .. (p - 1) / 2 at 0 .. p - 1, float64, each of length 1.

    With the constant they are an orthonormal basis.

    Args:
        modulus: p, an odd number of at least 3.
    """
    frequency, x = torch.arange(1, modulus // 2 + 1), torch.arange(modulus)
    # whole turns are taken off while they are whole numbers
    angle = 2 * torch.pi * (frequency[:, None] * x % modulus).double() / modulus
    return torch.stack([angle.cos(), angle.sin()], 1) * (2 / modulus) ** 0.5


def power_by_frequency(weight: Float[Tensor, "M P D"]) -> Float[Tensor, "M F"]:
    """Sum of the squared Fourier coefficients of a weight's rows, over cosine, sine and width.

    Over all frequencies they add up to the squared size of the weight less its mean row.

    Args:
        weight: embedding of the numbers 0 .. p - 1, a row each.
    """
    basis = fourier_basis(weight.shape[1]).to(weight)
    return torch.einsum("fxp,mpd->mfxd", basis, weight).square().sum((2, 3))


def gini(amounts: Float[Tensor, "M F"]) -> Float[Tensor, " M"]:
    """Gini coefficient of amounts of 0 or more: 0 where all are equal, (F - 1) / F where one has everything."""
    count = amounts.shape[1]
    rank = torch.arange(1, count + 1, device=amounts.device, dtype=amounts.dtype)
    return ((2 * rank - count - 1) * amounts.sort(1).values).sum(1) / (count * amounts.sum(1))


def strongest_frequencies(power: Float[Tensor, "M F"], count: int) -> Bool[Tensor, "M F"]:
    """Which frequencies have the most power.

    Args:
        power: power of every frequency; frequency k is at index k - 1.
        count: number of frequencies that are chosen, at most F.
    """
    chosen = power.topk(count, 1).indices
    return torch.zeros_like(power, dtype=torch.bool).scatter(1, chosen, True)


def share_in(power: Float[Tensor, "M F"], chosen: Bool[Tensor, "M F"]) -> Float[Tensor, " M"]:
    """Share of the power that chosen frequencies have."""
    return torch.where(chosen, power, 0.0).sum(1) / power.sum(1)


def neuron_concentration(activation: Float[Tensor, "M P P N"]) -> Float[Tensor, "M N"]:
    """Largest share of a neuron's variance over all pairs (a, b) that lies in one frequency; nan where it has none.

    The part of frequency w is what {1, cos wa, sin wa} x {1, cos wb, sin wb} spans, without the constant (Nanda et al.
    2023).

    Args:
        activation: activation of each neuron at every a and b.
    """
    modulus = activation.shape[1]
    basis = fourier_basis(modulus).to(activation)
    constant = activation.new_full((1, modulus), modulus**-0.5)
    waves = torch.cat([constant, basis.flatten(0, 1)])
    squared = torch.einsum("ia,mabn,jb->mijn", waves, activation, waves).square()
    frequencies = (-1, 2)
    of_one = (squared[:, 1:, 0] + squared[:, 0, 1:]).unflatten(1, frequencies).sum(2)  # M F N
    of_both = squared[:, 1:, 1:].unflatten(2, frequencies).unflatten(1, frequencies)  # M F 2 F 2 N
    in_frequency = of_one + of_both.diagonal(dim1=1, dim2=3).sum((1, 2)).mT
    return in_frequency.amax(1) / (squared.sum((1, 2)) - squared[:, 0, 0])


# ---- logits -----------------------------------------------------------------------------------------


def trig_coefficients(logits: Float[Tensor, "M B P"], answers: Int[Tensor, " B"]) -> Float[Tensor, "M F"]:
    """Inner product of the logits with cos w(answer - c) over all pairs and outputs c, of length 1, for every w.

    Args:
        logits: logits of every output c at every pair.
        answers: right answer of every pair.
    """
    basis = fourier_basis(logits.shape[-1]).to(logits)
    # cos w(s - c) = cos ws cos wc + sin ws sin wc, of squared length p / 2 at each pair
    size = (2 * len(answers) / logits.shape[-1]) ** 0.5
    return torch.einsum("fxb,mbc,fxc->mf", basis[:, :, answers], logits, basis) / size


def share_of_logits(coefficients: Float[Tensor, "M F"], logits: Float[Tensor, "M B P"]) -> Float[Tensor, " M"]:
    """Share of the logits' variance that the cos w(answer - c) explain.

    A pair's mean over outputs, which changes no probability, does not count.

    Args:
        coefficients: trigonometric coefficients of the logits.
        logits: logits of every output at every pair.
    """
    centred = logits - logits.mean(-1, keepdim=True)
    return coefficients.square().sum(1) / centred.square().sum((1, 2))


def part_in(
    logits: Float[Tensor, "M B P"], answers: Int[Tensor, " B"], chosen: Bool[Tensor, "M F"]
) -> Float[Tensor, "M B P"]:
    """The part of the logits, as functions of the pair, along cos w(answer) and sin w(answer) of chosen frequencies.

    Args:
        logits: logits of every output at every pair.
        answers: right answer of every pair; each occurs equally often.
        chosen: frequencies that count, of each member.
    """
    count, modulus = logits.shape[1:]
    waves = fourier_basis(modulus).to(logits)[:, :, answers] * (modulus / count) ** 0.5  # F 2 B, of length 1
    coefficients = torch.einsum("fxb,mbc,mf->mfxc", waves, logits, chosen.to(logits))
    return torch.einsum("fxb,mfxc->mbc", waves, coefficients)


def restricted(
    logits: Float[Tensor, "M B P"], answers: Int[Tensor, " B"], chosen: Bool[Tensor, "M F"]
) -> Float[Tensor, "M B P"]:
    """Logits with nothing but their mean over pairs and their part in chosen frequencies (Nanda et al. 2023).

    Args:
        logits: logits of every output at every pair.
        answers: right answer of every pair; each occurs equally often.
        chosen: frequencies that are kept, of each member.
    """
    return logits.mean(1, keepdim=True) + part_in(logits, answers, chosen)


def excluded(
    logits: Float[Tensor, "M B P"], answers: Int[Tensor, " B"], chosen: Bool[Tensor, "M F"]
) -> Float[Tensor, "M B P"]:
    """Logits without their part in chosen frequencies (Nanda et al. 2023).

    Args:
        logits: logits of every output at every pair.
        answers: right answer of every pair; each occurs equally often.
        chosen: frequencies that are taken away, of each member.
    """
    return logits - part_in(logits, answers, chosen)
