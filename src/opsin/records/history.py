"""What a run has measured so far: in memory, in checkpoints, and in the table that mirrors it.

A run's folder holds

    config.yaml     the resolved configuration
    metrics.csv     step, sequences, metric, member, layer, head, further axes, value: one row per number
    events.csv      step, member, kind, message: one row per event, such as a phase change
    snapshots/      weights at chosen steps
    checkpoints/    what a resume needs
    summary.json    onset, final strengths, wall time
    summary.png     loss with the onset marked, strength of every head

Legend: M members, n records of a metric.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from opsin.errors import ConfigError
from opsin.records.axes import Axes, axes_of_header, check_axes, sizes_in_words, table_axes
from opsin.records.schema import ROW_AXES

NEVER = np.iinfo(np.int64).max
"""The step of what has not happened."""

Question = Callable[[np.ndarray], np.ndarray]
"""From the values ``[M, ...]`` of one record to yes or no for each member, ``[M]``."""


class Record(NamedTuple):
    """The values of one metric at one step.

    Args:
        step: optimizer steps finished when the values were taken.
        metric: name of the metric.
        values: values ``[M, ...]``, float32.
        axes: names of the axes of ``values`` after that of the members.
    """

    step: int
    metric: str
    values: np.ndarray
    axes: tuple[str, ...] = ()


def is_at_least(level: float, values: Float[np.ndarray, " M"]) -> Bool[np.ndarray, " M"]:
    """Whether values have reached a level from below; a question once the level is bound to it."""
    return values >= level


def is_below(level: float, values: Float[np.ndarray, " M"]) -> Bool[np.ndarray, " M"]:
    """Whether values have fallen below a level; a question once the level is bound to it."""
    return values < level


Records = Sequence[Record]


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
        values: ``[M, ...]`` of each record, float32.
        order: number of each record among all records of the run, from 0.
        axes: names of the axes of one record after that of the members.
    """

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: Rows = field(default_factory=Rows)
    order: array[int] = field(default_factory=lambda: array("q"))
    axes: tuple[str, ...] = ()
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

    def first_or_nan(self, question: Question) -> Float[np.ndarray, " M"]:
        """The same as numbers, nan where no record has that answer.

        Args:
            question: from the values of one record to yes or no for each member.
        """
        steps = self.first(question)
        return np.where(steps == NEVER, np.nan, steps)


