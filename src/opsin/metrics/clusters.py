"""Clusters of representations: how much of their variance a feature explains, and when a loss spiked.

Legend: M members, B sequences, D width, K key positions, N records of a curve.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

SPIKE_FACTOR = 3.0
"""Factor by which a spike exceeds the median of the records before it."""

SPIKE_WINDOW = 10
"""Records before a spike whose median it is compared with."""

SPIKE_SHARE = 0.02
"""Share of the largest record by which a spike exceeds that median at least."""


def explained_share(x: Float[Tensor, "M B D"], feature: Int[Tensor, "M B"]) -> Float[Tensor, " M"]:
    """Share of the variance of representations that lies between the classes of a feature, in [0, 1].

    The sum over units of the squared deviations of class means from the overall mean, over that of all
    representations: the R^2 of a regression of the units on the feature, one-hot (Lampinen et al. 2024, "Learned
    feature representations are biased by complexity, learning order, position, and more"). Shares of independent
    features add up. What remains, 1 less the share, is the variance within clusters (Odonnat et al. 2024, "Clustering
    head"). By chance it is (classes - 1) / (B - 1); nan where nothing varies.

    Args:
        x: representation of every sequence.
        feature: class of every sequence, a whole number; different ones need not follow each other.
    """
    _, classes = feature.unique(return_inverse=True)
    x = (x - x.mean(1, keepdim=True)).double()
    groups = torch.nn.functional.one_hot(classes, int(classes.max()) + 1).to(x.dtype)  # M B classes
    sums, counts = groups.mT @ x, groups.sum(1)
    between = (sums.square().sum(-1) / counts.clamp(min=1)).sum(-1)
    return between / x.square().sum((1, 2))


def attention_share(pattern: Float[Tensor, "M B K"], positions: Bool[Tensor, " K"]) -> Float[Tensor, " M"]:
    """Mean share of the attention of one query that goes to chosen positions, in [0, 1].

    Args:
        pattern: attention of every sequence, which sums to 1.
        positions: whether a position is among the chosen.
    """
    return pattern[..., positions].sum(-1).mean(1)


def loss_spikes(losses: Real[np.ndarray, " N"]) -> list[int]:
    """Records at which a spike of a loss begins.

    A spike is a record above ``SPIKE_FACTOR`` times the median of the ``SPIKE_WINDOW`` records before it, by at least
    ``SPIKE_SHARE`` of the largest record; records that directly follow it above its level belong to it.

    Args:
        losses: loss at each record, at least 0; records that are no number are none.
    """
    starts, level = [], np.inf
    least = SPIKE_SHARE * float(np.nanmax(losses, initial=0.0))
    for index in range(1, len(losses)):
        before = losses[max(0, index - SPIKE_WINDOW) : index]
        median = float(np.median(before))
        if losses[index] > level:
            continue
        above = max(SPIKE_FACTOR * median, median + least)
        level = above if losses[index] > above else np.inf
        if losses[index] > above:
            starts.append(index)
    return starts
