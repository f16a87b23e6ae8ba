"""What every figure shares: colours, sizes, short numbers, how a figure becomes a file or an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from opsin.metrics.onset import monotone
from opsin.records.folder import write_atomically

PICTURED_MEMBERS = 4
"""Of several members in one process only the first are drawn."""


def as_image(figure: Figure) -> Image.Image:
    """The figure as pixels; no global state of matplotlib is touched."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


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


def short_count(x: float) -> str:
    """Sequences for an axis: ``500``, ``20k``, ``1.5M``."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:g}{suffix}"
    return f"{x:g}"


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved apart to at least ``gap`` and to 0 or more, least in the sum of squares."""
    if not heights:
        return []
    offsets = gap * np.arange(len(heights))
    means, sizes = monotone(np.array(heights) - offsets)
    return (np.maximum(np.repeat(means, sizes), 0.0) + offsets).tolist()


def _lighter(colour: str, share: float) -> tuple[float, ...]:
    """Mixed with white by that share."""
    return tuple(1 - (1 - part) * (1 - share) for part in to_rgb(colour))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture, replacing the old one at once."""
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
