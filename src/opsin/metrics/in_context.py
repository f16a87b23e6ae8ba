"""Which algorithm a model has learned in context: the weights that its answers imply, and which predictor is nearest.

After Akyürek et al. 2022, "What learning algorithm is in-context learning? Investigations with linear models": squared
prediction distance and implicit linear weight distance, each divided by the d entries of an input.

Legend: M members, B batch, Q numbers of examples, V outputs, C contexts, K queries of one context, d entries of an
input, R references, n records.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def prediction_distance(
    outputs: Float[Tensor, "M B Q V"], reference: Float[Tensor, "_ B Q V"], dimensions: int
) -> Float[Tensor, "M Q"]:
    """Squared prediction distance, E |f(x) - g(x)|^2 / d, at every number of examples, in double precision.

    Args:
        outputs: what the model answers, f.
        reference: what the predictor answers to the same, g, for all members or for one that stands for all.
        dimensions: d, entries of an input.
    """
    return (outputs.double() - reference.double()).square().sum(-1).mean(1) / dimensions


def implicit_weights(answers: Float[Tensor, "*s K"], x: Float[Tensor, "K d"]) -> Float[Tensor, "*s d"]:
    """Weights of the linear function without intercept that is nearest to a predictor's answers, by least squares.

    Args:
        answers: answers of the predictor to K queries after one fixed context.
        x: queries that were answered, at least d of them.
    """
    return answers.double() @ torch.linalg.pinv(x.double()).mT


def weight_distance(weights: Float[Tensor, "M C d"], reference: Float[Tensor, "_ C d"]) -> Float[Tensor, " M"]:
    """Implicit linear weight distance, E |w_f - w_g|^2 / d, over contexts.

    Args:
        weights: implicit weights of the model in every context.
        reference: implicit weights of the predictor, for all members or for one that stands for all.
    """
    return (weights - reference).square().mean((1, 2))


def linearity(
    answers: Float[Tensor, "M C K"], x: Float[Tensor, "K d"], weights: Float[Tensor, "M C d"]
) -> Float[Tensor, " M"]:
    """Share of the squared size of a model's answers that functions linear in the query explain: an adjusted R^2.

    One less the mean square of what remains, with K - d degrees of freedom, over that of the answers: 1 for a function
    that is linear in every context, about 0 for answers without relation to the query. No number for answers of 0.

    Args:
        answers: answers of the model to K queries after each of C contexts.
        x: queries that were answered, more than d of them.
        weights: implicit weights of the model in every context.
    """
    count, dimensions = x.shape
    rest = (answers.double() - weights @ x.double().mT).square().sum((1, 2)) / (count - dimensions)
    return 1 - rest / (answers.double().square().sum((1, 2)) / count)


def change_step(steps: Int[np.ndarray, " n"], before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"]) -> float:
    """Step from which on a model stays nearer to one predictor, having been nearer to another.

    The last record nearer to the first predictor, or as near to both, and the one after it bracket the change; the
    difference of the two distances is taken to be linear between them.

    Args:
        steps: optimizer steps finished at each record, ascending.
        before: distance from the predictor that is left, at each record.
        after: distance from the predictor that is neared.

    Returns:
        nan where the last record is not nearer to the second predictor, or none was nearer to the first.
    """
    known = np.isfinite(before) & np.isfinite(after)
    steps, lead = steps[known], (before - after)[known]
    nearer_before = np.flatnonzero(lead <= 0)
    if not len(nearer_before) or nearer_before[-1] == len(lead) - 1:
        return math.nan
    last = nearer_before[-1]
    share = -lead[last] / (lead[last + 1] - lead[last])
    return float(steps[last] + share * (steps[last + 1] - steps[last]))


def phases(steps: Int[np.ndarray, " n"], distances: Float[np.ndarray, "n R"]) -> list[tuple[int, int]]:
    """The nearest predictor over training: its number, and the step of the record from which on it is the nearest.

    Args:
        steps: optimizer steps finished at each record, ascending.
        distances: distance from every predictor at each record; records with a number that is not finite are left out.
    """
    known = np.isfinite(distances).all(1)
    found: list[tuple[int, int]] = []
    for step, nearest in zip(steps[known].tolist(), distances[known].argmin(1).tolist(), strict=True):
        if not found or found[-1][0] != nearest:
            found.append((nearest, step))
    return found
