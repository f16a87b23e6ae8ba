"""What a population compares as a figure: every such metric over training, under each condition.

Legend: n records of a metric, M members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from opsin.errors import shortened
from opsin.figures.population import LONGEST_NAME, colour
from opsin.figures.style import MUTED, Margins, add_panel, blank_figure, figure_style, short_count
from opsin.metrics.compare import mean_curve
from opsin.population.folder import Curve
from opsin.population.tables import Row

COMPARISON_COLUMNS = 3
"""Panels side by side."""

LEGEND_COLUMNS = 4
"""Names of conditions side by side."""


def comparison_figure(curves: Mapping[str, Curve], summary: Mapping[str, Sequence[Row]]) -> Figure:
    """``comparison.png``: a panel for every metric that is compared, a line for every condition.

    A line is the mean over seeds, its band the 95 % interval at each point. Colours are those of ``population.png``.

    Args:
        curves: values of every metric over training, by its name.
        summary: tables of the population, of which ``members`` and ``conditions`` are read.
    """
    # inches: a panel, the gaps between columns and rows, and a row of the legend
    wide, tall, across, down, legend_row = 2.75, 1.8, 0.55, 0.85, 0.18
    names = [row["condition"] for row in summary["conditions"]]
    columns = min(COMPARISON_COLUMNS, len(curves))
    rows, legend = -(-len(curves) // columns), legend_row * -(-len(names) // LEGEND_COLUMNS)
    margins = Margins(left=0.55, right=0.25, top=0.45 + legend, bottom=0.5)
    width, height = margins.around(columns * wide + (columns - 1) * across, rows * tall + (rows - 1) * down)
    with figure_style({"axes.titlepad": 6}):
        figure = blank_figure(width, height, dpi=150)
        for index, (metric, curve) in enumerate(curves.items()):
            row, column = divmod(index, columns)
            left, bottom = margins.left + column * (wide + across), height - margins.top - tall - row * (tall + down)
            _draw_metric(add_panel(figure, left, bottom, wide, tall), metric, curve, summary)
        for index, name in enumerate(names):
            row, column = divmod(index, LEGEND_COLUMNS)
            left = margins.left + column * (width - margins.left) / LEGEND_COLUMNS
            y = height - 0.1 - row * legend_row
            figure.text(
                left / width, y / height, shortened(name, LONGEST_NAME), color=colour(index), fontsize=7.5, va="top"
            )
    return figure


def _draw_metric(axes: Axes, metric: str, curve: Curve, summary: Mapping[str, Sequence[Row]]) -> None:
    sequences, values = curve
    axes.set_title(metric, fontsize=8)
    for index, condition in enumerate(summary["conditions"]):
        members = [row["member"] for row in summary["members"] if row["condition"] == condition["condition"]]
        mean, low, high = mean_curve(values[:, members])
        axes.fill_between(sequences, low, high, color=colour(index), alpha=0.16, linewidth=0, zorder=1.5)
        axes.plot(sequences, mean, color=colour(index), linewidth=1.4, zorder=3)
    axes.set_xlim(0, max(int(sequences[-1]), 1) if len(sequences) else 1)
    axes.set_xlabel("training sequences")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
    if not np.isfinite(values).any():
        axes.text(0.5, 0.5, "no number", transform=axes.transAxes, color=MUTED, ha="center", va="center")
