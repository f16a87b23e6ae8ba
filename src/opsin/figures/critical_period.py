"""Tables of a population to the map of its critical period: one cell a window, start across, length up.

Legend: W lengths, T starts of windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from opsin.errors import ConfigError
from opsin.figures.style import INK, MUTED, Margins, add_panel, blank_figure, figure_style, short_count
from opsin.objective import LossScale
from opsin.population.tables import Row

EARLIER, LATER = "#0072b2", "#d55e00"
DELAY_COLOURS = LinearSegmentedColormap.from_list("delay", (EARLIER, "#ffffff", LATER))
FINAL_COLOURS = LinearSegmentedColormap.from_list("level", ("#ffffff", "#8fc7b5", "#00614a"))
CELL_WIDTH, CELL_HEIGHT, BETWEEN_MAPS = 0.68, 0.5, 1.6  # inches
DARK_CELL = 0.55  # luminance below which a cell has white letters

MAP_NOTES = (
    "bold: 95 % interval excludes 0",
    "2 of 4: pairs in which both formed, where not all did",
    "hatched: none did",
)

GridWindows = Mapping[str, Mapping[str, Any]]
"""Start and length of each condition's window."""


@dataclass(frozen=True)
class _HeatMap:
    """One heat map; ``cells`` hold, by window, a number or None, a text, and whether the number is certain."""

    title: str
    more: str
    unit: str
    colours: Colormap
    norm: Normalize
    cells: Mapping[str, tuple[float | None, str, bool]]


def critical_period_figure(
    grid: Mapping[str, Mapping[str, Any] | None], summary: Mapping[str, Sequence[Row]], scale: LossScale
) -> Figure:
    """``critical_period.png``: the delay of the onset by each window, and what was reached at the end.

    The delay is the mean difference of paired onsets from the first condition without a window; bold where its 95 %
    interval excludes 0, with a count where not every pair formed. Where none did, the cell is hatched. Beside it
    stands the final induction strength of the strongest head or, if heads were not tracked, the final loss.

    Args:
        grid: condition to its window ``{"start", "length"}``, in sequences unless ``"unit"`` says ``"steps"``; None for
            a condition without a window.
        summary: tables of the population, of which ``conditions`` and ``differences`` are read.
        scale: unit of the losses, and where they end.

    Raises:
        ConfigError: every condition has a window, so that there is nothing to compare with, or none has one.
    """
    bare = [name for name, window in grid.items() if window is None]
    windows = {name: window for name, window in grid.items() if window is not None}
    if not bare or not windows:
        raise ConfigError("population.grid", [*grid], "a condition without a window (null), and some with one")
    starts = sorted({window["start"] for window in windows.values()})
    lengths = sorted({window["length"] for window in windows.values()})
    maps = (_delay_map(windows, bare[0], summary), _final_map(windows, summary, scale))
    across, up = max(len(starts), 3) * CELL_WIDTH, max(len(lengths), 3) * CELL_HEIGHT
    margins = Margins(left=0.75, right=0.8, top=0.42, bottom=0.8)
    width, height = margins.around(2 * across + BETWEEN_MAPS, up)
    with figure_style({"axes.grid": False, "hatch.linewidth": 0.6}):
        figure = blank_figure(width, height, dpi=160)
        for index, shown in enumerate(maps):
            left = margins.left + index * (across + BETWEEN_MAPS)
            axes = add_panel(figure, left, margins.bottom, across, up)
            _draw_map(axes, shown, windows, starts, lengths)
            bar = add_panel(figure, left + across + 0.1, margins.bottom, 0.11, up)
            _draw_bar(figure, bar, shown)
        notes = "   ·   ".join(MAP_NOTES)
        figure.text(margins.left / width, 0.16 / height, notes, fontsize=7, color=MUTED, va="center")
    return figure


# ---- the numbers in the cells -----------------------------------------------------------------------


def _delay_map(windows: GridWindows, bare: str, summary: Mapping[str, Sequence[Row]]) -> _HeatMap:
    cells = {}
    for name in windows:
        row = _onset_row(summary["differences"], name, bare)
        sure = row["low"] is not None and not row["low"] <= 0 <= row["high"]
        cells[name] = row["difference"], _delay_text(row), sure
    widest = max((abs(delay) for delay, _, _ in cells.values() if delay is not None), default=0.0) or 1.0
    return _HeatMap(
        "Delay of the onset", f"against {bare}, by seed", "sequences", DELAY_COLOURS, Normalize(-widest, widest), cells
    )


