"""A killed run resumes to the same end, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    - class_path: killers.KillAfter
"""


def opsin(*arguments: str, folder: Path, kill: str = "") -> int:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OPSIN_TEST_KILL": kill}
    command = [sys.executable, "-m", "opsin", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False).returncode


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of an uninterrupted run and of one killed ten times."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "recipe.yaml").write_text(RECIPE)
    start = ["fit", "--config", "recipe.yaml", "--checkpoint_every", "40", "--run_folder"]
    assert opsin(*start, "whole", folder=folder) == 0
    # any moment will do; a fixed seed only keeps a failure repeatable
    chance = random.Random(0)
    moments = sorted(chance.sample(range(1, STEPS), KILLS))
    kills = [f"{step}:{chance.choice([0, 0, 3, 20])}" for step in moments]
    assert opsin(*start, "killed", folder=folder, kill=kills[0]) == -signal.SIGKILL
    for kill in kills[1:]:
        assert opsin("resume", "killed", folder=folder, kill=kill) == -signal.SIGKILL
    assert opsin("resume", "killed", folder=folder) == 0
    return folder / "whole", folder / "killed"


def checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def test_ten_kills_leave_weights_bitwise_as_they_would_have_been(runs):
    whole, killed = (checkpoint(run)["state_dict"] for run in runs)
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_ten_kills_leave_the_optimizer_bitwise_as_it_would_have_been(runs):
    whole, killed = (checkpoint(run)["optimizer_states"][0] for run in runs)
    assert whole["param_groups"] == killed["param_groups"] and whole["param_groups"][0]["steps"] == STEPS
    for index, state in whole["state"].items():
        assert all(torch.equal(value, killed["state"][index][name]) for name, value in state.items())


def test_ten_kills_leave_the_logged_metrics_byte_for_byte(runs):
    whole, killed = ((run / "metrics.csv").read_bytes() for run in runs)
    assert whole == killed and whole.count(b"\n") > 500


def test_ten_kills_leave_the_same_snapshots(runs):
    whole, killed = (sorted(path.name for path in (run / "snapshots").iterdir()) for run in runs)
    assert whole == killed and whole
    for name in whole:
        a, b = (torch.load(run / "snapshots" / name, weights_only=True)["parameters"] for run in runs)
        assert all(torch.equal(a[key], b[key]) for key in a)
