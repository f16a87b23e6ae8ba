"""Claims about subspaces: what a projection leaves, where it is the identity, and what gradient flows through it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opsin.interventions.selection import Selection
from opsin.interventions.values.directions import read_directions
from opsin.interventions.values.subspaces import Basis, Projected, along


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(seed, *shape):
    return torch.linalg.qr(random(seed, *shape)).Q


def projected(x, basis, **settings):
    """What the value writes, and where."""
    where = Basis("somewhere", x.shape[-1], basis.shape[-1], None, Selection(), read_directions("", [[1.0]]), None)
    return Projected(where, **settings)(x, None, basis)


SETTINGS = [
    {"mode": mode, "about": about, "heads": heads}
    for mode in ("remove", "keep")
    for about in ("zero", "mean")
    for heads in (False, True)
]


@pytest.mark.parametrize("settings", SETTINGS)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5))
def test_a_projection_is_idempotent_and_leaves_nothing_where_it_removes(settings, seed, rank):
    settings = dict(settings)
    heads = (3,) if settings.pop("heads") else ()
    x, basis = random(seed, 2, 6, 4, *heads, 5), orthonormal(seed + 1, 2, *heads, 5, rank)
    once = projected(x, basis, **settings).value
    assert torch.allclose(projected(once, basis, **settings).value, once, atol=1e-12)
    centre = x.mean(1, keepdim=True) if settings["about"] == "mean" else torch.zeros(())
    inside = along(once - centre, basis)
    if settings["mode"] == "remove":
        assert inside.abs().max() < 1e-12
    else:
        assert torch.allclose(inside, once - centre, atol=1e-12)
    if settings["about"] == "mean":
        assert torch.allclose(once.mean(1), x.mean(1), atol=1e-12)


def test_the_part_along_directions_is_that_of_every_member_and_head_alone():
    x, basis = random(0, 2, 3, 4, 3, 5), orthonormal(1, 2, 3, 5, 2)
    expected = torch.empty_like(x)
    for m, b, row, h in np.ndindex(2, 3, 4, 3):
        vector = x[m, b, row, h]
        expected[m, b, row, h] = sum(vector.dot(column) * column for column in basis[m, h].T)
    assert torch.allclose(along(x, basis), expected, atol=1e-12)


@pytest.mark.parametrize("mode", ["remove", "keep"])
def test_the_gradient_is_the_finite_difference_and_nothing_flows_along_what_is_removed(mode):
    x, basis, weight = random(0, 2, 3, 4, 5), orthonormal(1, 2, 5, 2).requires_grad_(), random(2, 2, 3, 4, 5)

    def loss(x):
        return (projected(x, basis, mode=mode).value * weight).square().sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    direction, step = random(3, *x.shape), 1e-5
    slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-8, atol=1e-8)
    lost = along(direction, basis) if mode == "remove" else direction - along(direction, basis)
    assert abs((gradient * lost).sum()) < 1e-12 * gradient.norm() * lost.norm()
    assert torch.allclose(loss(x + lost), loss(x), rtol=1e-12)


def test_along_a_removed_axis_the_gradient_is_zero_to_the_bit():
    basis = torch.eye(5, dtype=torch.float64)[None, :, [1, 3]]
    x = random(0, 1, 3, 4, 5).requires_grad_()
    for about in ("zero", "mean"):
        (gradient,) = torch.autograd.grad(projected(x, basis, about=about).value.square().sum(), x)
        assert (gradient[..., [1, 3]] == 0).all() and (gradient[..., [0, 2, 4]] != 0).all()


@pytest.mark.parametrize("mode", ["remove", "keep"])
def test_an_empty_basis_leaves_the_activation_of_its_member_and_head_to_the_bit(mode):
    x, basis = random(0, 2, 3, 4, 2, 5), orthonormal(1, 2, 2, 5, 2)
    basis[1, 0] = 0
    written = projected(x, basis, mode=mode)
    where = torch.ones((), dtype=torch.bool) if written.where is None else written.where
    after = torch.where(where, written.value, x)
    same = (after == x).all(-1).all(2).all(1)
    assert same.tolist() == [[False, False], [True, False]]
