"""A population as a figure: the loss under every condition, and the onset of every member.

Legend: S seeds of a condition, n records of the loss, b bins of a drawn curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from opsin.figures.style import FAINT, INK, MUTED, blank_figure, figure_style, short_count
from opsin.metrics.compare import mean_curve
from opsin.population.folder import Losses
from opsin.population.tables import FORMED, NO_PLATEAU, NOT_FORMED, Row
from opsin.records.schema import DIVERGED, UNFINISHED

Colour = tuple[float, float, float]

# Okabe and Ito's colours, after the ink of the first condition
CONDITION_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
EARLY_ONSET = 0.04  # share of the run before which an onset would stick to the edge of a linear axis
CURVE_POINTS = 250  # points of a drawn curve

# inches
FIGURE_WIDTH, TITLE_SPACE, LABEL_SPACE = 10.0, 0.5, 0.8
PANEL_HEIGHT, ROW_HEIGHT = 1.26, 0.42  # of a small panel with its labels, of a row of onsets
LEAST_HEIGHT = 2.4  # of the panels together, however few conditions there are
CHARACTER_WIDTH = 0.061  # of a letter in a condition's name

PANEL_COLUMNS = 3  # small panels side by side: as high as the rows of onsets, however many conditions
LOSSES_FROM, NAMES_FROM, ONSETS_TO = 0.04, 0.555, 0.9  # edges of the two halves, as shares of the width
MOST_CONDITIONS = 60  # that are drawn
LONGEST_NAME = 26  # characters of a condition's name that are shown
SHORTEST_KEY = 2  # characters that are left of a key of a grid


@dataclass(frozen=True)
class _Axis:
    """What all panels share: sequences from ``low`` to ``high``, logarithmic or not."""

    low: float
    high: float
    log: bool

    def apply(self, axes: Axes, ticks: int) -> None:
        """Give axes these limits on x, and about ``ticks`` numbers along it."""
        if self.log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=ticks + 2))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
        axes.set_xlim(self.low, self.high)


def population_figure(losses: Losses, summary: Mapping[str, Sequence[Row]]) -> Figure:
    """``population.png``, 1600 pixels wide: a small panel of losses for every condition, and all onsets.

    A panel shows the seeds (thin), their mean (bold) with the 95 % interval at each point, and in grey the mean under
    the first condition. The onsets are one row a condition: each seed with its own interval, the mean with that over
    the seeds, and a mark of another shape for each member without an onset, so that none is missing. Sequences are on
    a logarithmic axis where an onset lies in the first ``EARLY_ONSET`` of the run. A condition has one colour in all
    panels. The first ``MOST_CONDITIONS`` are drawn.

    Args:
        losses: training losses of all members over sequences, with their unit.
        summary: tables of the population, of which ``members`` and ``conditions`` are read.
    """
    total, summary = len(summary["conditions"]), _first_conditions(summary)
    conditions = len(summary["conditions"])
    rows = -(-conditions // PANEL_COLUMNS)
    height = max(rows * PANEL_HEIGHT, conditions * ROW_HEIGHT, LEAST_HEIGHT) + TITLE_SPACE + LABEL_SPACE
    with figure_style({"axes.titlepad": 5}):
        figure = blank_figure(FIGURE_WIDTH, height, dpi=160)
        axis = _shared_axis(losses, summary)
        _draw_loss_panels(figure, losses, summary, axis)
        _draw_onsets(figure, losses, summary, axis)
        _draw_legend(figure, summary)
        if conditions < total:
            text = f"the first {conditions} of {total:,} conditions"
            figure.text(LOSSES_FROM, 0.16 / height, text, fontsize=7, color=MUTED, va="center")
    return figure


def _first_conditions(summary: Mapping[str, Sequence[Row]]) -> Mapping[str, Sequence[Row]]:
    """The tables without the conditions that there is no room for."""
    if len(summary["conditions"]) <= MOST_CONDITIONS:
        return summary
    conditions = summary["conditions"][:MOST_CONDITIONS]
    names = {row["condition"] for row in conditions}
    return {"conditions": conditions, "members": [row for row in summary["members"] if row["condition"] in names]}


def colour(index: int) -> Colour:
    """Colour of the ``index``-th condition of the recipe; rounds after the first are darker, then paler."""
    if index == 0:
        return to_rgb(INK)
    around, hue = divmod(index - 1, len(CONDITION_COLOURS))
    share, towards = ((1.0, 0.0), (0.6, 0.0), (0.72, 1.0))[around % 3]
    red, green, blue = (part * share + towards * (1 - share) for part in to_rgb(CONDITION_COLOURS[hue]))
    return red, green, blue


def _shared_axis(losses: Losses, summary: Mapping[str, Sequence[Row]]) -> _Axis:
    last = float(losses.sequences[-1]) if len(losses.sequences) else 1.0
    times = [row[name] for row in summary["members"] for name in ("onset", "below_half") if row[name] is not None]
    log = bool(times) and min(times) < EARLY_ONSET * last
    # one decade before the first change is enough to show that nothing happened before it
    low = max(min(float(losses.sequences[0]), last), 0.2 * min(times)) if log else 0.0
    return _Axis(low, last, log)


# ---- the losses -----------------------------------------------------------------------------------


def _draw_loss_panels(figure: Figure, losses: Losses, summary: Mapping[str, Sequence[Row]], axis: _Axis) -> None:
    curves = _curves(losses, summary, axis)
    top = max((float(np.nanmax(values)) for _, values in curves if np.isfinite(values).any()), default=1.0)
    bottom = min(0.0, *(1.06 * float(np.nanmin(values)) for _, values in curves if np.isfinite(values).any()), 0.0)
    conditions = summary["conditions"]
    for index, (condition, panel) in enumerate(zip(conditions, _loss_panels(figure, len(conditions)), strict=True)):
        if index:
            panel.plot(curves[0][0], mean_curve(curves[0][1])[0], color=FAINT, linewidth=1.1, zorder=2)
        _draw_condition(panel, *curves[index], colour(index), losses.scale.floor)
        name = _shortened(condition["condition"])
        inches = panel.get_position().width * FIGURE_WIDTH
        panel.set_title(name, color=colour(index), fontsize=min(8.0, 72 * inches / (0.7 * max(len(name), 1))))
        axis.apply(panel, ticks=3)
        panel.set_ylim(bottom, 1.06 * max(top, 1e-3))
        panel.yaxis.set_major_locator(MaxNLocator(3))
    _draw_heading(
        figure, LOSSES_FROM, losses.scale.titled("Training loss"), "mean over seeds, 95 % interval at each point"
    )


def _loss_panels(figure: Figure, count: int) -> list[Axes]:
    """Small axes in rows; the outer ones carry numbers, the lowest of each column what they count."""
    height, gap, end = figure.get_figheight(), 0.28 / FIGURE_WIDTH, NAMES_FROM - 0.03
    columns, rows = min(PANEL_COLUMNS, count), -(-count // PANEL_COLUMNS)
    width = (end - LOSSES_FROM - (columns - 1) * gap) / columns
    step = (height - TITLE_SPACE - LABEL_SPACE + 0.25) / rows
    panels = []
    for index in range(count):
        row, column = divmod(index, columns)
        bottom = (height - TITLE_SPACE - 0.15 - (row + 1) * step + 0.4) / height
        axes = figure.add_axes((LOSSES_FROM + column * (width + gap), bottom, width, (step - 0.4) / height))
        lowest = index + columns >= count
        axes.tick_params(labelsize=7, labelleft=column == 0, labelbottom=lowest)
        if lowest:
            axes.set_xlabel("sequences", labelpad=2, fontsize=7.5)
        panels.append(axes)
    return panels


def _draw_condition(
    axes: Axes, x: Float[np.ndarray, " b"], values: Float[np.ndarray, "b S"], shade: Colour, floor: float
) -> None:
    mean, low, high = mean_curve(values, floor=floor)
    axes.fill_between(x, low, high, color=shade, alpha=0.16, linewidth=0, zorder=1.5)
    axes.plot(x, values, color=shade, alpha=0.4, linewidth=0.5, zorder=2.5)
    axes.plot(x, mean, color=shade, linewidth=1.5, zorder=3)


def _curves(
    losses: Losses, summary: Mapping[str, Sequence[Row]], axis: _Axis
) -> list[tuple[Float[np.ndarray, " b"], Float[np.ndarray, "b S"]]]:
    """Smoothed curves of each condition's members."""
    curves = []
    for condition in summary["conditions"]:
        columns = [row["member"] for row in summary["members"] if row["condition"] == condition["condition"]]
        curves.append(_bin_means(losses.sequences, losses.values[:, columns], axis.log))
    return curves


