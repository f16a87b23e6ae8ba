"""Tables of a population to the figure of its grid: when what formed, and the final loss, by the values of its keys.

Two keys are the columns and rows of a heat map, one key is an axis, and further keys give a row of maps for each
combination of their values.

Legend: S seeds of a condition.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from opsin.errors import shortened
from opsin.figures.heat_map import (
    BAR_GAP,
    BAR_WIDTH,
    BETWEEN_MAPS,
    CELL_HEIGHT,
    CELL_WIDTH,
    HeatMap,
    MapAxis,
    draw_bar,
    draw_map,
    final_loss_map,
)
from opsin.figures.style import ACCENT, FAINT, INK, MUTED, Margins, add_panel, blank_figure, figure_style, short_count
from opsin.objective import LossScale
from opsin.population.grid import GridValues, key_names, value_names
from opsin.population.tables import Row, compared_metrics

ONSET_COLOURS = LinearSegmentedColormap.from_list("onset", ("#f3f8fc", "#7fb2d9", "#0a4673"))
WIDE_RANGE = 10  # ratio of onsets from which their colours are logarithmic
MOST_ROWS = 12  # rows of maps that are drawn
LABEL_WIDTH = 0.066  # inches of a letter of a tick's label
LINE_HEIGHT = 1.9  # inches of a panel where the grid has one key
GRID_MARGINS = Margins(left=0.45, right=0.85, top=0.42, bottom=0.62)
NOTES_SPACE = 0.22  # inches below all maps
REASONS = {"no_plateau": "no plateau", "diverged": "diverged", "unfinished": "unfinished"}
"""Columns of the conditions' table that count members without an onset, and what a cell says of such."""

Summary = Mapping[str, Sequence[Row]]


@dataclass(frozen=True)
class _Key:
    """A key of the grid, its name in labels, its values in order, and a label for each."""

    key: str
    name: str
    values: Sequence[Any]
    labels: Sequence[str]

    def index(self, settings: Mapping[str, Any]) -> int:
        """Index of the value that a condition has."""
        # true is no 1
        return [*map(json.dumps, self.values)].index(json.dumps(settings[self.key]))


def grid_figure(crossed: GridValues, summary: Summary, scale: LossScale) -> Figure:
    """``grid.png``: onset, final loss and compared metrics, means over seeds, by the values of the grid's keys.

    Values are in order, equally far apart. A cell says how many of its members formed; where none did it is hatched,
    and says why if all have one reason. Of one key all members are drawn as points, and their mean as a line.

    Args:
        crossed: value of each key of the grid, by name of the condition.
        summary: tables of the population, of which ``members`` and ``conditions`` are read.
        scale: unit of the losses, and where they end.
    """
    keys = _keys(crossed)
    with figure_style({"axes.grid": len(keys) == 1, "hatch.linewidth": 0.6}):
        return (
            _lines_figure(keys[0], crossed, summary, scale)
            if len(keys) == 1
            else _maps_figure(keys, crossed, summary, scale)
        )


def _keys(crossed: GridValues) -> list[_Key]:
    found = []
    for key, name in key_names([*next(iter(crossed.values()))]).items():
        values = [*{json.dumps(settings[key]): settings[key] for settings in crossed.values()}.values()]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            values.sort()
        found.append(_Key(key, name, values, value_names(values)))
    return found


# ---- maps -------------------------------------------------------------------------------------------


def _maps_figure(keys: Sequence[_Key], crossed: GridValues, summary: Summary, scale: LossScale) -> Figure:
    column, row, *further = keys
    combinations = [*product(*(range(len(key.values)) for key in further))]
    shown = combinations[:MOST_ROWS]
    cell = max(CELL_WIDTH, LABEL_WIDTH * max(map(len, column.labels)))
    left = GRID_MARGINS.left + LABEL_WIDTH * max(map(len, row.labels))
    across, up = max(len(column.values), 3) * cell, max(len(row.values), 3) * CELL_HEIGHT
    step = up + GRID_MARGINS.top + GRID_MARGINS.bottom
    between = BETWEEN_MAPS + LABEL_WIDTH * max(map(len, row.labels)) - 0.2
    compared = compared_metrics(summary["conditions"])
    count = 2 + len(compared)
    width = left + count * across + (count - 1) * between + GRID_MARGINS.right
    height = len(shown) * step + NOTES_SPACE
    figure = blank_figure(width, height, dpi=160)
    rows = {name: entry for entry in summary["conditions"] if (name := entry["condition"]) in crossed}
    norm = _onset_norm([entry["onset"] for entry in rows.values() if entry["onset"] is not None])
    for number, combination in enumerate(shown):
        text = ", ".join(f"{key.name}={key.labels[i]}" for key, i in zip(further, combination, strict=True))
        names = shortened(text, max(20, int((across + 0.5) / LABEL_WIDTH)))
        cells = {
            (column.index(settings), row.index(settings)): rows[name]
            for name, settings in crossed.items()
            if combination == tuple(key.index(settings) for key in further)
        }
        bottom = height - (number + 1) * step + GRID_MARGINS.bottom
        maps = [_onset_map(cells, norm, names), _loss_map(cells, names, scale)]
        maps += [_metric_map(cells, metric, names) for metric in compared]
        for index, shown_map in enumerate(maps):
            start = left + index * (across + between)
            panel = add_panel(figure, start, bottom, across, up)
            draw_map(panel, shown_map, MapAxis(column.name, column.labels), MapAxis(row.name, row.labels))
            bar = add_panel(figure, start + across + BAR_GAP, bottom, BAR_WIDTH, up)
            draw_bar(figure, bar, shown_map)
    notes = "means over seeds, onsets of the formed   ·   2 of 4: members that formed   ·   hatched: no number"
    if len(shown) < len(combinations):
        notes += f"   ·   {len(shown)} of {len(combinations)} combinations of {', '.join(k.name for k in further)}"
    figure.text(GRID_MARGINS.left / width, 0.14 / height, notes, fontsize=7, color=MUTED, va="center")
    return figure


