"""Neurons by what their mean ablation does to the output, in total and with a mediator held. Pure functions.

Stolfo et al. 2024, "Confidence Regulation Neurons in Language Models", sections 3 (entropy neurons) and 4
(token-frequency neurons), for the last MLP layer. Coordinates are those of ``opsin.metrics.neuron_weights``.

**Mediation.** A mean ablation replaces a neuron's activation by its mean. Its *total* effect is the change (ablated
minus not) of a quantity of the output; its *direct* effect is that change with a mediator held where it is without the
ablation: the standard deviation that LayerNorm divides by, or the projection of the logits on the log-unigram
direction. The mediated share is 1 - direct / total, each the mean over tokens of the absolute change.

Legend: M members, B batch, L positions, D width, N neurons, V vocabulary, T tokens that are averaged over, I tokens of
one tile, J neurons of one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opsin.metrics.neuron_weights import ReadOut, centred
from opsin.model.layers import NORM_EPS

Mediator = Literal["scale", "frequency"]
"""What a direct effect holds: LayerNorm's scale, or the logits' projection on the log-unigram direction."""

LEAST_EFFECT = 1e-6
"""Nats; of a smaller total effect no share is taken, since single precision does not resolve it."""

TILE_TOKENS, TILE = 256, 2**18
"""Tokens whose effects are computed together, and logits: what the caches of a processor hold."""


@dataclass(frozen=True)
class Effect:
    """What mean-ablating each neuron does to one quantity of the output (nats, ablated minus not), means over tokens.

    Args:
        total, direct: means of the absolute change, nats; direct with the mediator held.
        total_signed, direct_signed: means of the change with its sign, nats.
    """

    total: Float[Tensor, "M N"]
    direct: Float[Tensor, "M N"]
    total_signed: Float[Tensor, "M N"]
    direct_signed: Float[Tensor, "M N"]

    @property
    def mediated(self) -> Float[Tensor, "M N"]:
        """1 - direct / total: the share that passes through the mediator; nan for a total below ``LEAST_EFFECT``.

        Below 0 where holding the mediator makes the effect larger.
        """
        return torch.where(self.total > LEAST_EFFECT, 1 - self.direct / self.total, torch.nan)


def finite_unigram(unigram: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
    """The unigram with a finite logarithm: an output that never occurs counts as half as frequent as the rarest."""
    lowest = unigram[unigram > 0].min() / 2
    raised = unigram.clamp(min=lowest)
    return raised / raised.sum()


def unit_log_unigram(unigram: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
    """The unit direction of the centred log-unigram in the space of logits; zeros where no output is rarer."""
    log = unigram.log()
    return torch.nn.functional.normalize(log - log.mean(), dim=0)


@torch.no_grad()
def mean_ablation_effects(
    read_out: ReadOut,
    resid: Float[Tensor, "M B L D"],
    post: Float[Tensor, "M B L N"],
    w_out: Float[Tensor, "M N D"],
    *,
    targets: Int[Tensor, "M B L"] | None = None,
    unigram: Float[Tensor, " V"] | None = None,
    means: Float[Tensor, "M _ _ N"] | None = None,
    where: Bool[Tensor, "M B L"] | None = None,
    mediator: Mediator = "scale",
) -> dict[str, Effect]:
    """Total and direct effect of mean-ablating each neuron of the last MLP, one at a time, on the output.

    Stolfo et al. 2024, sections 3.2 and 4. Exact: an ablation changes the residual by a multiple of the output weight,
    so the centred residual's logits, its variance and their changes are inner products that all neurons share, and
    no neuron costs a forward pass.

    Args:
        read_out: the last LayerNorm and the unembedding.
        resid: residual stream before the last LayerNorm, the neurons' outputs included.
        post: activations of the neurons after the nonlinearity.
        w_out: output weights of the neurons; ``random_outputs`` of them for the control, whose ablation removes as
            much in another direction.
        targets: right outputs, for the effect on the loss; None for no such effect.
        unigram: probabilities above 0, for the effect on the divergence from the unigram; None for no such effect.
        means: activations that replace the neurons', axes of B and L may be 1; the mean over B and L when None.
        where: tokens that the effects are averaged over; all when None. nan where a member has none.
        mediator: quantity that the direct effect holds; ``frequency`` needs the unigram.

    Returns:
        ``"entropy"``; ``"loss"`` (cross-entropy) if there are targets; ``"kl"`` if there is a unigram:
        KL(model || unigram), the expectation under the model's output of the log-ratio.
    """
    matrix, constant, weights = read_out.effective(), read_out.constant(), centred(w_out)
    away = post - (post.mean((1, 2), keepdim=True) if means is None else means)
    log_unigram = None if unigram is None else unigram.to(resid).log()
    direction = None if unigram is None or mediator == "scale" else unit_log_unigram(unigram.to(resid))
    members = []
    for m in range(len(resid)):
        chosen = torch.ones_like(resid[m, ..., 0], dtype=torch.bool) if where is None else where[m]
        answers = None if targets is None else targets[m][chosen]
        neurons = _Neurons(weights[m], weights[m] @ matrix[m], constant[m], log_unigram, direction)
        members.append(neurons.effects(resid[m][chosen], matrix[m], away[m][chosen], answers))
    found = torch.stack(members, 2)  # measures, kinds, M, N
    given = {"entropy": True, "loss": targets is not None, "kl": unigram is not None}
    return {name: Effect(*kinds) for name, kinds in zip([n for n in given if given[n]], found, strict=True)}


@dataclass(frozen=True)
class _Neurons:
    """One member's neurons as its read-out sees them.

    Args:
        weights: centred output weight of every neuron.
        logits: what a unit of activation adds to the logits before LayerNorm divides.
        constant: logits of a residual of zeros.
        log_unigram: logarithm of the unigram; None where no divergence from it is measured.
        direction: unit direction in logits whose projection is held; None to hold the scale.
    """

    weights: Float[Tensor, "N D"]
    logits: Float[Tensor, "N V"]
    constant: Float[Tensor, " V"]
    log_unigram: Float[Tensor, " V"] | None
    direction: Float[Tensor, " V"] | None

    def effects(
        self,
        resid: Float[Tensor, "T D"],
        matrix: Float[Tensor, "D V"],
        away: Float[Tensor, "T N"],
        targets: Int[Tensor, " T"] | None,
    ) -> Float[Tensor, "measures 4 N"]:
        """Mean over tokens of absolute total and direct, then signed total and direct changes."""
        tokens, neurons = away.shape
        summed: Tensor | None = None
        for first in range(0, max(tokens, 1), TILE_TOKENS):
            rows = slice(first, first + TILE_TOKENS)
            tile = _Tile.of(resid[rows], matrix, None if targets is None else targets[rows], self)
            step = max(1, TILE // max(1, tile.logits.numel()))
            parts = [
                self._changes(tile, away[rows, n : n + step].T, slice(n, n + step)) for n in range(0, neurons, step)
            ]
            summed = torch.cat(parts, -1) if summed is None else summed + torch.cat(parts, -1)
        assert summed is not None
        return summed / tokens

    def _changes(self, tile: _Tile, away: Float[Tensor, "J I"], chosen: slice) -> Float[Tensor, "measures 4 J"]:
        """Sums over a tile's tokens, as ``effects`` orders them."""
        weights = self.weights[chosen]
        # the variance of a residual that a multiple of a weight is taken from, by inner products
        moved = away * (away * weights.square().sum(-1)[:, None] - 2 * (weights @ tile.centred.T)) / weights.shape[1]
        recomputed = ((tile.variance + moved).clamp(min=0) + NORM_EPS).rsqrt()
        total = self._ablated(tile, away, chosen, recomputed)
        if self.direction is None:
            frozen = (tile.variance + NORM_EPS).rsqrt().expand_as(recomputed)
            direct = self._ablated(tile, away, chosen, frozen)
        else:
            # what the logits are shifted by, to be exponentiated, is the same for all and so has no part along it
            direct = total + ((tile.base - total) @ self.direction)[..., None] * self.direction
        outcomes = torch.stack([self._outcomes(logits, tile.targets) for logits in (total, direct)], 1)
        changes = outcomes - tile.outcomes
        return torch.cat([changes.abs().sum(-1), changes.sum(-1)], 1)

    def _ablated(
        self, tile: _Tile, away: Float[Tensor, "J I"], chosen: slice, inverse: Float[Tensor, "J I"]
    ) -> Float[Tensor, "J I V"]:
        """Logits with each neuron at its mean, given the inverse of what LayerNorm divides by.

        Shifted so that the largest is near 0, whatever LayerNorm divides by.
        """
        logits = tile.logits * inverse[..., None]
        left = torch.stack([-away * inverse, torch.ones_like(away), -tile.highest * inverse], -1)  # J I 3
        constant = (self.constant - self.constant.amax()).expand(len(away), -1)
        right = torch.stack([self.logits[chosen], constant, torch.ones_like(constant)], 1)  # J 3 V
        return logits.baddbmm_(left, right)

    def _outcomes(
        self, logits: Float[Tensor, "J I V"], targets: Int[Tensor, " I"] | None
    ) -> Float[Tensor, "measures J I"]:
        """Entropy, then loss and KL from the unigram where they are measured, nats; the largest logit is near 0."""
        weight = logits.exp()
        whole = weight @ torch.ones_like(self.constant)
        log_whole = whole.log()
        measures = [log_whole - torch.linalg.vecdot(weight, logits) / whole]
        if targets is not None:
            measures.append(log_whole - logits.gather(-1, targets.expand(whole.shape)[..., None])[..., 0])
        if self.log_unigram is not None:
            measures.append(-measures[0] - weight @ self.log_unigram / whole)
        return torch.stack(measures)


