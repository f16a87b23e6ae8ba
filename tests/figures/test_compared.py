"""Claims about the figure of what a population compares."""

from __future__ import annotations

from matplotlib.colors import to_hex

from opsin.figures.compared import METRIC_COLOURS, compared_figure, has_curves, measure_of
from opsin.population.folder import merge_metrics, read_population
from opsin.population.tables import summarise
from tests.helpers.populations import record, write_population

MEMBERS = [(name, seed) for name in ("plain", "clamped") for seed in range(2)]
STEPS = {
    "val/icl/accuracy": [[0.5, 0.5, 0.5, 0.5], [1.0, 0.75, 0.25, 0.125]],
    "val/iwl/accuracy": [[0.0, 0.0, 0.0, 0.0], [0.5, 0.25, 1.0, 0.75]],
    "val/icl/loss": [[0.75] * 4, [0.125] * 4],
}


def drawn(folder, compare=STEPS):
    path = write_population(folder / "run", MEMBERS, [record(6000.0)] * 4, compare=compare)
    population = read_population(path)
    losses = merge_metrics(population)
    return losses, compared_figure(losses, summarise(population, losses))


def test_a_condition_has_a_panel_for_every_measure(tmp_path):
    _, figure = drawn(tmp_path)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["plain", "clamped", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy", "", "loss", ""]
    assert [text.get_text() for text in figure.legends[0].texts] == list(STEPS)


def test_a_metric_is_drawn_by_seed_and_as_their_mean_in_one_colour(tmp_path):
    losses, figure = drawn(tmp_path)
    lines = figure.axes[0].lines
    assert [line.get_ydata().tolist() for line in lines[:3]] == [[0.5, 1.0], [0.5, 0.75], [0.5, 0.875]]
    assert [to_hex(lines[index].get_color()) for index in (2, 5)] == list(METRIC_COLOURS[:2])
    assert figure.axes[1].lines[5].get_ydata().tolist() == [0.0, 0.875]
    assert losses.compared["val/iwl/accuracy"].values.tolist() == STEPS["val/iwl/accuracy"]


def test_one_record_is_no_curve(tmp_path):
    losses, _ = drawn(tmp_path, {"val/icl/accuracy": [[0.5] * 4]})
    assert not has_curves(losses) and measure_of("induction_strength") == "induction_strength"
