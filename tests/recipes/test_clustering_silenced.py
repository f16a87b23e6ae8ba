"""Claims about heads whose plane has lost a dimension, for sixteen seeds under each condition."""

from __future__ import annotations

import json

import pytest

from tests.helpers.paths import RECIPES
from tests.helpers.processes import opsin

SEEDS = 16


@pytest.mark.slow
def test_what_a_silenced_dimension_does_is_compared_seed_by_seed(tmp_path):
    opsin("fit", "--config", RECIPES / "clustering_silenced.yaml", "--run_folder", "run", folder=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    solved = {row["condition"]: row["clustering/solved"] for row in summary["conditions"]}
    assert solved["none"] >= 0.25, solved
    differences = [row for row in summary["differences"] if row["quantity"] == "clustering/solved"]
    assert all(row["pairs"] == SEEDS and row["low"] <= row["difference"] <= row["high"] for row in differences)
