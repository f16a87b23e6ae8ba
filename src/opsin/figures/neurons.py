"""Neurons as points: norm against LogitVar, coloured by the share of their effect that a mediator carries.

Legend: M members, N neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from opsin.figures.style import ACCENT, FAINT, STYLE

LOWEST = 1e-6
"""LogitVar below it is drawn at it: the axis is logarithmic, and an exact null space has none."""

# inches
PANEL, LEFT, RIGHT, TOP, BOTTOM, APART = 2.6, 0.85, 0.95, 0.75, 0.5, 0.75


def neuron_figure(
    norm: Float[np.ndarray, "M N"],
    logit_var: Float[np.ndarray, "M N"],
    mediated: Float[np.ndarray, "M N"],
    candidate: Bool[np.ndarray, "M N"],
    names: Sequence[str],
    title: str,
    colour: str,
) -> Figure:
    """One panel a member, every neuron a point, candidates ringed; grey where the effect is too small for a share.

    Args:
        mediated: shares; drawn from 0 to 1.
        names: of the panels.
        title: above all panels.
        colour: what the share is of.
    """
    panels = len(norm)
    across = panels * PANEL + (panels - 1) * APART
    width, height = LEFT + across + RIGHT, TOP + PANEL + BOTTOM
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=130)
        FigureCanvasAgg(figure)
        for member in range(panels):
            left = LEFT + member * (PANEL + APART)
            first = figure.axes[0] if member else None
            rect = (left / width, BOTTOM / height, PANEL / width, PANEL / height)
            axes = figure.add_axes(rect, sharex=first, sharey=first)
            points = _panel(axes, norm[member], logit_var[member], mediated[member], candidate[member])
            axes.set_title(names[member])
            axes.set_xlabel("norm of the output weight")
            if member == 0:
                axes.set_ylabel("LogitVar")
        beside = ((width - RIGHT + 0.15) / width, BOTTOM / height, 0.12 / width, PANEL / height)
        bar = figure.colorbar(points, cax=figure.add_axes(beside))
        bar.set_ticks([0, 0.5, 1])
        bar.set_label(colour)
        figure.text(0.1 / width, 1 - 0.12 / height, title, fontsize=9.5, va="top")
    return figure


def _panel(
    axes: Axes,
    norm: Float[np.ndarray, " N"],
    logit_var: Float[np.ndarray, " N"],
    mediated: Float[np.ndarray, " N"],
    candidate: Bool[np.ndarray, " N"],
) -> PathCollection:
    height, known = np.maximum(logit_var, LOWEST), np.isfinite(mediated)
    axes.scatter(norm[~known], height[~known], s=9, color=FAINT, linewidths=0)
    points = axes.scatter(
        norm[known], height[known], c=np.clip(mediated[known], 0, 1), s=11, cmap="viridis", vmin=0, vmax=1, linewidths=0
    )
    axes.scatter(norm[candidate], height[candidate], s=46, facecolors="none", edgecolors=ACCENT, linewidths=1.2)
    axes.set_yscale("log")
    return points
