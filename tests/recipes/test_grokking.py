"""Claims about grokking.yaml, over three seeds: what is fitted when, what generalises when, and what comes before."""

from __future__ import annotations

import csv
import json
from collections import defaultdict

import pytest
import yaml

from tests.helpers.paths import RECIPES
from tests.helpers.processes import opsin

pytestmark = pytest.mark.slow
DECAY, NO_DECAY = "weight_decay", "no_weight_decay"


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Value by step of every metric, for each condition and seed."""
    return curves_of(RECIPES / "grokking.yaml", tmp_path_factory.mktemp("grokking"))


def curves_of(recipe, folder, *settings):
    """Train a population; ``METRIC/INDEX`` has the values of one frequency."""
    line = ["--config", recipe, "--run_folder", "run", *settings]
    opsin("fit", *line, folder=folder, WANDB_MODE="disabled")
    members = json.loads((folder / "run" / "population.json").read_text())["members"]
    about = {row["member"]: (row["condition"], row["seed"]) for row in members}
    found = defaultdict(lambda: defaultdict(dict))
    with (folder / "run" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            name = "/".join([row["metric"], *filter(None, [row["frequency"]])])
            found[about[int(row["member"])]][name][int(row["step"])] = float(row["value"])
    return found


def of(curves, condition, metric):
    """The curves of one metric, one a seed."""
    found = [metrics[metric] for (name, _), metrics in curves.items() if name == condition]
    assert len(found) == 3
    return found


def first(curve, level):
    """First step at which a curve is at a level or above."""
    return min(step for step, value in curve.items() if value >= level)


def test_training_pairs_are_fitted_by_step_200(curves):
    for condition in (DECAY, NO_DECAY):
        assert all(first(curve, 0.99) <= 200 for curve in of(curves, condition, "val/train/accuracy"))


def test_at_step_400_fewer_than_half_of_the_test_pairs_are_right(curves):
    assert all(curve[400] < 0.5 for curve in of(curves, DECAY, "val/test/accuracy"))


def test_by_step_2500_test_pairs_are_right(curves):
    assert all(first(curve, 0.99) <= 2500 for curve in of(curves, DECAY, "val/test/accuracy"))


def test_without_weight_decay_fewer_than_half_ever_are(curves):
    assert all(max(curve.values()) < 0.5 for curve in of(curves, NO_DECAY, "val/test/accuracy"))


def test_the_embedding_is_of_few_frequencies_before_test_pairs_are_right(curves):
    pairs = zip(of(curves, DECAY, "fourier/gini"), of(curves, DECAY, "val/test/accuracy"), strict=True)
    for gini, accuracy in pairs:
        assert first(gini, 0.2) < first(accuracy, 0.6) and gini[2500] > 0.5


def test_other_frequencies_take_over_where_those_of_a_run_are_taken_away(tmp_path):
    recipe = yaml.safe_load((RECIPES / "grokking_frequencies.yaml").read_text())
    recipe["population"]["conditions"] = {"key_removed": (removed := recipe["population"]["conditions"]["key_removed"])}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = curves_of("recipe.yaml", tmp_path, "--trainer.max_steps", 1000)
    assert len(found) == 3
    for (_, seed), metrics in found.items():
        assert first(metrics["val/test/accuracy"], 0.99) <= 1000
        gone = removed["by_seed"][seed][0]["init_args"]["frequencies"]
        assert all(metrics[f"fourier/power/{frequency - 1}"][1000] < 1e-9 for frequency in gone)
        assert metrics["fourier/key_share"][1000] > 0.9
