"""Neurons as points: norm against LogitVar, coloured by the share of their effect that a mediator carries.

Legend: M members, N neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from opsin.figures.style import ACCENT, FAINT, STYLE, Margins, add_panel, blank_figure

LEAST_LOGIT_VAR = 1e-6
"""LogitVar below it is drawn at it: the axis is logarithmic, and an exact null space has none."""


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
        norm: 2-norm of every neuron's centred output weight.
        logit_var: LogitVar of every neuron; drawn on a logarithmic axis, at ``LEAST_LOGIT_VAR`` or above.
        mediated: share of every neuron's effect that the mediator carries, drawn from 0 to 1; nan where there is none.
        candidate: whether a neuron is a candidate, which is ringed.
        names: titles of the panels, one a member.
        title: text above all panels, one line.
        colour: words beside the colour scale, which say what the share is of.
    """
    panels, side, apart = len(norm), 2.6, 0.75  # inches
    margins = Margins(left=0.85, right=0.95, top=0.75, bottom=0.5)
    width, height = margins.around(panels * side + (panels - 1) * apart, side)
    with matplotlib.rc_context(STYLE):
        figure = blank_figure(width, height, dpi=130)
        for member in range(panels):
            left = margins.left + member * (side + apart)
            axes = add_panel(figure, left, margins.bottom, side, side, figure.axes[0] if member else None)
            points = _draw_neurons(axes, norm[member], logit_var[member], mediated[member], candidate[member])
            axes.set_title(names[member])
            axes.set_xlabel("norm of the output weight")
            if member == 0:
                axes.set_ylabel("LogitVar")
        scale = add_panel(figure, width - margins.right + 0.15, margins.bottom, 0.12, side)
        bar = figure.colorbar(points, cax=scale)
        bar.set_ticks([0, 0.5, 1])
        bar.set_label(colour)
        figure.text(0.1 / width, 1 - 0.12 / height, title, fontsize=9.5, va="top")
    return figure


def _draw_neurons(
    axes: Axes,
    norm: Float[np.ndarray, " N"],
    logit_var: Float[np.ndarray, " N"],
    mediated: Float[np.ndarray, " N"],
    candidate: Bool[np.ndarray, " N"],
) -> PathCollection:
    height, known = np.maximum(logit_var, LEAST_LOGIT_VAR), np.isfinite(mediated)
    axes.scatter(norm[~known], height[~known], s=9, color=FAINT, linewidths=0)
    points = axes.scatter(
        norm[known], height[known], c=np.clip(mediated[known], 0, 1), s=11, cmap="viridis", vmin=0, vmax=1, linewidths=0
    )
    axes.scatter(norm[candidate], height[candidate], s=46, facecolors="none", edgecolors=ACCENT, linewidths=1.2)
    axes.set_yscale("log")
    return points
