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
from tests.contracts.readers import every_reader
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


@pytest.fixture(scope="session")
def read(tmp_path_factory) -> Read:
    """A run with every reader, W&B's offline among them, left alone to its end."""
    folder = tmp_path_factory.mktemp("read") / "run"
    model = module()
    with pytest.MonkeyPatch.context() as patch, collected() as drawn:
        patch.setenv("WANDB_MODE", "offline")
        fit(model, kept(folder), folder)
        assert final_report(model.summary, folder)
    return Read(folder, weights(model), drawn)


@pytest.fixture(scope="session")
def resumed(tmp_path_factory) -> Read:
    """The same run killed between two checkpoints, and resumed from the last."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    model = module()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        with pytest.raises(Killed):
            fit(module(), [*kept(folder), KillAt(STEPS - 4)], folder)
        assert not (folder / "summary.json").exists()
        fit(model, kept(folder), folder, resume=folder / "checkpoints" / "last.ckpt")
    return Read(folder, weights(model), {})


def kept(folder: Path) -> list[Callback]:
    """Every reader, and one that keeps the run even where no document shows how."""
    made = every_reader(folder)
    return made if any(isinstance(item, KeepRun) for item in made) else [*made, KeepRun(folder, checkpoint_every=12)]