class MetricsTable(Protocol):
    """A table that mirrors a history, as a run folder has it."""

    @property
    def metrics(self) -> Path:
        """Path of the table."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes that the table has columns for."""

    def start_metrics(self, records: Records, batch_size: int, axes: Sequence[str]) -> None:
        """Begin the table anew with these records, and with columns for these axes."""

    def continue_metrics(self, length: int) -> None:
        """Go on with the table after its first ``length`` bytes."""

    def append_metrics(self, records: Records, batch_size: int) -> None:
        """Append records to the table."""

    def mark(self) -> dict[str, Any]:
        """Path, axes, length and SHA-256 of the table."""


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
        self._axes: dict[str, dict[str, int]] = {}
        self._unwritten: list[Record] = []
        self._count = 0
        self._table: MetricsTable | None = None
        self._restored: tuple[int, Mapping[str, Any]] | None = None

    def declare(self, metric: str, axes: Axes) -> None:
        """Say which axes the values of a metric have beside that of the members, before they are recorded.

        Args:
            metric: name of the metric, as in ``metrics.csv``.
            axes: name to size of every axis of one member's values, in order; empty for one number a member.

        Raises:
            ConfigError: a malformed name or size, or other axes than the metric was declared or recorded with.
        """
        found = check_axes(metric, axes)
        before = self._axes.setdefault(metric, found)
        if [*before.items()] != [*found.items()]:
            raise ConfigError(
                f"axes of metric {metric}", sizes_in_words(found), f"{sizes_in_words(before)}, as it had until now"
            )

    def axes(self, metric: str) -> Axes:
        """Axes of a metric beside that of the members, name to size.

        Raises:
            KeyError: nothing of that name was declared or recorded.
        """
        return self._axes[metric]

    def record(self, metric: str, step: int, values: torch.Tensor | np.ndarray) -> None:
        """Add the values of one metric.

        Args:
            metric: name of the metric, as in ``metrics.csv``.
            step: optimizer steps finished when it was measured.
            values: one number a member, ``[M]``, or as many as the axes that were declared say; copied.

        Raises:
            ConfigError: values without a member axis, with axes that nobody declared or of other sizes, or of another
                shape than the metric's earlier records.
        """
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu().numpy()
        # a copy: what was measured must not change with the tensor it was read from
        numbers = np.array(values, dtype=np.float32)
        self._check_shape(metric, numbers.shape)
        axes = tuple(self._axes.setdefault(metric, {}))
        self._series.setdefault(metric, Series(axes=axes)).add(step, numbers, self._count)
        self._count += 1
        self._unwritten.append(Record(step, metric, numbers, axes))

    def _check_shape(self, metric: str, shape: tuple[int, ...]) -> None:
        """Refuse what no row of the table could hold, or what is not the metric that it was."""
        if metric in self._series and shape != (before := self._series[metric].values[-1].shape):
            expected = f"{before}, the shape of its earlier records"
        elif metric not in self._axes and len(shape) > 1:
            expected = "one number a member, (M,): nobody declared further axes of it, as Reader.records does"
        elif not shape or 0 in shape or shape[1:] != tuple(self._axes.get(metric, {}).values()):
            words = sizes_in_words(self._axes.get(metric, {}))
            expected = f"an axis of the members, and those declared: {words}"
        else:
            return
        raise ConfigError(f"metric {metric}", f"values of shape {shape}", expected)

    def __contains__(self, metric: str) -> bool:
        return metric in self._series

    def __getitem__(self, metric: str) -> Series:
        """The series of that name.

        Raises:
            KeyError: nothing of that name was recorded.
        """
        return self._series[metric]

    def ends_at(self, metric: str, step: int) -> bool:
        """Whether the newest record of a metric is of this step.

        Args:
            metric: name of the metric, of which there may be no record.
            step: optimizer steps finished when it was measured.
        """
        return metric in self._series and self._series[metric].steps[-1] == step

    def names(self) -> list[str]:
        """Metrics recorded so far."""
        return list(self._series)

    def sequences(self, steps: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Training sequences seen after so many steps."""
        return steps * self.batch_size

    def records(self) -> Records:
        """All records, in order of recording."""
        rows = [
            (number, Record(step, name, values, series.axes))
            for name, series in self._series.items()
            for number, step, values in zip(series.order, series.steps, series.values, strict=True)
        ]
        return [record for _, record in sorted(rows, key=lambda row: row[0])]

    def keep_in(self, table: MetricsTable) -> None:
        """Mirror this history in a table from now on, with all that has been recorded until now.

        Args:
            table: table of the run; one that the history was rebuilt from goes on where its checkpoint was saved, and
                begins anew where it lacks a column.
        """
        self._table = table
        if self._restored is not None and self._goes_on(table, self._restored[1]):
            count, mark = self._restored
            table.continue_metrics(mark["bytes"])
            self._unwritten = list(self.records()[count:])
            self.write_out()
        else:
            self._start_table(table)

    def _goes_on(self, table: MetricsTable, mark: Mapping[str, Any]) -> bool:
        """Whether a table is the one that a mark counts on, with a column for every axis."""
        path = Path(mark["path"])
        if not (table.metrics.exists() and path.exists() and path.samefile(table.metrics)):
            return False
        with path.open() as file:
            axes = axes_of_header(file.readline())
        return axes == axes_of_mark(mark) and {*self._table_axes()} <= {*axes}

    def _start_table(self, table: MetricsTable) -> None:
        table.start_metrics(self.records(), self.batch_size, self._table_axes())
        self._unwritten = []

    def _table_axes(self) -> tuple[str, ...]:
        """Axes that a table of this history needs columns for."""
        return table_axes(name for axes in self._axes.values() for name in axes)

    def write_out(self) -> None:
        """Append what was recorded since the last call to the table; nothing where no table keeps this history.

        A table without a column for an axis that was declared since is begun anew.
        """
        if self._table is None or not self._unwritten:
            return
        if not {name for record in self._unwritten for name in record.axes} <= {*self._table.axes}:
            self._start_table(self._table)
            return
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
        self._restored = None if mark is None else (self._count, mark)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and names, for a checkpoint that loads with ``weights_only=True``."""
        return state_of_series(self._series)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; everything counts as unwritten, in the order of recording.

        Raises:
            ConfigError: a metric with other axes than those that were declared.
        """
        self._series = {}
        for name, entry in state.items():
            axes, values = self._restored_axes(name, entry)
            series = self._series[name] = Series(axes=axes)
            for row in zip(entry["steps"].tolist(), values, entry["places"].tolist(), strict=True):
                series.add(*row)
        self._unwritten = list(self.records())
        self._count = len(self._unwritten)

    def _restored_axes(
        self, metric: str, entry: Mapping[str, Any]
    ) -> tuple[tuple[str, ...], Float[np.ndarray, "n M ..."]]:
        """Names of the axes of saved values, and the values, with the axes in the order that was declared."""
        values = entry["values"].numpy()
        # a checkpoint of an earlier version knows layers and heads alone
        names = tuple(entry.get("axes", ROW_AXES[1 : values.ndim - 1]))
        sizes = dict(zip(names, values.shape[2:], strict=True))
        declared = self._axes.get(metric, {})
        if sizes == declared:
            # a table does not tell in which order axes of one entry stood
            values = values.transpose(0, 1, *(2 + names.index(name) for name in declared))
        self.declare(metric, declared if sizes == declared else sizes)
        return tuple(self._axes[metric]), values


def axes_of_mark(mark: Mapping[str, Any]) -> tuple[str, ...]:
    """Axes that a table had columns for when it was marked; those of every table of an earlier version without a word.

    Args:
        mark: what ``History.for_checkpoint`` says of the table.
    """
    return tuple(mark.get("axes", ROW_AXES))


def state_of_series(series_of: Mapping[str, Series]) -> dict[str, Any]:
    """The state of a history that has these series, by metric, as ``History.load_state_dict`` takes it."""
    state = {}
    for name, series in series_of.items():
        steps, values = (torch.from_numpy(array) for array in series.arrays())
        state[name] = {
            "steps": steps,
            "values": values,
            "places": torch.from_numpy(np.array(series.order, dtype=np.int64)),
            "axes": list(series.axes),
        }
    return state
