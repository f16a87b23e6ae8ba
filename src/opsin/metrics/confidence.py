"""What ablating neurons does to the entropy of predictions where a sequence repeats itself. Pure functions.

The case study of induction in Stolfo et al. 2024, "Confidence Regulation Neurons in Language Models"; coordinates and
the words *total* and *direct* are those of ``opsin.metrics.mean_ablation``.

Legend: M members, B batch, L positions, D width, N neurons, V vocabulary, J neurons of one member that are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opsin.metrics.mean_ablation import Effect
from opsin.metrics.neuron_weights import ReadOut, centred, random_outputs
from opsin.model.layers import NORM_EPS


@dataclass(frozen=True)
class Joint:
    """Change of the entropy (nats, ablated minus not) when some neurons are at their means together.

    Args:
        total: change with the scale of the last LayerNorm recomputed.
        direct: change with that scale as it is without the ablation.
    """

    total: Float[Tensor, "M B L"]
    direct: Float[Tensor, "M B L"]


@torch.no_grad()
def joint_ablation(
    read_out: ReadOut,
    resid: Float[Tensor, "M B L D"],
    post: Float[Tensor, "M B L N"],
    w_out: Float[Tensor, "M N D"],
    neurons: Sequence[int],
    means: Float[Tensor, "M _ _ N"],
) -> Joint:
    """What mean-ablating ``neurons`` of the last MLP at once does to the entropy of every token.

    Exact: the residual changes by a sum of as many output weights, and nothing but LayerNorm and the read-out follows.

    Args:
        read_out: the last LayerNorm and the unembedding.
        resid: residual stream before the last LayerNorm, the neurons' outputs included.
        post: activations after the nonlinearity, of all neurons of the last MLP.
        w_out: output weights of all neurons; ``random_outputs`` of them for a control.
        neurons: indices of the neurons that are ablated, 0 .. N - 1.
        means: activations that replace those of the ablated neurons; the axes of B and L may be 1.
    """
    chosen, matrix, constant = list(neurons), read_out.effective(), read_out.constant()[:, None, None]
    away = (post - means)[..., chosen]
    before = resid - resid.mean(-1, keepdim=True)
    after = before - torch.einsum("mblk,mkd->mbld", away, centred(w_out)[:, chosen])
    kept, recomputed = (1 / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() for x in (before, after))
    plain, moved = (torch.einsum("mbld,mdv->mblv", x, matrix) for x in (before, after))
    base = token_entropy(plain * kept + constant)
    return Joint(token_entropy(moved * recomputed + constant) - base, token_entropy(moved * kept + constant) - base)


def token_entropy(logits: Float[Tensor, "M B L V"]) -> Float[Tensor, "M B L"]:
    """Entropy of every prediction, nats."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


# ---- one member --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """Effect of an ablation on the entropy, beside the effects of its controls.

    Args:
        value: change of the entropy, nats, ablated minus not, mean over tokens.
        control: mean of that change over random output weights of the same norms, nats.
        low, high: ends of the interval that holds 95 % of the controls, nats.
    """

    value: float
    control: float
    low: float
    high: float

    @classmethod
    def of(cls, value: Tensor, controls: Float[Tensor, " draws"]) -> Compared:
        """The change ``value`` (a scalar, nats) beside those of the random draws (nats)."""
        low, high = torch.quantile(controls, controls.new_tensor([0.025, 0.975])).tolist()
        return cls(value.item(), controls.mean().item(), low, high)


@dataclass(frozen=True)
class Change:
    """What one ablation does to the entropy of one member.

    Args:
        neurons: indices of the neurons that are ablated together.
        total, direct: changes as in ``Joint``, means over tokens, beside their controls.
    """

    neurons: tuple[int, ...]
    total: Compared
    direct: Compared


def change(
    read_out: ReadOut,
    resid: Float[Tensor, "1 B L D"],
    post: Float[Tensor, "1 B L N"],
    w_out: Float[Tensor, "1 N D"],
    neurons: Sequence[int],
    means: Float[Tensor, "1 1 1 N"],
    draws: int,
) -> Change:
    """One member's ablation of some neurons, and of as many with random outputs, of the same norms and activations.

    Args:
        read_out: the last LayerNorm and the unembedding.
        resid: residual stream before the last LayerNorm, the neurons' outputs included.
        post: activations after the nonlinearity, of all neurons of the last MLP.
        w_out: output weights of all neurons of the last MLP.
        neurons: indices of the neurons that are ablated, 0 .. N - 1.
        means: activations that replace those of the ablated neurons.
        draws: number of random outputs; draw i is made from seed i.
    """
    outputs = [w_out, *(random_outputs(w_out, seed) for seed in range(draws))]
    found = [joint_ablation(read_out, resid, post, weights, neurons, means) for weights in outputs]
    total, direct = (torch.stack([getattr(joint, kind).mean() for joint in found]) for kind in ("total", "direct"))
    return Change(tuple(neurons), Compared.of(total[0], total[1:]), Compared.of(direct[0], direct[1:]))


def strongest(effect: Effect, candidate: Bool[Tensor, "M N"], member: int, top: int) -> list[int]:
    """A member's candidates, largest effect first; without any, the neurons of the largest mediated effect.

    Args:
        effect: effect of every neuron's ablation on the entropy, nats; the mediated effect is the mediated share
            times the total.
        candidate: whether a neuron is a candidate.
        member: index of the member, 0 .. M - 1.
        top: number of neurons that are returned where there is no candidate.
    """
    total = effect.total[member]
    if bool(candidate[member].any()):
        return sorted(candidate[member].nonzero()[:, 0].tolist(), key=lambda neuron: -total[neuron].item())
    return (effect.mediated[member].nan_to_num(-1.0) * total).topk(top).indices.tolist()


@dataclass(frozen=True)
class Study:
    """What one member does on sequences that repeat themselves.

    Args:
        positions: scored positions, at which everything is measured.
        repeated: whether the answer at a position can be copied in every sequence.
        loss, entropy: means over sequences at every position, nats.
        neurons: indices of the shown neurons of the last MLP.
        candidate: whether the shown neurons are entropy neurons; otherwise they come nearest to being so.
        activation: activation of every neuron of the last MLP after the nonlinearity, mean over sequences.
        changes: change of the entropy on the repeated positions by the ablation of every shown neuron and, where there
            are several, by that of all together.
    """

    positions: tuple[int, ...]
    repeated: Bool[Tensor, " L"]
    loss: Float[Tensor, " L"]
    entropy: Float[Tensor, " L"]
    neurons: tuple[int, ...]
    candidate: bool
    activation: Float[Tensor, "N L"]
    changes: tuple[Change, ...]