def _onset_norm(onsets: Sequence[float]) -> Normalize:
    if not onsets:
        return Normalize(0, 1)
    low, high = min(onsets), max(onsets)
    return LogNorm(low, high) if low > 0 and high > WIDE_RANGE * low else Normalize(0, high or 1.0)


def _onset_map(cells: Mapping[tuple[int, int], Row], norm: Normalize, names: str) -> HeatMap:
    texts = {index: (row["onset"], _onset_text(row), False) for index, row in cells.items()}
    return HeatMap("Onset", names, "sequences", ONSET_COLOURS, norm, texts)


def _onset_text(row: Row) -> str:
    if row["onset"] is None:
        return _formed_text(row)
    rounded = float(f"{row['onset']:.2g}")
    return f"{short_count(rounded)}\n{_formed_text(row)}"


def _formed_text(row: Row) -> str:
    """How many members of a condition formed, or the one reason why none did."""
    reason = next((text for name, text in REASONS.items() if row[name] == row["members"]), None)
    return reason or f"{row['formed']} of {row['members']}"


def _loss_map(cells: Mapping[tuple[int, int], Row], names: str, scale: LossScale) -> HeatMap:
    values = {index: row["final_loss"] for index, row in cells.items()}
    texts = {index: _formed_text(row) if (v := values[index]) is None else f"{v:.2g}" for index, row in cells.items()}
    return final_loss_map(names, scale.unit, values, texts)


def _metric_map(cells: Mapping[tuple[int, int], Row], metric: str, names: str) -> HeatMap:
    """The map of a metric that the recipe compares, whose colours begin at 0 or at its lowest mean below that."""
    known = [row[metric] for row in cells.values() if row[metric] is not None]
    norm = Normalize(min(0.0, *known, 0.0), max(known, default=0.0) or 1.0)
    texts = {index: "none" if row[metric] is None else f"{row[metric]:.3g}" for index, row in cells.items()}
    return HeatMap(metric, names, "", ONSET_COLOURS, norm, {i: (cells[i][metric], texts[i], False) for i in cells})


# ---- one key ----------------------------------------------------------------------------------------


def _lines_figure(key: _Key, crossed: GridValues, summary: Summary, scale: LossScale) -> Figure:
    spacing = max(CELL_WIDTH, LABEL_WIDTH * max(map(len, key.labels)))
    across = max(len(key.values), 3) * spacing
    margins = Margins(left=0.75, right=0.2, top=0.42, bottom=0.75)
    units = {"onset": ("Onset", "sequences"), "final_loss": ("Final loss", scale.unit)}
    units |= {metric: (metric, "") for metric in compared_metrics(summary["conditions"])}
    width, height = margins.around(len(units) * (across + 0.85) - 0.85, LINE_HEIGHT)
    figure = blank_figure(width, height, dpi=160)
    for index, (quantity, (title, unit)) in enumerate(units.items()):
        axes = add_panel(figure, margins.left + index * (across + 0.85), margins.bottom, across, LINE_HEIGHT)
        axes.set_title(title)
        axes.set_xlabel(key.name)
        axes.set_ylabel(unit)
        _draw_line(axes, key, quantity, crossed, summary)
    notes = "points: seeds   ·   line: their mean   ·   above: members that formed"
    figure.text(margins.left / width, 0.14 / height, notes, fontsize=7, color=MUTED, va="center")
    return figure


def _draw_line(axes: Axes, key: _Key, quantity: str, crossed: GridValues, summary: Summary) -> None:
    """The members of every value as points, and their means as a line that ends where nothing formed."""
    order = {name: key.values.index(settings[key.key]) for name, settings in crossed.items()}
    rows = sorted(
        (row for row in summary["conditions"] if row["condition"] in order), key=lambda r: order[r["condition"]]
    )
    means = [np.nan if row[quantity] is None else row[quantity] for row in rows]
    axes.plot(range(len(rows)), means, "-D", color=ACCENT, markersize=4.5, markeredgecolor="white", zorder=3)
    points = [(order[row["condition"]], row[quantity]) for row in summary["members"] if row["condition"] in order]
    known = [(x, y) for x, y in points if y is not None]
    axes.plot([x for x, _ in known], [y for _, y in known], "o", color=INK, alpha=0.55, markersize=3, zorder=2)
    axes.set_xlim(-0.5, max(len(key.values), 3) - 0.5)
    low, high = min((y for _, y in known), default=0.0), max((y for _, y in known), default=1.0)
    axes.set_ylim(min(0.0, low), 1.25 * max(high, 1e-9))
    axes.set_xticks(range(len(key.labels)), key.labels)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short_count(y)))
    for x, row in enumerate(rows):
        style = {"transform": axes.get_xaxis_transform(), "fontsize": 7, "color": MUTED, "ha": "center", "va": "top"}
        axes.text(x, 0.97, _formed_text(row), **style)
        if row[quantity] is None:
            axes.axvspan(x - 0.5, x + 0.5, color=FAINT, alpha=0.25, linewidth=0, zorder=1)
