"""Claims about references: each on numbers that a hand can check."""

import math

import pytest
import torch

from opsin.tasks import FewShot, GaussianClusters
from opsin.tasks.shared.references import (
    after_token,
    always,
    among_plausible,
    chance,
    gradient_step,
    in_context,
    least_squares,
    nearest_label,
    nearest_neighbours,
    ridge,
)
from tests.helpers.toys import ToyTokens, batch_of, hand_batch

# three points on a line through the origin of slope 2, in one member and one sequence
X, Y = torch.tensor([[[[1.0], [2.0], [3.0]]]]), torch.tensor([[[[2.0], [4.0], [6.0]]]])


def probabilities(logits):
    return logits.double().softmax(-1)


def test_chance_and_a_unigram_say_one_thing_whatever_they_are_shown():
    batch = batch_of(ToyTokens())
    assert torch.allclose(probabilities(chance(7)(batch)), torch.full((2, 4, 2, 7), 1 / 7).double())
    p = torch.tensor([0.5, 0.25, 0.25, 0, 0, 0, 0])
    found = always(p)(batch)
    assert found.shape == (2, 4, 2, 7) and found.isfinite().all()
    assert torch.allclose(probabilities(found), p.double().expand(2, 4, 2, 7), atol=1e-6)


def test_a_bigram_follows_the_token_at_the_scored_position():
    batch, table = batch_of(ToyTokens()), torch.eye(7).roll(1, 1)
    found = after_token(table)(batch)
    assert torch.equal(found.argmax(-1), (batch.tokens[:, :, [3, 4]] + 1) % 7)


def test_the_labels_of_the_context_share_what_is_certain():
    batch = hand_batch([[0, 1, 0]], [[3, 1]], [3])
    p = probabilities(among_plausible(0.2)(batch))[0, 0, 0]
    assert p.tolist() == pytest.approx([0.05, 0.45, 0.05, 0.45])
    assert among_plausible(0.0)(batch).isfinite().all()


def test_the_label_of_the_most_similar_item_is_found_and_ties_share():
    # the query shows class 0, as the first item does; then two items of it with other labels
    sure = probabilities(nearest_label(hand_batch([[0, 1, 0]], [[3, 1]], [3]), 4))[0, 0, 0]
    assert sure.argmax() == 3 and sure[3] > 0.999
    tied = probabilities(nearest_label(hand_batch([[0, 0, 0]], [[3, 1]], [3]), 4))[0, 0, 0]
    assert tied.tolist() == pytest.approx([0, 0.5, 0, 0.5], abs=1e-5)


def test_few_shot_references_predict_what_its_baselines_lose():
    task = FewShot(GaussianClusters(classes=60, features=16), batch_size=64)
    batch = task.batch(0, 0)
    losses = {name: task.objective.member_loss(find(batch), batch).item() for name, find in task.references().items()}
    assert list(task.baselines().values()) == pytest.approx([losses["uniform"], losses["context_labels"]], rel=1e-6)
    # without noise the nearest item has the right label
    assert losses["nearest_neighbour"] < 1e-5


def test_least_squares_and_a_small_ridge_find_the_slope_exactly():
    at = torch.tensor([[[5.0]]])
    assert least_squares(X, Y, at).tolist() == [[[pytest.approx(10)]]]
    # sum xy / (sum xx + penalty) = 28 / (14 + 14)
    assert ridge(14.0)(X, Y, at).tolist() == [[[pytest.approx(5)]]]
    assert ridge(1e-12)(X, Y, at).tolist() == [[[pytest.approx(10)]]]


def test_least_squares_of_too_few_examples_is_the_smallest_solution():
    x, y = torch.tensor([[[[1.0, 1.0]]]]), torch.tensor([[[[2.0]]]])
    assert least_squares(x, y, torch.tensor([[[1.0, 0.0]]])).tolist() == [[[pytest.approx(1)]]]


def test_one_gradient_step_from_zero_is_the_rate_times_the_correlation():
    assert gradient_step(lambda n: 1 / (n + 4))(X, Y, torch.tensor([[[1.0]]])).tolist() == [[[pytest.approx(28 / 7)]]]


def test_nearest_neighbours_answer_with_the_mean_of_the_nearest():
    at = torch.tensor([[[2.2]]])
    for k, expected in ((1, 4), (2, 5), (3, 4), (9, 4)):
        assert nearest_neighbours(k)(X, Y, at).tolist() == [[[pytest.approx(expected)]]]


def test_in_context_each_pair_is_predicted_from_those_before_it():
    found = in_context(X, Y, least_squares)
    assert found.flatten().tolist() == pytest.approx([0, 4, 6])
    changed = in_context(X, torch.cat([Y[:, :, :2], Y[:, :, 2:] + 9], 2), least_squares)
    assert torch.equal(found, changed), "an answer is not seen before it is given"


def test_a_bayesian_ridge_beats_least_squares_where_there_is_noise():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(1, 2000, 5, 4, generator=generator), torch.randn(1, 2000, 4, 1, generator=generator)
    y = x @ w + torch.randn(1, 2000, 5, 1, generator=generator)
    errors = [
        (learn(x[:, :, :4], y[:, :, :4], x[:, :, 4]) - y[:, :, 4]).square().mean()
        for learn in (ridge(1.0), least_squares)
    ]
    assert errors[0] < 0.5 * errors[1] and math.isfinite(errors[1])
