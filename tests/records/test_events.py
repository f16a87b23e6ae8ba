"""Claims about events.csv: every event is there as it was said, and a checkpoint counts on so many."""

import pandas as pd
import pytest

from opsin.callbacks import Clamp, KeepRun
from opsin.interventions.feedback import Feedback
from opsin.interventions.schedules import Schedule
from opsin.records.checkpoint import DamagedError, read_checkpoint
from opsin.records.events import EventTable, read_events
from opsin.records.folder import RunFolder
from tests.training.test_notebooks import module, trainer_with

ENTRIES = [
    {"step": 3, "member": 0, "kind": "phase change", "message": 'it said "so", and, then\nended'},
    {"step": 3, "member": 12, "kind": "feedback", "message": ""},
    {"step": 40, "member": 1, "kind": "diverged", "message": "Ablate in member 1: strength 1, µ"},
]


def test_events_come_back_as_they_were_said_and_pandas_reads_them(tmp_path):
    table = EventTable(RunFolder(tmp_path), ENTRIES[:1])
    for entry in ENTRIES[1:]:
        table.append(entry)
    for count in range(len(ENTRIES) + 1):
        assert read_events(table.path, count) == ENTRIES[:count]
    frame = pd.read_csv(table.path, keep_default_na=False)
    assert frame.to_dict("records") == ENTRIES


def test_what_a_killed_process_wrote_after_its_checkpoint_is_cut_off(tmp_path):
    for entry in ENTRIES:
        EventTable(RunFolder(tmp_path), []).append(entry)
    table = EventTable(RunFolder(tmp_path), ENTRIES[:1])
    assert read_events(table.path, 1) == ENTRIES[:1] and read_events(table.path, 2) is None


def test_a_run_without_events_has_no_file(tmp_path):
    assert not EventTable(RunFolder(tmp_path), []).path.exists()
    assert read_events(tmp_path / "events.csv", 0) == [] and read_events(tmp_path / "events.csv", 1) is None


def fit(folder, steps, start=None):
    """A run whose clamp is switched on by the first record of its loss."""
    run = module()
    schedule = Schedule(feedback=Feedback("train/loss", below=10.0))
    keeper = KeepRun(folder, checkpoint_every=20)
    trainer_with(Clamp(heads=["0:0"], pattern="previous_token", schedule=schedule), keeper, max_steps=steps).fit(
        run, ckpt_path=start
    )
    return run, keeper


def test_a_checkpoint_holds_the_number_of_events_and_a_resume_has_them_all(tmp_path):
    _, keeper = fit(tmp_path / "run", 40)
    saved = read_checkpoint(keeper.checkpoint)["opsin"]["events"]
    whole, _ = fit(tmp_path / "whole", 60)
    resumed, _ = fit(tmp_path / "run", 60, keeper.checkpoint)
    assert isinstance(saved, int) and saved > 0
    assert (
        [*map(vars, resumed.events)]
        == [*map(vars, whole.events)]
        == read_events(tmp_path / "run/events.csv", len(whole.events))
    )
    assert (tmp_path / "run/events.csv").read_bytes() == (tmp_path / "whole/events.csv").read_bytes()


def test_a_checkpoint_whose_events_are_gone_is_damaged(tmp_path):
    _, keeper = fit(tmp_path / "run", 40)
    (tmp_path / "run/events.csv").write_text("step,member,kind,message\n")
    with pytest.raises(DamagedError, match=r"events\.csv lacks some of the"):
        read_checkpoint(keeper.checkpoint, history=True)
