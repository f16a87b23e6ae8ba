"""Grokking as a figure: accuracies, the share of a few frequencies, and losses with and without them, over training.

Legend: M members, n records of a metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from opsin.figures.style import ACCENT, INK, Margins, add_panel, blank_figure, figure_style
from opsin.records.history import History

LEAST_LOSS = 1e-6
"""Losses below it (nats) are drawn at it: the axis is logarithmic."""


@dataclass(frozen=True)
class Line:
    """A metric as it is drawn.

    Args:
        metric: name of the metric, with one number a member.
        text: words beside the panel that say what it is.
        colour: colour of the line and of its words.
    """

    metric: str
    text: str
    colour: str


@dataclass(frozen=True)
class Panel:
    """What one row of panels shows.

    Args:
        title: words above the first panel of the row.
        lines: metrics that are drawn, where the run has them.
        is_loss: whether they are losses, on a logarithmic axis, and not shares from 0 to 1.
    """

    title: str
    lines: tuple[Line, ...]
    is_loss: bool = False


PANELS = (
    Panel("Accuracy", (Line("val/train/accuracy", "training", INK), Line("val/test/accuracy", "test", ACCENT))),
    Panel(
        "Share of a few frequencies",
        (
            Line("fourier/key_share", "power of the embedding\nin key frequencies", "#0072b2"),
            Line("fourier/gini", "Gini coefficient of\nthat power", "#56b4e9"),
            Line("fourier/neuron_share", "variance of a neuron\nin one frequency", "#009e73"),
            Line("fourier/logit_share", "variance of the logits\nin cos w(answer - c)", "#cc79a7"),
        ),
    ),
    Panel(
        "Loss, nats",
        (
            Line("val/train/loss", "training", INK),
            Line("val/test/loss", "test", ACCENT),
            Line("fourier/restricted_loss", "all pairs, key\nfrequencies alone", "#009e73"),
            Line("fourier/excluded_loss", "training, without\nkey frequencies", "#cc79a7"),
        ),
        is_loss=True,
    ),
)


def fourier_figure(history: History, members: Sequence[int], named: bool) -> Figure:
    """A column for each member, over optimizer steps: accuracies, shares of a few frequencies, losses, all frequencies.

    Args:
        history: records of the run, ``fourier/power`` among them; another metric that it lacks is not drawn.
        members: numbers of the members that are drawn.
        named: whether the number of each stands above its column.
    """
    wide, tall, beside, between = 4.4 if len(members) == 1 else 2.5, 1.35, 0.21, 0.42  # inches
    rows = len(PANELS) + 1
    margins = Margins(left=0.65, right=1.7, top=0.4, bottom=0.5)
    across = len(members) * (wide + beside) - beside
    width, height = margins.around(across, rows * tall + (rows - 1) * between)
    with figure_style({"axes.titlepad": 6}):
        figure = blank_figure(width, height, dpi=160)
        for row in range(rows):
            bottom = margins.bottom + (rows - 1 - row) * (tall + between)
            lefts = [margins.left + index * (wide + beside) for index in range(len(members))]
            columns = [add_panel(figure, left, bottom, wide, tall) for left in lefts]
            if row < len(PANELS):
                _draw_row(columns, PANELS[row], history, members)
            else:
                scale = add_panel(figure, margins.left + across + 0.1, bottom, 0.1, tall)
                _draw_powers(columns, scale, history, members)
            for axes, member in zip(columns, members, strict=True):
                _set_steps(axes, history["fourier/power"].steps[-1], is_last=row == rows - 1)
                if named and row == 0:
                    axes.text(1, 1.05, f"member {member}", transform=axes.transAxes, ha="right", fontsize=8)
            for axes in columns[1:]:
                axes.tick_params(labelleft=False)
    return figure


def _set_steps(axes: Axes, last: int, is_last: bool) -> None:
    """Optimizer steps along x, with numbers below the last row alone."""
    axes.set_xlim(0, max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.tick_params(labelbottom=is_last)
    axes.set_xlabel("optimizer steps" if is_last else "")


def _draw_row(columns: Sequence[Axes], panel: Panel, history: History, members: Sequence[int]) -> None:
    found = [line for line in panel.lines if line.metric in history]
    highest = 10 * LEAST_LOSS
    for axes, member in zip(columns, members, strict=True):
        for line in found:
            steps, values = history[line.metric].arrays()
            shown = np.maximum(values[:, member], LEAST_LOSS) if panel.is_loss else values[:, member]
            axes.plot(steps, shown, color=line.colour, linewidth=1.4)
            highest = max([highest, *shown[np.isfinite(shown)]])
    for axes in columns:
        if panel.is_loss:
            _set_decades(axes, highest)
        else:
            axes.set_ylim(-0.03, 1.03)
    columns[0].set_title(panel.title)
    beside = {"transform": columns[-1].transAxes, "va": "top", "fontsize": 7}
    for index, line in enumerate(panel.lines):
        columns[-1].text(1.04, 0.97 - 0.25 * index, line.text, color=line.colour, **beside)


def _draw_powers(columns: Sequence[Axes], scale: Axes, history: History, members: Sequence[int]) -> None:
    """Shares of the embedding's power as shades, a row a frequency."""
    steps, power = history["fourier/power"].arrays()  # n M F
    frequencies, most = np.arange(1, power.shape[2] + 1), float(np.nanmax(power[:, list(members)], initial=1e-9))
    for axes, member in zip(columns, members, strict=True):
        shades = axes.pcolormesh(
            steps, frequencies, power[:, member].T, shading="nearest", cmap="Blues", vmin=0, vmax=most
        )
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(visible=False)
    columns[0].set_title("Power of the embedding by frequency")
    bar = columns[0].figure.colorbar(shades, cax=scale)
    bar.set_label("share of the power", fontsize=7)
    bar.outline.set_visible(False)


def _set_decades(axes: Axes, highest: float) -> None:
    """A logarithmic axis between powers of ten, which alone are ticks."""
    axes.set_yscale("log")
    axes.set_ylim(LEAST_LOSS, 10 ** np.ceil(np.log10(highest)))
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
