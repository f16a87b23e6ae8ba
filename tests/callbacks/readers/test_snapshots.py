"""Claims about Snapshots: which states are written, that they are the states, and that a resume changes no file."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from opsin.callbacks import KeepRun
from opsin.callbacks.readers.snapshots import Snapshots
from opsin.errors import ConfigError
from opsin.model.transformer import Transformer
from opsin.tasks import FewShot, GaussianClusters
from opsin.training.module import OpsinModule
from opsin.training.observers import Event
from tests.helpers.killers import KillAt, Killed
from tests.helpers.toys import train

BATCH = 8


def tiny() -> OpsinModule:
    task = FewShot(exemplars=GaussianClusters(classes=20, features=16), train_classes=12, batch_size=BATCH)
    return OpsinModule(
        task, Transformer(width=16, heads=2), seed=[3, 4], steps_per_batch=10, log_every=5, compile=False
    )


def trained(steps: int, *callbacks: pl.Callback, resume=None) -> OpsinModule:
    return train(tiny(), steps, *callbacks, resume=resume)


class Announce(pl.Callback):
    """Announces at the end of the batch that ends at ``at``, as of a record ``late`` steps before."""

    def __init__(self, at: int, kind: str = "phase change", late: int = 0) -> None:
        self.at, self.kind, self.late = at, kind, late

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.at:
            pl_module.announce(Event(self.kind, self.at - self.late, 0, "here"))


def steps_in(folder) -> set[int]:
    return {int(path.stem.removeprefix("step_")) for path in (folder / "snapshots").iterdir()}


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "snapshots").iterdir()}


def test_without_a_phase_change_only_log_spaced_steps_and_the_last_are_written(tmp_path):
    trained(45, Snapshots(per_decade=2, ring=2, every=5), Announce(20, kind="something else"), KeepRun(tmp_path))
    assert steps_in(tmp_path) == {0, 1, 3, 10, 32, 45}


def test_around_a_phase_change_the_ring_and_as_many_states_after_it_are_written(tmp_path):
    trained(120, Snapshots(per_decade=1, ring=4, every=5), Announce(60), KeepRun(tmp_path))
    assert steps_in(tmp_path) == {0, 1, 10, 100, 120} | {45, 50, 55, 60} | {65, 70, 75, 80}


def test_the_dense_stretch_counts_from_the_step_the_event_names(tmp_path):
    trained(120, Snapshots(per_decade=1, ring=4, every=5), Announce(60, late=5), KeepRun(tmp_path))
    assert steps_in(tmp_path) == {0, 1, 10, 100, 120} | {45, 50, 55, 60} | {65, 70, 75}


def test_two_phase_changes_are_both_surrounded(tmp_path):
    trained(120, Snapshots(per_decade=1, ring=2, every=5), Announce(30), Announce(90), KeepRun(tmp_path))
    assert steps_in(tmp_path) == {0, 1, 10, 100, 120} | {25, 30, 35, 40} | {85, 90, 95}


def test_a_snapshot_holds_the_weights_of_a_run_that_stopped_there(tmp_path):
    trained(60, Snapshots(per_decade=1, ring=9, every=7), Announce(50), KeepRun(tmp_path))
    for step in (0, 7, 35, 56):
        saved = torch.load(tmp_path / "snapshots" / f"step_{step:07d}.pt", weights_only=True)
        stopped = trained(step).parameters_by_name() if step else tiny().parameters_by_name()
        assert (saved["step"], saved["sequences"]) == (step, step * BATCH)
        assert saved["parameters"].keys() == stopped.keys()
        assert all(torch.equal(saved["parameters"][name], tensor) for name, tensor in stopped.items())


@pytest.mark.parametrize(
    ("announced", "killed"),
    [(60, 50), (60, 70), pytest.param(40, 70, marks=pytest.mark.slow), pytest.param(90, 70, marks=pytest.mark.slow)],
)
def test_a_killed_and_resumed_run_leaves_the_same_files_bit_for_bit(tmp_path, announced, killed):
    def callbacks(folder):
        return Snapshots(per_decade=3, ring=8, every=5), Announce(announced), KeepRun(folder, checkpoint_every=30)

    trained(100, *callbacks(tmp_path / "whole"))
    with pytest.raises(Killed):
        trained(100, *callbacks(tmp_path / "killed"), KillAt(killed))
    trained(100, *callbacks(tmp_path / "killed"), resume=tmp_path / "killed/checkpoints/last.ckpt")
    assert content(tmp_path / "whole") == content(tmp_path / "killed")


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots/step_0000003.pt.part").write_bytes(b"half")
    trained(10, Snapshots(per_decade=1), KeepRun(tmp_path))
    assert steps_in(tmp_path) == {0, 1, 10}


def test_different_settings_have_different_state_keys():
    settings = [{}, {"per_decade": 3}, {"ring": 3}, {"every": 3}]
    assert len({Snapshots(**setting).state_key for setting in settings}) == len(settings)


@pytest.mark.parametrize("name", ["per_decade", "ring", "every"])
def test_a_number_below_one_is_refused(name):
    with pytest.raises(ConfigError, match=f"Snapshots.{name}"):
        Snapshots(**{name: 0})
