"""Claims about iterative null-space projection: what it finds, what it leaves, and which rows have a label."""

import numpy as np
import pytest
import torch

from opsin.interventions.values.nullspace import labelled_rows, learn_directions
from tests.helpers.toys import ToyTokens, batch_of, few_shot
from tests.interventions.values.test_subspaces import random


def span(basis):
    return basis @ basis.T


def planted(seed, classes, rank, width=12, sequences=400):
    """Activations whose first half tells the label in a subspace, mixed there as a matrix likes, and nowhere else.

    Outside the subspace the fitted half has noise that no linear prediction of the label can use.
    """
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=sequences)
    inside = np.linalg.qr(generator.standard_normal((width, width)))[0]
    means = generator.standard_normal((classes, rank)) * 6
    unmixed = means[labels] + generator.standard_normal((sequences, rank))
    informative = unmixed @ generator.standard_normal((rank, rank))
    noise = generator.standard_normal((sequences, width - rank))
    half = sequences // 2
    known = np.concatenate([np.eye(classes)[labels[:half]], informative[:half]], 1)
    noise[:half] -= known @ np.linalg.lstsq(known, noise[:half], rcond=None)[0]
    x = informative @ inside[:, :rank].T + noise @ inside[:, rank:].T
    return torch.from_numpy(x)[:, None], torch.from_numpy(labels)[:, None], torch.from_numpy(inside[:, :rank])


@pytest.mark.parametrize(("classes", "rank", "rounds"), [(2, 1, 1), (2, 3, 3), (4, 3, 1), (4, 3, 2), (3, 4, 2)])
def test_learning_finds_the_planted_subspace_and_leaves_no_linear_trace_of_the_label(classes, rank, rounds):
    pairs = [planted(seed, classes, rank) for seed in (1, 2)]
    x, labels = (torch.stack(column) for column in list(zip(*pairs, strict=True))[:2])
    found = learn_directions(x, labels, classes, rounds, columns=12)
    for member, (activations, label, inside) in enumerate(pairs):
        basis = found.basis[member]
        assert torch.allclose(span(inside) @ basis, basis, atol=1e-8)
        if rank == classes - 1:
            assert torch.allclose(span(basis), span(inside), atol=1e-8)
        left = (activations - activations @ span(basis))[:200, 0].numpy()
        probe = np.concatenate([left - left.mean(0), np.ones((200, 1))], 1)
        indicators = np.eye(classes)[label[:200, 0]]
        fresh = probe @ np.linalg.lstsq(probe, indicators, rcond=1e-9)[0]
        assert np.allclose(fresh, indicators.mean(0), atol=1e-3)
    assert (found.accuracy[:, 0] > found.chance + 0.2).all()
    assert torch.equal(found.accuracy[:, -1], found.chance)


def test_one_round_too_few_leaves_the_label_to_be_read():
    x, labels, inside = planted(1, 2, 3)
    found = learn_directions(x[None], labels[None], 2, 2, columns=12)
    assert (found.basis[0] != 0).any(0).sum() == 2
    assert torch.allclose(span(inside) @ found.basis[0], found.basis[0], atol=1e-8)
    assert found.accuracy.shape == (1, 3) and (found.accuracy[0, :2] > found.chance).all()


def test_chance_is_the_share_of_the_most_frequent_fitted_label_among_the_held_out():
    labels = torch.tensor([0, 0, 1, 0, 1, 1, 2, 0])[None, :, None]
    found = learn_directions(torch.zeros(1, 8, 1, 3), labels, 3, 1, 3)
    assert found.chance.item() == 0.25
    assert (found.basis == 0).all() and found.accuracy.tolist() == [[0.25, 0.25]]


def test_labels_that_are_all_the_same_name_no_direction():
    found = learn_directions(random(0, 1, 40, 1, 3), torch.ones(1, 40, 1, dtype=torch.int64), 3, 2, 3)
    assert (found.basis == 0).all()


def test_labelled_rows_of_a_task_of_tokens():
    batch = batch_of(ToyTokens())
    rows, labels = labelled_rows(batch, "token", None)
    assert rows == list(range(6)) and torch.equal(labels, batch.tokens)
    rows, labels = labelled_rows(batch, "previous_token", (0, 2, 5))
    assert rows == [2, 5] and torch.equal(labels, batch.tokens[:, :, [1, 4]])
    rows, labels = labelled_rows(batch, "target", (4,))
    assert rows == [4] and torch.equal(labels, batch.targets[:, :, 1:])


def test_labelled_rows_of_a_few_shot_task():
    batch = batch_of(few_shot())
    rows, labels = labelled_rows(batch, "token", None)
    assert rows == [1, 3] and torch.equal(labels, batch.tokens)
    rows, labels = labelled_rows(batch, "previous_token", None)
    assert rows == [2, 4] and torch.equal(labels, batch.tokens)
    rows, labels = labelled_rows(batch, "target", None)
    assert rows == [4] and torch.equal(labels, batch.targets)
