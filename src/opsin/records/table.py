"""The lines of metrics.csv: from records to lines, and from the lines of a run back to its records.

Legend: M members.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opsin.errors import ConfigError
from opsin.records.axes import axes_of_header, table_header
from opsin.records.history import Record, Records, Series, state_of_series
from opsin.records.schema import ROW_AXES


class TableRow(NamedTuple):
    """One number of a table, as it is written.

    Args:
        about: step, sequences and metric, with commas between them.
        cells: index along every axis that the table has a column for; empty where the metric has no such axis.
        value: the number, with the end of the line.
    """

    about: str
    cells: Sequence[str]
    value: str

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return self.about.split(",", 2)[2]


def axes_of_table(path: Path) -> tuple[str, ...]:
    """Names of the axes that a table has columns for.

    Raises:
        ConfigError: it is no table of numbers.
    """
    with path.open() as lines:
        header = lines.readline().rstrip("\n")
    axes = axes_of_header(header)
    if axes is None:
        expected = f"the columns {table_header((*ROW_AXES, '...'))}, further axes or none in the place of the dots"
        raise ConfigError(str(path), header, expected)
    return axes


def rows_of_table(path: Path) -> Iterator[TableRow]:
    """The rows of a table, one at a time; the half line that a killed process leaves at its end is dropped.

    Raises:
        ConfigError: it is no table of numbers.
    """
    axes = axes_of_table(path)
    with path.open() as lines:
        next(lines)
        for line in lines:
            if line.endswith("\n"):
                about, *cells, value = line.rsplit(",", len(axes) + 1)
                yield TableRow(about, cells, value)


# ---- the records of a run -----------------------------------------------------------------------------


def tidy_rows(records: Records, batch_size: int, axes: Sequence[str] = ROW_AXES) -> Iterator[str]:
    """CSV lines, one per number; axes a metric does not have stay empty.

    Args:
        records: records in the order in which they were made.
        batch_size: sequences of a training step, which turn steps into sequences.
        axes: names of the axes that the table has columns for.
    """
    column = {name: index for index, name in enumerate(axes)}
    for step, metric, values, further in records:
        columns = [column[name] for name in (axes[0], *further)]
        about = f"{step},{step * batch_size},{metric},"
        for index, value in zip(np.ndindex(values.shape), values.ravel().tolist(), strict=True):
            cells = [""] * len(axes)
            for slot, number in zip(columns, index, strict=True):
                cells[slot] = str(number)
            yield f"{about}{','.join(cells)},{float(value)!r}"


def history_from_table(path: Path, length: int, sha256: str, axes: Sequence[str] = ROW_AXES) -> dict[str, Any] | None:
    """The state of the history that a table mirrored when it was marked; None where it is not that table.

    The table may have been begun anew since, with columns for more axes. Numbers come back exactly: the table has the
    shortest text that names each float32 as a double.

    Args:
        path: path of the table.
        length: number of bytes that counted.
        sha256: SHA-256 of these bytes, in hexadecimal digits.
        axes: names of the axes that the table had columns for.
    """
    try:
        content = _marked_bytes(path, length, tuple(axes))
    except OSError:
        return None
    if len(content) != length or hashlib.sha256(content).hexdigest() != sha256:
        return None
    found: dict[str, Series] = {}
    records = _records_of(content.decode().split("\n")[1:-1], axes)
    for number, (step, metric, values, further) in enumerate(records):
        found.setdefault(metric, Series(axes=further)).add(step, values, number)
    return state_of_series(found)


def _marked_bytes(path: Path, length: int, axes: tuple[str, ...]) -> bytes:
    """The first bytes of a table, as they were when it had columns for these axes alone."""
    with path.open("rb") as file:
        header = file.readline()
        found = axes_of_header(header.decode(errors="replace"))
        if found is None or found == axes or not {*axes} <= {*found}:
            return header + file.read(max(length - len(header), 0))
        lines = [f"{table_header(axes)}\n".encode()]
        total, kept = len(lines[0]), [found.index(name) for name in axes]
        while total < length and (line := file.readline()):
            about, *cells = line.rsplit(b",", len(found) + 1)
            lines.append(b",".join((about, *(cells[column] for column in kept), cells[-1])))
            total += len(lines[-1])
    return b"".join(lines)


def _records_of(lines: Iterable[str], axes: Sequence[str]) -> Iterator[Record]:
    """The records that lines of a table were written from: each begins with the row whose axes are all 0."""
    step, metric, rows = 0, "", list[list[str]]()
    for line in lines:
        first, _, following = line.split(",", 2)
        name, *cells = following.rsplit(",", len(axes) + 1)
        if rows and all(cell in ("", "0") for cell in cells[:-1]):
            yield _as_record(step, metric, rows, axes)
            rows = []
        step, metric = int(first), name
        rows.append(cells)
    if rows:
        yield _as_record(step, metric, rows, axes)


def _as_record(step: int, metric: str, rows: Sequence[Sequence[str]], axes: Sequence[str]) -> Record:
    """One record from its rows, the last of which has the largest index of every axis."""
    last = rows[-1]
    member, *further = (column for column, cell in enumerate(last[:-1]) if cell)
    # values may have been declared in another order than that of the columns: the last axis moves first
    slowest_first = sorted(further, key=lambda column: -_first_move(rows, column))
    moves = [_first_move(rows, column) for column in further if last[column] != "0"]
    columns = further if moves == sorted(moves, reverse=True) else slowest_first
    numbers = np.array([row[-1] for row in rows], dtype=np.float64).astype(np.float32)
    values = numbers.reshape([int(last[column]) + 1 for column in (member, *columns)])
    return Record(step, metric, values, tuple(axes[column] for column in columns))


def _first_move(rows: Sequence[Sequence[str]], column: int) -> int:
    """The first row of a record whose index along an axis is not 0."""
    return next((number for number, row in enumerate(rows) if row[column] != "0"), len(rows))
