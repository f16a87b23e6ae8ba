"""What a run has measured so far: in memory, in checkpoints, and as the lines of metrics.csv.

A run's folder holds

    config.yaml     the resolved configuration
    metrics.csv     step, sequences, metric, member, layer, head, value: one row per number
    events.csv      step, member, kind, message: one row per event, such as a phase change
    snapshots/      weights at chosen steps
    checkpoints/    what a resume needs
    summary.json    onset, final strengths, wall time
    summary.png     loss with the onset marked, strength of every head

Legend: M members, n records of a metric.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import torch
from jaxtyping import Float, Int

from opsin.errors import ConfigError
from opsin.records.schema import ROW_AXES

NEVER = np.iinfo(np.int64).max
"""The step of what has not happened."""

Question = Callable[[np.ndarray], np.ndarray]
"""From the values ``[M, ...]`` of one record to yes or no for each member, ``[M]``."""


Records = Sequence[tuple[int, str, np.ndarray]]
"""Step, name of the metric, and its values ``[M, ...]`` of each record."""


class Rows(Sequence[np.ndarray]):
    """Values of one metric, one record a row, in one block that doubles whenever it is full."""

    def __init__(self) -> None:
        self._block: np.ndarray | None = None
        self._count = 0

    def append(self, row: Float[np.ndarray, "M ..."]) -> None:
        """Add one record; its values are copied."""
        if self._block is None:
            self._block = np.empty((1, *row.shape), dtype=np.float32)
        if self._count == len(self._block):
            self._block = np.concatenate([self._block, np.empty_like(self._block)])
        self._block[self._count] = row
        self._count += 1

    @property
    def block(self) -> Float[np.ndarray, "n M ..."]:
        """All records, one a row."""
        return np.zeros((0, 1)) if self._block is None else self._block[: self._count]

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        return list(self.block[index]) if isinstance(index, slice) else self.block[index]


@dataclass
class Series:
    """One metric over training.

    Args:
        steps: optimizer steps finished when each value was taken.
        values: ``[M]`` or ``[M, layers, heads]`` of each record, float32.
        order: number of each record among all records of the run, from 0.
    """

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: Rows = field(default_factory=Rows)
    order: array[int] = field(default_factory=lambda: array("q"))
    _answered: dict[Question, tuple[int, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    def add(self, step: int, values: Float[np.ndarray, "M ..."], number: int) -> None:
        """Add one record.

        Args:
            step: optimizer steps finished when the values were taken.
            values: values of the record, float32.
            number: number of the record among all records of the run.
        """
        self.steps.append(step)
        self.values.append(values)
        self.order.append(number)

    def arrays(self) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n M ..."]]:
        """Steps and stacked values."""
        return np.array(self.steps, dtype=np.int64), self.values.block.copy()

    def first(self, question: Question) -> Int[np.ndarray, " M"]:
        """Steps finished at the first record to which the answer is yes, for each member; ``NEVER`` where none is.

        Every record is looked at once, however often this is called, as long as the question is the same object.

        Args:
            question: from the values of one record to yes or no for each member.
        """
        count, found = self._answered.get(question, (0, np.array(NEVER)))
        for step, values in zip(self.steps[count:], self.values[count:], strict=True):
            found = np.minimum(found, np.where(question(values), step, NEVER))
        self._answered[question] = (len(self.steps), found)
        return found


class MetricsTable(Protocol):
    """A table that mirrors a history, as a run folder has it."""

    @property
    def metrics(self) -> Path:
        """Path of the table."""

    def start_metrics(self, records: Records, batch_size: int) -> None:
        """Begin the table anew with these records."""

    def continue_metrics(self, length: int) -> None:
        """Go on with the table after its first ``length`` bytes."""

    def append_metrics(self, records: Records, batch_size: int) -> None:
        """Append records to the table."""

    def mark(self) -> dict[str, Any]:
        """Path, length and SHA-256 of the table."""


class History:
    """Everything a run has measured so far, in memory.

    ``metrics.csv`` mirrors it where a table keeps it, and a checkpoint then holds the table's mark; else it holds the
    records themselves.

    Args:
        batch_size: sequences of a training step, which turn steps into sequences.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._series: dict[str, Series] = {}
        self._unwritten: list[tuple[int, str, np.ndarray]] = []
        self._count = 0
        self._table: MetricsTable | None = None
        self._restored: tuple[int, Path, int] | None = None

    def record(self, metric: str, step: int, values: torch.Tensor | np.ndarray) -> None:
        """Add the values of one metric.

        Args:
            metric: name of the metric, as in ``metrics.csv``.
            step: optimizer steps finished when it was measured.
            values: one number a member, ``[M]``, or one a head, ``[M, layers, heads]``; copied.

        Raises:
            ConfigError: values without a member axis, with more axes than the table has, or of another shape than the
                metric's earlier records.
        """
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu().numpy()
        # a copy: what was measured must not change with the tensor it was read from
        numbers = np.array(values, dtype=np.float32)
        self._check_shape(metric, numbers.shape)
        self._series.setdefault(metric, Series()).add(step, numbers, self._count)
        self._count += 1
        self._unwritten.append((step, metric, numbers))

    def _check_shape(self, metric: str, shape: tuple[int, ...]) -> None:
        """Refuse what no row of the table could hold, or what is not the metric that it was."""
        if not 1 <= len(shape) <= len(ROW_AXES) or 0 in shape:
            expected = f"1 to {len(ROW_AXES)} axes, none of them empty: {', '.join(ROW_AXES)}"
            raise ConfigError(f"metric {metric}", f"values of shape {shape}", expected)
        if metric in self._series and shape != (before := self._series[metric].values[-1].shape):
            expected = f"{before}, the shape of its earlier records"
            raise ConfigError(f"metric {metric}", f"values of shape {shape}", expected)

    def __contains__(self, metric: str) -> bool:
        return metric in self._series

    def __getitem__(self, metric: str) -> Series:
        """The series of that name.

        Raises:
            KeyError: nothing of that name was recorded.
        """
        return self._series[metric]

    def names(self) -> list[str]:
        """Metrics recorded so far."""
        return list(self._series)

    def sequences(self, steps: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Training sequences seen after so many steps."""
        return steps * self.batch_size

    def records(self) -> Records:
        """All records, in order of recording."""
        rows = [
            (number, (step, name, values))
            for name, series in self._series.items()
            for number, step, values in zip(series.order, series.steps, series.values, strict=True)
        ]
        return [record for _, record in sorted(rows, key=lambda row: row[0])]

    def keep_in(self, table: MetricsTable) -> None:
        """Mirror this history in a table from now on, with all that has been recorded until now.

        Args:
            table: table of the run; one that the history was rebuilt from goes on where its checkpoint was saved.
        """
        records = self.records()
        count, path, length = self._restored or (0, None, 0)
        if path is not None and table.metrics.exists() and path.samefile(table.metrics):
            table.continue_metrics(length)
            self._unwritten = list(records[count:])
        else:
            table.start_metrics(records, self.batch_size)
            self._unwritten = []
        self._table = table
        self.write_out()

    def write_out(self) -> None:
        """Append what was recorded since the last call to the table; nothing where no table keeps this history."""
        if self._table is not None and self._unwritten:
            self._table.append_metrics(self._unwritten, self.batch_size)
            self._unwritten = []

    def for_checkpoint(self) -> dict[str, Any]:
        """What a checkpoint holds: ``metrics``, the mark of the table, or ``history``, where no table has the records.

        The table has what was recorded before this returns.
        """
        if self._table is None:
            return {"history": self.state_dict()}
        self.write_out()
        return {"metrics": self._table.mark()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore the records of a checkpoint.

        Args:
            saved: ``history``, and ``metrics`` with the path of the table that they were rebuilt from, if they were.
        """
        self.load_state_dict(saved["history"])
        mark = saved.get("metrics")
        self._restored = None if mark is None else (self._count, Path(mark["path"]), mark["bytes"])

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, for a checkpoint that loads with ``weights_only=True``."""
        return _as_state(self._series)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; everything counts as unwritten, in the order of recording."""
        self._series = {}
        for name, entry in state.items():
            series = self._series[name] = Series()
            for row in zip(entry["steps"].tolist(), entry["values"].numpy(), entry["places"].tolist(), strict=True):
                series.add(*row)
        self._unwritten = list(self.records())
        self._count = len(self._unwritten)


def _as_state(series_of: Mapping[str, Series]) -> dict[str, Any]:
    state = {}
    for name, series in series_of.items():
        steps, values = (torch.from_numpy(array) for array in series.arrays())
        state[name] = {
            "steps": steps,
            "values": values,
            "places": torch.from_numpy(np.array(series.order, dtype=np.int64)),
        }
    return state


def tidy_rows(records: Records, batch_size: int) -> Iterator[str]:
    """CSV lines, one per number; axes a metric does not have stay empty.

    Args:
        records: step, name of the metric, and its values ``[M, ...]`` of each record.
        batch_size: sequences of a training step, which turn steps into sequences.
    """
    for step, metric, values in records:
        for index in np.ndindex(values.shape):
            axes = [str(i) for i in index] + [""] * (len(ROW_AXES) - len(index))
            yield ",".join([str(step), str(step * batch_size), metric, *axes, repr(float(values[index]))])


def history_from_table(path: Path, length: int, sha256: str) -> dict[str, Any] | None:
    """The state of the history that the first bytes of a table mirror; None where they are not these bytes.

    Numbers come back exactly: the table has the shortest text that names each float32 as a double.

    Args:
        path: path of the table.
        length: number of bytes that count.
        sha256: SHA-256 of these bytes, in hexadecimal digits.
    """
    try:
        with path.open("rb") as file:
            content = file.read(length)
    except OSError:
        return None
    if len(content) != length or hashlib.sha256(content).hexdigest() != sha256:
        return None
    found: dict[str, Series] = {}
    for number, (step, metric, values) in enumerate(_records_of(content.decode().split("\n")[1:-1])):
        found.setdefault(metric, Series()).add(step, values, number)
    return _as_state(found)


def _records_of(lines: Iterable[str]) -> Iterator[tuple[int, str, np.ndarray]]:
    """The records that lines of a table were written from: each begins with the row whose axes are all 0."""
    step, metric, numbers = 0, "", list[str]()
    last: tuple[int, ...] = ()
    for line in lines:
        first, _, following = line.split(",", 2)
        name, *axes, value = following.rsplit(",", len(ROW_AXES) + 1)
        index = tuple(int(axis) for axis in axes if axis)
        if not any(index) and numbers:
            yield step, metric, _as_values(numbers, last)
            numbers = []
        step, metric, last = int(first), name, index
        numbers.append(value)
    if numbers:
        yield step, metric, _as_values(numbers, last)


def _as_values(numbers: Sequence[str], last: Sequence[int]) -> Float[np.ndarray, "M ..."]:
    """The values of one record from its rows, the last of which has the largest index of every axis."""
    return np.array(numbers, dtype=np.float64).astype(np.float32).reshape([size + 1 for size in last])
