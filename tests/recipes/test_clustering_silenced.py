"""Claims about clusters whose dimension is silenced while they form, for sixteen seeds under each condition."""

from __future__ import annotations

import json

import pytest

from tests.helpers.paths import RECIPES
from tests.helpers.processes import opsin


@pytest.mark.slow
def test_fewer_seeds_are_solved_where_the_dimension_of_most_values_is_silenced(tmp_path):
    opsin("fit", "--config", RECIPES / "clustering_silenced.yaml", "--run_folder", "run", folder=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    solved = {row["condition"]: row["clustering/solved"] for row in summary["conditions"]}
    assert solved["none"] >= 0.25 and solved["most_early"] < solved["none"], solved
