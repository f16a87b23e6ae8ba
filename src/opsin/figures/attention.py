"""The attention of every head as a figure: a square a head, a row of squares a layer.

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

from opsin.figures.style import Margins, add_panel, blank_figure
from opsin.task import Layout

FEW_POSITIONS, NAMED_POSITIONS = 9, 5
"""Up to so many positions are all named, each cell ruled off; of more only so many are named."""

# from the left or upper edge of a head's square to that of the next, in squares
ACROSS_HEADS, DOWN_LAYERS = 1.06, 1.2


def position_names(layout: Layout) -> list[str]:
    """``x1 y1 x2 y2 x3``: x for a feature vector, y for a label, t for any other token, each counted from 1."""
    kinds = ["x" if p in layout.features else "y" if p in layout.labels else "t" for p in range(layout.positions)]
    return [f"{kind}{kinds[: position + 1].count(kind)}" for position, kind in enumerate(kinds)]


def attention_figure(
    patterns: Float[np.ndarray, "layers H L K"],
    induction: Float[np.ndarray, "layers H"],
    names: Sequence[str],
    title: str,
) -> Figure:
    """One panel per head, rows are layers: attention from each query (row) to each key (column), 0 to 1.

    Args:
        patterns: attention of every head from 0 to 1, averaged over the sequences to be shown.
        induction: induction strength of every head, from -1 to 1, written above its panel; nan for none.
        names: names of the L positions, as ``position_names`` gives them.
        title: text above all panels, one line.
    """
    layers, heads = induction.shape
    # all panels are drawn into one Axes: an Axes for each makes the picture six times slower
    across, down = heads * ACROSS_HEADS - (ACROSS_HEADS - 1), layers * DOWN_LAYERS - (DOWN_LAYERS - 1)
    side, margins = 1.4, Margins(left=0.6, right=0.85, top=0.6, bottom=0.5)  # inches
    width, height = margins.around(max(across * side, 3.6), down * side)
    figure = blank_figure(width, height, dpi=110)
    axes = add_panel(figure, margins.left, margins.bottom, across * side, down * side)
    axes.set_xlabel("key", fontsize=9)
    axes.set_ylabel("query", fontsize=9)
    for layer, head in np.ndindex(layers, heads):
        strength = induction[layer, head]
        heading = f"head {layer}:{head}" if np.isnan(strength) else f"{layer}:{head}  induction {strength:.2f}"
        image = _draw_head(axes, patterns[layer, head], head * ACROSS_HEADS, layer * DOWN_LAYERS, heading)
    axes.set(xlim=(0, across), ylim=(down, 0), aspect="auto")
    axes.set_xticks(*_ticks(names, heads, ACROSS_HEADS))
    axes.set_yticks(*_ticks(names, layers, DOWN_LAYERS))
    axes.tick_params(length=0, labelsize=8, pad=3)
    axes.spines[:].set_visible(False)
    scale = add_panel(figure, margins.left + across * side + 0.15, margins.bottom, 0.12, down * side)
    bar = figure.colorbar(image, cax=scale)
    bar.set_ticks([0, 0.5, 1])
    bar.set_label("mean over the probe", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.text(0.1 / width, 1 - 0.1 / height, title, fontsize=10, va="top")
    return figure


def _draw_head(axes: Axes, pattern: Float[np.ndarray, "L K"], left: float, top: float, heading: str) -> AxesImage:
    """One head as a unit square."""
    square = (left, left + 1, top + 1, top)
    image = axes.imshow(pattern, extent=square, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", clip_on=False)
    queries, keys = pattern.shape
    few = max(queries, keys) <= FEW_POSITIONS
    xs = left + np.linspace(0, 1, keys + 1 if few else 2)
    ys = top + np.linspace(0, 1, queries + 1 if few else 2)
    lines = [[(x, top), (x, top + 1)] for x in xs] + [[(left, y), (left + 1, y)] for y in ys]
    axes.add_collection(LineCollection(lines, colors="0.85", linewidths=0.6, clip_on=False), autolim=False)
    axes.text(left, top - 0.03, heading, fontsize=8, va="bottom", clip_on=False)
    return image


def _ticks(names: Sequence[str], panels: int, distance: float) -> tuple[list[float], list[str]]:
    """Coordinates and names of the positions in panels that are ``distance`` apart."""
    shown = range(0, len(names), 1 if len(names) <= FEW_POSITIONS else -(-len(names) // NAMED_POSITIONS))
    centres = [panel * distance + (position + 0.5) / len(names) for panel in range(panels) for position in shown]
    return centres, [names[position] for position in shown] * panels
