"""The runs that the contracts share: one with every reader, and the same killed and resumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from opsin.callbacks import KeepRun
from opsin.reports.run import final_report
from tests.contracts.examples import STEPS
from tests.contracts.figures import Drawn, collected
from tests.contracts.readers import TASKS, every_reader
from tests.contracts.runs import fit, module, weights
from tests.helpers.killers import KillAt, Killed


@dataclass(frozen=True)
class Read:
    """A run with every reader that has ended.

    Args:
        folder: folder in which it is kept.
        weights: final parameters in one row.
        drawn: figures that were drawn meanwhile, by the name of their function.
    """

    folder: Path
    weights: torch.Tensor
    drawn: Drawn


class Runs:
    """The runs of every task with its readers, each made when it is first wanted.

    Args:
        folder: folder that the run folders are made in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read, self._resumed = {}, {}

    def read(self, task: str) -> Read:
        """A run with every reader, W&B's offline among them, left alone to its end."""
        if task not in self._read:
            folder, model = self.folder / f"{task}-read" / "run", module(*TASKS[task]())
            with pytest.MonkeyPatch.context() as patch, collected() as drawn:
                patch.setenv("WANDB_MODE", "offline")
                fit(model, kept(folder, task), folder)
                assert final_report(model.summary, folder)
            self._read[task] = Read(folder, weights(model), drawn)
        return self._read[task]

    def resumed(self, task: str) -> Read:
        """The same run killed between two checkpoints, and resumed from the last."""
        if task not in self._resumed:
            folder, model = self.folder / f"{task}-resumed" / "run", module(*TASKS[task]())
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("WANDB_MODE", "disabled")
                with pytest.raises(Killed):
                    fit(module(*TASKS[task]()), [*kept(folder, task), KillAt(STEPS - 4)], folder)
                assert not (folder / "summary.json").exists()
                fit(model, kept(folder, task), folder, resume=folder / "checkpoints" / "last.ckpt")
            self._resumed[task] = Read(folder, weights(model), {})
        return self._resumed[task]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    """The runs that the contracts share."""
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(params=TASKS)
def task(request) -> str:
    """Each of the tasks in turn."""
    return request.param


@pytest.fixture
def read(runs, task) -> Read:
    """A run with every reader of a task."""
    return runs.read(task)


@pytest.fixture
def resumed(runs, task) -> Read:
    """The same run killed and resumed."""
    return runs.resumed(task)


def kept(folder: Path, task: str) -> list[Callback]:
    """Every reader of a task, and one that keeps the run even where none of them does."""
    made = every_reader(folder, task)
    return made if any(isinstance(item, KeepRun) for item in made) else [*made, KeepRun(folder, checkpoint_every=12)]
