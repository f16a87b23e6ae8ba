"""Claims about Fourier measures: cases with a closed form, and numpy's transform."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opsin.metrics.fourier import (
    excluded,
    fourier_basis,
    gini,
    neuron_concentration,
    power_by_frequency,
    restricted,
    share_in,
    share_of_logits,
    strongest_frequencies,
    trig_coefficients,
)

P = 7
A, B = (x.reshape(-1) for x in np.divmod(np.arange(P * P), P))
SUMS = torch.from_numpy((A + B) % P)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wave(k, x, phase=0.0):
    return torch.from_numpy(np.cos(2 * np.pi * k * np.asarray(x) / P + phase))


def cosine_logits(*frequencies):
    """Logits cos w(a + b - c) summed over frequencies, of one member."""
    difference = SUMS.numpy()[:, None] - np.arange(P)
    return torch.stack([wave(k, difference) for k in frequencies]).sum(0)[None]


@pytest.mark.parametrize("modulus", [3, 7, 37])
def test_the_basis_and_the_constant_are_orthonormal(modulus):
    rows = torch.cat([torch.full((1, modulus), modulus**-0.5), fourier_basis(modulus).flatten(0, 1)])
    assert torch.allclose(rows @ rows.T, torch.eye(modulus, dtype=torch.float64), atol=1e-14)


def test_power_is_that_of_numpys_transform():
    weight = normals(2, P, 5)
    found = np.abs(np.fft.rfft(weight.numpy(), axis=1)[:, 1:]) ** 2
    np.testing.assert_allclose(power_by_frequency(weight), 2 / P * found.sum(2), rtol=1e-12)
    centred = weight - weight.mean(1, keepdim=True)
    torch.testing.assert_close(power_by_frequency(weight).sum(1), centred.square().sum((1, 2)))


def test_an_embedding_of_one_frequency_has_all_power_there_whatever_its_mean_row():
    weight = torch.stack([wave(2, range(P)), wave(2, range(P), 1.0)], 1)[None] + 5
    power = power_by_frequency(weight)
    assert power[0, 1].item() == pytest.approx(P)
    assert gini(power).item() == pytest.approx(2 / 3) and strongest_frequencies(power, 1).tolist() == [
        [False, True, False]
    ]
    assert share_in(power, strongest_frequencies(power, 1)).item() == pytest.approx(1)


def test_a_delta_has_equal_power_in_all_frequencies():
    delta = torch.zeros(1, P, 1, dtype=torch.float64)
    delta[0, 3] = 1
    power = power_by_frequency(delta)
    np.testing.assert_allclose(power, np.full((1, 3), 2 / P))
    assert gini(power).item() == pytest.approx(0, abs=1e-12)
    assert share_in(power, strongest_frequencies(power, 2)).item() == pytest.approx(2 / 3)


def test_gini_is_half_the_mean_difference_over_the_mean():
    amounts = normals(3, 9).square()
    for row, found in zip(amounts.numpy(), gini(amounts), strict=True):
        assert found.item() == pytest.approx(np.abs(row[:, None] - row).mean() / (2 * row.mean()), rel=1e-12)


def test_a_neuron_of_one_frequency_is_concentrated_and_a_sum_of_two_halves_is_half():
    a, b = torch.arange(P)[:, None], torch.arange(P)
    one = wave(3, a + b) + 2 * wave(3, a + 0 * b, 0.3) + 7
    two = wave(3, a + b) + wave(2, a - b)
    mixed = wave(1, a + 0 * b) * wave(2, b + 0 * a)
    found = neuron_concentration(torch.stack([one, two, mixed, 0 * one], -1)[None])
    np.testing.assert_allclose(found, [[1, 0.5, 0, math.nan]], atol=1e-12)


def test_the_concentration_is_that_of_numpys_two_dimensional_transform():
    activation = normals(2, P, P, 3).relu()
    power = np.abs(np.fft.fft2(activation.numpy(), axes=(1, 2))) ** 2
    power[:, 0, 0] = 0
    by_frequency = [power[:, [0, k, -k]][:, :, [0, k, -k]].sum((1, 2)) for k in range(1, P // 2 + 1)]
    np.testing.assert_allclose(
        neuron_concentration(activation), np.max(by_frequency, 0) / power.sum((1, 2)), rtol=1e-10
    )


def test_logits_of_a_cosine_have_its_coefficient_alone():
    logits = 3 * cosine_logits(2)
    found = trig_coefficients(logits, SUMS)
    # P^3 entries of mean square 1/2
    np.testing.assert_allclose(found, [[0, 3 * math.sqrt(P**3 / 2), 0]], atol=1e-10)
    assert share_of_logits(found, logits + normals(1, P * P, 1)).item() == pytest.approx(1)


def test_a_delta_at_the_answer_has_equal_coefficients_and_is_all_cosines():
    delta = torch.nn.functional.one_hot(SUMS, P).double()[None]
    found = trig_coefficients(delta, SUMS)
    # P^2 entries of 1 at the top of each wave
    np.testing.assert_allclose(found, np.full((1, 3), P**2 / math.sqrt(P**3 / 2)))
    assert share_of_logits(found, delta).item() == pytest.approx(1)


def test_what_a_pair_has_of_its_own_is_no_function_of_its_sum():
    logits = torch.zeros(1, P * P, P, dtype=torch.float64)
    logits[0, 3, 5] = 1
    # the entry, centred, has 1 - 1 / p; cos^2 2w over all w adds up to (p - 2) / 4, each over p^3 / 2
    expected = (P - 2) / 4 / (P**3 / 2) / (1 - 1 / P)
    assert share_of_logits(trig_coefficients(logits, SUMS), logits).item() == pytest.approx(expected)


def test_restricting_keeps_key_frequencies_and_excluding_takes_them_away():
    key = torch.tensor([[False, True, False]])
    bias = normals(1, 1, P)
    rest = wave(1, A)[None, :, None] * normals(1, 1, P, seed=1)
    logits = cosine_logits(1, 2) + bias + rest
    torch.testing.assert_close(restricted(logits, SUMS, key), cosine_logits(2) + bias)
    torch.testing.assert_close(excluded(logits, SUMS, key), cosine_logits(1) + bias + rest)


def test_each_member_has_key_frequencies_of_its_own():
    logits = cosine_logits(1, 3).expand(2, -1, -1)
    keys = torch.tensor([[True, False, False], [False, False, True]])
    torch.testing.assert_close(restricted(logits, SUMS, keys), torch.cat([cosine_logits(1), cosine_logits(3)]))
