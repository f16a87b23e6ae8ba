"""A heat map: cells in rows and columns, each with its colour and a text, and a bar that says what the colours mean.

Legend: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter

from opsin.figures.style import INK, MUTED, short_count

FINAL_COLOURS = LinearSegmentedColormap.from_list("level", ("#ffffff", "#8fc7b5", "#00614a"))
CELL_WIDTH, CELL_HEIGHT, BETWEEN_MAPS = 0.68, 0.5, 1.6  # inches
BAR_GAP, BAR_WIDTH = 0.1, 0.11  # inches, of the bar beside a map
DARK_CELL = 0.55  # luminance below which a cell has white letters

Cell = tuple[float | None, str, bool]
"""A number or None, a text, and whether the number is certain."""


@dataclass(frozen=True)
class MapAxis:
    """One axis of a heat map.

    Args:
        label: what rows or columns differ by.
        ticks: label of each, in order.
    """

    label: str
    ticks: Sequence[str]


@dataclass(frozen=True)
class HeatMap:
    """One heat map.

    Args:
        title: title of the map.
        more: what stands beside the title, smaller.
        unit: what the numbers count.
        colours: colours of the numbers.
        norm: from a number to its share of the colours.
        cells: cells by column and row.
    """

    title: str
    more: str
    unit: str
    colours: Colormap
    norm: Normalize
    cells: Mapping[tuple[int, int], Cell]


def draw_map(axes: Axes, shown: HeatMap, across: MapAxis, up: MapAxis) -> None:
    """Draw a heat map; a cell without a number is hatched.

    Args:
        axes: axes that the map fills.
        shown: the map with its numbers and texts.
        across: what the columns are, from the left.
        up: what the rows are, from below.
    """
    values: Float[np.ndarray, "R C"] = np.full((len(up.ticks), len(across.ticks)), np.nan)
    for (column, row), cell in shown.cells.items():
        if cell[0] is not None:
            values[row, column] = cell[0]
        _draw_cell(axes, shown, column, row, cell)
    axes.imshow(values, cmap=shown.colours, norm=shown.norm, origin="lower", aspect="auto", interpolation="nearest")
    title = axes.set_title(shown.title, pad=8)
    axes.annotate(
        shown.more, (1, 0), (6, 0), xycoords=title, textcoords="offset points", fontsize=7.5, color=MUTED, va="bottom"
    )
    axes.set_xlabel(across.label)
    axes.set_ylabel(up.label)
    axes.set_xticks(range(len(across.ticks)), across.ticks)
    axes.set_yticks(range(len(up.ticks)), up.ticks)
    axes.set_xticks(np.arange(len(across.ticks) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(up.ticks) - 1) + 0.5, minor=True)
    axes.grid(True, which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(False)


def _draw_cell(axes: Axes, shown: HeatMap, column: int, row: int, cell: Cell) -> None:
    """The text of a cell, and its hatching where it has no number."""
    value, text, sure = cell
    ink = INK
    if value is None:
        style = {"facecolor": "#f4f6f7", "edgecolor": "#9aa5ac", "linewidth": 0}
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, hatch="////", **style, zorder=1.5))
    else:
        red, green, blue, _ = shown.colours(shown.norm(value))
        ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < DARK_CELL else INK
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2} if value is None and text else None
    weight = "bold" if sure else "normal"
    axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=ink, fontweight=weight, bbox=box)


def draw_bar(figure: Figure, axes: Axes, shown: HeatMap) -> None:
    """Draw what the colours of a heat map mean.

    Args:
        figure: figure of the map.
        axes: axes that the bar fills, beside the map.
        shown: the map with its colours and unit.
    """
    scale = matplotlib.cm.ScalarMappable(shown.norm, shown.colours)
    bar = figure.colorbar(scale, cax=axes)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.set_label(shown.unit, fontsize=7.5)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)


def final_loss_map(
    title_more: str, unit: str, values: Mapping[tuple[int, int], float | None], texts: Mapping[tuple[int, int], str]
) -> HeatMap:
    """The map of final losses, whose colours begin at 0 or at the lowest loss where that is below 0.

    Args:
        title_more: what stands beside the title.
        unit: unit of the losses.
        values: losses by column and row; None where there is none.
        texts: text of every cell.
    """
    known = [value for value in values.values() if value is not None]
    colours = Normalize(min(0.0, *known, 0.0), max(known, default=0.0) or 1.0)
    cells = {index: (value, texts[index], False) for index, value in values.items()}
    return HeatMap("Final loss", title_more, unit, FINAL_COLOURS, colours, cells)
