"""What every figure shares: colours and sizes, axes measured in inches, labels, and how a figure becomes a file.

A function that draws is named ``*_figure`` and returns a figure; ``save_figure`` alone writes one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from opsin.metrics.onset import monotone
from opsin.records.folder import write_atomically

PICTURED_MEMBERS = 4
"""Of several members in one process only the first are drawn."""

LONGEST_SIDE = 20_000
"""Pixels of a figure's longer side."""

# Okabe and Ito's colours, which colour-blind readers tell apart
INK, MUTED, FAINT = "#22303c", "#6b7780", "#b9c1c7"
ACCENT = "#d55e00"
LAYERS = ("#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9")

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "grid.color": "#e9edf0",
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


# ---- figures ----------------------------------------------------------------------------------------


def figure_style(changes: Mapping[str, Any] | None = None) -> AbstractContextManager[None]:
    """The settings under which every figure is drawn: ``with figure_style(): ...``.

    Args:
        changes: settings of matplotlib that one figure has otherwise; none when None.
    """
    # matplotlib types the names of its settings as literals
    settings: dict[Any, Any] = {**STYLE, **(changes or {})}
    return matplotlib.rc_context(settings)


@dataclass(frozen=True)
class Margins:
    """Space between the edges of a figure and its panels, inches."""

    left: float
    right: float
    top: float
    bottom: float

    def around(self, width: float, height: float) -> tuple[float, float]:
        """Width and height (inches) of a figure whose panels take ``width`` x ``height`` inches."""
        return self.left + width + self.right, self.top + height + self.bottom


def blank_figure(width: float, height: float, dpi: int) -> Figure:
    """An empty figure on a canvas of pixels, which no window shows.

    Args:
        width, height: size of the figure, inches.
        dpi: pixels of the figure per inch; fewer where a side would have more than ``LONGEST_SIDE``.
    """
    figure = Figure(figsize=(width, height), dpi=min(dpi, LONGEST_SIDE / max(width, height)))
    FigureCanvasAgg(figure)
    return figure


def add_panel(
    figure: Figure, left: float, bottom: float, width: float, height: float, beside: Axes | None = None
) -> Axes:
    """New axes, measured in inches from the lower left corner of the figure.

    Args:
        left, bottom: where the lower left corner of the axes is, inches.
        width, height: size of the axes, inches.
        beside: axes whose limits on x and y the new ones share; None for limits of their own.
    """
    across, up = figure.get_size_inches().tolist()
    rect = (left / across, bottom / up, width / across, height / up)
    return figure.add_axes(rect, sharex=beside, sharey=beside)


def as_image(figure: Figure) -> Image.Image:
    """The figure as pixels; no global state of matplotlib is touched."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture as PNG, replacing the old one at once.

    Args:
        figure: what a function named ``*_figure`` has drawn.
        path: the picture's file, in a folder that exists.
    """
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


# ---- labels and colours -----------------------------------------------------------------------------


def short_count(x: float) -> str:
    """Sequences for an axis: ``500``, ``20k``, ``1.5M``."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:g}{suffix}"
    return f"{x:g}"


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved apart to at least ``gap`` and to 0 or more, least in the sum of squares.

    Args:
        heights: heights of labels, ascending, in any unit.
        gap: least distance of two neighbours, in the unit of the heights.
    """
    if not heights:
        return []
    offsets = gap * np.arange(len(heights))
    means, sizes = monotone(np.array(heights) - offsets)
    return (np.maximum(np.repeat(means, sizes), 0.0) + offsets).tolist()


def lighter(colour: str, share: float) -> tuple[float, ...]:
    """A colour mixed with white, as red, green and blue in [0, 1].

    Args:
        colour: any colour that matplotlib can name.
        share: share of white in the mixture, in [0, 1].
    """
    return tuple(1 - (1 - part) * (1 - share) for part in to_rgb(colour))
