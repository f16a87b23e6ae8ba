"""k-sparse probes: how well a feature can be read from the k units of a representation that tell most of it.

Gurnee et al. 2023, "Finding neurons in a haystack: case studies with sparse probing".

Legend: M members, B sequences, D units, C classes of a feature, S numbers of units, K units of one probe.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

RIDGE = 1e-3
"""Penalty on squared weights of standardised units, in units of a sequence's squared error."""


def probe_accuracies(
    x: Float[Tensor, "M B D"], feature: Int[Tensor, "M B"], sizes: Sequence[int]
) -> Float[Tensor, "M S"]:
    """Balanced accuracy of linear probes on the k best units, for every k.

    Units are ranked by the share of their variance that lies between the classes. A probe is a ridge regression of the
    one-hot classes on the k first of them, standardised; it says the class with the largest output. Ranks, means and
    weights come from the sequences with an even number, the accuracy from the others: the mean over classes of the
    share that is said rightly, 1 / C by chance; nan where a representation is no number.

    Args:
        x: representation of every sequence.
        feature: class of every sequence, a whole number.
        sizes: numbers of units k, each at most D.
    """
    _, classes = feature.unique(return_inverse=True)
    one_hot = torch.nn.functional.one_hot(classes, int(classes.max()) + 1).double()
    x, known = x.double(), x.isfinite().flatten(1).all(1)
    mean, deviation = x[:, ::2].mean(1, keepdim=True), x[:, ::2].std(1, correction=0, keepdim=True)
    # a unit that does not vary tells nothing
    x = torch.where(deviation > 0, (x - mean) / deviation, 0.0)
    order = _between_shares(x[:, ::2], one_hot[:, ::2]).argsort(dim=1, descending=True, stable=True)
    found = []
    for size in sizes:
        units = x.gather(2, order[:, None, :size].expand(-1, x.shape[1], -1))
        found.append(_balanced_accuracy(_outputs(units, one_hot), one_hot[:, 1::2]))
    return torch.where(known[:, None], torch.stack(found, 1), torch.nan)


def _between_shares(x: Float[Tensor, "M B D"], one_hot: Float[Tensor, "M B C"]) -> Float[Tensor, "M D"]:
    """Share of the variance of every standardised unit that lies between the classes."""
    sums, counts = one_hot.mT @ x, one_hot.sum(1)
    return (sums.square() / counts.clamp(min=1)[..., None]).sum(1) / x.shape[1]


def _outputs(units: Float[Tensor, "M B K"], one_hot: Float[Tensor, "M B C"]) -> Float[Tensor, "M half C"]:
    """What a probe fitted on even sequences says of the odd ones."""
    fitted, targets = units[:, ::2], one_hot[:, ::2]
    base = targets.mean(1, keepdim=True)
    penalty = RIDGE * fitted.shape[1] * torch.eye(units.shape[2]).to(units)
    weights = torch.linalg.solve(fitted.mT @ fitted + penalty, fitted.mT @ (targets - base))
    return units[:, 1::2] @ weights + base


def _balanced_accuracy(outputs: Float[Tensor, "M half C"], one_hot: Float[Tensor, "M half C"]) -> Float[Tensor, " M"]:
    """Mean over the classes that occur of the share of their sequences that is said rightly."""
    right = torch.nn.functional.one_hot(outputs.argmax(-1), outputs.shape[-1]) * one_hot
    counts = one_hot.sum(1)
    shares = torch.where(counts > 0, right.sum(1) / counts.clamp(min=1), 0.0)
    return shares.sum(1) / (counts > 0).sum(1)
