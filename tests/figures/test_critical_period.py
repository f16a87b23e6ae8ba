"""Claims about the map of a critical period: every window has its cell, with its delay or why there is none."""

from __future__ import annotations

import numpy as np
import pytest

from opsin.errors import ConfigError
from opsin.figures.critical_period import critical_period_figure
from opsin.objective import LossScale
from opsin.population.folder import merge_metrics, read_population
from opsin.population.tables import summarise
from tests.helpers.populations import axes_texts, record, seeds, write_population

GRID = {
    "none": None,
    "early": {"start": 0, "length": 2000},
    "long": {"start": 0, "length": 8000},
    "late": {"start": 4000, "length": 2000},
}
WINDOWS = {
    "none": seeds(6000.0, 6500.0, 5500.0),
    "early": seeds(7900.0, 8500.0, 7600.0),
    "long": seeds(None, None, None),
    "late": seeds(9000.0, None, 8500.0),
}


@pytest.fixture
def draw(tmp_path):
    """Conditions with their seeds' records -> the figure of the map over ``GRID``."""

    def drawn(conditions):
        members = [(name, seed) for name, records in conditions.items() for seed in range(len(records))]
        records = [record for records in conditions.values() for record in records]
        population = read_population(write_population(tmp_path / "run", members, records, grid=GRID))
        return critical_period_figure(
            population.windows, summarise(population, merge_metrics(population)), population.scale
        )

    return drawn


def test_the_map_shows_the_paired_delay_of_every_window(draw):
    figure = draw(WINDOWS)
    delays = figure.axes[0].images[0].get_array()
    # rows are lengths 2,000 and 8,000 from below, columns starts 0 and 4,000
    assert delays.filled(np.nan)[0].tolist() == pytest.approx([2000, 3000])
    assert delays.mask[1].tolist() == [True, True]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0", "4k"]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["2k", "8k"]


def test_windows_that_did_not_form_are_hatched_and_counted(draw):
    figure = draw(WINDOWS)
    (hatched,) = figure.axes[0].patches
    assert (hatched.get_x(), hatched.get_y(), bool(hatched.get_hatch())) == (-0.5, 0.5, True)
    cells = {text.get_text(): text.get_fontweight() for text in figure.axes[0].texts}
    assert cells["0 of 3"] == "normal"
    assert cells["+2k"] == "bold", "its interval excludes 0"
    assert "+3k\n2 of 3" in cells


def test_a_window_that_left_no_plateau_is_called_so(draw):
    figure = draw({**WINDOWS, "long": [record(None)] * 3})
    assert "no plateau" in axes_texts(figure)


def test_beside_the_delay_stands_the_final_strength_or_without_heads_the_final_loss(draw):
    figure = draw(WINDOWS)
    assert figure.axes[2].get_title(loc="left") == "Final induction strength"
    assert figure.axes[2].images[0].get_array().filled(np.nan)[1, 0] == pytest.approx(0.05)
    bare = {name: [{**record, "heads": {}} for record in records] for name, records in WINDOWS.items()}
    figure = draw(bare)
    assert figure.axes[2].get_title(loc="left") == "Final loss"
    assert [axes.get_ylabel() for axes in figure.axes[1::2]] == ["sequences", "nats"]


@pytest.mark.parametrize("grid", [{"none": None}, {"early": {"start": 0, "length": 1}}])
def test_a_grid_without_a_window_or_without_a_comparison_is_refused(grid):
    with pytest.raises(ConfigError, match=r"population\.grid"):
        critical_period_figure(grid, {"conditions": [], "differences": []}, LossScale("nats", 0.0))
