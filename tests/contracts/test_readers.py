"""Claims about every reader there is, found in the package and in this folder: it reads, resumes, refuses early."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.errors import ConfigError
from opsin.model.transformer import Transformer
from opsin.task import Task
from tests.contracts.readers import READERS, TASKS, lacks_an_example, makers, task_of
from tests.contracts.runs import FEW, WHOLE, fit, generators, module, rich_task, weights
from tests.helpers.killers import Begun
from tests.helpers.regression import Pairs
from tests.helpers.toys import ToyTokens, few_shot

LEDGERS = ("wandb", "checkpoints")
"""Files that begin so hold an id of their own, or times, and are looked at by tests of those wings."""


@dataclass(frozen=True)
class Untouched:
    """What the run that nobody reads ends with: its parameters in one row, and the digest of its plan."""

    weights: torch.Tensor
    plan: str


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> dict[str, Untouched]:
    """The run of every task that nobody reads."""
    found = {}
    for task, make in TASKS.items():
        model = module(*make())
        fit(model, [], tmp_path_factory.mktemp("untouched"), FEW)
        found[task] = Untouched(weights(model), model.plan.digest())
    return found


@pytest.fixture(autouse=True)
def disabled(monkeypatch, tmp_path):
    # the run that all readers share is the one that W&B sees
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_a_reader_can_be_made_from_its_defaults_or_from_an_example_in_the_documents(name):
    assert not lacks_an_example(name), f"{name} has settings without a default, and no document shows an example"


@pytest.mark.parametrize("name", READERS)
def test_a_reader_moves_no_weight_and_draws_no_random_number(name, untouched, tmp_path):
    for number, make in enumerate(makers(name, tmp_path / "kept")):
        shutil.rmtree(tmp_path / "kept", ignore_errors=True)
        task = task_of(name)
        model, reader, before = module(*TASKS[task]()), make(), generators()
        fit(model, [reader], tmp_path / str(number), FEW)
        assert torch.equal(weights(model), untouched[task].weights), f"{name} moved a weight"
        assert model.plan.digest() == untouched[task].plan, f"{name} changed the plan of interventions"
        assert generators() == before, f"{name} drew from a global generator"


def test_all_readers_together_move_no_weight(read, task, tmp_path):
    model = module(*TASKS[task]())
    fit(model, [], tmp_path)
    assert torch.equal(weights(model), read.weights)


# ---- killed and resumed -----------------------------------------------------------------------------


def test_readers_that_are_killed_and_resumed_write_the_metrics_of_readers_left_alone(read, resumed):
    whole, killed = (list(csv.reader((run.folder / "metrics.csv").open())) for run in (read, resumed))
    unlike = {metric for step, _, metric, *_ in {*map(tuple, whole)} ^ {*map(tuple, killed)}}
    assert not unlike and whole == killed


def test_readers_that_are_killed_and_resumed_end_with_the_summary_of_readers_left_alone(read, resumed):
    whole, killed = (content(run.folder / "summary.json") for run in (read, resumed))
    assert whole.keys() == killed.keys()
    assert {name for name in whole if whole[name] != killed[name]} == set()


def test_readers_that_are_killed_and_resumed_leave_the_files_of_readers_left_alone(read, resumed):
    whole, killed = (left_behind(run.folder) for run in (read, resumed))
    assert whole.keys() == killed.keys() and len(whole) >= 4
    assert {name for name in whole if content(whole[name]) != content(killed[name])} == set()


def test_readers_that_are_killed_and_resumed_end_in_the_state_of_readers_left_alone(read, resumed):
    whole, killed = (states(run.folder / "checkpoints" / "last.ckpt") for run in (read, resumed))
    assert whole.keys() == killed.keys()
    assert {name for name in whole if whole[name] != killed[name]} == set()


@pytest.mark.parametrize("name", READERS)
def test_what_a_reader_saves_is_what_it_loads(name, runs, tmp_path):
    saved = torch.load(runs.read(task_of(name)).folder / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    for make in makers(name, tmp_path)[-1:]:
        # other numbers than a fresh reader may have by itself
        other = plain(shifted(saved.get(make().state_key, {})))
        if numbers(other):
            reader = make()
            reader.load_state_dict(shifted(saved[reader.state_key]))
            assert numbers(plain(reader.state_dict())) == numbers(other)


def shifted(state: Any) -> Any:
    """The same with one more in the place of every number."""
    if isinstance(state, dict):
        return {name: shifted(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return [shifted(value) for value in state]
    if isinstance(state, torch.Tensor):
        return ~state if state.dtype == torch.bool else state + 1
    return state if isinstance(state, bool | str | None) else state + 1


def numbers(state: Any) -> list[str]:
    """All numbers of a state in order, as text; not whether it has finished, which a run that goes on has not."""
    if isinstance(state, dict | list):
        return [item for value in (state.values() if isinstance(state, dict) else state) for item in numbers(value)]
    return [repr(state)] if isinstance(state, int | float) and not isinstance(state, bool) else []


def states(path: Path) -> dict[str, str]:
    """What a checkpoint holds of the module and of every callback, as text, since nan equals nothing."""
    saved = torch.load(path, weights_only=True)
    return {name: repr(plain(state)) for name, state in {**saved["opsin"], **saved["callbacks"]}.items()}


def left_behind(folder: Path) -> dict[str, Path]:
    """The files of a run by their names."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if not name.startswith(LEDGERS)}


def content(path: Path) -> Any:
    """What a file holds, without the time that the clock on the wall has shown."""
    match path.suffix:
        case ".json":
            return {name: value for name, value in json.loads(path.read_text()).items() if name != "wall_time_seconds"}
        case ".png":
            return np.asarray(Image.open(path)).tobytes()
        case ".pt":
            return plain(torch.load(path, weights_only=True))
        case _:
            return path.read_bytes()


def plain(saved: Any) -> Any:
    """The same with tensors as lists, which can be compared, and without times."""
    if isinstance(saved, dict):
        return {name: plain(value) for name, value in saved.items() if name != "seconds"}
    if isinstance(saved, list | tuple):
        return [plain(value) for value in saved]
    return saved.tolist() if isinstance(saved, torch.Tensor) else saved


# ---- on a run that lacks something --------------------------------------------------------------------

LACKING: dict[str, Callable[[], tuple[Task, Transformer]]] = {
    "no MLP": lambda: (rich_task(), Transformer(layers=2, width=16, heads=8)),
    "no LayerNorm": lambda: (rich_task(), Transformer(layers=2, width=16, heads=8, mlp_ratio=1, norm=False)),
    "features": lambda: (few_shot(), Transformer(layers=2, width=16, heads=8, mlp_ratio=1)),
    "features, attention only": lambda: (few_shot(), Transformer(layers=2, width=16, heads=8, norm=False)),
    "no unigram and no set that repeats": lambda: (ToyTokens(), WHOLE),
    "numbers in place of classes, and no token": lambda: (Pairs(), WHOLE),
}


@pytest.mark.parametrize("lack", LACKING)
@pytest.mark.parametrize("name", READERS)
def test_where_something_is_missing_a_reader_works_or_refuses_before_training(name, lack, tmp_path):
    for make in makers(name, tmp_path / "kept"):
        shutil.rmtree(tmp_path / "kept", ignore_errors=True)
        begun = Begun()
        try:
            fit(module(*LACKING[lack]()), [begun, make()], tmp_path, steps=4)
        except ConfigError as error:
            assert len(str(error).splitlines()) == 1
            assert not begun.seen, f"{name} refuses only once training starts: {error}"
