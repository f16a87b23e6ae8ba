"""Claims about every task there is: what a step sees is decided by seed and step, and the truth it hands out holds."""

from __future__ import annotations

import inspect
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from opsin import tasks
from opsin.task import Task
from tests.contracts.examples import built, examples_of, needs_an_example
from tests.contracts.runs import generators
from tests.helpers.paths import ROOT

TASKS: dict[str, type[Task]] = {
    name: kind
    for name in tasks.__all__
    if isinstance(kind := getattr(tasks, name), type) and issubclass(kind, Task) and not inspect.isabstract(kind)
}
SEED, STEP, SIZE = 3, 5, 4
"""One member's seed, one optimizer step, and the sequences of a batch in these tests."""


def lacks_an_example(name: str) -> bool:
    """Whether nothing says how a task can be made."""
    return needs_an_example(TASKS[name]) and not examples_of(f"opsin.tasks.{name}")


MADE = [name for name in TASKS if not lacks_an_example(name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.fixture
def task(name, folder, monkeypatch) -> Task:
    monkeypatch.chdir(folder)
    return task_of(name)


@cache
def task_of(name: str) -> Task:
    """A task from its defaults if it can be, else from the first example that a document or a recipe shows."""
    bare = {"class_path": f"opsin.tasks.{name}", "init_args": {}}
    settings = examples_of(bare["class_path"])[0] if needs_an_example(TASKS[name]) else bare
    for value in settings["init_args"].values():
        # a text that only its reader has
        if isinstance(value, str) and value.endswith(".txt"):
            Path(value).parent.mkdir(parents=True, exist_ok=True)
            Path(value).write_text((ROOT / "README.md").read_text() * 4)
    return built(settings)


def splits(task: Task) -> list[str]:
    return ["train", *(f"eval/{name}" for name in task.evaluations)]


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def enough(task: Task) -> int:
    """Sequences of a batch that has so many positions that two are not equal by chance."""
    return SIZE * -(-8 // task.layout.positions)


def sequences(task: Task, split: str, steps: int = 3) -> set[bytes]:
    """Every sequence of a split by what it shows: its numbers, features and answers."""
    found = set()
    for step in range(steps):
        batch = task.batch(SEED, step, split, enough(task))
        parts = [batch.tokens, batch.targets, *([] if batch.features is None else [batch.features])]
        for row in range(enough(task)):
            found.add(b"".join(np.ascontiguousarray(part[0, row].numpy()).tobytes() for part in parts))
    return found


@pytest.mark.parametrize("name", TASKS)
def test_a_task_can_be_made_from_its_defaults_or_from_an_example(name):
    assert not lacks_an_example(name), f"{name} has settings without a default, and no document or recipe shows any"


@pytest.mark.parametrize("name", MADE)
def test_a_batch_is_a_function_of_seed_and_step_whoever_is_drawn_beside_it(task, name):
    before = generators()
    for split in splits(task):
        alone = {key: x[0, 0] for key, x in task.draw([SEED], STEP, 1, split, SIZE).items()}
        for seeds, first, count in (([SEED], STEP, 1), ([1, SEED], STEP, 1), ([SEED, 1, 2], STEP - 2, 4)):
            together = task.draw(seeds, first, count, split, SIZE)
            assert all(x.shape[:3] == (count, len(seeds), SIZE) for x in together.values())
            assert same(alone, {key: x[STEP - first, seeds.index(SEED)] for key, x in together.items()})
    assert generators() == before


@pytest.mark.parametrize("name", MADE)
def test_another_seed_or_step_draws_other_sequences(task, name):
    # a fixed set is the same for everybody; what its own training draws is a claim of tests/tasks/shared/test_finite.py
    for split in (split for split in splits(task) if task.set_size(split) is None):
        base = task.draw([SEED], STEP, 1, split, SIZE)
        assert not same(base, task.draw([SEED + 1], STEP, 1, split, SIZE))
        assert not same(base, task.draw([SEED], STEP + 1, 1, split, SIZE))


@pytest.mark.parametrize("name", MADE)
def test_evaluation_draws_never_coincide_with_those_of_training(task, name):
    trained_on = [] if task.set_size("train") is None else ["eval/train"]
    for split in (split for split in splits(task)[1:] if split not in trained_on):
        pairs = [
            tuple(task.draw([SEED], at, 1, name, enough(task)) for at, name in ((trained, "train"), (step, split)))
            for trained in range(3)
            for step in range(3)
        ]
        assert not any(same(one, other) for one, other in pairs), split
        assert sequences(task, "train") != sequences(task, split)


@pytest.mark.parametrize("name", MADE)
def test_the_truth_has_its_stated_shape_and_points_at_the_answer(task, name):
    length = task.layout.positions
    assert sorted((*task.layout.features, *task.layout.tokens)) == list(range(length))
    for split in splits(task):
        batch = task.batch(SEED, STEP, split, SIZE)
        truth, scored = batch.truth, list(task.layout.scored)
        assert truth.previous.shape == truth.labels.shape == (length,)
        assert truth.query.shape == (1, SIZE, length)
        assert truth.match.shape == truth.other.shape == (1, SIZE, length, length)
        assert truth.previous[0] == 0 and (truth.previous <= torch.arange(length)).all()
        candidates = truth.match | truth.other
        assert not (truth.match & truth.other).any() and not candidates[~truth.query].any()
        # a query sees what it looks at, and some of it is right
        assert not candidates.triu(1).any() and truth.match.any(-1)[truth.query].all()
        for _, row, position, key in truth.match.nonzero().tolist():
            if position in scored and key in task.layout.tokens:
                shown = batch.tokens[0, row, task.layout.tokens.index(key)]
                assert shown == batch.targets[0, row, scored.index(position)]


@pytest.mark.parametrize("name", MADE)
def test_tokens_targets_and_features_are_in_their_ranges(task, name):
    for split in splits(task):
        batch = task.batch(SEED, STEP, split, SIZE)
        assert batch.tokens.shape == (1, SIZE, len(task.layout.tokens))
        assert ((batch.tokens >= 0) & (batch.tokens < task.n_tokens)).all()
        scored = (1, SIZE, len(task.layout.scored))
        if task.objective.predicts_classes:
            assert batch.targets.shape == scored
            assert batch.targets.min() >= 0 and batch.targets.max() < task.n_outputs
        else:
            assert batch.targets.shape == (*scored, task.n_outputs) and batch.targets.isfinite().all()
        assert (batch.features is None) == (task.n_features is None)
        if batch.features is not None:
            assert batch.features.shape == (1, SIZE, len(task.layout.features), task.n_features)
            assert batch.features.isfinite().all()


@pytest.mark.parametrize("name", MADE)
def test_its_baselines_are_finite_and_fall_to_the_plateau(task, name):
    losses = list(task.baselines().values())
    assert losses and all(math.isfinite(loss) for loss in losses)
    # the last is the plateau: the best without looking the answer up
    assert losses == sorted(losses, reverse=True) and losses[-1] == min(losses) > 0


@pytest.mark.parametrize("name", MADE)
def test_what_it_knows_of_its_outputs_are_outputs_and_of_classes_probabilities(task, name):
    unigram = task.unigram()
    if unigram is not None:
        assert unigram.shape == (task.n_outputs,) and torch.isclose(unigram.sum(), torch.ones(()).to(unigram))
    batch = task.batch(SEED, STEP, "train", SIZE)
    exact = task.exact(batch)
    if exact is not None:
        assert exact.shape == (1, SIZE, len(task.layout.scored), task.n_outputs) and exact.isfinite().all()
        if task.objective.predicts_classes:
            assert torch.allclose(exact.exp().sum(-1), torch.ones(()).to(exact))


@pytest.mark.parametrize("name", MADE)
def test_the_training_distribution_is_its_first_evaluation_set(task, name):
    assert task.evaluations[0] == "train" and len({*task.evaluations}) == len(task.evaluations)
