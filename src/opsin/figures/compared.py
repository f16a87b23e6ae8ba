"""What a population compares, over training: a column of panels for every condition, a row for every kind of measure.

Legend: n records of a metric, S seeds of a condition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from opsin.figures.population import CONDITION_COLOURS
from opsin.figures.style import INK, Margins, add_panel, blank_figure, figure_style, lighter, short_count
from opsin.population.folder import Curves, Losses
from opsin.population.tables import Row

MOST_COLUMNS = 8
"""Conditions that are drawn, the first of the recipe."""

PANEL, GAP = (1.9, 1.5), (0.25, 0.3)  # width and height of a panel, and between panels, inches
MARGINS = Margins(left=0.75, right=0.25, top=0.75, bottom=0.55)
NAME_WIDTH, LETTER = 0.085, 0.0095  # of a letter in the legend, and of one in a title for every point, inches
METRIC_COLOURS = (*CONDITION_COLOURS, INK)


def has_curves(losses: Losses) -> bool:
    """Whether some compared metric was recorded more than once."""
    return any(len(curves.sequences) > 1 for curves in losses.compared.values())


def compared_figure(losses: Losses, summary: Mapping[str, Sequence[Row]]) -> Figure:
    """``compared.png``: every metric that the population compares, over training sequences.

    Thin lines are seeds, bold ones their mean where all have a number. Metrics of one measure, such as the accuracy on
    several evaluation sets, share a panel; a metric has one colour everywhere. Beyond eight conditions the first eight
    are drawn.

    Args:
        losses: what the members' tables hold, of which ``compared`` is drawn.
        summary: tables of the population, of which ``members`` and ``conditions`` are read.
    """
    conditions = [row["condition"] for row in summary["conditions"]][:MOST_COLUMNS]
    measures = list(dict.fromkeys(map(measure_of, losses.compared)))
    longest = NAME_WIDTH * sum(len(name) + 5 for name in losses.compared)
    across, up = (
        count * (side + gap) - gap
        for count, side, gap in zip((len(conditions), len(measures)), PANEL, GAP, strict=True)
    )
    with figure_style({"axes.titlepad": 5}):
        figure = blank_figure(*MARGINS.around(max(across, longest), up), dpi=160)
        for row, measure in enumerate(measures):
            bottom = MARGINS.bottom + (len(measures) - 1 - row) * (PANEL[1] + GAP[1])
            panels: list[Axes] = []
            for column, condition in enumerate(conditions):
                left = MARGINS.left + column * (PANEL[0] + GAP[0])
                panels.append(add_panel(figure, left, bottom, *PANEL, beside=panels[0] if panels else None))
                members = [member["member"] for member in summary["members"] if member["condition"] == condition]
                _draw_metrics(panels[-1], losses, measure, members)
            _name_row(panels, measure, conditions if row == 0 else (), row == len(measures) - 1)
        _draw_names(figure, list(losses.compared))
    return figure


def measure_of(metric: str) -> str:
    """What a metric measures: the last part of its name, ``accuracy`` of ``val/icl/accuracy``."""
    return metric.rpartition("/")[2]


def _colour_of(index: int) -> str:
    return METRIC_COLOURS[index % len(METRIC_COLOURS)]


def _draw_metrics(axes: Axes, losses: Losses, measure: str, members: Sequence[int]) -> None:
    for index, (metric, curves) in enumerate(losses.compared.items()):
        if measure_of(metric) == measure:
            _draw_curves(axes, curves, curves.values[:, members], _colour_of(index))
    if measure == "accuracy":
        axes.set_ylim(-0.03, 1.03)


def _draw_curves(axes: Axes, curves: Curves, values: Float[np.ndarray, "n S"], shade: str) -> None:
    known = np.isfinite(values).all(1)
    axes.plot(curves.sequences, values, color=lighter(shade, 0.6), linewidth=0.6, zorder=2)
    axes.plot(curves.sequences[known], values[known].mean(1), color=shade, linewidth=1.4, zorder=3)


def _name_row(panels: Sequence[Axes], measure: str, titles: Sequence[str], lowest: bool) -> None:
    panels[0].set_ylabel(measure.replace("_", " "))
    for index, axes in enumerate(panels):
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(labelleft=index == 0, labelbottom=lowest)
        axes.set_xlabel("training sequences" if lowest else "")
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title, fontsize=min(8.0, PANEL[0] / (LETTER * max(len(title), 1))))


def _draw_names(figure: Figure, metrics: Sequence[str]) -> None:
    handles = [Line2D([], [], color=_colour_of(index), linewidth=1.6) for index in range(len(metrics))]
    left, top = MARGINS.left / figure.get_figwidth(), 1 - 0.06 / figure.get_figheight()
    style = {"frameon": False, "fontsize": 8, "handlelength": 1.4, "columnspacing": 1.4, "borderaxespad": 0.0}
    figure.legend(handles, metrics, loc="upper left", bbox_to_anchor=(left, top), ncols=len(metrics), **style)