@dataclass(frozen=True)
class _Tile:
    """Some tokens without an ablation.

    Args:
        centred: residual of every token without its mean.
        variance: variance of the residual over the width.
        logits: logits of the centred residual, before LayerNorm divides.
        highest: the largest of a token's ``logits``.
        targets: right output of every token; None where no loss is measured.
        base: logits as the model gives them, shifted so that a token's largest is 0.
        outcomes: entropy, loss and divergence of ``base``, nats.
    """

    centred: Float[Tensor, "I D"]
    variance: Float[Tensor, " I"]
    logits: Float[Tensor, "I V"]
    highest: Float[Tensor, " I"]
    targets: Int[Tensor, " I"] | None
    base: Float[Tensor, "I V"]
    outcomes: Float[Tensor, "measures 1 1 I"]

    @classmethod
    def of(
        cls,
        resid: Float[Tensor, "I D"],
        matrix: Float[Tensor, "D V"],
        targets: Int[Tensor, " I"] | None,
        neurons: _Neurons,
    ) -> _Tile:
        """The tokens of a tile as one member's read-out sees them."""
        centred = resid - resid.mean(-1, keepdim=True)
        variance, logits = centred.square().mean(-1), centred @ matrix
        base = logits * (variance + NORM_EPS).rsqrt()[:, None] + neurons.constant
        base = base - base.amax(-1, keepdim=True)
        outcomes = neurons._outcomes(base[None], targets)[:, None]
        return cls(centred, variance, logits, logits.amax(-1), targets, base, outcomes)


# ---- candidates ---------------------------------------------------------------------------------------


def control_level(control: Effect, quantile: float = 0.99) -> Float[Tensor, " M"]:
    """The quantile of the total effects of a member's control neurons, nats.

    Args:
        control: effects of ``random_outputs`` with the activations of the neurons, nats.
        quantile: share of the control neurons whose effect is below the level, in [0, 1].
    """
    return torch.quantile(control.total, quantile, dim=-1)


def candidates(effect: Effect, control: Effect, share: float = 0.5, quantile: float = 0.99) -> Bool[Tensor, "M N"]:
    """Neurons most of whose effect passes through the mediator, and is larger than chance would have it.

    An entropy neuron by its effect on the entropy through LayerNorm's scale; a token-frequency neuron by that on the
    divergence from the unigram through the log-unigram direction.

    Args:
        effect: effects of the neurons, nats.
        control: effects of ``random_outputs`` with the activations of the neurons, nats.
        share: mediated share that a candidate exceeds, in [0, 1].
        quantile: quantile of the member's control effects that a candidate's total effect exceeds, in [0, 1].
    """
    return (effect.mediated > share) & (effect.total > control_level(control, quantile)[:, None])
