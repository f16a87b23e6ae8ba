"""The folder of a population at its end: its members, and their chunks' tables as one.

A population's folder holds

    population.json   members (member, condition, seed, chunk, slot), conditions in the recipe's order; ``compare``,
                      metrics whose last values are compared, where the recipe names some; where the conditions
                      are windows, ``grid``: condition to {"start", "length"}, null for no window; and, where the
                      recipe has a grid, ``crossed``: condition to the value of each of its keys
    chunks/00, ...    ordinary run folders, one a chunk; a member is at index ``slot`` of its chunk's members
    metrics.csv       the chunks' tables with the population's member numbers, and the columns of all of them

and what ``opsin.population.tables`` and ``opsin.figures.population`` write.

Legend: M members, n records of the loss.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float, Int

from opsin.errors import ConfigError
from opsin.objective import LossScale
from opsin.population.grid import GridValues
from opsin.records.axes import table_axes, table_header
from opsin.records.folder import write_atomically
from opsin.records.schema import (
    CHUNKS_FOLDER,
    COMPLETE,
    FINISHED_EARLY,
    METRICS_FILE,
    POPULATION_FILE,
    STATUSES,
    SUMMARY_FILE,
    TRAIN_LOSS,
    UNFINISHED,
)
from opsin.records.table import axes_of_table, rows_of_table
from opsin.records.user_files import UNREADABLE, read_settings, reason


@dataclass(frozen=True)
class TrainedMember:
    """One model of a population.

    Args:
        member: number of the member in the population, from 0.
        condition, seed: what it was trained under; no other member has both.
        chunk, slot: the chunk that trained it, and its index among the members of that chunk.
        status: one of ``STATUSES``; unfinished if its chunk has no summary.
        record: the member's part of the chunk's summary, as ``PhaseChange`` describes it; empty if unfinished.
    """

    member: int
    condition: str
    seed: int
    chunk: int
    slot: int
    status: str
    record: Mapping[str, Any]

    @property
    def counts(self) -> bool:
        """Whether it was trained as far as it should be: a diverged or unfinished member enters no mean."""
        return self.status in (COMPLETE, FINISHED_EARLY)


# records differ in number from metric to metric
Curve = tuple[Int[np.ndarray, " _"], Float[np.ndarray, "_ M"]]
"""Training sequences at which some member has a record, ascending, and the values of every member, nan without one."""


@dataclass(frozen=True)
class Losses:
    """What the members' tables hold.

    Args:
        sequences: numbers of training sequences after which some member has a record of its training loss, ascending.
        values: training loss of every member after so many; nan where a member has no record.
        last: every member's last value of each metric that is compared, by name; nan without one.
        scale: unit of the losses, and where they end.
        compared: every metric that is compared over training, by name.
    """

    sequences: Int[np.ndarray, " n"]
    values: Float[np.ndarray, "n M"]
    last: Mapping[str, Float[np.ndarray, " M"]] = field(default_factory=dict)
    scale: LossScale = LossScale.of({})  # noqa: RUF009 - frozen
    compared: Mapping[str, Curve] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedPopulation:
    """A population at its end, finished or not.

    Args:
        path: the folder of the population.
        conditions: names of the conditions, in the recipe's order.
        members: all members, in the order of their numbers.
        windows: start, length and unit of the window that a condition is, by name; None for a condition that is no
            window. Empty where the recipe has no windows.
        crossed: value of each key of the recipe's grid, by name of the condition. Empty where it has no grid.
        compare: names of the metrics whose last values are compared.
        scale: unit of the members' losses, and where they end; neither where the members' objectives differ.
    """

    path: Path
    conditions: tuple[str, ...]
    members: tuple[TrainedMember, ...]
    windows: Mapping[str, Mapping[str, int] | None]
    crossed: GridValues = field(default_factory=dict)
    compare: tuple[str, ...] = ()
    scale: LossScale = LossScale.of({})  # noqa: RUF009 - frozen

    def under(self, condition: str) -> list[TrainedMember]:
        """Members of a condition, by seed."""
        return sorted((m for m in self.members if m.condition == condition), key=lambda m: m.seed)


def is_population(path: Path) -> bool:
    """Whether a folder is that of a population and whole."""
    return (path / POPULATION_FILE).exists()


def read_document(path: Path) -> dict[str, Any]:
    """What ``population.json`` says in the folder of a population.

    Raises:
        ConfigError: it is no such document.
    """
    file = path / POPULATION_FILE
    content = _read_json(file)
    rows, conditions = content.get("members"), content.get("conditions")
    if not (isinstance(rows, list) and isinstance(conditions, list) and all(map(_is_row, rows))):
        raise ConfigError(POPULATION_FILE, str(file), "a population's conditions and members")
    return content


def _is_row(row: object) -> bool:
    """Whether it says of a member what every row of ``population.json`` says."""
    numbers = ("member", "seed", "chunk", "slot")
    return isinstance(row, dict) and "condition" in row and all(isinstance(row.get(name), int) for name in numbers)


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON document that a run has written.

    Raises:
        ConfigError: it is no such document.
    """
    try:
        return read_settings(file, json.loads)
    except UNREADABLE as error:
        raise ConfigError(file.name, str(file), f"a JSON document that a run has written ({reason(error)})") from error


