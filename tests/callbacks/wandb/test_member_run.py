"""Claims about what one member sends to W&B: under which axis, and where each step stands on it."""

from __future__ import annotations

import pytest

from opsin.callbacks.wandb.member_run import MemberRun
from opsin.callbacks.wandb.start import Ledger
from opsin.task import TimeAxis


class Run:
    """Keeps what a W&B run would be told."""

    def __init__(self):
        self.axes, self.rows = [], []

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, row, step, commit):
        self.rows.append(row)


@pytest.mark.parametrize(
    ("axis", "name", "at"),
    [
        (TimeAxis("sequences", 1), "sequences", 40),
        (TimeAxis("steps", 4), "step", 10),
        (TimeAxis("epochs", 16), "epochs", 2.5),
    ],
    ids=lambda value: value.unit if isinstance(value, TimeAxis) else "",
)
def test_the_axis_is_what_the_task_counts(tmp_path, axis, name, at):
    run = Run()
    member = MemberRun(run, Ledger(tmp_path / "ledger.json", "id", "fingerprint"), 4, axis)
    member.add(10, {"train/loss": 0.5})
    member.send()
    assert run.axes == [(name, None), ("*", name)]
    assert run.rows[0][name] == at and run.rows[0]["train/loss"] == 0.5
    assert ("epochs" in run.rows[0]) == (axis.unit == "epochs")
