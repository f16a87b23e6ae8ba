"""In-context regression as a figure: error, distance to every predictor, which is nearest, and implied weights.

Legend: n records, M members, Q numbers of examples, R references.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from opsin.figures.style import (
    ACCENT,
    INK,
    MUTED,
    Margins,
    add_panel,
    blank_figure,
    figure_style,
    lighter,
    short_count,
    spread,
)
from opsin.metrics.compare import Mean
from opsin.records.history import History

REFERENCE_COLOURS = (MUTED, "#8a5a2b", "#cc79a7", "#e69f00", "#0072b2", "#009e73", "#56b4e9", "#7b4b94")
"""Colours of the references in their order; more begin anew."""

LEAST_SHOWN = 1e-4
"""Lowest distance on an axis in decades."""


@dataclass(frozen=True)
class Drawn:
    """What the figure shows beside the records.

    Args:
        errors: mean squared error over d of every reference, by name, in their order.
        compared: numbers of examples over which errors and distances are averaged.
        change: step at which the nearest of two references changes, with its interval over members.
        members: members that are drawn.
    """

    errors: Mapping[str, float]
    compared: Sequence[int]
    change: Mean
    members: slice


def in_context_figure(history: History, drawn: Drawn) -> Figure:
    """Four panels over training: error, distances, the nearest reference by number of examples, implied weights.

    Thin lines are members and bold ones their mean. The vertical line is the change of the nearest reference, its band
    the 95 % interval over members.

    Args:
        history: records of the run, of which all that begin with ``algorithm/`` are drawn.
        drawn: what is shown beside them.
    """
    # inches: a panel, the room of its labels, and the gap between rows
    wide, tall, labels, between_rows = 3.1, 1.9, 1.45, 0.75
    margins = Margins(left=0.55, right=0.05, top=0.5, bottom=0.5)
    width, height = margins.around(2 * wide + 2 * labels + 0.45, 2 * tall + between_rows)
    with figure_style({"axes.titlepad": 8}):
        figure = blank_figure(width, height, dpi=150)
        lefts = (margins.left, margins.left + wide + labels + 0.45)
        bottoms = (margins.bottom + tall + between_rows, margins.bottom)
        panels = [add_panel(figure, left, bottom, wide, tall) for bottom in bottoms for left in lefts]
        for axes, draw in zip(panels, (_draw_errors, _draw_distances, _draw_nearest, _draw_weights), strict=True):
            draw(axes, history, drawn)
    return figure


# ---- panels -----------------------------------------------------------------------------------------


def _draw_errors(axes: Axes, history: History, drawn: Drawn) -> None:
    axes.set_title("Squared error / d; dashed: references")
    steps, error = _drawn_series(history, "algorithm/error", drawn)
    mean = error[:, :, drawn.compared].mean(2)
    axes.plot(steps, mean, color=lighter(INK, 0.65), linewidth=0.6, zorder=2)
    axes.plot(steps, mean.mean(1), color=INK, linewidth=1.5, zorder=4)
    ends = [(float(mean[-1].mean()), "model", INK)]
    for (name, value), colour in _coloured(drawn.errors):
        axes.axhline(value, color=colour, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1.5)
        ends.append((value, _words(name), colour))
    axes.set_ylim(0, 1.06 * max(drawn.errors.get("zero", 0.0), float(mean.mean(1).max())))
    _finish(axes, steps, drawn, ends)


def _draw_distances(axes: Axes, history: History, drawn: Drawn) -> None:
    axes.set_title("Squared prediction distance / d")
    ends = []
    for (name, _), colour in _coloured(drawn.errors):
        steps, distance = _drawn_series(history, f"algorithm/{name}/distance", drawn)
        ends.append(_members_and_mean(axes, steps, distance, name, colour))
    _in_decades(axes)
    _finish(axes, steps, drawn, ends)


def _draw_nearest(axes: Axes, history: History, drawn: Drawn) -> None:
    axes.set_title("Nearest reference by number of examples")
    steps, nearest = _drawn_series(history, "algorithm/nearest_by_examples", drawn)
    names = list(drawn.errors)
    common = _commonest(nearest, len(names))
    colours = ListedColormap([colour for _, colour in _coloured(drawn.errors)])
    norm = BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names))
    if len(steps) > 1:
        axes.pcolormesh(steps, np.arange(common.shape[1]), common.T, cmap=colours, norm=norm, shading="nearest")
    axes.set_ylim(-0.5, common.shape[1] - 0.5)
    axes.grid(visible=False)
    axes.set_ylabel("examples")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    shown = [number for number in range(len(names)) if (common == number).any()]
    ends = [(0.5 + 1.1 * row, _words(names[number]), _colour(number)) for row, number in enumerate(shown)]
    # a band would change the colours of the map
    _finish(axes, steps, replace(drawn, change=replace(drawn.change, low=None, high=None)), ends)


def _draw_weights(axes: Axes, history: History, drawn: Drawn) -> None:
    axes.set_title("Distance of implied weights / d; dashed: not linear")
    ends = []
    for (name, _), colour in _coloured(drawn.errors):
        steps, distance = _drawn_series(history, f"algorithm/{name}/weight_distance", drawn)
        ends.append(_members_and_mean(axes, steps, distance[:, :, drawn.compared].mean(2), name, colour))
    steps, linear = _drawn_series(history, "algorithm/linearity", drawn)
    rest = 1 - linear[:, :, drawn.compared].mean((1, 2))
    axes.plot(steps, rest, color=INK, linewidth=1.1, linestyle=(0, (4, 2)), zorder=4)
    ends.append((float(rest[-1]), "1 - R²", INK))
    _in_decades(axes)
    _finish(axes, steps, drawn, ends)


# ---- what panels share --------------------------------------------------------------------------------


def _drawn_series(
    history: History, metric: str, drawn: Drawn
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n M ..."]]:
    steps, values = history[metric].arrays()
    return steps, values[:, drawn.members]


def _commonest(nearest: Float[np.ndarray, "n M Q"], count: int) -> Int[np.ndarray, "n Q"]:
    """The number that most members have."""
    votes = np.stack([(nearest == number).sum(1) for number in range(count)], -1)
    return votes.argmax(-1)


def _colour(number: int) -> str:
    return REFERENCE_COLOURS[number % len(REFERENCE_COLOURS)]


def _coloured(errors: Mapping[str, float]) -> list[tuple[tuple[str, float], str]]:
    return [(item, _colour(number)) for number, item in enumerate(errors.items())]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _members_and_mean(
    axes: Axes, steps: Int[np.ndarray, " n"], values: Float[np.ndarray, "n M"], name: str, colour: str
) -> tuple[float, str, str]:
    """Members thin, their mean bold; returns the label of the line's end."""
    mean = values.mean(1)
    axes.plot(steps, values, color=lighter(colour, 0.65), linewidth=0.6, zorder=2)
    axes.plot(steps, mean, color=colour, linewidth=1.5, zorder=4)
    return float(mean[-1]), _words(name), colour


def _in_decades(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], LEAST_SHOWN))


def _finish(axes: Axes, steps: Int[np.ndarray, " n"], drawn: Drawn, ends: Sequence[tuple[float, str, str]]) -> None:
    """The axis of steps, the mark of the change, and labels right of the frame at the lines' ends."""
    axes.set_xlim(0, max(int(steps[-1]), 1))
    axes.set_xlabel("optimizer steps")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
    if drawn.change.value is not None:
        axes.axvline(drawn.change.value, color=ACCENT, linewidth=1.1, zorder=5)
        if drawn.change.low is not None and drawn.change.high is not None:
            axes.axvspan(drawn.change.low, drawn.change.high, color=ACCENT, alpha=0.16, linewidth=0, zorder=4.5)
    _write_ends(axes, ends)


def _write_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    inside = axes.transData + axes.transAxes.inverted()
    found = sorted((float(inside.transform((0.0, y))[1]), text, colour) for y, text, colour in ends if np.isfinite(y))
    heights = spread([min(max(y, 0.0), 1.0) for y, _, _ in found], 0.085)
    for (_, text, colour), height in zip(found, heights, strict=True):
        axes.text(1.03, height, text, transform=axes.transAxes, va="center", fontsize=7.5, color=colour)
