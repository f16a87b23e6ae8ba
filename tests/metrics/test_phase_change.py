"""Claims about phase changes on made curves: which left a plateau that was held, from what level, and how they end."""

from __future__ import annotations

import json

import numpy as np
import pytest

from opsin.metrics.phase_change import CurveReading, read_curve
from tests.helpers.curves import LN2, MIDDLE, correlated, head_curve, loss_curve, sigmoid

X = 3200 * np.arange(1, 301.0)
NAMED = {"named": LN2, "best": 0.0, "direction": "fall"}
"""What a loss of the few-shot task has."""


def noisy(clean: np.ndarray, seed: int = 0, sd: float = 0.03) -> np.ndarray:
    return clean + sd * np.random.default_rng(seed).standard_normal(len(clean))


def quick(y: np.ndarray, **known: float | str | None) -> CurveReading:
    return read_curve(X, y, **known, n_bootstrap=0)


@pytest.mark.parametrize("width", [2_000, 20_000, 150_000])
@pytest.mark.parametrize("known", [NAMED, {}], ids=["named level", "own level"])
def test_a_drop_from_a_plateau_is_a_phase_change_from_its_level(width, known):
    for seed in range(20):
        reading = read_curve(*loss_curve(seed, n=300, spacing=3200, width=width), **known, n_bootstrap=0)
        assert (reading.verdict, reading.direction, len(reading.steps)) == ("phase change", "fall", 1)
        assert reading.plateau == pytest.approx(LN2, abs=0 if known else 0.07)
        assert reading.change.midpoint.value == pytest.approx(MIDDLE, abs=30_000)


@pytest.mark.parametrize(
    "descent",
    [
        1.6 * np.exp(-X / 40_000),
        1.6 * np.exp(-X / 200_000),
        1.6 * (1 + X / 10_000) ** -0.5,
        1.6 * (1 + X / 10_000) ** -1.0,
        1.6 * (1 - X / X[-1]),
    ],
    ids=["fast exponential", "slow exponential", "square root", "hyperbola", "line"],
)
@pytest.mark.parametrize("known", [NAMED, {}], ids=["named level", "own level"])
def test_a_smooth_descent_passes_every_level_and_is_no_phase_change(descent, known):
    found = [quick(noisy(descent, seed), **known) for seed in range(100)]
    smooth = [reading for reading in found if reading.verdict == "smooth"]
    assert len(smooth) >= 99 and {reading.verdict for reading in found} <= {"smooth", "phase change"}
    assert all(reading.change is None and reading.plateau is None for reading in smooth)


def test_an_accuracy_that_rises_from_chance_is_a_phase_change():
    reading = read_curve(X, noisy(0.2 + 0.8 * sigmoid(X, MIDDLE, 40_000)))
    assert (reading.verdict, reading.direction, reading.trend) == ("phase change", "rise", "level")
    assert reading.plateau == pytest.approx(0.2, abs=0.02) and reading.final == pytest.approx(1.0, abs=0.02)
    assert reading.change.midpoint.low <= MIDDLE <= reading.change.midpoint.high


def test_a_change_of_the_wrong_direction_is_none():
    assert quick(noisy(0.2 + 0.8 * sigmoid(X, MIDDLE, 40_000)), direction="fall").verdict == "not by the end"


def test_a_change_in_the_first_hundredth_of_a_record_is_found():
    x = 320 * np.arange(1, 3001.0)
    reading = read_curve(x, noisy(sigmoid(x, 8_000, 2_000)), direction="rise")
    assert reading.verdict == "phase change" and reading.change.midpoint.value == pytest.approx(8_000, abs=400)


def test_a_curve_that_is_still_falling_at_the_end_is_said_to_be():
    reading = quick(noisy(LN2 - 0.2 * np.clip((X - 9e5) / 6e4, 0, 1)), **NAMED)
    assert (reading.verdict, reading.trend) == ("not by the end", "falling")
    assert reading.change is None and reading.final < LN2 - 0.03


def test_a_curve_that_rests_on_its_plateau_has_no_trend():
    found = [quick(LN2 + 0.1 * correlated(np.random.default_rng(seed), 300, 0.5), **NAMED) for seed in range(200)]
    assert {reading.verdict for reading in found} == {"not by the end"}
    assert sum(reading.trend != "level" for reading in found) <= 4


def test_a_change_that_is_not_over_by_the_end_says_so():
    reading = quick(noisy(LN2 * (1 - np.clip((X - 6e5) / 6e5, 0, 1))), **NAMED)
    assert (reading.verdict, reading.trend) == ("phase change", "falling")


def test_two_events_are_two_steps_of_one_change():
    clean = LN2 * (1 - 0.5 * sigmoid(X, 300_000, 20_000) - 0.5 * sigmoid(X, 700_000, 30_000))
    reading = read_curve(X, noisy(clean), **NAMED)
    first, second = reading.steps
    assert first.midpoint.low <= 300_000 <= first.midpoint.high
    assert second.midpoint.low <= 700_000 <= second.midpoint.high
    assert first.before == LN2 and first.after == pytest.approx(LN2 / 2, abs=0.02)
    assert second.before == pytest.approx(LN2 / 2, abs=0.02) and second.after == pytest.approx(0, abs=0.02)
    assert reading.change.onset == read_curve(X, noisy(clean), **NAMED).change.onset


def test_a_curve_above_the_named_level_leaves_its_own():
    reading = quick(noisy(0.85 * (1 - sigmoid(X, MIDDLE, 40_000))), **NAMED)
    assert reading.verdict == "phase change" and reading.plateau == pytest.approx(0.85, abs=0.02)


def test_reaching_the_named_plateau_is_not_leaving_it():
    reading = quick(noisy(1.6 - (1.6 - LN2) * sigmoid(X, MIDDLE, 40_000)), **NAMED)
    assert (reading.verdict, reading.change) == ("not by the end", None)


def test_a_curve_without_numbers_says_nothing():
    empty = read_curve(X, np.full(len(X), np.nan))
    assert (empty.verdict, empty.final, empty.trend) == ("not by the end", None, "level")


def test_a_reading_is_json():
    reading = read_curve(*loss_curve(0, n=300, spacing=3200), **NAMED)
    assert json.loads(json.dumps(reading.to_dict())) == reading.to_dict()


CURVES = {
    "a loss from a named plateau": (loss_curve, NAMED, 20_000),
    "a loss from its own plateau": (loss_curve, {}, 20_000),
    "a strength that rises": (head_curve, {"direction": "rise"}, 60_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CURVES)
def test_over_500_seeds_intervals_cover_the_truth_as_often_as_they_say(case):
    curve, known, width = CURVES[case]
    found = [read_curve(*curve(seed), **known).change for seed in range(500)]
    assert sum(change is not None for change in found) >= 499
    truth = (MIDDLE - width / 2, MIDDLE, MIDDLE + width / 2)
    estimates = [(change.onset, change.midpoint, change.end) for change in found if change]
    covered = np.mean([[e.low <= t <= e.high for e, t in zip(row, truth, strict=True)] for row in estimates], 0)
    assert (covered >= 0.9).all(), covered
