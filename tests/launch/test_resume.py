"""A killed run resumes to the same end, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.killers import assert_equal_optimizers, assert_equal_weights, whole_and_killed

KILLS = 10
STEPS = 400

RECIPE = f"""
task:
  class_path: opsin.tasks.FewShot
  init_args:
    batch_size: 8
    exemplars: {{class_path: opsin.tasks.GaussianClusters, init_args: {{classes: 60, features: 16}}}}
model:
  transformer: {{width: 16, heads: 2}}
  seed: 3
  learning_rate: 0.01
  steps_per_batch: 20
  log_every: 5
  probe_size: 32
  evaluation_size: 32
  lr_scheduler:
    class_path: torch.optim.lr_scheduler.CosineAnnealingLR
    init_args: {{T_max: {STEPS}}}
trainer:
  max_steps: {STEPS}
  val_check_interval: 5
  enable_progress_bar: false
  callbacks:
    - class_path: opsin.callbacks.Clamp
      init_args:
        heads: ["0:1"]
        pattern: previous_token
        schedule: {{start: 50, stop: 350, ramp: 40, period: 30}}
    - class_path: opsin.callbacks.Ablate
      init_args: {{heads: ["1:0"], value: mean, schedule: {{start: 1200, unit: sequences}}}}
    - class_path: opsin.callbacks.InductionHeads
      init_args: {{every: 7}}
    - class_path: opsin.callbacks.PreviousTokenHeads
      init_args: {{every: 13}}
    - class_path: opsin.callbacks.PhaseChange
    - class_path: opsin.callbacks.Snapshots
    - class_path: tests.helpers.killers.KillAfter
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of an uninterrupted run and of one killed ten times."""
    return whole_and_killed(tmp_path_factory.mktemp("resume"), RECIPE, STEPS, KILLS)


def test_ten_kills_leave_weights_bitwise_as_they_would_have_been(runs):
    assert_equal_weights(runs)


def test_ten_kills_leave_the_optimizer_bitwise_as_it_would_have_been(runs):
    assert_equal_optimizers(runs, STEPS)


def test_ten_kills_leave_the_logged_metrics_byte_for_byte(runs):
    whole, killed = ((run / "metrics.csv").read_bytes() for run in runs)
    assert whole == killed and whole.count(b"\n") > 500


def test_ten_kills_leave_the_same_snapshots(runs):
    whole, killed = (sorted(path.name for path in (run / "snapshots").iterdir()) for run in runs)
    assert whole == killed and whole
    for name in whole:
        a, b = (torch.load(run / "snapshots" / name, weights_only=True)["parameters"] for run in runs)
        assert all(torch.equal(a[key], b[key]) for key in a)
