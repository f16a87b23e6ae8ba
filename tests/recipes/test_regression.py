"""Claims about models of in-context regression, for three seeds: which algorithm they have, when it changes."""

from __future__ import annotations

import json

import pytest

from tests.helpers.paths import RECIPES
from tests.helpers.processes import opsin

pytestmark = pytest.mark.slow


def found(folder, recipe):
    """What the three seeds of a recipe are found to compute."""
    opsin("fit", "--config", RECIPES / recipe, "--run_folder", "run", folder=folder)
    return json.loads((folder / "run" / "summary.json").read_text())["algorithm"]


def test_a_model_leaves_one_step_of_gradient_descent_for_least_squares(tmp_path):
    summary = found(tmp_path, "regression.yaml")
    assert summary["after"] == "least_squares" and summary["change"]["count"] == 3
    for member in summary["members"]:
        nearest = [name for name, _ in member["nearest"]]
        assert "gradient_step" in nearest and nearest[-1] == "least_squares", member
        assert nearest.index("gradient_step") < nearest.index("least_squares"), member
        assert member["r_squared"] >= 0.95, member


def test_in_a_mixture_the_posterior_mean_is_nearest_after_any_number_of_examples(tmp_path):
    summary = found(tmp_path, "regression_mixture.yaml")
    for member in summary["members"]:
        assert member["nearest_by_examples"] == ["posterior_mean"] * 9, member
