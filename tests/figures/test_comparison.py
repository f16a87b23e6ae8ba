"""Claims about the figure of what a population compares: every curve is a condition's mean, read from its table."""

from __future__ import annotations

import math

import numpy as np
import pytest

from opsin.figures.comparison import comparison_figure
from opsin.population.folder import merge_metrics, read_population
from opsin.population.tables import summarise
from tests.helpers.populations import BATCH, record, write_population

MEMBERS = [("none", 1), ("none", 2), ("clamped", 1), ("clamped", 2)]
VALUES = [[1.0, 3.0, 5.0, math.nan], [2.0, 4.0, 6.0, 8.0]]


@pytest.fixture
def population(tmp_path):
    """Two conditions of two seeds, in two chunks, with two records of what is compared."""
    records = [record(5000.0)] * 4
    path = write_population(tmp_path / "run", MEMBERS, records, compare={"nearness": VALUES, "other": VALUES[:1]})
    return read_population(path)


def test_curves_are_read_from_the_table_by_member(population):
    curves = merge_metrics(population).compared
    assert list(curves) == ["nearness", "other"]
    sequences, values = curves["nearness"]
    assert sequences.tolist() == [0, BATCH]
    np.testing.assert_array_equal(values, VALUES)


def test_a_line_is_the_mean_of_a_condition_over_its_seeds(population):
    losses = merge_metrics(population)
    summary = summarise(population, losses)
    figure = comparison_figure(losses.compared, summary)
    first = figure.axes[0]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["nearness", "other"]
    assert [line.get_ydata().tolist() for line in first.lines] == [[2, 3], [5, 7]]
    assert [text.get_text() for text in figure.texts] == ["none", "clamped"]
