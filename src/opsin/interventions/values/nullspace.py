"""Iterative null-space projection: the directions along which linear classifiers read a label.

Ravfogel et al. 2020, "Null It Out: Guarding Protected Attributes by Iterative Nullspace Projection", algorithm 1.

Legend: M members, B batch, R labelled rows of a sequence, W width of what is read, C columns of a basis,
V classes, N rows of all sequences, T rounds + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot, pad

from opsin.task import Batch

Label = Literal["target", "token", "previous_token"]
"""What is predicted from one position: the right answer, at scored positions; the token, at positions that hold
one; the token before, where one precedes."""

# Penalties of classifiers over the mean variance of what they read. With a small one the weights favour directions of
# little variance, and the same label can still be read without them; with a large one they near the differences
# of the labels' means, which hold all of it.
FINDING_PENALTY = 10.0
MEASURING_PENALTY = 1e-3

LEAST_READ = 1e-6
"""A classifier whose score moves by less than this when what it reads moves by its deviation reads nothing there."""


@dataclass(frozen=True)
class Learned:
    """What iterative null-space projection found.

    Args:
        basis: the directions as orthonormal columns, ``[M, W, C]``; unused columns are zero.
        accuracy: share of right answers, ``[M, T]``, of a classifier fitted after 0, 1, ... rounds, on sequences that
            it was not fitted on.
        chance: accuracy there, ``[M]``, of the label that is the most frequent among those it was fitted on.
    """

    basis: Float[Tensor, "M W C"]
    accuracy: Float[Tensor, "M T"]
    chance: Float[Tensor, " M"]


def labelled_rows(
    batch: Batch, label: Label, positions: tuple[int, ...] | None
) -> tuple[list[int], Int[Tensor, "M B R"]]:
    """Positions that have such a label, and their labels.

    Args:
        batch: sequences that the labels are of.
        label: what is predicted from one position.
        positions: positions that count; all when None.
    """
    layout, previous = batch.layout, batch.truth.previous.tolist()
    if label == "previous_token":
        rows = [row for row, at in enumerate(previous) if at != row and at in layout.tokens]
        labels = batch.tokens[:, :, [layout.tokens.index(previous[row]) for row in rows]]
    else:
        rows, labels = (
            (list(layout.scored), batch.targets) if label == "target" else (list(layout.tokens), batch.tokens)
        )
    kept = [index for index, row in enumerate(rows) if positions is None or row in positions]
    return [rows[index] for index in kept], labels[:, :, kept]


def learn_directions(
    x: Float[Tensor, "M B R W"], labels: Int[Tensor, "M B R"], classes: int, rounds: int, columns: int
) -> Learned:
    """Iterative null-space projection for every member (Ravfogel et al. 2020, algorithm 1).

    Classifiers are least squares on the labels with a ridge, fitted on the first half of the sequences; no random
    number is drawn. The accuracy is that of a second classifier with next to no ridge, from which a
    label that counts as gone has to be hidden.

    Args:
        x: activations of the labelled rows, finite, ``[M, B, R, W]``.
        labels: the label of every row, from 0 to ``classes`` - 1.
        classes: how many labels there are.
        rounds: how many classifiers are fitted and removed in turn.
        columns: C, at least the number of directions that can be found.
    """
    members = [_learn(rows, row_labels, classes, rounds) for rows, row_labels in zip(x.double(), labels, strict=True)]
    bases = [pad(basis, (0, columns - basis.shape[1])) for basis, _, _ in members]
    accuracy = torch.tensor([accuracy for _, accuracy, _ in members], dtype=torch.float64)
    chance = torch.tensor([chance for *_, chance in members], dtype=torch.float64)
    return Learned(torch.stack(bases), accuracy, chance)


def _learn(
    x: Float[Tensor, "B R W"], labels: Int[Tensor, "B R"], classes: int, rounds: int
) -> tuple[Tensor, list[float], float]:
    """Basis, accuracies and chance of one member."""
    half, width = len(x) // 2, x.shape[-1]
    fit_labels, held_out_labels = labels[:half].flatten(), labels[half:].flatten()
    mean = x[:half].flatten(0, 1).mean(0)
    fit, held_out = (rows.flatten(0, 1) - mean for rows in (x[:half], x[half:]))
    indicators = one_hot(fit_labels, classes).to(x.dtype)
    share = indicators.mean(0)
    deviation = fit.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    basis, accuracy = fit.new_zeros(width, 0), []
    total_variance = len(fit) * deviation.square()
    for number in range(rounds + 1):
        fit_left, held_out_left = (rows - rows @ basis @ basis.T for rows in (fit, held_out))
        weights = _ridge(fit_left, indicators - share, MEASURING_PENALTY * total_variance)
        accuracy.append(float(((held_out_left @ weights + share).argmax(-1) == held_out_labels).double().mean()))
        if number < rounds:
            weights = _ridge(fit_left, indicators - share, FINDING_PENALTY * total_variance)
            directions, scores, _ = torch.linalg.svd(weights, full_matrices=False)
            found = directions[:, scores * deviation > LEAST_READ]
            basis = torch.linalg.qr(torch.cat([basis, found], 1)).Q
    return basis, accuracy, float((held_out_labels == share.argmax()).double().mean())


def _ridge(x: Float[Tensor, "N W"], y: Float[Tensor, "N V"], penalty: Float[Tensor, ""]) -> Float[Tensor, "W V"]:
    """Weights of the least-squares prediction of ``y`` from ``x`` with a penalty on their squares."""
    identity = torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.T @ x + penalty * identity, x.T @ y)
