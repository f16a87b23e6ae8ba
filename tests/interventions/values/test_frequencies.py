"""Claims about embeddings without frequencies: numpy's transform lacks them, all else stays, gradient avoids them."""

from __future__ import annotations

import numpy as np
import torch

from opsin.interventions.values.frequencies import WithoutFrequencies
from opsin.model.layers import looked_up
from opsin.tasks import ModularArithmetic

P, D = 7, 4
BATCH = ModularArithmetic(P).batch(0, 0)
VALUE = WithoutFrequencies((1, 3), P)


def embedding(seed=0):
    return torch.randn(1, P + 1, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def left(weight, value=VALUE):
    return value(looked_up(BATCH.tokens, weight), BATCH, weight).value


def spectrum(weight):
    return np.fft.rfft(weight[0, :P].detach().numpy(), axis=0)


def test_what_is_left_has_other_frequencies_alone_and_those_as_they_were():
    weight = embedding()
    rows = torch.zeros(1, P, D, dtype=torch.float64)
    rows[0, BATCH.tokens[0, :, :2]] = left(weight)[0, :, :2]
    expected = spectrum(weight)
    expected[[1, 3]] = 0
    np.testing.assert_allclose(spectrum(rows), expected, atol=1e-12)


def test_a_token_that_is_no_number_stays_as_it_is():
    weight = embedding()
    assert torch.equal(left(weight)[:, :, 2], weight[:, P].expand(1, len(BATCH.tokens[0]), D))


def test_what_another_writer_has_added_stays():
    weight = embedding()
    x = looked_up(BATCH.tokens, weight)
    torch.testing.assert_close(VALUE(x + 1, BATCH, weight).value, left(weight) + 1)


def test_no_gradient_moves_the_embedding_along_what_is_taken_away():
    weight = embedding().requires_grad_()
    out = left(weight)
    (gradient,) = torch.autograd.grad((out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum(), weight)
    found = spectrum(gradient)
    assert np.abs(found[[1, 3]]).max() < 1e-12 < np.abs(found[2]).min()
