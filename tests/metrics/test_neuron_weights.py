"""Claims about neurons' weights: the planted neuron is found, and every formula has a slow version."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opsin.metrics.neuron_weights import logit_var, null_share, random_outputs, weight_norm
from tests.helpers.planted_neurons import (
    ENTROPY,
    FREQUENCY,
    ORDINARY,
    D,
    N,
    V,
    any_model,
    planted,
)


def test_the_weights_tell_the_planted_entropy_neuron():
    model = planted()
    share, spread, norm = (
        null_share(model.w_out, model.read_out),
        logit_var(model.w_out, model.read_out),
        weight_norm(model.w_out),
    )
    assert share.dimensions.tolist() == [D - V]
    assert share.rho[0, ENTROPY] == pytest.approx(1, abs=1e-12)
    assert share.rho[0, [FREQUENCY, ORDINARY]].max() < 1e-7 and share.rho[0].argmax() == ENTROPY
    assert spread[0, ENTROPY] < 1e-20 and spread[0].argmin() == ENTROPY
    assert norm[0, ENTROPY] == pytest.approx(3) and norm[0, ENTROPY] > norm[0].median()


def test_logit_var_is_the_variance_of_the_cosines():
    model = any_model()
    found = logit_var(model.w_out, model.read_out)
    for m in range(2):
        folded = (model.values["ln_final.w"][m, :, None] * model.values["unembed.W_U"][m]).numpy()
        folded = folded - folded.mean(0) - folded.mean(1, keepdims=True) + folded.mean()
        for neuron in range(N):
            weight = model.w_out[m, neuron].numpy()
            weight = weight - weight.mean()
            cosines = [weight @ column / np.linalg.norm(weight) / np.linalg.norm(column) for column in folded.T]
            assert found[m, neuron].item() == pytest.approx(np.var(cosines), rel=1e-10)


# inside the exact null space any basis is as good, so no number of dimensions below its own has a known answer
@pytest.mark.parametrize("dimensions", [0, D - V, D - V + 3, D - 1, None])
def test_rho_is_what_is_left_when_all_other_directions_are_taken_away(dimensions):
    model = any_model()
    found = null_share(model.w_out, model.read_out, dimensions)
    k = D - V if dimensions is None else dimensions
    for m in range(2):
        folded = np.diag(model.values["ln_final.w"][m]) @ model.values["unembed.W_U"][m].numpy()
        centre = np.eye(D) - 1 / D
        folded = centre @ folded @ (np.eye(V) - 1 / V)
        values, vectors = np.linalg.eigh(folded @ folded.T)
        seen = vectors[:, np.argsort(values)[k + 1 :]]  # all ones is one of the directions of value 0
        weight = model.w_out[m].numpy() @ centre
        left = weight - weight @ seen @ seen.T if k else 0 * weight
        expected = np.linalg.norm(left, axis=1) / np.linalg.norm(weight, axis=1)
        np.testing.assert_allclose(found.rho[m], expected, atol=1e-7)
    assert found.dimensions.tolist() == [k, k]
    assert found.chance.tolist() == pytest.approx([(k / (D - 1)) ** 0.5] * 2)


def test_chance_is_what_random_weights_reach():
    model = any_model((0,))
    w_out = torch.randn(1, 20_000, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = null_share(w_out, model.read_out)
    squares = found.rho.square()
    error = squares.std() / squares.shape[1] ** 0.5
    assert abs(squares.mean() - found.chance.item() ** 2) < 4 * error


def test_controls_match_the_norms_differ_with_the_seed_and_draw_from_no_shared_generator():
    model, before = any_model(), torch.get_rng_state()
    first, again, other = (random_outputs(model.w_out, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(first, again) and not torch.allclose(first, other)
    assert torch.allclose(weight_norm(first), weight_norm(model.w_out)) and first.sum(-1).abs().max() < 1e-12
    directions = [outputs / outputs.norm(dim=-1, keepdim=True) for outputs in first]
    assert torch.allclose(*directions)
