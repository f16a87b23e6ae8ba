"""What a run has measured so far: in memory, in checkpoints, and as the lines of metrics.csv.

A run's folder holds

    config.yaml     the resolved configuration
    metrics.csv     step, sequences, metric, member, layer, head, value: one row per number
    snapshots/      weights at chosen steps
    checkpoints/    what a resume needs
    summary.json    onset, final strengths, wall time
    summary.png     loss with the onset marked, strength of every head

Legend: M members, n records of a metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from opsin.records.schema import ROW_AXES

NEVER = np.iinfo(np.int64).max
"""The step of what has not happened."""

Question = Callable[[np.ndarray], np.ndarray]
"""From the values ``[M, ...]`` of one record to yes or no for each member, ``[M]``."""


@dataclass
class Series:
    """One metric over training.

    Args:
        steps: optimizer steps finished when each value was taken.
        values: ``[n, M]`` or ``[n, M, layers, heads]``, float32.
        order: number of each record among all records of the run, from 0.
    """

    steps: list[int] = field(default_factory=list)
    values: list[Float[np.ndarray, "M ..."]] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    _answered: dict[Question, tuple[int, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    def arrays(self) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n M ..."]]:
        """Steps and stacked values."""
        return np.array(self.steps, dtype=np.int64), np.stack(self.values) if self.values else np.zeros((0, 1))

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


class History:
    """Everything a run has measured so far, in memory; checkpoints carry it and metrics.csv mirrors it.

    Args:
        batch_size: sequences of a training step, which turn steps into sequences.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._series: dict[str, Series] = {}
        self._unwritten: list[tuple[int, str, np.ndarray]] = []
        self._count = 0

    def record(self, metric: str, step: int, values: torch.Tensor | np.ndarray) -> None:
        """Add the values of one metric.

        Args:
            metric: name of the metric, as in ``metrics.csv``.
            step: optimizer steps finished when it was measured.
            values: one number a member, ``[M]``, or one a head, ``[M, layers, heads]``; copied.
        """
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu().numpy()
        # a copy: what was measured must not change with the tensor it was read from
        array = np.array(values, dtype=np.float32)
        series = self._series.setdefault(metric, Series())
        series.steps.append(step)
        series.values.append(array)
        series.order.append(self._count)
        self._count += 1
        self._unwritten.append((step, metric, array))

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

    def take_unwritten(self) -> list[tuple[int, str, np.ndarray]]:
        """Records since the last call, in order of recording."""
        unwritten, self._unwritten = self._unwritten, []
        return unwritten

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, for a checkpoint that loads with ``weights_only=True``."""
        state = {}
        for name, series in self._series.items():
            steps, values = (torch.from_numpy(array) for array in series.arrays())
            state[name] = {"steps": steps, "values": values, "places": torch.tensor(series.order)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; everything counts as unwritten, in the order of recording."""
        self._series = {
            name: Series(entry["steps"].tolist(), list(entry["values"].numpy()), entry["places"].tolist())
            for name, entry in state.items()
        }
        rows = [
            (number, (step, name, value))
            for name, series in self._series.items()
            for number, step, value in zip(series.order, series.steps, series.values, strict=True)
        ]
        self._unwritten = [record for _, record in sorted(rows, key=lambda row: row[0])]
        self._count = len(rows)


def tidy_rows(records: list[tuple[int, str, np.ndarray]], batch_size: int) -> Iterator[str]:
    """CSV lines, one per number; axes a metric does not have stay empty.

    Args:
        records: step, name of the metric, and its values ``[M, ...]`` of each record.
        batch_size: sequences of a training step, which turn steps into sequences.
    """
    for step, metric, array in records:
        for index in np.ndindex(array.shape):
            axes = [str(i) for i in index] + [""] * (len(ROW_AXES) - len(index))
            yield ",".join([str(step), str(step * batch_size), metric, *axes, repr(float(array[index]))])
