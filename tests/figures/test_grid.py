"""Claims about the figure of a grid: every combination has its cell, in the order of its values, with what formed."""

from __future__ import annotations

import numpy as np
import pytest

from opsin.figures.grid import grid_figure
from opsin.population.folder import merge_metrics, read_population
from opsin.population.tables import summarise
from tests.helpers.populations import axes_texts, record, seeds, write_population

RATE, COPIES, HEADS = "model.learning_rate", "task.init_args.burstiness", "model.transformer.heads"
CROSSED = {
    "a": {RATE: 1e-3, COPIES: 1},
    "b": {RATE: 1e-3, COPIES: 2},
    "c": {RATE: 3e-4, COPIES: 1},
    "d": {RATE: 3e-4, COPIES: 2},
}
FOUND = {
    "base": seeds(9000.0, 9500.0),
    "a": seeds(2000.0, 3000.0),
    "b": seeds(4000.0, None),
    "c": seeds(None, None),
    "d": [record(None), record(None)],
}


@pytest.fixture
def draw(tmp_path):
    """What a grid has crossed -> the figure of a population with a condition beside it."""

    def drawn(crossed, found=FOUND, compare=None):
        members = [(name, seed) for name, records in found.items() for seed in range(len(records))]
        records = [record for records in found.values() for record in records]
        population = read_population(
            write_population(tmp_path / "run", members, records, crossed=crossed, compare=compare)
        )
        summary = summarise(population, merge_metrics(population))
        return grid_figure(population.crossed, summary, population.scale)

    return drawn


def test_columns_and_rows_are_the_values_in_order(draw):
    onsets, _, losses, _ = draw(CROSSED).axes
    for axes in (onsets, losses):
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.0003", "0.001"]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["1", "2"]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("learning_rate", "burstiness")
    shown = onsets.images[0].get_array()
    # rows from below: burstiness 1 and 2; columns: the smaller rate, of which nothing formed, and the larger
    assert shown.mask.tolist() == [[True, False], [True, False]]
    assert shown[:, 1].tolist() == pytest.approx([2500, 4000])
    assert losses.images[0].get_array().filled(np.nan)[0].tolist() == pytest.approx([0.69, 0.01])


def test_a_cell_says_how_many_of_its_members_formed_or_why_none_did(draw):
    figure = draw(CROSSED)
    cells = {(text.get_position()): text.get_text() for text in figure.axes[0].texts}
    assert cells[(1, 0)] == "2.5k\n2 of 2" and cells[(1, 1)] == "4k\n1 of 2"
    assert cells[(0, 0)] == "0 of 2" and cells[(0, 1)] == "no plateau"
    assert len(figure.axes[0].patches) == 2, "hatched"


def test_one_key_is_a_line_of_means_with_every_member_as_a_point(draw):
    figure = draw({name: {RATE: settings[RATE]} for name, settings in CROSSED.items() if name in "ac"})
    onsets, losses = figure.axes
    means, points = onsets.lines
    assert means.get_xdata().tolist() == [0, 1] and means.get_ydata()[1] == pytest.approx(2500)
    assert np.isnan(means.get_ydata()[0])
    assert points.get_xdata().tolist() == [1, 1] and points.get_ydata().tolist() == [2000, 3000]
    assert [text.get_text() for text in onsets.texts] == ["0 of 2", "2 of 2"]
    assert len(losses.lines[1].get_xdata()) == 4


def test_a_third_key_gives_a_row_of_maps_for_each_of_its_values(draw):
    crossed = {f"{name}{heads}": {**values, HEADS: heads} for heads in (8, 4) for name, values in CROSSED.items()}
    found = {name: FOUND[name[0]] for name in crossed}
    figure = draw(crossed, found)
    assert len(figure.axes) == 8
    assert [text for text in axes_texts(figure) if "heads" in text] == ["heads=4"] * 2 + ["heads=8"] * 2


def test_true_is_no_number_and_values_that_are_no_numbers_keep_their_order(draw):
    crossed = {name: {RATE: values[RATE], "task.x": name in "bd" or 1} for name, values in CROSSED.items()}
    figure = draw(crossed)
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["1", "true"]


def test_onsets_of_very_different_size_have_logarithmic_colours(draw):
    figure = draw(CROSSED, FOUND | {"c": seeds(200.0, 200.0)})
    assert type(figure.axes[0].images[0].norm).__name__ == "LogNorm"


def test_a_compared_metric_has_a_map_of_its_own_without_members_that_lack_it(draw):
    # two members each of base, a, b, c, d
    values = [9, 9, 1, 3, 2, np.nan, np.nan, np.nan, 5, 7]
    *_, delays, bar = draw(CROSSED, compare={"delay/ratio": [values]}).axes
    assert delays.get_title(loc="left") == "delay/ratio" and len(bar.get_yticklabels()) > 0
    np.testing.assert_allclose(delays.images[0].get_array().filled(np.nan), [[np.nan, 2], [6, 2]])
    assert {text.get_text() for text in delays.texts} >= {"2", "6", "none"}
    line = draw({name: {RATE: CROSSED[name][RATE]} for name in "ac"}, compare={"delay/ratio": [values]}).axes[-1]
    assert line.lines[0].get_ydata()[1] == 2