def _bin_means(
    x: Int[np.ndarray, " n"], values: Float[np.ndarray, "n S"], log: bool
) -> tuple[Float[np.ndarray, " b"], Float[np.ndarray, "b S"]]:
    """Means over bins of the record, which grow with x on a logarithmic axis; nan where a seed has no number."""
    if not len(x):
        return x.astype(float), values
    edges = np.geomspace(1, len(x) + 1, CURVE_POINTS) - 1 if log else np.linspace(0, len(x), CURVE_POINTS)
    starts = np.unique(edges.astype(int))[:-1]
    known = np.isfinite(values)
    counts = np.add.reduceat(known, starts, axis=0, dtype=float)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts, axis=0)
    sizes = np.diff(np.append(starts, len(x)))
    with np.errstate(invalid="ignore"):
        return np.add.reduceat(x, starts) / sizes, sums / counts


# ---- the onsets -----------------------------------------------------------------------------------


def _draw_onsets(figure: Figure, losses: Losses, summary: Mapping[str, Sequence[Row]], axis: _Axis) -> None:
    height = figure.get_figheight()
    conditions = summary["conditions"]
    names = [_shortened(row["condition"]) for row in conditions]
    left = NAMES_FROM + CHARACTER_WIDTH * max(map(len, names)) / FIGURE_WIDTH
    axes = figure.add_axes((left, LABEL_SPACE / height, ONSETS_TO - left, 1 - (TITLE_SPACE + LABEL_SPACE) / height))
    _draw_heading(figure, NAMES_FROM, "Onset of the phase change", "sequences")
    axis.apply(axes, ticks=5)
    axes.set_ylim(len(conditions) - 0.5, -0.5)
    axes.set_yticks(range(len(conditions)), names, fontsize=8)
    axes.grid(False, axis="y")
    axes.hlines(np.arange(len(conditions) - 1) + 0.5, 0, 1, transform=axes.get_yaxis_transform(), color=FAINT, lw=0.4)
    beside = {"transform": axes.get_yaxis_transform(), "fontsize": 7.5, "color": MUTED}
    axes.text(1.045, -0.5, "formed", va="bottom", **beside)
    for index, condition in enumerate(conditions):
        axes.get_yticklabels()[index].set_color(colour(index))
        members = [row for row in summary["members"] if row["condition"] == condition["condition"]]
        _draw_members(axes, index, sorted(members, key=lambda row: row["seed"]), losses)
        _draw_mean(axes, index, condition)
        axes.text(1.045, index, f"{condition['formed']} of {condition['members']}", va="center", **beside)


