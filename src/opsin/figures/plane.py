"""A clustering head in its plane: vectors, attention, values and pooled sequences, a column a step.

Legend: L positions, T tokens, B sequences, G points of a grid's side, V outputs, C numbers of one entry; M members
where a state has several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from opsin.figures.style import INK, LAYERS, MUTED, Margins, add_panel, blank_figure, figure_style, lighter

PANEL, BETWEEN = 1.55, 0.16
"""Inches: the side of a panel, and the gap between two."""

PROBABILITY_LEVELS = (0.75, 0.95)
"""Probabilities of the likeliest answer along which level lines are drawn."""

ROWS = ("vectors, normalised", "attention", "values", "sequences and classifier")
NOTE = "filled: positions that decide   ·   dotted: even attention\ncolours: token; below, right and likeliest answer"
PLANE_COLOURS = (LAYERS[1], LAYERS[0], LAYERS[2], LAYERS[3], LAYERS[4])


@dataclass(frozen=True)
class PlaneState:
    """What the plane shows of one step.

    Args:
        step: number of optimizer steps finished.
        seen: normalised vector of every token at every position.
        values: value vector of every token at every position.
        attention: mean attention to every token at every position; nan, as above, where it never stands.
        points: point that each sequence is pooled into.
        classes: right answer of each sequence.
        centre: middle of the square in which the points are shown.
        reach: half the side of this square, one number a member.
        probabilities: what the classifier says at a square grid of points of that side, rows from below.
    """

    step: int
    seen: Float[Tensor, "*M L T 2"]
    values: Float[Tensor, "*M L T 2"]
    attention: Float[Tensor, "*M L T"]
    points: Float[Tensor, "*M B 2"]
    classes: Int[Tensor, "*M B"]
    centre: Float[Tensor, "*M 2"]
    reach: Float[Tensor, "*M"]
    probabilities: Float[Tensor, "*M G G V"]

    def of_member(self, member: int) -> PlaneState:
        """The state of one member, whose member axis has length 1."""
        tensors = {name: x[member : member + 1] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


def plane_figure(states: Sequence[PlaneState], relevant: Bool[Tensor, " L"]) -> Figure:
    """``plane.png``: four panels a step, one below the other.

    Normalised vectors, values and attention have the colour of the token and are filled at positions that decide, else
    hollow. Sequences have the colour of their right answer, regions of the plane that of the likeliest answer there,
    and level lines are probabilities of it.

    Args:
        states: the steps from left to right, with one member each.
        relevant: positions that decide the answer.
    """
    columns = len(states)
    margins = Margins(left=0.62, right=0.1, top=0.5, bottom=0.5)
    across = columns * (PANEL + BETWEEN) - BETWEEN
    width, height = margins.around(max(across, 2.6 * PANEL), len(ROWS) * (PANEL + BETWEEN) - BETWEEN)
    with figure_style({"axes.grid": False, "axes.titlesize": 8, "axes.titlepad": 4}):
        figure = blank_figure(width, height, dpi=140)
        for column, state in enumerate(states):
            left = margins.left + column * (PANEL + BETWEEN)
            bottoms = [height - margins.top - PANEL - row * (PANEL + BETWEEN) for row in range(len(ROWS))]
            panels = [add_panel(figure, left, bottom, PANEL, PANEL) for bottom in bottoms]
            _draw_state(panels, state, relevant)
            if column == 0:
                for axes, name in zip(panels, ROWS, strict=True):
                    axes.set_ylabel(name, fontsize=8)
            panels[0].set_title(f"step {state.step:,}")
        figure.text(margins.left / width, 0.22 / height, NOTE, fontsize=7, color=MUTED, va="center")
    return figure


def _draw_state(panels: Sequence[Axes], state: PlaneState, relevant: Bool[Tensor, " L"]) -> None:
    vectors, attention, values, sequences = panels
    decisive = relevant.numpy()
    _scatter(vectors, state.seen[0].numpy(), decisive, 1.6)
    _scatter(values, state.values[0].numpy(), decisive, max(1.1 * _largest(state.values[0]), 1e-6))
    _draw_attention(attention, state.attention[0].numpy(), decisive)
    _draw_sequences(sequences, state)
    for axes in (vectors, values, sequences):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(True)


def _scatter(axes: Axes, x: Float[np.ndarray, "L T 2"], decisive: Bool[np.ndarray, " L"], reach: float) -> None:
    for token in range(x.shape[1]):
        shade = token_colour(token)
        for chosen, face in ((decisive, shade), (~decisive, "none")):
            at = x[chosen, token]
            axes.scatter(at[:, 0], at[:, 1], s=16, facecolors=face, edgecolors=shade, linewidths=0.8, alpha=0.85)
    axes.axhline(0, color="#e9edf0", linewidth=0.6, zorder=0)
    axes.axvline(0, color="#e9edf0", linewidth=0.6, zorder=0)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")


def _draw_attention(axes: Axes, attention: Float[np.ndarray, "L T"], decisive: Bool[np.ndarray, " L"]) -> None:
    positions, tokens = attention.shape
    wide = 0.8 / tokens
    for token in range(tokens):
        shade = token_colour(token)
        faces = [shade if chosen else lighter(shade, 0.75) for chosen in decisive]
        at = np.arange(positions) + (token - (tokens - 1) / 2) * wide
        axes.bar(at, np.nan_to_num(attention[:, token]), wide, color=faces)
    axes.set_ylim(0, max(1.1 * float(np.nan_to_num(attention).max()), 1e-3))
    axes.set_xlim(-0.6, positions - 0.4)
    axes.axhline(1 / positions, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_sequences(axes: Axes, state: PlaneState) -> None:
    probabilities, (x, y), reach = state.probabilities[0], state.centre[0].tolist(), float(state.reach[0])
    likeliest, answers = probabilities.max(-1).values.numpy(), probabilities.argmax(-1)
    shades = torch.tensor([lighter(token_colour(answer), 0.82) for answer in range(probabilities.shape[-1])])
    edges = (x - reach, x + reach, y - reach, y + reach)
    axes.imshow(shades[answers].numpy(), extent=edges, origin="lower", interpolation="nearest", aspect="auto")
    side = np.linspace(-reach, reach, len(likeliest))
    levels = [level for level in PROBABILITY_LEVELS if likeliest.min() < level < likeliest.max()]
    if levels:
        axes.contour(x + side, y + side, likeliest, levels, colors=[INK], linewidths=0.4, alpha=0.6)
    for answer in state.classes[0].unique().tolist():
        chosen = state.points[0][state.classes[0] == answer].numpy()
        axes.scatter(chosen[:, 0], chosen[:, 1], s=4, color=token_colour(answer), linewidths=0)
    axes.set(xlim=edges[:2], ylim=edges[2:])


def _largest(x: Float[Tensor, "..."]) -> float:
    """The largest size of a finite number."""
    return float(x.nan_to_num(0.0, 0.0, 0.0).abs().max())


def token_colour(token: int) -> str:
    """Colour of a token, and of the answer of that number."""
    return PLANE_COLOURS[token % len(PLANE_COLOURS)]
