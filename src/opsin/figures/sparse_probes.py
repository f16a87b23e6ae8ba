"""k-sparse probes as a figure: accuracy against the number of units, a panel a layer.

Legend: M members, P layers, F features, S numbers of units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from opsin.figures.feature_variance import FEATURE_COLOURS
from opsin.figures.style import Margins, add_panel, blank_figure, figure_style, lighter, spread


def sparse_probe_figure(
    accuracies: Float[np.ndarray, "M P F S"], sizes: Sequence[int], names: Sequence[str], title: str
) -> Figure:
    """Balanced accuracy of probes against the number of units that they see; thin lines are members, bold ones means.

    Args:
        accuracies: accuracy of every probe, in [0, 1]; nan where there is none.
        sizes: numbers of units, ascending.
        names: names of the features.
        title: text above all panels, one line.
    """
    wide, tall, gap = 1.7, 1.8, 0.15
    layers = accuracies.shape[1]
    margins = Margins(left=0.6, right=1.0, top=0.75, bottom=0.5)
    width, height = margins.around(max(layers * (wide + gap) - gap, 2 * wide), tall)
    with figure_style({"axes.titlesize": 8.5, "axes.titlepad": 5}):
        figure = blank_figure(width, height, dpi=150)
        for layer in range(layers):
            axes = add_panel(figure, margins.left + layer * (wide + gap), margins.bottom, wide, tall)
            _draw_accuracies(axes, accuracies[:, layer], sizes)
            axes.set_title(f"layer {layer}")
            if layer:
                axes.tick_params(labelleft=False)
            else:
                axes.set_ylabel("balanced accuracy")
        _name_curves(axes, accuracies[:, -1, :, -1], names)
        figure.text(margins.left / width, 1 - 0.2 / height, title, fontsize=9.5, fontweight="bold", va="center")
    return figure


def _draw_accuracies(axes: Axes, accuracies: Float[np.ndarray, "M F S"], sizes: Sequence[int]) -> None:
    means = np.ma.masked_invalid(accuracies).mean(0).filled(np.nan)
    for index, mean in enumerate(means):
        shade = FEATURE_COLOURS[index % len(FEATURE_COLOURS)]
        axes.plot(sizes, accuracies[:, index].T, color=lighter(shade, 0.6), linewidth=0.7, zorder=2)
        axes.plot(sizes, mean, marker="o", markersize=3.5, color=shade, linewidth=1.6, zorder=3)
    axes.set_xscale("log")
    axes.set_xticks(list(sizes), [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("units k")
    axes.set_ylim(0, 1.04)


def _name_curves(axes: Axes, last: Float[np.ndarray, "M F"], names: Sequence[str]) -> None:
    """Names of the features beside the ends of their curves."""
    ends = np.nan_to_num(np.ma.masked_invalid(last).mean(0).filled(np.nan))
    order = np.argsort(ends)
    for index, height in zip(order.tolist(), spread(ends[order].tolist(), gap=0.09), strict=True):
        style = {"color": FEATURE_COLOURS[index % len(FEATURE_COLOURS)], "fontsize": 8, "va": "center"}
        axes.text(1.05, height, names[index], transform=axes.get_yaxis_transform(), **style)