def _draw_members(axes: Axes, index: int, members: Sequence[Row], losses: Losses) -> None:
    """A mark a member, in the upper two thirds of the row."""
    shade = colour(index)
    heights = index + np.linspace(-0.42, 0.16, len(members) + 2)[1:-1]
    for y, row in zip(heights.tolist(), members, strict=True):
        kind = _mark_name(row)
        shape, size, _ = MARKS[kind]
        if kind == FORMED:
            axes.hlines(y, row["onset_low"], row["onset_high"], color=shade, linewidth=0.9, alpha=0.65, zorder=2)
        style = {"color": shade, "markerfacecolor": shade if kind == FORMED else "white", "markeredgewidth": 0.9}
        # a mark may stand on the frame, but not outside of it
        x = float(np.clip(_mark_sequences(row, kind, losses), *axes.get_xlim()))
        axes.plot([x], [y], shape, markersize=size, **style, clip_on=False, zorder=3)


def _mark_name(row: Row) -> str:
    """Which mark shows a member."""
    if row["status"] in (DIVERGED, UNFINISHED):
        return row["status"]
    if row["onset"] is not None:
        return FORMED
    return NO_PLATEAU if row["outcome"] == NO_PLATEAU else NOT_FORMED


def _mark_sequences(row: Row, kind: str, losses: Losses) -> float:
    """Where a mark stands: at the onset, where half the plateau was passed if there was none, else at the last loss."""
    if kind == FORMED:
        return row["onset"]
    if kind == NO_PLATEAU and row["below_half"] is not None:
        return row["below_half"]
    known = np.flatnonzero(np.isfinite(losses.values[:, row["member"]]))
    return float(losses.sequences[known[-1]]) if len(known) else 0.0