def _onset_row(rows: Sequence[Row], name: str, bare: str) -> Row:
    """The row of the two conditions' onsets."""
    for row in rows:
        if (row["quantity"], row["condition"], row["against"]) == ("onset", name, bare):
            return row
    raise ConfigError("population.grid", bare, "the population's first condition as the first without a window")


def _delay_text(row: Row) -> str:
    if row["pairs"] and row["no_plateau"] == row["pairs"]:
        return "no plateau"
    counted = "" if row["formed_pairs"] == row["pairs"] else f"{row['formed_pairs']} of {row['pairs']}"
    return counted if row["difference"] is None else f"{_signed(row['difference'])}\n{counted}".rstrip()


def _signed(delay: float) -> str:
    rounded = float(f"{delay:.2g}")
    return ("+" if rounded > 0 else "\N{MINUS SIGN}" if rounded < 0 else "") + short_count(abs(rounded))


def _final_map(windows: GridWindows, summary: Mapping[str, Sequence[Row]], scale: LossScale) -> _HeatMap:
    rows = {row["condition"]: row for row in summary["conditions"]}
    heads = any(rows[name]["strongest_strength"] is not None for name in windows)
    quantity = "strongest_strength" if heads else "final_loss"
    values = {name: rows[name][quantity] for name in windows}
    cells = {name: (value, "" if value is None else f"{value:.2f}", False) for name, value in values.items()}
    more = "mean over seeds"
    if heads:
        return _HeatMap("Final induction strength", more, "strongest head", FINAL_COLOURS, Normalize(0, 1), cells)
    known = [value for value in values.values() if value is not None]
    colours = Normalize(min(0.0, *known, 0.0), max(known, default=0.0) or 1.0)
    return _HeatMap("Final loss", more, scale.unit, FINAL_COLOURS, colours, cells)


# ---- the drawing ------------------------------------------------------------------------------------


def _draw_map(axes: Axes, shown: _HeatMap, windows: GridWindows, starts: Sequence[int], lengths: Sequence[int]) -> None:
    values: Float[np.ndarray, "W T"] = np.full((len(lengths), len(starts)), np.nan)
    for name, window in windows.items():
        row, column = lengths.index(window["length"]), starts.index(window["start"])
        value, text, sure = shown.cells[name]
        ink = INK
        if value is None:
            style = {"facecolor": "#f4f6f7", "edgecolor": "#9aa5ac", "linewidth": 0}
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, hatch="////", **style, zorder=1.5))
        else:
            values[row, column] = value
            red, green, blue, _ = shown.colours(shown.norm(value))
            ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < DARK_CELL else INK
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2} if value is None and text else None
        weight = "bold" if sure else "normal"
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=ink, fontweight=weight, bbox=box)
    axes.imshow(values, cmap=shown.colours, norm=shown.norm, origin="lower", aspect="auto", interpolation="nearest")
    unit = next(iter(windows.values())).get("unit", "sequences")
    title = axes.set_title(shown.title, pad=8)
    axes.annotate(
        shown.more, (1, 0), (6, 0), xycoords=title, textcoords="offset points", fontsize=7.5, color=MUTED, va="bottom"
    )
    axes.set_xlabel(f"start of the window ({unit})")
    axes.set_ylabel(f"its length ({unit})")
    axes.set_xticks(range(len(starts)), [short_count(start) for start in starts])
    axes.set_yticks(range(len(lengths)), [short_count(length) for length in lengths])
    axes.set_xticks(np.arange(len(starts) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(lengths) - 1) + 0.5, minor=True)
    axes.grid(True, which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(False)


def _draw_bar(figure: Figure, axes: Axes, shown: _HeatMap) -> None:
    scale = matplotlib.cm.ScalarMappable(shown.norm, shown.colours)
    bar = figure.colorbar(scale, cax=axes)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
    bar.set_label(shown.unit, fontsize=7.5)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
