"""What neurons do to a model's confidence where a sequence repeats itself. Pure functions.

The case study of induction in Stolfo et al. 2024, "Confidence Regulation Neurons in Language Models"; coordinates and
the words *total* and *direct* are those of ``opsin.metrics.neurons``.

Legend: M members, B batch, L positions, D width, N neurons, V vocabulary, J neurons of one member that are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opsin.metrics.neurons import Effect, ReadOut, centred, random_outputs
from opsin.model.transformer import NORM_EPS


@dataclass(frozen=True)
class Joint:
    """Change of the entropy (nats, ablated minus not) when some neurons are at their means together.

    Args:
        total: the scale of the last LayerNorm recomputed.
        direct: that scale as it is without the ablation.
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
    """What mean-ablating these neurons of the last MLP at once does to the entropy of every token.

    Exact: the residual changes by a sum of as many output weights, and nothing but LayerNorm and the read-out follows.

    Args:
        resid: the residual stream before the last LayerNorm, the neurons' outputs included.
        post: activations after the nonlinearity.
        w_out: output weights of all neurons; ``random_outputs`` of them for a control.
        neurons: which are ablated.
        means: what activations are replaced by, axes of B and L may be 1.
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


# ---- of one member ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """One number of an ablation, beside the same of its controls.

    Args:
        value: change of the entropy, nats, ablated minus not, mean over tokens.
        control: the mean of it over random output weights of the same norms.
        low, high: between them are 95 % of these.
    """

    value: float
    control: float
    low: float
    high: float

    @classmethod
    def of(cls, value: Tensor, controls: Float[Tensor, " draws"]) -> Compared:
        low, high = torch.quantile(controls, controls.new_tensor([0.025, 0.975])).tolist()
        return cls(value.item(), controls.mean().item(), low, high)


@dataclass(frozen=True)
class Change:
    """What one ablation does.

    Args:
        neurons: that are ablated together.
        total, direct: as of ``Joint``.
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
        draws: of random outputs; draw i is that of seed i.
    """
    outputs = [w_out, *(random_outputs(w_out, seed) for seed in range(draws))]
    found = [joint_ablation(read_out, resid, post, each, neurons, means) for each in outputs]
    total, direct = (torch.stack([getattr(joint, kind).mean() for joint in found]) for kind in ("total", "direct"))
    return Change(tuple(neurons), Compared.of(total[0], total[1:]), Compared.of(direct[0], direct[1:]))


def strongest(effect: Effect, candidate: Bool[Tensor, "M N"], member: int, top: int) -> list[int]:
    """A member's candidates, largest effect first; without any, the neurons of the largest mediated effect.

    Args:
        effect: of every neuron on the entropy; mediated is its share times the total.
        candidate: which neurons are.
        top: how many are taken where none is.
    """
    total = effect.total[member]
    if bool(candidate[member].any()):
        return sorted(candidate[member].nonzero()[:, 0].tolist(), key=lambda neuron: -total[neuron].item())
    return (effect.mediated[member].nan_to_num(-1.0) * total).topk(top).indices.tolist()


@dataclass(frozen=True)
class Study:
    """What one member does on sequences that repeat themselves.

    Args:
        positions: scored positions, where everything is measured.
        repeated: those whose answer can be copied in every sequence.
        loss, entropy: nats, means over sequences.
        neurons: that are shown, of the last MLP.
        candidate: whether these are entropy neurons; otherwise they are the nearest to it.
        activation: after the nonlinearity, means over sequences.
        changes: of the entropy on the repeated positions, by each shown neuron's ablation and, where there are several,
            by that of all of them.
    """

    positions: tuple[int, ...]
    repeated: Bool[Tensor, " L"]
    loss: Float[Tensor, " L"]
    entropy: Float[Tensor, " L"]
    neurons: tuple[int, ...]
    candidate: bool
    activation: Float[Tensor, "J L"]
    changes: tuple[Change, ...]
