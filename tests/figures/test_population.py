"""Claims about the figure of a population: every member stands in it, in its condition's colour."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from opsin.figures.population import LONGEST_NAME, MARKS, _bin_means, colour, population_figure
from opsin.figures.style import save_figure
from opsin.population.folder import merge_metrics, read_population
from opsin.population.tables import summarise
from tests.helpers.populations import axes_texts, fall, nan_after, record, seeds, write_population

DIVERGED = record(None, float("nan"), status="diverged", stopped_at=900)


class DrawnPopulation:
    """A population's tables and its figure, drawn to a file.

    Args:
        folder: where the population and the picture are written.
        conditions: name of every condition to the records of its seeds.
        losses: a curve of the training loss for every member; None for curves that fit the records.
    """

    def __init__(self, folder, conditions, losses=None) -> None:
        members = [(name, seed) for name, records in conditions.items() for seed in range(len(records))]
        records = [record for records in conditions.values() for record in records]
        population = read_population(write_population(folder / "run", members, records, losses))
        merged = merge_metrics(population)
        self.summary = summarise(population, merged)
        self.figure = population_figure(merged, self.summary)
        self.path = folder / "picture.png"
        save_figure(self.figure, self.path)


@pytest.fixture
def draw(tmp_path):
    return partial(DrawnPopulation, tmp_path)


THREE = {"none": seeds(6000.0, 6500.0), "copy": seeds(4000.0, 4400.0), "match": seeds(None, 8000.0)}


def marks(figure, shape) -> list[tuple[float, float]]:
    """Where single marks of that shape stand among the onsets."""
    found = [line for line in figure.axes[-1].lines if line.get_marker() == shape and len(line.get_xdata()) == 1]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in found]


def test_it_is_1600_pixels_wide_and_leaves_no_other_file(draw, tmp_path):
    assert Image.open(draw(THREE).path).size[0] == 1600
    assert {file.name for file in tmp_path.iterdir()} == {"run", "picture.png"}


def test_every_condition_has_a_panel_with_its_seeds_its_mean_and_a_band(draw):
    figure = draw(THREE).figure
    assert [axes.get_title(loc="left") for axes in figure.axes[:3]] == list(THREE)
    for index, axes in enumerate(figure.axes[:3]):
        # the first condition's mean stands in the others' panels, too
        assert len(axes.lines) == 2 + 1 + (index > 0)
        assert len(axes.collections) == 1


def test_a_condition_has_one_colour_in_both_halves(draw):
    figure = draw(THREE).figure
    for index, (axes, name) in enumerate(zip(figure.axes, figure.axes[-1].get_yticklabels(), strict=False)):
        shade = to_hex(colour(index))
        bold = max(axes.lines, key=lambda line: line.get_linewidth())
        assert to_hex(bold.get_color()) == to_hex(name.get_color()) == to_hex(axes._left_title.get_color()) == shade


def test_the_first_twelve_conditions_have_twelve_colours():
    assert len({colour(index) for index in range(12)}) == 12


def test_every_seed_has_its_onset_in_its_conditions_row_with_its_own_interval(draw):
    figure = draw({"none": seeds(6000.0, 6500.0), "copy": seeds(4000.0)}).figure
    placed = [(x, round(y)) for x, y in marks(figure, "o")]
    assert placed == [(6000, 0), (6500, 0), (4000, 1)]
    intervals = [path.get_segments()[0][:, 0].tolist() for path in figure.axes[-1].collections[1:]]
    assert intervals == [[5500, 6500], [6000, 7000], [3500, 4500]]


def test_the_mean_stands_below_its_seeds_where_there_are_two(draw):
    figure = draw({"none": seeds(6000.0, 6500.0), "copy": seeds(4000.0)}).figure
    assert [(x, round(y)) for x, y in marks(figure, "D")] == [(6250, 0)]


def test_a_member_without_an_onset_has_a_mark_of_its_own(draw):
    losses = [
        fall(6000.0),
        fall(None, 0.69),
        lambda x: 0.01 + 0.69 * np.exp(-x / 3000),
        nan_after(fall(None, 0.7), 9000),
    ]
    drawn = draw({"none": seeds(6000.0, None), "copy": [record(None), DIVERGED]}, losses)
    figure = drawn.figure
    assert [x for x, _ in marks(figure, MARKS["not formed"][0])] == [20_000], "the end of the run"
    assert [x for x, _ in marks(figure, MARKS["diverged"][0])] == [8800], "the last sample that is a number"
    (half,) = (row["below_half"] for row in drawn.summary["members"] if row["outcome"] == "no plateau")
    assert [x for x, _ in marks(figure, MARKS["no plateau"][0])] == [6000, half]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [MARKS[kind][2] in legend for kind in MARKS] == [True, True, True, True, False]
    assert {"1 of 2", "0 of 2"} <= set(axes_texts(figure))


def test_members_of_a_chunk_that_has_not_finished_stand_where_their_record_ends(draw):
    figure = draw({"none": seeds(6000.0, 6500.0, 5500.0), "copy": [None]}).figure
    assert marks(figure, MARKS["unfinished"][0]) == [(20_000, pytest.approx(0.87))]


def test_where_nothing_formed_the_row_stays(draw):
    figure = draw({"none": seeds(None, None), "copy": seeds(None, None)}).figure
    assert len(marks(figure, MARKS["not formed"][0])) == 4
    assert axes_texts(figure).count("0 of 2") == 2


@pytest.mark.parametrize(("onset", "scale"), [(6000.0, "linear"), (400.0, "log")])
def test_the_axis_is_logarithmic_where_an_onset_would_stick_to_its_edge(draw, onset, scale):
    figure = draw({"none": seeds(6000.0), "copy": seeds(onset)}).figure
    assert {axes.get_xscale() for axes in figure.axes} == {scale}
    for axes in figure.axes:
        assert axes.get_xlim()[0] < onset < axes.get_xlim()[1] == 20_000


def test_a_drawn_curve_keeps_its_mean_and_leaves_out_missing_seeds():
    x, y = np.arange(10, 10_010, 10), np.random.default_rng(0).random((1000, 2))
    y[:, 1] = np.nan
    for log in (False, True):
        bins, values = _bin_means(x, y, log)
        assert len(bins) < 300 and (np.diff(bins) > 0).all() and bins[0] >= 10 and bins[-1] <= 10_000
        assert np.isnan(values[:, 1]).all() and np.isfinite(values[:, 0]).all()
    linear = _bin_means(x, y, False)[1][:, 0]
    assert linear.mean() == pytest.approx(y[:, 0].mean(), abs=0.01)


@pytest.mark.parametrize("count", [1, 6, 12])
def test_no_text_leaves_the_picture_or_meets_another(draw, count):
    names = [f"a much longer condition {i:02d}" for i in range(count)]
    drawn = draw({name: seeds(5000.0 + 500 * i, 6000.0, None) for i, name in enumerate(names)})
    figure = drawn.figure
    width, height = Image.open(drawn.path).size
    boxes = []
    for axes in figure.axes:
        shown = [*axes.texts, axes._left_title, axes.xaxis.label, *axes.get_yticklabels()]
        boxes += [(text.get_text(), text.get_window_extent()) for text in shown if text.get_text()]
    boxes += [(text.get_text(), text.get_window_extent()) for text in (*figure.texts, *figure.legends[0].get_texts())]
    for index, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
        for other, beside in boxes[:index]:
            assert not box.overlaps(beside), (text, other)


def test_the_names_of_a_grid_keep_their_values_where_they_are_too_long(draw):
    names = [f"learning_rate=0.0003 burstiness={copies}" for copies in (1, 2)]
    figure = draw(dict.fromkeys(names, seeds(6000.0))).figure
    shown = [axes.get_title(loc="left") for axes in figure.axes[:2]]
    assert shown == ["learnin…=0.0003 burstin…=1", "learnin…=0.0003 burstin…=2"]
    assert all(len(name) <= LONGEST_NAME for name in shown)


def test_of_more_conditions_than_there_is_room_for_the_first_are_drawn_and_counted(draw, monkeypatch):
    monkeypatch.setattr("opsin.figures.population.MOST_CONDITIONS", 2)
    figure = draw(THREE).figure
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["none", "copy"] and len(figure.axes) == 3
    assert "the first 2 of 3 conditions" in [text.get_text() for text in figure.texts]
