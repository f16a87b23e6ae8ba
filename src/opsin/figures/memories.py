"""Associative memories over training: what each recalls, what is copied, and the loss of facts beside it.

Legend: M members, n records.
"""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from opsin.figures.style import ACCENT, INK, LAYERS, MUTED, Margins, add_panel, blank_figure, figure_style, short_count
from opsin.population.folder import Curve

COLOURS = (*LAYERS[:3], ACCENT, LAYERS[3], INK)


def memory_figure(shares: Mapping[str, Curve], divergences: Mapping[str, Curve]) -> Figure:
    """Shares from 0 to 1 in the upper panel, losses and divergences below; members thin, their mean bold.

    Args:
        shares: what is recalled or right, by the name that labels it.
        divergences: numbers in nats by the name that labels them; without any there is one panel.
    """
    panels = [(shares, "recall above chance, and share copied right"), (divergences, "nats")]
    panels = [panel for panel in panels if panel[0]]
    width, height, apart = 4.6, 1.9, 0.55  # inches
    margins = Margins(left=0.65, right=1.9, top=0.4, bottom=0.5)
    across, up = margins.around(width, len(panels) * height + (len(panels) - 1) * apart)
    with figure_style():
        figure = blank_figure(across, up, dpi=160)
        for index, (curves, title) in enumerate(panels):
            bottom = margins.bottom + (len(panels) - 1 - index) * (height + apart)
            axes = add_panel(figure, margins.left, bottom, width, height)
            _draw_memories(axes, curves)
            axes.set_title(title, fontsize=8, pad=5)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
        axes.set_xlabel("training sequences")
    return figure


def _draw_memories(axes: Axes, curves: Mapping[str, Curve]) -> None:
    for (name, (sequences, values)), colour in zip(curves.items(), COLOURS, strict=False):
        if values.shape[1] > 1:
            axes.plot(sequences, values, color=colour, alpha=0.35, linewidth=0.6)
        axes.plot(sequences, values.mean(1), color=colour, linewidth=1.6, label=name)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=7.5, labelcolor=MUTED)
