"""Activations to pictures.

Legend: L positions (query side), K positions (key side), H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from opsin.task import Layout

FEW, SOME = 9, 5
"""Up to so many positions are all named, each cell ruled off; of more only so many are named."""

# inches, but for the distance from panel to panel, in panels
PANEL, LEFT, RIGHT, TOP, BOTTOM = 1.4, 0.6, 0.85, 0.6, 0.5
ACROSS, DOWN = 1.06, 1.2


def position_names(layout: Layout) -> list[str]:
    """``x1 y1 x2 y2 x3``: x for a feature vector, y for a label, t for any other token, each counted from 1."""
    kinds = ["x" if p in layout.features else "y" if p in layout.labels else "t" for p in range(layout.positions)]
    return [f"{kind}{kinds[: place + 1].count(kind)}" for place, kind in enumerate(kinds)]


def attention_figure(
    patterns: Float[np.ndarray, "layers H L K"],
    induction: Float[np.ndarray, "layers H"],
    names: Sequence[str],
    title: str,
) -> Figure:
    """One panel per head, rows are layers: attention from each query (row) to each key (column), 0 to 1.

    Args:
        patterns: attention.
        induction: strength of every head, written above its panel; nan for none.
        names: of the positions.
        title: above all panels.
    """
    layers, heads = induction.shape
    # all panels are drawn into one Axes: an Axes for each makes the picture six times slower
    across, down = heads * ACROSS - (ACROSS - 1), layers * DOWN - (DOWN - 1)
    width, height = max(across * PANEL, 3.6) + LEFT + RIGHT, down * PANEL + TOP + BOTTOM
    figure = Figure(figsize=(width, height), dpi=110)
    rect = (LEFT / width, BOTTOM / height, across * PANEL / width, down * PANEL / height)
    axes = figure.add_axes(rect)
    axes.set_xlabel("key", fontsize=9)
    axes.set_ylabel("query", fontsize=9)
    for layer, head in np.ndindex(layers, heads):
        strength = induction[layer, head]
        heading = f"head {layer}:{head}" if np.isnan(strength) else f"{layer}:{head}  induction {strength:.2f}"
        image = _panel(axes, patterns[layer, head], head * ACROSS, layer * DOWN, heading)
    axes.set(xlim=(0, across), ylim=(down, 0), aspect="auto")
    axes.set_xticks(*_ticks(names, heads, ACROSS))
    axes.set_yticks(*_ticks(names, layers, DOWN))
    axes.tick_params(length=0, labelsize=8, pad=3)
    axes.spines[:].set_visible(False)
    beside = (rect[0] + rect[2] + 0.15 / width, rect[1], 0.12 / width, rect[3])
    bar = figure.colorbar(image, cax=figure.add_axes(beside))
    bar.set_ticks([0, 0.5, 1])
    bar.set_label("mean over the probe", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.text(0.1 / width, 1 - 0.1 / height, title, fontsize=10, va="top")
    return figure


def _panel(axes: Axes, pattern: Float[np.ndarray, "L K"], left: float, top: float, heading: str) -> AxesImage:
    """One head as a unit square."""
    square = (left, left + 1, top + 1, top)
    image = axes.imshow(pattern, extent=square, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", clip_on=False)
    queries, keys = pattern.shape
    few = max(queries, keys) <= FEW
    xs = left + np.linspace(0, 1, keys + 1 if few else 2)
    ys = top + np.linspace(0, 1, queries + 1 if few else 2)
    lines = [[(x, top), (x, top + 1)] for x in xs] + [[(left, y), (left + 1, y)] for y in ys]
    axes.add_collection(LineCollection(lines, colors="0.85", linewidths=0.6, clip_on=False), autolim=False)
    axes.text(left, top - 0.03, heading, fontsize=8, va="bottom", clip_on=False)
    return image


def _ticks(names: Sequence[str], panels: int, distance: float) -> tuple[list[float], list[str]]:
    """Where the positions are, and their names, in panels ``distance`` apart."""
    shown = range(0, len(names), 1 if len(names) <= FEW else -(-len(names) // SOME))
    places = [panel * distance + (place + 0.5) / len(names) for panel in range(panels) for place in shown]
    return places, [names[place] for place in shown] * panels
