"""Claims about every function that draws a figure: somebody calls it, and what it draws can be read."""

from __future__ import annotations

import io
import itertools
import math
import warnings

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from opsin.objective import LossScale
from opsin.reports.population import finish_population, population_report
from tests.contracts.figures import Drawn, collected, figure_functions
from tests.contracts.house import report
from tests.contracts.readers import TASKS
from tests.helpers.populations import record, write_population

SLACK = 1.0
"""Pixels by which a text may leave the canvas, from rounding."""


@pytest.fixture(scope="module")
def drawn(runs, tmp_path_factory) -> Drawn:
    """Figures of a run of every task with its readers, and of populations: plain, with windows, with grids."""
    folder = tmp_path_factory.mktemp("populations")
    names = ("none", "copy", "a condition with quite a long name")
    members = [(name, seed) for name in names for seed in range(2)]
    records = [record(onset, 0.01 if onset else 0.69) for onset in (6000.0, 6500.0, 4000.0, 4400.0, None, 8000.0)]
    grid = {"none": None, "copy": {"start": 0, "length": 2000}, names[2]: {"start": 4000, "length": 2000}}
    rates = {"copy": {"model.learning_rate": 3e-4}, names[2]: {"model.learning_rate": 1e-3}}
    crossed = {name: {**values, "task.burstiness": index} for index, (name, values) in enumerate(rates.items())}
    with collected() as found:
        widths = {"crossed": {name: {"model.width": 2**index} for index, name in enumerate(names)}}
        for number, grids in enumerate(({}, {"grid": grid}, {"crossed": rates}, {"crossed": crossed}, widths)):
            compare = {"algorithm/change": [range(6), [math.nan] * 6], "error": [[0.5, 0.4, 0.2, 0.3, 0.1, 0.12]]}
            path = write_population(folder / str(number), members, records, compare=compare, **grids)
            assert population_report(finish_population(path), path, LossScale("nats", 0.0))
    of_runs = [runs.read(task).drawn for task in TASKS]
    return {name: [*(figure for run in of_runs for figure in run[name]), *figures] for name, figures in found.items()}


def test_some_function_draws_a_figure():
    assert figure_functions()


@pytest.mark.parametrize("name", figure_functions())
def test_a_function_that_draws_is_called_by_a_run_its_report_or_a_population(name, drawn):
    assert drawn[name], f"{name} was called by nothing"


@pytest.mark.parametrize("name", figure_functions())
def test_a_figure_can_be_read(name, drawn):
    # the first and the last of a kind: what a run draws again and again looks alike
    for figure in {id(item): item for item in (*drawn[name][:1], *drawn[name][-1:])}.values():
        canvas = FigureCanvasAgg(figure)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            canvas.draw()
            figure.savefig(io.BytesIO(), format="png")
        report(f"{name}: texts outside of the canvas", outside(figure))
        report(f"{name}: tick labels that overlap", overlapping(figure))
        report(f"{name}: axes without a name", unnamed(figure))


def outside(figure: Figure) -> list[str]:
    """Texts that leave the canvas."""
    canvas = Bbox.from_extents(-SLACK, -SLACK, figure.bbox.x1 + SLACK, figure.bbox.y1 + SLACK)
    found = []
    for text in texts(figure):
        box = text.get_window_extent()
        if not (canvas.contains(*box.min) and canvas.contains(*box.max)):
            found.append(f"{text.get_text()!r} at {box.extents.round().tolist()} of {canvas.max.tolist()}")
    return found


def texts(figure: Figure) -> list[Text]:
    ticks = {id(label) for axes in figure.axes for label in all_ticks(axes)}
    shown = [label for axes in figure.axes for labels in shown_ticks(axes) for label in labels]
    inside = [text for text in figure.findobj(Text) if id(text) not in ticks and text.get_visible()]
    return [text for text in (*inside, *shown) if text.get_text().strip()]


def all_ticks(axes: Axes) -> list[Text]:
    """Labels of ticks, those beyond the ends of an axis too."""
    ticks = [tick for axis in (axes.xaxis, axes.yaxis) for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())]
    return [label for tick in ticks for label in (tick.label1, tick.label2)]


def shown_ticks(axes: Axes) -> tuple[list[Text], list[Text]]:
    """Labels of ticks that are drawn, along x and along y."""
    if not (axes.get_visible() and axes.axison):
        return [], []

    def shown(axis: object) -> list[Text]:
        labels = [label for tick in axis._update_ticks() for label in (tick.label1, tick.label2)]
        return [label for label in labels if label.get_visible() and label.get_text().strip()]

    return shown(axes.xaxis), shown(axes.yaxis)


def overlapping(figure: Figure) -> list[str]:
    """Neighbouring tick labels of one axis that cover each other."""
    found = []
    for axes in figure.axes:
        for labels in shown_ticks(axes):
            boxes = [(label.get_window_extent(), label.get_text()) for label in labels]
            found += [
                f"{one[1]!r} and {other[1]!r}"
                for one, other in itertools.combinations(boxes, 2)
                if cover(one[0], other[0])
            ]
    return found


def cover(one: Bbox, other: Bbox) -> bool:
    common = Bbox.intersection(one, other)
    return common is not None and common.width > SLACK and common.height > SLACK


def unnamed(figure: Figure) -> list[str]:
    """Axes with ticks and nothing that says what they count: no label, no title, and no text of the figure."""
    over_all = [text for text in figure.texts if text.get_text().strip()]
    found = []
    for index, axes in enumerate(figure.axes):
        named = [
            axes.get_xlabel(),
            axes.get_ylabel(),
            *(axes.get_title(loc=side) for side in ("left", "center", "right")),
        ]
        if any(shown_ticks(axes)) and not any(named) and not over_all:
            found.append(f"axes {index}")
    return found
