"""Claims about context_or_weights.yaml, over three seeds: the number of classes decides where labels are learned."""

from __future__ import annotations

import csv
import json
from collections import defaultdict

import pytest

from tests.helpers.paths import RECIPES
from tests.helpers.processes import opsin

pytestmark = pytest.mark.slow
LAST = 2000


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Value by step of every accuracy, for each number of classes, burstiness and seed."""
    folder = tmp_path_factory.mktemp("context_or_weights")
    recipe = RECIPES / "context_or_weights.yaml"
    opsin("fit", "--config", recipe, "--run_folder", "run", folder=folder, WANDB_MODE="disabled")
    about = json.loads((folder / "run" / "population.json").read_text())
    members = {row["member"]: (about["crossed"][row["condition"]], row["seed"]) for row in about["members"]}
    found = defaultdict(lambda: defaultdict(dict))
    with (folder / "run" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if row["metric"].endswith("/accuracy"):
                values, seed = members[int(row["member"])]
                key = (values["task.init_args.classes"], values["task.init_args.burstiness"], seed)
                found[key][row["metric"].split("/")[1]][int(row["step"])] = float(row["value"])
    return found


def of(curves, classes, burstiness, name):
    """The curves of one evaluation set, one a seed."""
    found = [sets[name] for key, sets in sorted(curves.items()) if key[:2] == (classes, burstiness)]
    assert len(found) == 3
    return found


def first(curve, level):
    """First step at which a curve is at a level or above."""
    return min(step for step, value in curve.items() if value >= level)


@pytest.mark.parametrize(("classes", "burstiness"), [(512, 1), (512, 2), (128, 2)])
def test_many_classes_or_bursty_ones_are_learned_in_context_and_not_in_the_weights(curves, classes, burstiness):
    for name in ("ic", "ic2"):
        assert all(curve[LAST] >= 0.8 for curve in of(curves, classes, burstiness, name))
    assert all(curve[LAST] <= 0.2 for curve in of(curves, classes, burstiness, "iw"))


@pytest.mark.parametrize(("classes", "burstiness"), [(32, 1), (32, 2), (128, 1)])
def test_few_classes_are_learned_in_the_weights_and_not_in_context(curves, classes, burstiness):
    assert all(curve[LAST] >= 0.7 for curve in of(curves, classes, burstiness, "iw"))
    assert all(curve[LAST] <= 0.4 for curve in of(curves, classes, burstiness, "ic"))
    assert all(curve[LAST] <= 0.2 for curve in of(curves, classes, burstiness, "ic2"))


def test_burstiness_hastens_in_context_learning(curves):
    for bursty, single in zip(of(curves, 512, 2, "ic"), of(curves, 512, 1, "ic"), strict=True):
        assert first(bursty, 0.75) < first(single, 0.75)


def test_in_context_learning_comes_abruptly(curves):
    # from a little above guessing among the labels of the context (1/4) the rise is shorter than the wait for it
    for curve in of(curves, 512, 1, "ic"):
        assert first(curve, 0.75) - first(curve, 0.45) < first(curve, 0.45)