def read_population(path: Path) -> TrainedPopulation:
    """Read ``population.json`` and the summaries of the chunks.

    Raises:
        ConfigError: member numbers are not 0 to M - 1, two members share condition and seed, a condition is unknown, or
            a chunk's summary has no such slot.
    """
    content = read_document(path)
    conditions = tuple(content["conditions"])
    rows = sorted(content["members"], key=lambda row: row["member"])
    if [row["member"] for row in rows] != list(range(len(rows))):
        raise ConfigError("population.members", [row["member"] for row in rows], "each number from 0 once")
    summaries = {chunk: _summary(chunk_folder(path, chunk)) for chunk in {row["chunk"] for row in rows}}
    members, known = [], set()
    for row in rows:
        condition_and_seed = row["condition"], row["seed"]
        if row["condition"] not in conditions:
            raise ConfigError("population.members", row["condition"], "one of " + ", ".join(conditions))
        if condition_and_seed in known:
            raise ConfigError("population.members", condition_and_seed, "one member of each condition and seed")
        known.add(condition_and_seed)
        status, record = _record(summaries[row["chunk"]], row["slot"], chunk_folder(path, row["chunk"]))
        settings = {name: row[name] for name in ("member", "condition", "seed", "chunk", "slot")}
        members.append(TrainedMember(**settings, status=status, record=record))
    grids = content.get("grid") or {}, content.get("crossed") or {}
    compare = tuple(content.get("compare") or ())
    scales = {LossScale.of(summary) for summary in summaries.values() if summary is not None} or {LossScale.of({})}
    scale = scales.pop() if len(scales) == 1 else LossScale("", None)
    return TrainedPopulation(path, conditions, tuple(members), *grids, compare, scale)


def chunk_folder(path: Path, chunk: int) -> Path:
    """Run folder of a chunk of the population at ``path``."""
    return path / CHUNKS_FOLDER / f"{chunk:02d}"


def rows_of_chunk(folder: Path) -> tuple[Path, list[dict[str, Any]]] | None:
    """The population whose chunk a run folder is, and the rows of its members in ``population.json``, by slot.

    Returns:
        None for a run of no population.
    """
    folder = folder.absolute()
    path = folder.parent.parent
    if not is_population(path):
        return None
    rows = [row for row in read_document(path)["members"] if chunk_folder(path, row["chunk"]) == folder]
    return (path, sorted(rows, key=lambda row: row["slot"])) if rows else None


def _summary(folder: Path) -> Mapping[str, Any] | None:
    file = folder / SUMMARY_FILE
    return _read_json(file) if file.exists() else None


def _record(summary: Mapping[str, Any] | None, slot: int, folder: Path) -> tuple[str, Mapping[str, Any]]:
    """Status of a member and its part of the chunk's summary."""
    if summary is None:
        return UNFINISHED, {}
    rows = summary.get("members") or [summary]
    if not 0 <= slot < len(rows):
        raise ConfigError("population.members", slot, f"a slot from 0 to {len(rows) - 1} of {folder}")
    status = rows[slot].get("status", COMPLETE)
    if status not in STATUSES:
        raise ConfigError(f"{folder}/{SUMMARY_FILE}", status, "one of " + ", ".join(STATUSES))
    return status, rows[slot]


# ---- the table ------------------------------------------------------------------------------------


