"""Power laws of a grid as a figure: what is compared along every key, on logarithmic axes, with the fitted lines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opsin.errors import shortened
from opsin.figures.style import MUTED, Margins, add_panel, blank_figure, figure_style, short_count
from opsin.population.scaling import ScalingCurve

MOST_CURVES = 10
"""Curves that one panel shows."""

LONGEST_LABEL = 24
"""Letters of what the other keys are."""


def scaling_figure(curves: Sequence[ScalingCurve]) -> Figure:
    """``scaling.png``: a panel for every metric and key, a colour for each value of the other keys.

    Points are seeds, the dashed line is the mean power law, whose exponent stands in the legend with its interval over
    seeds.

    Args:
        curves: curves with their fitted lines, at least one.
    """
    panels: dict[tuple[str, str], list[ScalingCurve]] = {}
    for curve in curves:
        panels.setdefault((curve.metric, curve.key), []).append(curve)
    wide, tall, apart = 2.6, 2.3, 2.9  # inches
    margins = Margins(left=0.75, right=2.7, top=0.4, bottom=0.5)
    width, height = margins.around(len(panels) * wide + (len(panels) - 1) * apart, tall)
    with figure_style():
        figure = blank_figure(width, height, dpi=150)
        for index, ((metric, key), shown) in enumerate(panels.items()):
            axes = add_panel(figure, margins.left + index * (wide + apart), margins.bottom, wide, tall)
            _draw_laws(axes, shown[:MOST_CURVES])
            axes.set(xlabel=key)
            axes.set_title(metric, fontsize=8, pad=5)
    return figure


def _draw_laws(axes: Axes, curves: Sequence[ScalingCurve]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for index, curve in enumerate(curves):
        colour = _shade(index, len(curves))
        for y in curve.y.T:
            axes.plot(curve.x, np.where(y > 0, y, np.nan), "o", color=colour, markersize=2.4, alpha=0.5)
        exponent = curve.law.exponent
        interval = "" if exponent.low is None else f" [{exponent.low:.2f}, {exponent.high:.2f}]"
        label = f"{shortened(curve.fixed, LONGEST_LABEL)}: {exponent.value:.2f}{interval}".lstrip(": ")
        axes.plot(curve.x, curve.law(curve.x), "--", color=colour, linewidth=1.1, label=label)
    axes.set_xticks(curves[0].x, [short_count(x) for x in curves[0].x], fontsize=6.5)
    axes.minorticks_off()
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        fontsize=6.5,
        labelcolor=MUTED,
        title="exponent, 95 %",
        title_fontsize=7,
    )


def _shade(index: int, count: int) -> tuple[float, float, float]:
    """From light to dark blue."""
    share = (index + 1) / count
    return (0.75 * (1 - share) + 0.04 * share, 0.85 * (1 - share) + 0.27 * share, 0.95 * (1 - share) + 0.45 * share)
