"""Folders of populations, written by hand: what ``opsin.population.tables`` reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from opsin.records.folder import RunFolder
from opsin.records.history import History
from opsin.records.table import tidy_rows

PLATEAU, BATCH = 0.7, 10
NONE = {"onset": None, "midpoint": None, "end": None}


def estimate(value: float, width: float = 500.0) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width}


def record(onset: float | None, final: float = 0.01, strength: float = 0.9, **changes: Any) -> dict[str, Any]:
    """A member's summary: heads 0:0 and 1:2, the latter the strongest."""
    times = (
        NONE if onset is None else {name: estimate(onset * by) for name, by in zip(NONE, (1, 1.2, 1.5), strict=True)}
    )
    heads = {"0:0": {"strength": 0.02, **NONE}, "1:2": {"strength": strength, **NONE}}
    return {
        **times,
        "plateau": PLATEAU,
        "final_loss": final,
        "heads": heads,
        "strongest_heads": ["1:2"] if strength > 0.3 else [],
        "evaluations": {},
        **changes,
    }


def fall(onset: float | None, final: float = 0.01) -> Callable[[np.ndarray], np.ndarray]:
    """A loss over sequences: the plateau, then a fall of logistic shape in log sequences; no fall without an onset."""

    def loss(x: np.ndarray) -> np.ndarray:
        if onset is None:
            return np.full(len(x), final)
        return final + (PLATEAU - final) / (1 + (x / (1.2 * onset)) ** 12)

    return loss


def onset_of(record: Mapping[str, Any] | None) -> float | None:
    onset = (record or {}).get("onset")
    return onset and onset["value"]


def write_population(
    path: Path,
    members: Sequence[tuple[str, int]],
    records: Sequence[Mapping[str, Any] | None],
    losses: Sequence[Callable[[np.ndarray], np.ndarray]] | None = None,
    *,
    conditions: Sequence[str] | None = None,
    per_chunk: int = 3,
    steps: int = 2000,
    every: int = 20,
    grid: Mapping[str, Any] | None = None,
    crossed: Mapping[str, Mapping[str, Any]] | None = None,
    compare: Mapping[str, Sequence[Sequence[float]]] | None = None,
    objectives: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """A finished population: members as (condition, seed), cut into chunks in this order.

    A chunk that holds a member whose record is None has no summary. ``compare``: of each metric the values at the first
    steps, a row a step and a column a member. ``objectives``: what the summaries of the chunks say of theirs.
    """
    chunks = [range(start, min(start + per_chunk, len(members))) for start in range(0, len(members), per_chunk)]
    rows = [
        {"member": member, "condition": members[member][0], "seed": members[member][1], "chunk": chunk, "slot": slot}
        for chunk, held in enumerate(chunks)
        for slot, member in enumerate(held)
    ]
    names = list(dict.fromkeys(condition for condition, _ in members)) if conditions is None else list(conditions)
    content = {"members": rows, "conditions": names} | ({"grid": dict(grid)} if grid else {})
    content |= {"crossed": dict(crossed)} if crossed else {}
    content |= {"compare": list(compare)} if compare else {}
    RunFolder(path).write_json("population.json", content)
    x = np.arange(every, steps + 1, every)
    for number, held in enumerate(chunks):
        folder = RunFolder(path / "chunks" / f"{number:02d}")
        history = History(BATCH)
        history.declare("induction_strength", {"layer": 2, "head": 2})
        shapes = losses or [fall(onset_of(row)) for row in records]
        values = np.stack([shapes[member](x * BATCH) for member in held], 1)
        for step, value in zip(x.tolist(), values, strict=True):
            history.record("train/loss", step, value)
            if step % 500 == 0:
                history.record("induction_strength", step, np.full((len(held), 2, 2), 0.5))
        for metric, values in (compare or {}).items():
            for step, value in enumerate(values):
                history.record(metric, step, np.array([value[member] for member in held]))
        folder.start_metrics()
        with folder.metrics.open("a") as file:
            file.writelines(line + "\n" for line in tidy_rows(history.records(), BATCH))
        summaries = [records[member] for member in held]
        if None not in summaries:
            whole = {"members": summaries} if len(summaries) > 1 else dict(summaries[0])
            whole |= {"objective": objectives[number % len(objectives)]} if objectives else {}
            # as Python writes it, nan included
            (folder.path / "summary.json").write_text(json.dumps(whole))
    return path


def nan_after(loss: Callable[[np.ndarray], np.ndarray], stop: float) -> Callable[[np.ndarray], np.ndarray]:
    """The same loss, not a number from so many sequences on."""
    return lambda x: np.where(x < stop, loss(x), math.nan)


def seeds(*onsets: float | None, **changes: Any) -> list[dict[str, Any]]:
    """Summaries of one condition's members, by their onsets; None for a member that did not form."""
    return [record(onset, 0.01 if onset else 0.69, 0.9 if onset else 0.05, **changes) for onset in onsets]


def axes_texts(figure: Figure) -> list[str]:
    """Everything that is written on the axes of a figure."""
    return [text.get_text() for axes in figure.axes for text in (*axes.texts, axes.title, *axes.get_yticklabels())]