def merge_metrics(population: TrainedPopulation) -> Losses:
    """Write ``metrics.csv``: the chunks' tables in order, with the population's member numbers and all their columns.

    Only one line is in memory at a time, and two numbers for every record of a member's loss and of what is compared.
    The half line that a killed process leaves at a table's end is dropped; a chunk without a table has nothing to add.

    Returns:
        The losses and what is compared, as the tables hold them.

    Raises:
        ConfigError: a chunk's table is none of numbers, or a row of a slot that no member has.
    """
    kept = _KeptNumbers(
        {name: [(array("q"), array("d")) for _ in population.members] for name in (TRAIN_LOSS, *population.compare)},
        {member.member for member in population.members if member.status == FINISHED_EARLY},
        population.scale,
    )

    chunks = sorted({member.chunk for member in population.members})
    sources = {chunk: chunk_folder(population.path, chunk) / METRICS_FILE for chunk in chunks}
    sources = {chunk: source for chunk, source in sources.items() if source.exists()}
    axes = table_axes(name for source in sources.values() for name in axes_of_table(source))

    def merge(table: BinaryIO) -> None:
        table.write(f"{table_header(axes)}\n".encode())
        for chunk, source in sources.items():
            members = {str(m.slot): m.member for m in population.members if m.chunk == chunk}
            _merge_chunk(source, members, axes, table, kept)

    write_atomically(population.path / METRICS_FILE, merge)
    return kept.losses(population.compare)


@dataclass(frozen=True)
class _KeptNumbers:
    """What is kept of the tables while they are merged.

    Args:
        curves: sequences and values of every member, by its number, of the training loss and of each metric that is
            compared, by name.
        early: members that finished early, of whose steps after that there are records without a number.
        scale: unit of the losses, and where they end.
    """

    curves: Mapping[str, Sequence[tuple[array[int], array[float]]]]
    early: Collection[int]
    scale: LossScale

    def keep(self, metric: str, member: int, sequences: str, value: str) -> None:
        """Keep what is needed of one record of one member."""
        if metric in self.curves:
            x, y = self.curves[metric][member]
            x.append(int(sequences))
            y.append(float(value))

    def losses(self, compare: Sequence[str]) -> Losses:
        """The numbers of all members, those of a metric on one axis of sequences.

        Args:
            compare: names of the metrics that are compared.
        """
        last = {
            metric: np.array([self._last(member, y) for member, (_, y) in enumerate(self.curves[metric])])
            for metric in compare
        }
        compared = {metric: _on_one_axis(self.curves[metric]) for metric in compare}
        return Losses(*_on_one_axis(self.curves[TRAIN_LOSS]), last, self.scale, compared)

    def _last(self, member: int, values: Sequence[float]) -> float:
        """The newest value of a member; of one that finished early the newest number."""
        known = (value for value in reversed(values) if not (member in self.early and math.isnan(value)))
        return next(known, math.nan)


def _on_one_axis(members: Sequence[tuple[Sequence[int], Sequence[float]]]) -> Curve:
    """Values of all members at the sequences at which some member has one; nan for what is no finite number."""
    known = [(np.array(x, dtype=np.int64), np.array(y, dtype=np.float64)) for x, y in members]
    sequences = np.unique(np.concatenate([x for x, _ in known])) if known else np.zeros(0, np.int64)
    values = np.full((len(sequences), len(known)), math.nan)
    for member, (x, y) in enumerate(known):
        values[np.searchsorted(sequences, x), member] = np.where(np.isfinite(y), y, math.nan)
    return sequences, values


def _merge_chunk(
    source: Path, members: Mapping[str, int], axes: Sequence[str], merged: BinaryIO, kept: _KeptNumbers
) -> None:
    """Append a chunk's table, with the members' numbers by their slots, and empty cells for axes that it lacks."""
    column = {name: index for index, name in enumerate(axes_of_table(source))}
    order = [column.get(name) for name in axes[1:]]
    for row in rows_of_table(source):
        about, (slot, *_), value = row
        if slot not in members:
            raise ConfigError(str(source), slot, "a member that population.json puts into this chunk")
        cells = ["" if index is None else row.cells[index] for index in order]
        merged.write(",".join((about, str(members[slot]), *cells, value)).encode())
        kept.keep(row.metric, members[slot], about.split(",", 2)[1], value)
