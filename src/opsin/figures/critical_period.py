"""Tables of a population to the map of its critical period: one cell a window, start across, length up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from opsin.errors import ConfigError
from opsin.figures.heat_map import (
    BAR_GAP,
    BAR_WIDTH,
    BETWEEN_MAPS,
    CELL_HEIGHT,
    CELL_WIDTH,
    FINAL_COLOURS,
    HeatMap,
    MapAxis,
    draw_bar,
    draw_map,
    final_loss_map,
)
from opsin.figures.style import MUTED, Margins, add_panel, blank_figure, figure_style, short_count
from opsin.objective import LossScale
from opsin.population.tables import Row

EARLIER, LATER = "#0072b2", "#d55e00"
DELAY_COLOURS = LinearSegmentedColormap.from_list("delay", (EARLIER, "#ffffff", LATER))

MAP_NOTES = (
    "bold: 95 % interval excludes 0",
    "2 of 4: pairs in which both formed, where not all did",
    "hatched: none did",
)

CellOfWindow = Mapping[str, tuple[int, int]]
"""Column and row of each condition's window."""


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
    indices = {name: (starts.index(w["start"]), lengths.index(w["length"])) for name, w in windows.items()}
    maps = (_delay_map(indices, bare[0], summary), _final_map(indices, summary, scale))
    unit = next(iter(windows.values())).get("unit", "sequences")
    axes_of_map = (
        MapAxis(f"start of the window ({unit})", [short_count(start) for start in starts]),
        MapAxis(f"its length ({unit})", [short_count(length) for length in lengths]),
    )
    across, up = max(len(starts), 3) * CELL_WIDTH, max(len(lengths), 3) * CELL_HEIGHT
    margins = Margins(left=0.75, right=0.8, top=0.42, bottom=0.8)
    width, height = margins.around(2 * across + BETWEEN_MAPS, up)
    with figure_style({"axes.grid": False, "hatch.linewidth": 0.6}):
        figure = blank_figure(width, height, dpi=160)
        for index, shown in enumerate(maps):
            left = margins.left + index * (across + BETWEEN_MAPS)
            draw_map(add_panel(figure, left, margins.bottom, across, up), shown, *axes_of_map)
            bar = add_panel(figure, left + across + BAR_GAP, margins.bottom, BAR_WIDTH, up)
            draw_bar(figure, bar, shown)
        notes = "   ·   ".join(MAP_NOTES)
        figure.text(margins.left / width, 0.16 / height, notes, fontsize=7, color=MUTED, va="center")
    return figure


# ---- the numbers in the cells -----------------------------------------------------------------------


def _delay_map(indices: CellOfWindow, bare: str, summary: Mapping[str, Sequence[Row]]) -> HeatMap:
    cells = {}
    for name, index in indices.items():
        row = _onset_row(summary["differences"], name, bare)
        sure = row["low"] is not None and not row["low"] <= 0 <= row["high"]
        cells[index] = row["difference"], _delay_text(row), sure
    widest = max((abs(delay) for delay, _, _ in cells.values() if delay is not None), default=0.0) or 1.0
    return HeatMap(
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


def _final_map(indices: CellOfWindow, summary: Mapping[str, Sequence[Row]], scale: LossScale) -> HeatMap:
    rows = {row["condition"]: row for row in summary["conditions"]}
    heads = any(rows[name]["strongest_strength"] is not None for name in indices)
    quantity = "strongest_strength" if heads else "final_loss"
    values = {index: rows[name][quantity] for name, index in indices.items()}
    texts = {index: "" if value is None else f"{value:.2f}" for index, value in values.items()}
    more = "mean over seeds"
    if not heads:
        return final_loss_map(more, scale.unit, values, texts)
    cells = {index: (value, texts[index], False) for index, value in values.items()}
    return HeatMap("Final induction strength", more, "strongest head", FINAL_COLOURS, Normalize(0, 1), cells)
