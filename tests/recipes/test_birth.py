"""Claims about birth.yaml, over three seeds: what is learned first, what last, and how soon triggers are copied."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict

import numpy as np
import pytest

from tests.helpers.paths import RECIPES
from tests.helpers.processes import opsin

pytestmark = pytest.mark.slow
ALL, REPEATED = "all_rows", "repeated_triggers"


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Value by step of every metric, for each condition and seed."""
    folder = tmp_path_factory.mktemp("birth")
    opsin("fit", "--config", RECIPES / "birth.yaml", "--run_folder", "run", folder=folder, WANDB_MODE="disabled")
    members = json.loads((folder / "run" / "population.json").read_text())["members"]
    about = {row["member"]: (row["condition"], row["seed"]) for row in members}
    found = defaultdict(lambda: defaultdict(dict))
    with (folder / "run" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            found[about[int(row["member"])]][row["metric"]][int(row["step"])] = float(row["value"])
    return found


def of(curves, condition, metric):
    """The curves of one metric, one a seed."""
    found = [metrics[metric] for (name, _), metrics in curves.items() if name == condition]
    assert len(found) == 3
    return found


def first(curve, level):
    """First step at which a curve is at a level or above."""
    return min((step for step, value in curve.items() if value >= level), default=math.inf)


def test_the_previous_token_is_the_last_memory_to_recall_half(curves):
    recalled = [of(curves, REPEATED, f"recall/{name}") for name in ("W_K1", "W_K2", "W_O2")]
    for previous, *rest in zip(*recalled, strict=True):
        assert max(first(curve, 0.5) for curve in rest) < first(previous, 0.5) < math.inf


def test_triggers_are_copied_within_300_steps(curves):
    assert all(first(curve, 0.95) <= 300 for curve in of(curves, REPEATED, "train/trigger_accuracy"))


def test_global_bigrams_are_learned_before_half_of_the_triggers_are_copied(curves):
    pairs = zip(of(curves, ALL, "train/other_loss"), of(curves, ALL, "train/trigger_accuracy"), strict=True)
    for loss, accuracy in pairs:
        steps, values = np.array(list(loss)), np.array(list(loss.values()))
        half = first(accuracy, 0.5)
        before = values[steps < half][-10:].mean()
        # flat: what is left of the fall by then is a tenth of it at most
        assert half < math.inf and before - values[-20:].mean() < 0.1 * (values[0] - values[-20:].mean())
