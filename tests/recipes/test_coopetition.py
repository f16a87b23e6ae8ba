"""Claims about coopetition.yaml, over three seeds: what controls leave of in-context learning and of the hybrid."""

from __future__ import annotations

import csv
import json
from collections import defaultdict

import pytest

from tests.helpers.paths import RECIPES
from tests.helpers.processes import opsin

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def last(tmp_path_factory):
    """Last accuracy on every evaluation set, for each condition and seed."""
    folder = tmp_path_factory.mktemp("coopetition")
    for name in ("hybrid", "coopetition"):
        run = ["--config", RECIPES / f"{name}.yaml", "--run_folder", f"runs/{name}"]
        opsin("fit", *run, folder=folder, WANDB_MODE="disabled")
    rows = json.loads((folder / "runs" / "coopetition" / "population.json").read_text())["members"]
    about = {row["member"]: (row["condition"], row["seed"]) for row in rows}
    found = defaultdict(dict)
    with (folder / "runs" / "coopetition" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if row["metric"].endswith("/accuracy"):
                found[about[int(row["member"])]][row["metric"].split("/")[1]] = float(row["value"])
    return found


def of(last, condition, name):
    """Last accuracies on one evaluation set, one a seed."""
    found = [sets[name] for key, sets in sorted(last.items()) if key[0] == condition]
    assert len(found) == 3
    return found


def test_with_matched_exemplars_labels_are_looked_up_in_the_context_alone(last):
    assert min(of(last, "matched_exemplars", "icl") + of(last, "matched_exemplars", "flip")) >= 0.8
    assert max(of(last, "matched_exemplars", "ciwl")) <= 0.6


def test_the_hybrid_alone_knows_the_labels_of_classes_and_looks_nothing_up(last):
    assert min(of(last, "hybrid_only", "ciwl")) >= 0.7
    assert max(of(last, "hybrid_only", "icl")) <= 0.6 and max(of(last, "hybrid_only", "flip")) <= 0.3


def test_fixed_labels_leave_a_mixture_of_the_two(last):
    pairs = zip(of(last, "fixed_labels", "flip"), of(last, "matched_exemplars", "flip"), strict=True)
    assert all(mixed <= matched - 0.15 for mixed, matched in pairs)
    pairs = zip(of(last, "fixed_labels", "flip"), of(last, "hybrid_only", "flip"), strict=True)
    assert all(mixed >= hybrid + 0.15 for mixed, hybrid in pairs)
