"""Shares of representational variance as a figure: each feature over training, and by layer at the end.

Legend: n records, M members, P layers, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from opsin.figures.style import (
    ACCENT,
    LAYERS,
    MUTED,
    Margins,
    add_panel,
    blank_figure,
    figure_style,
    lighter,
    short_count,
    spread,
)
from opsin.records.history import History

FEATURE_COLOURS = (LAYERS[1], ACCENT, LAYERS[2], LAYERS[3], LAYERS[0], LAYERS[4])
SHARES = "feature_variance"
"""Metric that is drawn."""


def feature_variance_figure(history: History, names: Sequence[str], members: Sequence[int] | None = None) -> Figure:
    """Two panels: the share of every feature in the last layer over training, and in every layer at the end.

    Thin lines are members and bold ones their mean.

    Args:
        history: records of the run, with ``feature_variance`` among them.
        names: names of the features, in the order of the records.
        members: members that are drawn; all when None.
    """
    steps, shares = history[SHARES].arrays()  # n M P F
    shares = shares if members is None else shares[:, list(members)]
    wide, tall, labels = 3.0, 2.0, 1.1
    margins = Margins(left=0.6, right=0.1, top=0.5, bottom=0.5)
    width, height = margins.around(2 * wide + labels + 0.45, tall)
    with figure_style({"axes.titlepad": 8}):
        figure = blank_figure(width, height, dpi=150)
        over_time = add_panel(figure, margins.left, margins.bottom, wide, tall)
        by_layer = add_panel(figure, margins.left + wide + labels + 0.45, margins.bottom, wide, tall)
        _draw_shares(over_time, history.sequences(steps), shares[:, :, -1], names)
        over_time.set_title("Variance explained, last layer")
        over_time.set_xlabel("training sequences")
        over_time.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
        over_time.xaxis.set_major_locator(MaxNLocator(4))
        _draw_shares(by_layer, np.arange(shares.shape[2]), shares[-1].transpose(1, 0, 2), names, named=False)
        by_layer.set_title("By layer, at the end")
        by_layer.set_xlabel("layer")
        by_layer.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (over_time, by_layer):
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
    return figure


def _draw_shares(
    axes: Axes, x: np.ndarray, shares: Float[np.ndarray, "n M F"], names: Sequence[str], named: bool = True
) -> None:
    """A colour a feature; names stand at the ends of the lines where they are wanted."""
    known = np.ma.masked_invalid(shares)
    means = known.mean(1).filled(np.nan)  # n F
    for index in range(len(names)):
        shade = FEATURE_COLOURS[index % len(FEATURE_COLOURS)]
        axes.plot(x, shares[:, :, index], color=lighter(shade, 0.6), linewidth=0.7, zorder=2)
        marker = "" if named else "o"
        axes.plot(x, means[:, index], marker=marker, markersize=3.5, color=shade, linewidth=1.7, zorder=3)
    if named:
        order = np.argsort(np.nan_to_num(means[-1]))
        heights = spread(np.nan_to_num(means[-1])[order].tolist(), gap=0.085)
        for index, height in zip(order.tolist(), heights, strict=True):
            text, shade = (
                f"{names[index]} {100 * means[-1, index]:.0f} %",
                FEATURE_COLOURS[index % len(FEATURE_COLOURS)],
            )
            axes.text(1.02, height, text, transform=axes.get_yaxis_transform(), color=shade, fontsize=8, va="center")
    axes.tick_params(labelcolor=MUTED)
