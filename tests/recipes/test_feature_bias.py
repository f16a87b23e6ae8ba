"""Claims about feature bias, for three seeds: at equal accuracy an easy feature has far more of the variance."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.helpers.paths import RECIPES
from tests.helpers.processes import opsin

ACCURATE = 0.99


@pytest.mark.slow
def test_an_easy_feature_has_at_least_twice_the_variance_of_a_hard_one_that_is_said_as_well(tmp_path):
    recipe = yaml.safe_load((RECIPES / "feature_bias.yaml").read_text())
    del recipe["population"]
    recipe["model"]["seed"] = [1, 2, 3]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", folder=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for shares, member in zip(summary["feature_variance"], summary["members"], strict=True):
        for name in ("easy", "hard"):
            assert member["changes"][f"train/accuracy_{name}"]["final"] >= ACCURATE, member
        assert shares["easy"][-1] >= 2 * shares["hard"][-1], shares
        assert shares["hard"][-1] < 0.2 and shares["unused"][-1] < 0.02, shares
