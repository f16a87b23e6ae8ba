"""Claims about directions: what given rows and a weight span, and when directions are taken."""

import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opsin.errors import ConfigError
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.directions import (
    LearnedDirections,
    Renewal,
    WeightDirections,
    read_directions,
    renewal,
    singular_directions,
    weight_matrix,
)
from tests.helpers.toys import SMALL, few_shot, weights
from tests.interventions.values.test_subspaces import random

TABLE = SMALL.parameters(few_shot())


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
    v = weight_matrix(values, TABLE, "blocks.1.attn.W_V", "output", None)
    assert torch.equal(v, whole[:, :, 16:])
    for head in range(2):
        columns = slice(4 * head, 4 * head + 4)
        per_head = weight_matrix(values, TABLE, "blocks.1.attn.W_V", "output", 2)[:, head]
        assert torch.equal(per_head, whole[:, :, 16:][:, :, columns])
        assert torch.equal(weight_matrix(values, TABLE, "blocks.1.attn.W_O", "input", 2)[:, head], out[:, columns])


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
        weight_matrix(weights(SMALL, few_shot()), TABLE, name, side, heads)


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


def header(shape, kind):
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


class RunsWhenUnpickled:
    """Ends the process of whoever unpickles it."""

    def __reduce__(self):
        return os._exit, (13,)


BAD_FILES = {
    "terabytes": header((10**6, 10**6), "<f8") + b"\0" * 64,
    "more_than_there_is": header((2, 3), "<f8") + b"\0" * 8,
    "objects": header((1, 1), "|O"),
    "code": header((1, 1), "|O") + pickle.dumps(RunsWhenUnpickled()),
    "text": b"1 2 3\n4 5 6\n",
    "pickle": pickle.dumps(RunsWhenUnpickled()),
    "empty": b"",
    "complex": header((1, 1), "<c16") + b"\0" * 16,
    "one_axis": header((3,), "<f8") + b"\0" * 24,
    "not_a_number": header((1, 1), "<f8") + np.array([np.nan]).tobytes(),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.filterwarnings("error")
def test_a_file_that_holds_no_directions_is_refused_by_setting_and_file(name, tmp_path):
    path = tmp_path / "rows.npy"
    path.write_bytes(BAD_FILES[name])
    with pytest.raises(ConfigError, match=r"^Project\.directions: got '.*rows\.npy', expected ") as caught:
        read_directions("Project.directions", str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [os.mkdir, os.mkfifo, lambda path: None])
def test_what_is_no_regular_file_holds_no_directions(place, tmp_path):
    place(tmp_path / "rows.npy")
    with pytest.raises(ConfigError, match=r"^Project\.directions: got '.*rows\.npy', expected a \.npy file"):
        read_directions("Project.directions", str(tmp_path / "rows.npy"))
