"""Claims about what a population compares along the keys of its grid."""

import pytest

from opsin.population.scaling import scaling_curves

WIDTH, SAMPLES = "model.network.init_args.width", "task.init_args.samples"


def crossed(widths, samples):
    return {f"{w} {t}": {WIDTH: w, SAMPLES: t} for w in widths for t in samples}


def members(grid, error, seeds=(1, 2)):
    return [
        {"condition": name, "seed": seed, "error": error(**{"w": keys[WIDTH], "t": keys[SAMPLES]})}
        for name, keys in grid.items()
        for seed in seeds
    ]


def test_a_power_law_is_fitted_along_each_key_where_the_other_stands_still():
    grid = crossed([8, 2, 4], [10, 100, 1000, 10_000])
    rows = [*members(grid, lambda w, t: w**-1.0 * t**-0.5), {"condition": "base", "seed": 1, "error": 9.0}]
    found = [curve.row() for curve in scaling_curves(grid, ["error"], rows)]
    along_width = [row for row in found if row["key"] == "width"]
    along_samples = [row for row in found if row["key"] == "samples"]
    assert {row["fixed"] for row in along_width} == {f"samples={t}" for t in (10, 100, 1000, 10_000)}
    assert {row["fixed"] for row in along_samples} == {"width=2", "width=4", "width=8"}
    assert [row["exponent"] for row in along_width] == pytest.approx([-1.0] * 4)
    assert [row["exponent"] for row in along_samples] == pytest.approx([-0.5] * 3)
    assert {(row["seeds"], row["points"]) for row in along_samples} == {(2, 4)}


def test_a_key_of_words_and_one_of_two_values_have_none():
    grid = {f"{w} {name}": {WIDTH: w, "task.rule": name} for w in (1, 2) for name in ("sum", "difference")}
    rows = [{"condition": name, "seed": 1, "error": 0.5} for name in grid]
    assert scaling_curves(grid, ["error"], rows) == []