def _draw_mean(axes: Axes, index: int, condition: Row) -> None:
    if condition["onset_low"] is None:
        return
    y, shade = index + 0.29, colour(index)
    ends = [condition["onset_low"], condition["onset_high"]]
    axes.plot(ends, [y, y], color=shade, linewidth=1.8, solid_capstyle="butt", zorder=3)
    # an interval that leaves the frame shows no end there
    axes.plot(ends, [y, y], "|", color=shade, markersize=5, markeredgewidth=1.2, zorder=3)
    axes.plot([condition["onset"]], [y], "D", color=shade, markersize=4.8, markeredgecolor="white", zorder=4)


MARKS = {
    FORMED: ("o", 3.2, "one seed, 95 %"),
    NO_PLATEAU: ("o", 3.8, "no plateau (where the loss passed half of it)"),
    NOT_FORMED: (">", 4.0, "not formed by the end"),
    DIVERGED: ("X", 4.8, "diverged"),
    UNFINISHED: ("s", 3.5, "chunk not finished"),
}


def _draw_legend(figure: Figure, summary: Mapping[str, Sequence[Row]]) -> None:
    """The marks that occur."""
    kinds = {_mark_name(row) for row in summary["members"]}
    handles = []
    for kind, (shape, size, label) in MARKS.items():
        if kind in kinds:
            face = MUTED if kind == FORMED else "white"
            style = {"marker": shape, "markersize": size, "markerfacecolor": face, "markeredgewidth": 0.9}
            handles.append(Line2D([], [], color=MUTED, linewidth=0.9 if kind == FORMED else 0, label=label, **style))
    if any(row["onset_low"] is not None for row in summary["conditions"]):
        label = "mean of the formed, 95 %"
        handles.insert(1, Line2D([], [], color=MUTED, linewidth=1.8, marker="D", markersize=4.5, label=label))
    corner = (0.99, 0.02 / figure.get_figheight())
    style = {"frameon": False, "fontsize": 7, "labelcolor": MUTED, "handletextpad": 0.5, "columnspacing": 1.4}
    figure.legend(handles=handles, loc="lower right", bbox_to_anchor=corner, ncols=max(len(handles), 1), **style)


def _draw_heading(figure: Figure, left: float, text: str, more: str) -> None:
    """The heading of one half of the figure, and beside it a lighter text that says what is counted."""
    height = 1 - 0.18 / figure.get_figheight()
    heading = figure.text(left, height, text, fontsize=9.5, fontweight="bold", va="center")
    style = {"fontsize": 8, "color": MUTED, "va": "center"}
    figure.axes[0].annotate(more, (1, 0.5), (6, 0), xycoords=heading, textcoords="offset points", **style)


def _shortened(name: str) -> str:
    """A name of at most ``LONGEST_NAME`` characters; of a grid's conditions the keys are cut, and not the values."""
    words = name.split(" ")
    keys = {index: word.partition("=")[0] for index, word in enumerate(words) if "=" in word}
    values = {index: words[index].partition("=")[2] for index in keys}
    while len(" ".join(words)) > LONGEST_NAME and max(map(len, keys.values()), default=0) > SHORTEST_KEY:
        longest = max(keys, key=lambda index: len(keys[index]))
        keys[longest] = keys[longest][:-1]
        words[longest] = f"{keys[longest]}…={values[longest]}"
    found = " ".join(words)
    return found if len(found) <= LONGEST_NAME else found[: LONGEST_NAME - 1] + "…"
