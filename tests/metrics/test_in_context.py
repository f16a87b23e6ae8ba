"""Claims about the algorithm a model has in context: known weights come back, changes are where they must be."""

import math

import numpy as np
import pytest
import torch

from opsin.metrics.in_context import (
    change_step,
    implicit_weights,
    linearity,
    phases,
    prediction_distance,
    weight_distance,
)


@pytest.fixture
def x():
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_prediction_distance_is_the_mean_square_over_sequences_and_d():
    outputs, reference = torch.zeros(2, 2, 3, 1), torch.tensor([[[[1.0], [2.0], [0.0]], [[3.0], [2.0], [0.0]]]])
    assert prediction_distance(outputs, reference, 2).tolist() == [[2.5, 2.0, 0.0]] * 2


def test_weights_of_a_linear_predictor_come_back_and_explain_all(x):
    weights = torch.tensor([[[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]]], dtype=torch.float64)
    answers = weights @ x.mT
    found = implicit_weights(answers, x)
    assert torch.allclose(found, weights, atol=1e-12) and linearity(answers, x, found).item() == pytest.approx(1)
    assert weight_distance(found, weights + 2).item() == pytest.approx(4)


def test_implied_weights_are_numpys_least_squares(x):
    answers = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = implicit_weights(answers, x)
    for m, c in np.ndindex(2, 5):
        expected = np.linalg.lstsq(x.numpy(), answers[m, c].numpy(), rcond=None)[0]
        assert np.allclose(found[m, c], expected, atol=1e-10)


def test_answers_without_relation_to_the_query_are_not_linear_on_average(x):
    answers = torch.randn(1, 4000, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert abs(linearity(answers, x, implicit_weights(answers, x)).item()) < 0.02


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        # from 1 nearer to the one to 3 nearer to the other: a quarter of the way from 10 to 20
        ([1, 1, 4, 4], [2, 2, 1, 1], 12.5),
        # it came back once: the last change counts
        ([1, 4, 1, 4], [2, 2, 2, 2], 23.333333),
        ([1, 2, 4, 4], [2, 2, 1, 1], 10),
        ([1, 1, 1, 1], [2, 2, 2, 2], math.nan),
        ([3, 3, 3, 3], [2, 2, 2, 2], math.nan),
        ([1, math.nan, 4, 4], [2, math.nan, 1, 1], 5),
    ],
)
def test_the_change_is_where_the_nearer_one_changes_for_good(before, after, expected):
    found = change_step(np.array([0, 10, 20, 30]), np.array(before, float), np.array(after, float))
    assert found == pytest.approx(expected, nan_ok=True)


def test_phases_are_the_nearest_over_training_with_the_record_at_which_each_begins():
    distances = np.array([[0, 1, 2], [0, 1, 2], [3, 1, 2], [math.nan, 1, 2], [3, 1, 2], [3, 2, 1]], float)
    assert phases(np.arange(0, 60, 10), distances) == [(0, 0), (1, 20), (2, 50)]
    assert phases(np.arange(1), np.full((1, 2), math.nan)) == []
