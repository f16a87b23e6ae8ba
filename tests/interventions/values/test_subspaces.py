"""Claims about subspaces: what a projection leaves, where directions come from, and what learning them finds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opsin.errors import ConfigError
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection
from opsin.interventions.values.nullspace import labelled_rows, learn_directions
from opsin.interventions.values.subspaces import (
    Basis,
    LearnedDirections,
    Projected,
    Renewal,
    WeightDirections,
    along,
    read_directions,
    renewal,
    singular_directions,
    weight_matrix,
)
from tests.helpers.toys import SMALL, ToyTokens, batch_of, few_shot, weights


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


# ---- given directions -----------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), rank=st.integers(1, 4), scale=st.sampled_from([1e-12, 1.0, 1e12]))
def test_given_rows_become_an_orthonormal_basis_of_their_span(seed, rank, scale):
    rows = random(seed, rank, 5)
    rows[0] *= scale
    basis = read_directions("field", rows.tolist()).basis
    assert torch.allclose(basis.T @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-12)
    unit = rows / rows.norm(dim=1, keepdim=True)
    assert torch.allclose(unit @ basis @ basis.T, unit, atol=1e-9)


def test_rows_of_a_file_are_those_of_the_list(tmp_path):
    rows = [[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]
    np.save(tmp_path / "rows.npy", np.array(rows, np.float32))
    listed, read = read_directions("", rows), read_directions("", str(tmp_path / "rows.npy"))
    assert listed == read and torch.equal(listed.basis, read.basis)
    assert listed != read_directions("", [[1.0, 2.0, 0.0], [0.0, 1.0, 2.0]])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "equally long rows"),
        ([[]], "equally long rows"),
        ([1.0, 2.0], "equally long rows"),
        ([[1.0, 2.0], [1.0]], "equally long rows"),
        ([["a"]], "equally long rows"),
        ([[1.0, float("nan")]], "finite numbers"),
        ([[1.0, float("inf")]], "finite numbers"),
        ([[0.0, 0.0]], "these 1 span 0"),
        ([[1.0, 2.0], [2.0, 4.0]], "these 2 span 1"),
        ([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], "these 3 span 2"),
        ("missing.npy", "a .npy file of equally long rows"),
    ],
)
def test_rows_that_are_no_directions_are_refused(rows, expected):
    with pytest.raises(ConfigError, match=rf"^Project.directions: got .*{expected}"):
        read_directions("Project.directions", rows)


@pytest.mark.parametrize("content", [np.ones(3), np.ones((1, 2, 3)), np.ones((1, 3), complex), np.array([["a"]])])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    np.save(tmp_path / "rows.npy", content)
    with pytest.raises(ConfigError, match=r"a \.npy file of"):
        read_directions("Project.directions", str(tmp_path / "rows.npy"))


def test_a_file_of_python_objects_is_not_run(tmp_path):
    np.save(tmp_path / "rows.npy", np.array([[object()]]), allow_pickle=True)
    with pytest.raises(ConfigError, match=r"a \.npy file of"):
        read_directions("Project.directions", str(tmp_path / "rows.npy"))


# ---- directions of a weight -----------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("part", ["top", "bottom"])
def test_singular_directions_span_what_numpy_finds(side, part):
    weight = random(0, 3, 8, 5)
    found = singular_directions(weight, WeightDirections(name="w", side=side, part=part, rank=2))
    for member in range(3):
        left, values, right = np.linalg.svd(weight[member].numpy(), full_matrices=False)
        assert (np.diff(values) < 0).all()
        vectors = (left if side == "input" else right.T)[:, :2] if part == "top" else None
        vectors = (left if side == "input" else right.T)[:, -2:] if vectors is None else vectors
        np.testing.assert_allclose((found[member] @ found[member].T).numpy(), vectors @ vectors.T, atol=1e-12)


def test_the_parts_of_a_block_are_those_that_the_model_multiplies_by():
    values = weights(SMALL, few_shot())
    whole, out = values["blocks.1.attn.W_QKV"], values["blocks.1.attn.W_O"]
    v = weight_matrix(values, "blocks.1.attn.W_V", "output", None)
    assert torch.equal(v, whole[:, :, 16:])
    for head in range(2):
        columns = slice(4 * head, 4 * head + 4)
        per_head = weight_matrix(values, "blocks.1.attn.W_V", "output", 2)[:, head]
        assert torch.equal(per_head, whole[:, :, 16:][:, :, columns])
        assert torch.equal(weight_matrix(values, "blocks.1.attn.W_O", "input", 2)[:, head], out[:, columns])


@pytest.mark.parametrize(
    ("name", "side", "heads"),
    [
        ("blocks.2.attn.W_V", "output", None),
        ("unembed.W", "input", None),
        ("unembed.b_U", "input", None),
        ("unembed.W_U", "input", 2),
        ("blocks.0.attn.W_V", "input", 2),
        ("blocks.0.attn.W_O", "output", 2),
    ],
)
def test_a_weight_that_is_not_there_is_refused(name, side, heads):
    with pytest.raises(ConfigError, match=rf"^Project.weight.name: got '{name}"):
        weight_matrix(weights(SMALL, few_shot()), name, side, heads)


# ---- learned directions ---------------------------------------------------------------------------


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
    told = (means[labels] + generator.standard_normal((sequences, rank))) @ generator.standard_normal((rank, rank))
    noise = generator.standard_normal((sequences, width - rank))
    half = sequences // 2
    known = np.concatenate([np.eye(classes)[labels[:half]], told[:half]], 1)
    noise[:half] -= known @ np.linalg.lstsq(known, noise[:half], rcond=None)[0]
    x = told @ inside[:, :rank].T + noise @ inside[:, rank:].T
    return torch.from_numpy(x)[:, None], torch.from_numpy(labels)[:, None], torch.from_numpy(inside[:, :rank])


@pytest.mark.parametrize(("classes", "rank", "rounds"), [(2, 1, 1), (2, 3, 3), (4, 3, 1), (4, 3, 2), (3, 4, 2)])
def test_learning_finds_the_planted_subspace_and_leaves_no_linear_trace_of_the_label(classes, rank, rounds):
    pairs = [planted(seed, classes, rank) for seed in (1, 2)]
    x, labels = (torch.stack(each) for each in list(zip(*pairs, strict=True))[:2])
    found = learn_directions(x, labels, classes, rounds, columns=12)
    for member, (own, label, inside) in enumerate(pairs):
        basis = found.basis[member]
        assert torch.allclose(span(inside) @ basis, basis, atol=1e-8)
        if rank == classes - 1:
            assert torch.allclose(span(basis), span(inside), atol=1e-8)
        left = (own - own @ span(basis))[:200, 0].numpy()
        probe = np.concatenate([left - left.mean(0), np.ones((200, 1))], 1)
        one = np.eye(classes)[label[:200, 0]]
        fresh = probe @ np.linalg.lstsq(probe, one, rcond=1e-9)[0]
        assert np.allclose(fresh, one.mean(0), atol=1e-3)
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


# ---- when -----------------------------------------------------------------------------------------


def due_steps(when, batch_size=4, steps=20):
    return [step for step in range(steps) if when.due(step, batch_size)]


def test_directions_are_taken_when_they_are_due():
    assert due_steps(Renewal(3, "steps", None)) == [3]
    assert due_steps(Renewal(3, "steps", 7)) == [3, 10, 17]
    assert due_steps(Renewal(0, "steps", 10)) == [0, 10]
    # the first step that a schedule from 9 sequences on covers is the one that begins at 12
    assert due_steps(Renewal(9, "sequences", 5)) == [3, 8, 13, 18]
    assert due_steps(Renewal(8, "sequences", None)) == [2]


@given(st.integers(0, 100), st.sampled_from(["steps", "sequences"]), st.integers(1, 9))
def test_directions_are_there_before_the_first_step_on_which_their_schedule_acts(start, unit, batch_size):
    schedule = Schedule(start=start, unit=unit)
    when = renewal(WeightDirections(name="w"), schedule, "Project.weight")
    active = np.flatnonzero(schedule.strength(np.arange(200), batch_size))
    assert due_steps(when, batch_size, 200) == [active[0]]


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: WeightDirections(name="w", side="left"), "Project.weight.side"),
        (lambda: WeightDirections(name="w", part="middle"), "Project.weight.part"),
        (lambda: WeightDirections(name="w", rank=0), "Project.weight.rank"),
        (lambda: WeightDirections(name="w", every=0), "Project.weight.every"),
        (lambda: WeightDirections(name="w", at=-1), "Project.weight.at"),
        (lambda: LearnedDirections(label="colour"), "Project.learn.label"),
        (lambda: LearnedDirections(rounds=0), "Project.learn.rounds"),
        (lambda: LearnedDirections(every=0), "Project.learn.every"),
        (lambda: renewal(LearnedDirections(at=6), Schedule(start=5), "Project.learn"), "Project.learn.at"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(make, field):
    with pytest.raises(ConfigError) as refused:
        make()
    assert refused.value.field == field
