"""A run as a figure: its losses with the onset marked, and the strength of every head.

Legend: M members, n records of a metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from opsin.figures.style import (
    ACCENT,
    FAINT,
    INK,
    LAYERS,
    MUTED,
    blank_figure,
    figure_style,
    lighter,
    short_count,
    spread,
)
from opsin.objective import LossScale
from opsin.records.history import History
from opsin.records.schema import BASE_LINE, TRAIN_LOSS
from opsin.task import TimeAxis

HELD_OUT_COLOURS = ("#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MEASURE_COLOURS = ("#0072b2", "#7b4b94", "#8a5a2b", "#6b7a00")  # dashed, and darker than what is held out
MOST_LABELLED = 6  # heads with a label of their own
MARKED_EVALUATIONS = 20  # evaluations up to which each is marked
MEASURE_HEADROOM = 1.5  # times the other losses that a measure may reach: a crippled model's would flatten them all
LONGEST_MEASURE_NAME = 18  # characters of a progress measure's name
LABEL_GAP = 0.046  # smallest distance of two labels at line ends, as a share of the height


@dataclass(frozen=True)
class _LineEnd:
    """What stands at the right end of a line."""

    y: float
    text: str
    colour: str


def summary_figure(history: History, summary: Mapping[str, Any]) -> Figure:
    """``summary.png``, 1600 x 700 pixels: the loss with its onset marked, and the strength of every head.

    Panels without data are left out. For several members thin lines are members and the bold one their mean.

    Args:
        history: records of the run, of which ``train/loss``, ``val/SET/loss``, ``progress/NAME/loss`` of all sets but
            the base line, and ``induction_strength`` are drawn.
        summary: content of ``summary.json``, of which ``onset``, ``plateau``, ``strongest_heads`` and ``members`` are
            read, the loss's unit of ``objective``, and the x-axis of ``axis``; a missing one is not drawn.
    """
    with figure_style():
        figure = blank_figure(10, 4.375, dpi=160)
        heads = "induction_strength" in history
        _draw_run_losses(figure.add_axes((0.04, 0.115, 0.375 if heads else 0.84, 0.78)), history, summary)
        if heads:
            _draw_heads(figure.add_axes((0.556, 0.115, 0.366, 0.78)), history, summary)
    return figure


# ---- the loss -------------------------------------------------------------------------------------


def _draw_run_losses(axes: Axes, history: History, summary: Mapping[str, Any]) -> None:
    ends, scale = _held_out_losses(axes, history), LossScale.of(summary)
    title = f"{scale.titled('Loss')}, training and held out" if ends else scale.titled("Training loss")
    top = bottom = 0.0
    if TRAIN_LOSS in history:
        x, loss = _series(history, TRAIN_LOSS)
        smooth = np.stack([_smooth(member) for member in loss.T], 1)
        _thin_and_bold(axes, x, loss if loss.shape[1] == 1 else smooth, smooth.mean(1), INK)
        ends.insert(0, _LineEnd(float(smooth[-1].mean()), "training", INK))
        top, bottom = float(smooth.max()), float(smooth.min())
    plateau = _member_summaries(summary)[0].get("plateau")
    if plateau is not None:
        axes.axhline(plateau, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
        ends.append(_LineEnd(plateau, f"plateau {plateau:.3f}", MUTED))
    measured = _measured_losses(axes, history, MEASURE_HEADROOM * max([top, *(end.y for end in ends)]) or math.inf)
    ends += measured
    axes.set_title(f"{scale.titled('Loss')}; dashed: progress measures" if measured else title)
    heights = [end.y for end in ends]
    lowest = min(0.0, 1.06 * min([bottom, *heights]))
    _set_axes(axes, history, TimeAxis.of(summary), 1.06 * max([top, 1e-3, *heights]) if ends else 1.0, lowest)
    _label_ends(axes, ends)
    _mark_onsets(axes, summary, labelled=True)


def _held_out_losses(axes: Axes, history: History) -> list[_LineEnd]:
    names = [name for name in history.names() if name.startswith("val/") and name.endswith("/loss")]
    ends = []
    for index, name in enumerate(names):
        x, loss = _series(history, name)
        colour = HELD_OUT_COLOURS[index % len(HELD_OUT_COLOURS)]
        # few evaluations say nothing about the way between them
        marker = "o" if len(x) <= MARKED_EVALUATIONS else ""
        axes.plot(x, loss.mean(1), color=colour, linewidth=0.9, marker=marker, markersize=2.5, zorder=3)
        kind = name.split("/")[1].replace("_", " ")
        ends.append(_LineEnd(float(loss[-1].mean()), "train, new draws" if kind == "train" else kind, colour))
    return ends


def _measured_losses(axes: Axes, history: History, highest: float) -> list[_LineEnd]:
    """Losses under interventions that training does not have, the mean of all members; ends at most that high."""
    names = [name for name in history.names() if name.startswith("progress/") and name.endswith("/loss")]
    ends = []
    for index, name in enumerate(name for name in names if name != f"progress/{BASE_LINE}/loss"):
        x, loss = _series(history, name)
        mean, colour = loss.mean(1), MEASURE_COLOURS[index % len(MEASURE_COLOURS)]
        axes.plot(x, mean, color=colour, linewidth=1.1, linestyle=(0, (4, 1.2)), zorder=3.5)
        text = name.split("/")[1].replace("_", " ")
        text = text if len(text) <= LONGEST_MEASURE_NAME else text[: LONGEST_MEASURE_NAME - 1] + "…"
        ends.append(_LineEnd(min(float(mean[-1]), highest), text, colour))
    return ends


def _mark_onsets(axes: Axes, summary: Mapping[str, Any], labelled: bool) -> None:
    """One member: a line with its interval as a band. Several: one tick a member along the upper edge."""
    records = _member_summaries(summary)
    onsets = [record["onset"] for record in records if record.get("onset")]
    if not onsets:
        return
    if len(records) > 1:
        values = [onset["value"] for onset in onsets]
        axes.vlines(values, 0.955, 1, transform=axes.get_xaxis_transform(), color=ACCENT, linewidth=1.1)
        text = f"onset in {len(onsets)} of {len(records)} members"
    else:
        values = [onsets[0]["value"]]
        axes.axvspan(onsets[0]["low"], onsets[0]["high"], color=ACCENT, alpha=0.16, linewidth=0, zorder=1)
        axes.axvline(values[0], color=ACCENT, linewidth=1.1, zorder=2.5)
        axis = TimeAxis.of(summary)
        at, low, high = (onsets[0][key] / axis.sequences for key in ("value", "low", "high"))
        text = f"onset at {at:,.0f} {axis.unit}\n95 %, this run: {low:,.0f} to {high:,.0f}"
    if labelled:
        _write_beside(axes, min(values), max(values), text)


def _write_beside(axes: Axes, first: float, last: float, text: str) -> None:
    """Text at the upper edge, on the side of the marks that has more room."""
    low, high = axes.get_xlim()
    on_right = high - last > first - low
    offset = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "linespacing": 1.45}
    clear = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5}
    axes.annotate(
        text,
        (last if on_right else first, 0.985),
        xytext=(7 if on_right else -7, 0),
        ha="left" if on_right else "right",
        va="top",
        color=ACCENT,
        fontsize=7.5,
        bbox=clear,
        zorder=5,
        **offset,
    )


# ---- the heads ------------------------------------------------------------------------------------


def _draw_heads(axes: Axes, history: History, summary: Mapping[str, Any]) -> None:
    x, strength = _series(history, "induction_strength")
    members = strength.shape[1]
    if members == 1:
        axes.set_title("Induction strength of every head (layer:head)")
        ends = _every_head(axes, x, strength[:, 0], summary)
    else:
        axes.set_title("Induction strength of each member's strongest head")
        ends = _strongest_heads(axes, x, strength)
    bottom = min(-0.05, 1.1 * float(strength.min()))
    _set_axes(axes, history, TimeAxis.of(summary), max(1.0, float(strength.max())), bottom)
    _label_ends(axes, ends)
    _mark_onsets(axes, summary, labelled=False)


def _every_head(
    axes: Axes, x: Int[np.ndarray, " n"], strength: Float[np.ndarray, "n layers heads"], summary: Mapping[str, Any]
) -> list[_LineEnd]:
    final = {(layer, head): float(strength[-1, layer, head]) for layer, head in np.ndindex(strength.shape[1:])}
    formed = [tuple(int(part) for part in name.split(":")) for name in summary.get("strongest_heads", ())]
    named = formed[:MOST_LABELLED] or [max(final, key=final.__getitem__)]
    unnamed = [head for head in final if head not in named]
    for layer, head in unnamed:
        axes.plot(x, strength[:, layer, head], color=FAINT, linewidth=0.7, zorder=2)
    ends = []
    for rank, (layer, head) in enumerate(named):
        colour = lighter(LAYERS[layer % len(LAYERS)], 0.4 * rank / MOST_LABELLED)
        axes.plot(x, strength[:, layer, head], color=colour, linewidth=1.6 - 0.12 * rank, zorder=4 - rank / 10)
        ends.append(_LineEnd(final[layer, head], f"{layer}:{head}  {final[layer, head]:.2f}", colour))
    if unnamed:
        text = "1 other" if len(unnamed) == 1 else f"{len(unnamed)} others"
        ends.append(_LineEnd(float(np.median([final[head] for head in unnamed])), text, MUTED))
    return ends


def _strongest_heads(
    axes: Axes, x: Int[np.ndarray, " n"], strength: Float[np.ndarray, "n M layers heads"]
) -> list[_LineEnd]:
    flat = strength.reshape(*strength.shape[:2], -1)
    strongest = np.take_along_axis(flat, flat[-1].argmax(1)[None, :, None], 2)[:, :, 0]
    mean = strongest.mean(1)
    _thin_and_bold(axes, x, strongest, mean, LAYERS[1])
    return [_LineEnd(float(mean[-1]), f"mean  {mean[-1]:.2f}", LAYERS[1])]


# ---- both panels ------------------------------------------------------------------------------------


def _member_summaries(summary: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """One summary a member."""
    return summary.get("members") or [summary]


def _series(history: History, metric: str) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n M ..."]]:
    """A metric over sequences, without members that ended before the run; with every member where all ended so."""
    steps, values = history[metric].arrays()
    whole = np.isfinite(values).all(axis=(0, *range(2, values.ndim)))
    return history.sequences(steps), values[:, whole] if whole.any() else np.nan_to_num(values)


def _smooth(y: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Centred mean over 1 % of the record: calms the line, hardly moves a drop."""
    window = np.ones(len(y) // 200 * 2 + 1)
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same") if len(y) else y


def _thin_and_bold(
    axes: Axes, x: Int[np.ndarray, " n"], thin: Float[np.ndarray, "n M"], bold: Float[np.ndarray, " n"], colour: str
) -> None:
    axes.plot(x, thin, color=lighter(colour, 0.65), linewidth=0.6, zorder=2)
    axes.plot(x, bold, color=colour, linewidth=1.5, zorder=4)


def _set_axes(axes: Axes, history: History, time: TimeAxis, top: float, bottom: float) -> None:
    last = max((history[name].steps[-1] for name in history.names()), default=1)
    end = max(last, 1) * history.batch_size
    axes.set_xlim(0, end)
    axes.set_ylim(bottom, top)
    axes.set_xlabel(f"training {time.unit}")
    # lines are drawn over sequences, and marked in round numbers of the unit
    ticks = np.asarray(MaxNLocator(6).tick_values(0, end / time.sequences)) * time.sequences
    axes.xaxis.set_major_locator(FixedLocator(ticks[ticks <= end]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x / time.sequences)))
    axes.yaxis.set_major_locator(MaxNLocator(6))


def _label_ends(axes: Axes, ends: Sequence[_LineEnd]) -> None:
    """Labels right of the frame, moved apart, each tied to its line's end."""
    low, high = axes.get_ylim()
    ends = sorted(ends, key=lambda end: end.y)
    heights = spread([(end.y - low) / (high - low) for end in ends], LABEL_GAP)
    for end, height in zip(ends, heights, strict=True):
        tie = {"arrowstyle": "-", "color": end.colour, "linewidth": 0.6, "shrinkA": 1.5, "shrinkB": 1.5}
        axes.annotate(
            end.text,
            (1, end.y),
            xytext=(1.035, height),
            xycoords=axes.get_yaxis_transform(),
            textcoords="axes fraction",
            va="center",
            fontsize=7.5,
            color=end.colour,
            arrowprops={**tie, "relpos": (0, 0.5)},
            annotation_clip=False,
        )
