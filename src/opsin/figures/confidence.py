"""The case study of confidence as a figure: position against loss, entropy and activations, and what ablations change.

Legend: J neurons of one member that are shown, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opsin.figures.style import (
    ACCENT,
    FAINT,
    INK,
    LAYERS,
    MUTED,
    Margins,
    add_panel,
    blank_figure,
    figure_style,
    spread,
)
from opsin.metrics.confidence import Study

SHOWN = 6
"""Neurons that are drawn, the strongest first; more are in the table."""

NEURON_COLOURS = (*LAYERS, "#8a5a2b")
REPEATED_SHADE = "#f1f4f6"

EFFECTS = (("total", ACCENT, "total (scale recomputed)", 0.16), ("direct", "#0072b2", "direct (scale as it is)", -0.16))
"""Field of a change, colour, words of the legend, and height above the middle of its row, in rows."""


def confidence_figure(studies: Sequence[Study], names: Sequence[str], layer: int, title: str) -> Figure:
    """One row a member: loss and entropy, activations, and changes of the entropy beside their controls.

    The repeated part is shaded. Of a change the grey bar holds 95 % of the norm-matched random neurons, its tick their
    mean.

    Args:
        studies: what was measured, one study a member.
        names: names of the members, in the order of ``studies``; an empty one is left out.
        layer: layer that the neurons belong to, the first number of their names.
        title: text above all panels, one line.
    """
    # inches: a panel, the gap between rows, and what stands right of the lines and left of the last column
    wide, tall, between_rows, line_labels, row_names = 2.55, 1.75, 0.62, 0.9, 0.25
    rows = len(studies)
    margins = Margins(left=0.55, right=0.25, top=0.82, bottom=0.5)
    steps = (0, wide + line_labels, 2 * wide + 2 * line_labels + row_names)
    lefts = [margins.left + step for step in steps]
    width, height = margins.around(steps[-1] + wide, rows * tall + (rows - 1) * between_rows)
    with figure_style({"axes.titlepad": 8}):
        figure = blank_figure(width, height, dpi=150)
        for row, (study, name) in enumerate(zip(studies, names, strict=True)):
            bottom = height - margins.top - tall - row * (tall + between_rows)
            panels = [add_panel(figure, left, bottom, wide, tall) for left in lefts]
            _draw_loss_and_entropy(panels[0], study, name)
            _draw_activations(panels[1], study, layer)
            _draw_changes(panels[2], study, layer)
            if row == rows - 1:
                for axes in panels[:2]:
                    axes.set_xlabel("position in the sequence (shaded: repeated)")
                panels[2].set_xlabel("nats, ablated minus not, on the repeated part")
        figure.text(0.1 / width, 1 - 0.1 / height, title, fontsize=9.5, va="top")
        _explain(figure, lefts[2] / width, 1 - 0.12 / height)
    return figure


# ---- panels -----------------------------------------------------------------------------------------


def _draw_loss_and_entropy(axes: Axes, study: Study, name: str) -> None:
    axes.set_title(f"{name.capitalize()}: loss and entropy (nats)" if name else "Loss and entropy (nats)")
    lines = [("loss", study.loss.numpy(), INK), ("entropy", study.entropy.numpy(), ACCENT)]
    _draw_lines(axes, study, lines)
    axes.set_ylim(bottom=0)
    _label(axes, [(values[-1], text, colour) for text, values, colour in lines])


def _draw_activations(axes: Axes, study: Study, layer: int) -> None:
    kind = "Candidates" if study.candidate else "Not candidates"
    axes.set_title(f"{kind}: mean activation")
    shown = zip(study.neurons, study.activation[list(study.neurons)].numpy(), NEURON_COLOURS, strict=False)
    lines = [(f"{layer}:{neuron}", values, colour) for neuron, values, colour in shown]
    _draw_lines(axes, study, lines)
    axes.axhline(0, color=FAINT, linewidth=0.8, zorder=1.5)
    _label(axes, [(values[-1], text, colour) for text, values, colour in lines])


def _draw_lines(axes: Axes, study: Study, lines: Sequence[tuple[str, np.ndarray, str]]) -> None:
    repeated = [position for position, again in zip(study.positions, study.repeated.tolist(), strict=True) if again]
    axes.axvspan(repeated[0] - 0.5, repeated[-1] + 0.5, color=REPEATED_SHADE, linewidth=0, zorder=0.5)
    for _, values, colour in lines:
        axes.plot(study.positions, values, color=colour, linewidth=1.3, zorder=3)
    axes.set_xlim(study.positions[0] - 0.5, study.positions[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _draw_changes(axes: Axes, study: Study, layer: int) -> None:
    axes.set_title("Change of the entropy by ablation")
    together = [change for change in study.changes if len(change.neurons) > 1]
    shown = [*[change for change in study.changes if len(change.neurons) == 1][:SHOWN], *together]
    for row, change in enumerate(shown):
        for field, colour, _, up in EFFECTS:
            found, y = getattr(change, field), row - up
            axes.plot([found.low, found.high], [y, y], color=FAINT, linewidth=5, zorder=2, solid_capstyle="butt")
            axes.plot([found.control], [y], "|", color=MUTED, markersize=6, zorder=2.5)
            axes.plot([found.value], [y], "o", color=colour, markersize=4.5, zorder=4)
    axes.axvline(0, color=MUTED, linewidth=0.8, zorder=1.5)
    names = [f"{layer}:{change.neurons[0]}" if len(change.neurons) == 1 else "all" for change in shown]
    axes.set_yticks(range(len(shown)), names)
    # few are not spread over the whole height
    room = max(len(shown), 3) / 2
    axes.set_ylim((len(shown) - 1) / 2 + room, (len(shown) - 1) / 2 - room)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", visible=False)


# ---- words ------------------------------------------------------------------------------------------


def _label(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Labels right of the frame at the lines' ends, moved apart."""
    low, high = axes.get_ylim()
    ends = sorted(end for end in ends if np.isfinite(end[0]))
    heights = spread([(y - low) / (high - low) for y, _, _ in ends], 0.085)
    for (_, text, colour), height in zip(ends, heights, strict=True):
        axes.text(1.03, height, text, transform=axes.transAxes, va="center", fontsize=7.5, color=colour)


def _explain(figure: Figure, left: float, top: float) -> None:
    """What dots and bars are, above the last column."""
    width = figure.get_figwidth()
    for index, (_, colour, text, _) in enumerate(EFFECTS):
        figure.text(left + index * 1.45 / width, top, f"● {text}", fontsize=7, color=colour, va="top")
    grey = "▬ 95 % of random neurons of the same norms"
    figure.text(left, top - 0.15 / figure.get_figheight(), grey, fontsize=7, color=MUTED, va="top")
