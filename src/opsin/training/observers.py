"""How readers follow a run: events, and what the probe shows after a step.

Legend: M members, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL.Image import Image
from torch import Tensor

from opsin.errors import ConfigError
from opsin.model.sites import SiteTable
from opsin.records.axes import Axes, check_axes
from opsin.task import Batch, Task
from opsin.training.objective import evaluation_metrics, step_metrics


@dataclass(frozen=True)
class Event:
    """Something worth telling: written to the run, shown in the terminal, sent as an alert.

    Args:
        kind: a word, for example ``"phase change"``.
        step: optimizer steps finished when it was noticed.
        member: number of the member that it happened to.
        message: one line for people.
    """

    kind: str
    step: int
    member: int
    message: str


@dataclass(frozen=True)
class Observation:
    """What the probe showed after some step.

    Args:
        step: number of optimizer steps finished.
        batch: sequences of the probe that were shown.
        activations: activations ``[M, B, ...]`` of the sites that were wanted, by name.
    """

    step: int
    batch: Batch
    activations: dict[str, Tensor]


@dataclass(frozen=True)
class Listener:
    """A reader's request to be notified of what the probe shows.

    Args:
        every: optimizer steps between two notifications.
        sites: names of the activations that it wants to see.
        notify: function that is called with what the probe shows.
    """

    every: int
    sites: tuple[str, ...]
    notify: Callable[[Observation], None]


@runtime_checkable
class Recorder(Protocol):
    """A callback that says which metrics it records, so that schedules with feedback may read them."""

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        """Names, and the axes of one member's values: ``{}``, ``{"layer": 2, "head": 8}``, ``{"neuron": 64}``."""


@runtime_checkable
class TaskRecorder(Protocol):
    """A callback some of whose metrics depend on the task: on what its objective measures, or what it knows."""

    def task_records(self, task: Task) -> dict[str, Axes]:
        """Names of these metrics, and the axes of one member's values."""


@runtime_checkable
class Pictured(Protocol):
    """A callback with a picture of what it last saw, which loggers may show under its name."""

    name: str

    def picture(self, member: int) -> Image | None:
        """Of one member; None before there is anything to show."""


def recorded_metrics(callbacks: Iterable[object], sites: SiteTable, task: Task, validates: bool) -> dict[str, Axes]:
    """All metrics that a run with these callbacks says it records, and the axes of one member's values.

    Args:
        validates: whether the run evaluates the task's evaluation sets.

    Raises:
        ConfigError: something that is no mapping of sizes by name, or two callbacks that record one metric with
            different axes.
    """
    found: dict[str, Axes] = {name: {} for name in step_metrics(task)}
    for name in task.evaluations if validates else ():
        found |= {metric: {} for metric in evaluation_metrics(task, name)}
    for callback in callbacks:
        if isinstance(callback, Recorder):
            _add_declared(found, callback.records(sites), f"{type(callback).__name__}.records")
        if isinstance(callback, TaskRecorder):
            _add_declared(found, callback.task_records(task), f"{type(callback).__name__}.task_records")
    return found


def _add_declared(found: dict[str, Axes], declared: Mapping[str, Axes], field: str) -> None:
    for metric, axes in declared.items():
        if not isinstance(axes, Mapping):
            check_axes(metric, axes)
        if metric in found and [*found[metric].items()] != [*axes.items()]:
            raise ConfigError(f"{field}, metric {metric}", dict(axes), f"{dict(found[metric])}, as others record it")
        found[metric] = axes
