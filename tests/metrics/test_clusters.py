"""Claims about clusters and spikes, on points that one can draw."""

import math

import numpy as np
import pytest
import torch

from opsin.metrics.clusters import attention_share, explained_share, loss_spikes


def test_points_that_sit_on_their_cluster_have_no_variance_within_it():
    x = torch.tensor([[[0.0, 0.0], [2.0, 1.0], [0.0, 0.0], [2.0, 1.0]]])
    assert explained_share(x, torch.tensor([[7, 3, 7, 3]])).tolist() == [1.0]
    assert explained_share(x, torch.tensor([[7, 7, 3, 3]])).tolist() == [0.0]


def test_the_share_of_four_points_is_that_of_their_squared_distances():
    # class means -1 and 1 on the line, points one half from them: 4 between, 1 within
    x = torch.tensor([[[-1.5], [-0.5], [0.5], [1.5]]])
    assert explained_share(x, torch.tensor([[0, 0, 1, 1]])).item() == pytest.approx(4 / 5)


def test_the_share_is_the_r_squared_of_a_regression_on_the_classes():
    rng = np.random.default_rng(0)
    x, classes = rng.normal(size=(40, 3)), rng.integers(0, 4, size=40)
    centred, one_hot = x - x.mean(0), np.eye(4)[classes]
    fitted = one_hot @ np.linalg.lstsq(one_hot, centred, rcond=None)[0]
    expected = 1 - ((centred - fitted) ** 2).sum() / (centred**2).sum()
    found = explained_share(torch.from_numpy(x)[None], torch.from_numpy(classes)[None] * 100)
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_shares_of_independent_features_add_up():
    bits = torch.cartesian_prod(*[torch.arange(2)] * 3)
    x = (bits * torch.tensor([1.0, 2.0, 0.0]))[None]
    shares = [explained_share(x, bits[None, :, bit]).item() for bit in range(3)]
    assert shares == pytest.approx([1 / 5, 4 / 5, 0])


def test_members_have_shares_of_their_own():
    x = torch.tensor([[[0.0], [1.0]], [[0.0], [0.0]], [[1.0], [1.0]]])
    feature = torch.tensor([[0, 1]]).expand(3, 2)
    first, *others = explained_share(x, feature).tolist()
    assert first == 1 and all(map(math.isnan, others))


def test_attention_to_chosen_positions_is_its_mean_over_sequences():
    pattern = torch.tensor([[[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]]])
    assert attention_share(pattern, torch.tensor([False, True, True])).tolist() == [0.75]


def test_a_spike_is_counted_once_and_a_plateau_not_at_all():
    flat = np.full(40, 0.5)
    assert loss_spikes(flat) == [] and loss_spikes(flat[:0]) == []
    spiked = flat.copy()
    spiked[20:23], spiked[30] = (3.0, 4.0, 3.5), 2.0
    assert loss_spikes(spiked) == [20, 30]
    # a fall, or a rise by less than a fiftieth of the largest loss
    assert loss_spikes(np.concatenate([flat, np.full(40, 1e-4), [5e-4], np.full(40, 1e-4)])) == []
