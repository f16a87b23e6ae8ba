"""Neurons by their weights: how much of a neuron's output the unembedding sees. Pure functions.

Stolfo et al. 2024, "Confidence Regulation Neurons in Language Models", section 3 (entropy neurons), for the last MLP
layer, whose output meets only the last LayerNorm and the unembedding. What the neurons do is measured in
``opsin.metrics.mean_ablation``.

**Coordinates.** LayerNorm removes the mean over the width, so output weights are centred over D; its weight
is folded into the unembedding; and the softmax sees only differences of logits, so the unembedding is centred over the
vocabulary. The direction of D that is all ones is unseen by construction and no centred weight has a part along it: it
counts neither among the null directions nor among the D - 1 that remain.

Legend: M members, D width, C = D - 1 directions, N neurons, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

NULL_FRACTION = 0.01
"""Directions whose singular value is at most this share of the largest count as unseen by the unembedding."""


@dataclass(frozen=True)
class ReadOut:
    """The last LayerNorm and the unembedding of every member.

    Args:
        norm_weight, norm_bias: the parameters ``ln_final.w`` and ``ln_final.b``.
        unembed: the parameter ``unembed.W_U`` of every member.
        unembed_bias: the parameter ``unembed.b_U``; None where the model has none.
    """

    norm_weight: Float[Tensor, "M D"]
    norm_bias: Float[Tensor, "M D"]
    unembed: Float[Tensor, "M D V"]
    unembed_bias: Float[Tensor, "M V"] | None = None

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> ReadOut:
        """The read-out of a model with LayerNorm.

        Args:
            parameters: weights of every member by name; ``ln_final`` and ``unembed`` are read, and detached. A
                LayerNorm without weight or bias multiplies by ones and adds zeros.
        """
        unembed = parameters["unembed.W_U"].detach()
        weight = parameters.get("ln_final.w", torch.ones_like(unembed[..., 0])).detach()
        bias = parameters.get("ln_final.b", torch.zeros_like(unembed[..., 0])).detach()
        unembed_bias = parameters.get("unembed.b_U")
        return cls(weight, bias, unembed, None if unembed_bias is None else unembed_bias.detach())

    def effective(self) -> Float[Tensor, "M D V"]:
        """W_U with LayerNorm's weight folded in, centred over the width and over the vocabulary."""
        folded = self.norm_weight[..., None] * self.unembed
        folded = folded - folded.mean(1, keepdim=True)
        return folded - folded.mean(2, keepdim=True)

    def constant(self) -> Float[Tensor, "M V"]:
        """Logits of a residual that LayerNorm maps to its bias."""
        logits = torch.bmm(self.norm_bias[:, None], self.unembed)[:, 0]
        return logits if self.unembed_bias is None else logits + self.unembed_bias


def centred(w_out: Float[Tensor, "M N D"]) -> Float[Tensor, "M N D"]:
    """Output weights as LayerNorm sees them: without their mean over the width."""
    return w_out - w_out.mean(-1, keepdim=True)


def weight_norm(w_out: Float[Tensor, "M N D"]) -> Float[Tensor, "M N"]:
    """2-norm of every neuron's centred output weight."""
    return centred(w_out).norm(dim=-1)


def logit_var(w_out: Float[Tensor, "M N D"], read_out: ReadOut) -> Float[Tensor, "M N"]:
    """LogitVar: variance over the vocabulary of the cosine between output weight and unembedding column.

    Stolfo et al. 2024, section 3.1; weights and columns in the module's coordinates, the variance without Bessel's
    correction. Small where the output moves all logits alike, as an entropy neuron's does. A weight of zeros has
    cosine 0 with every column.
    """
    columns = torch.nn.functional.normalize(read_out.effective(), dim=1)
    return torch.bmm(torch.nn.functional.normalize(centred(w_out), dim=-1), columns).var(-1, unbiased=False)


@dataclass(frozen=True)
class NullShare:
    """How much of every neuron's output the unembedding does not see.

    Args:
        rho: norm of the output weight's projection on the null directions over the norm of the weight, from 0 to 1;
            the share of squares is the square of rho. nan for a weight of zeros.
        dimensions: k, the number of null directions, all ones not counted.
        chance: root mean square of rho of a weight of random direction, sqrt(k / (D - 1)).
    """

    rho: Float[Tensor, "M N"]
    dimensions: Int[Tensor, " M"]
    chance: Float[Tensor, " M"]


def null_share(w_out: Float[Tensor, "M N D"], read_out: ReadOut, dimensions: int | None = None) -> NullShare:
    """Share of the output weight's norm on the k bottom left singular directions of the unembedding.

    Stolfo et al. 2024, section 3.3 (a share of norms, not of squares). Computed in double precision.

    Args:
        w_out: output weights of the neurons.
        read_out: the last LayerNorm and the unembedding.
        dimensions: k, from 0 to D - 1. None counts, for each member, the directions whose singular value is at
            most ``NULL_FRACTION`` of the largest, directions without one included: at least max(0, D - V),
            since D - 1 centred directions meet V - 1 differences of logits.

    Returns:
        rho and chance are nan for a member whose unembedding is not finite.
    """
    basis = _without_ones(w_out.shape[-1]).to(w_out.device)  # D C
    effective = read_out.effective().double()
    # a member that has diverged would end the decomposition of all
    known = effective.isfinite().all(-1).all(-1)
    inside = basis.T @ effective.where(known[:, None, None], 0.0)  # M C V
    directions, values, _ = torch.linalg.svd(inside, full_matrices=inside.shape[1] > inside.shape[2])  # M C C
    values = torch.nn.functional.pad(values, (0, inside.shape[1] - values.shape[1]))  # M C, descending
    if dimensions is None:
        unseen = values <= NULL_FRACTION * values[:, :1]
    else:
        unseen = (torch.arange(values.shape[1], device=values.device) >= values.shape[1] - dimensions).expand_as(values)
    squares = (w_out.double() @ basis @ directions).square()
    rho = ((squares * unseen[:, None]).sum(-1) / squares.sum(-1)).sqrt()
    count = unseen.sum(-1)
    chance = (count / values.shape[1]).sqrt()
    rho, chance = (x.where(known[:, None] if x.dim() > 1 else known, torch.nan).to(w_out.dtype) for x in (rho, chance))
    return NullShare(rho, count, chance)


def _without_ones(width: int) -> Float[Tensor, "D C"]:
    """An orthonormal basis of the directions whose entries sum to zero."""
    start = torch.eye(width, dtype=torch.float64)
    start[:, 0] = 1
    return torch.linalg.qr(start).Q[:, 1:]


def random_outputs(w_out: Float[Tensor, "M N D"], seed: int = 0) -> Float[Tensor, "M N D"]:
    """For each neuron a centred output weight of the same centred norm and of random direction: the control.

    Directions are drawn by a generator that nothing else draws from, on the CPU, equal ones for every member.

    Args:
        w_out: output weights whose norms are kept.
        seed: seed of the directions, at least 0.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(w_out.shape[1:], generator=generator, dtype=torch.float64)
    direction = torch.nn.functional.normalize(drawn - drawn.mean(-1, keepdim=True), dim=-1)
    return weight_norm(w_out)[..., None] * direction.to(w_out)
