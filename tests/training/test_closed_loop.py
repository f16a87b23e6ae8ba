"""A run whose interventions follow what it measures is the same after a kill, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.helpers.killers import assert_equal_optimizers, assert_equal_weights, checkpoint, whole_and_killed

KILLS = 5
STEPS = 300

# the cadence of the tracker divides neither the steps of a Lightning batch nor those between checkpoints
RECIPE = f"""
task:
  class_path: opsin.tasks.FewShot
  init_args:
    batch_size: 8
    exemplars: {{class_path: opsin.tasks.GaussianClusters, init_args: {{classes: 60, features: 16}}}}
model:
  transformer: {{width: 16, heads: 2}}
  seed: [3, 4]
  learning_rate: 0.01
  steps_per_batch: 10
  log_every: 5
  probe_size: 32
  evaluation_size: 32
trainer:
  max_steps: {STEPS}
  val_check_interval: 3
  enable_progress_bar: false
  callbacks:
    - class_path: opsin.callbacks.Ablate
      init_args:
        heads: ["0:0", "0:1", "1:0", "1:1"]
        schedule: {{feedback: {{metric: induction_strength, head: strongest, above: 0.2}}}}
    - class_path: opsin.callbacks.Ablate
      init_args:
        heads: ["0:0", "0:1"]
        value: mean
        schedule: {{feedback: {{metric: val/train/loss, below: 1.2, mode: start}}, start: 30}}
    - class_path: opsin.callbacks.Clamp
      init_args:
        heads: ["0:1"]
        pattern: previous_token
        schedule:
          period: 7
          duty: 0.4
          random: 5
          ramp: 100
          feedback: {{metric: train/loss, above: 0.2, mode: scale, full: 1.5}}
    - class_path: opsin.callbacks.InductionHeads
      init_args: {{every: 7}}
    - class_path: tests.helpers.killers.KillAfter
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of an uninterrupted run and of one killed five times."""
    return whole_and_killed(tmp_path_factory.mktemp("closed"), RECIPE, STEPS, KILLS)


def test_five_kills_leave_weights_bitwise_as_they_would_have_been(runs):
    assert_equal_weights(runs)


def test_five_kills_leave_the_optimizer_bitwise_as_it_would_have_been(runs):
    assert_equal_optimizers(runs, STEPS)


def test_five_kills_leave_the_logged_metrics_and_switches_byte_for_byte(runs):
    whole, killed = ((run / "metrics.csv").read_bytes() for run in runs)
    assert whole == killed and whole.count(b"feedback/") > 100


def test_five_kills_leave_the_announced_switches_and_the_counts(runs):
    whole, killed = (checkpoint(run)["opsin"] for run in runs)
    assert whole["events"] == killed["events"] and whole["events"]
    for name in ("active", "fired"):
        assert (whole["control"][name] == killed["control"][name]).all() and whole["control"][name].any()


def switches(runs, name):
    """Step, member and strength of every change that the table tells of."""
    table = pd.read_csv(runs[0] / "metrics.csv")
    return table[table.metric == f"feedback/{name}/strength"]


def test_the_strongest_head_was_switched_on_and_off_and_another_took_its_place(runs):
    heads = [switches(runs, f"Ablate 1/{head}") for head in ("0:0", "0:1", "1:0", "1:1")]
    on = [set(rows[rows.value == 1].step) for rows in heads]
    off = [set(rows[(rows.value == 0)].step) for rows in heads]
    assert sum(map(bool, on)) > 1 and sum(map(bool, off)) > 1
    assert any(a & b for i, a in enumerate(on) for j, b in enumerate(off) if i != j)


def test_a_loop_that_starts_started_in_the_midst_of_the_run_and_stayed(runs):
    rows = switches(runs, "Ablate 2")
    for _, own in rows.groupby("member"):
        assert own.value.tolist() == sorted(own.value) and own.value.iloc[-1] == 1
        assert 0 < own[own.value == 1].step.min() < STEPS


def test_a_loop_that_scales_took_many_strengths(runs):
    strengths = switches(runs, "Clamp").value
    assert len(np.unique(strengths)) > 20 and strengths.between(0, 1).all()
