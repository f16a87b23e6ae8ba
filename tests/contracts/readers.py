"""Every reader there is, and how to make each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from opsin import callbacks
from opsin.errors import ConfigError
from opsin.model.clustering import ClusteringTransformer
from opsin.model.protocol import Model
from opsin.task import Task
from opsin.tasks import LinearRegression, SparseModularAddition, TriggerBigrams
from opsin.training.module import opsin_module
from opsin.training.observers import Observation
from tests.contracts.examples import built, examples_of, needs_an_example, short, with_short_cadence
from tests.contracts.runs import MEMORIES, WHOLE, rich_task

ROOMS = ("opsin.callbacks.readers", "opsin.callbacks.wandb")


class MeanOfLogits(Callback):
    """A reader as a user writes one."""

    def __init__(self, every: int = 5) -> None:
        self.every = every

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._module = opsin_module(pl_module)
        self._module.listen(self.every, self._record, ["hook_logits"])

    def _record(self, seen: Observation) -> None:
        self._module.history.record("mean_logit", seen.step, seen.activations["hook_logits"].mean((1, 2, 3)))


def readers() -> dict[str, type[Callback]]:
    """Every reader by its name: those that the package exports, and the one that this file defines."""
    exported = {name: getattr(callbacks, name) for name in callbacks.__all__}
    found = {
        name: kind
        for name, kind in exported.items()
        if isinstance(kind, type) and issubclass(kind, Callback) and kind.__module__.startswith(ROOMS)
    }
    return {**found, MeanOfLogits.__name__: MeanOfLogits}


READERS = readers()

TASKS: dict[str, Callable[[], tuple[Task, Model]]] = {
    "rich": lambda: (rich_task(), WHOLE),
    "regression": lambda: (LinearRegression(dimensions=2, examples=3, batch_size=4), WHOLE),
    "birth": lambda: (TriggerBigrams(vocabulary=8, positions=12, batch_size=4), MEMORIES),
    "clustering": lambda: (SparseModularAddition(positions=4, relevant=2, batch_size=4), ClusteringTransformer()),
}
"""Tasks that the runs of these contracts learn, the first by default, and by which model."""

MEASURES_ONE = {"InContextAlgorithm": "regression", "MemoryRecall": "birth", "ClusteringHead": "clustering"}
"""Readers that measure one kind of task alone, and which of the above it is."""


def task_of(name: str) -> str:
    """Which of the tasks a reader is tried on."""
    return MEASURES_ONE.get(name, "rich")


def _examples(name: str) -> list[dict]:
    return [] if READERS[name] is MeanOfLogits else examples_of(f"opsin.callbacks.{name}")[:1]


def _has_defaults(kind: type[Callback]) -> bool:
    """Whether it can be made from nothing."""
    if needs_an_example(kind):
        return False
    try:
        kind()
    except ConfigError:
        return False
    return True


def lacks_an_example(name: str) -> bool:
    """Whether nothing says how a reader can be made."""
    return not (_has_defaults(READERS[name]) or _examples(name))


def makers(name: str, folder: Path) -> list[Callable[[], Callback]]:
    """Ways to make one reader: from its defaults if it can be, and as the documents show it."""
    if READERS[name] is MeanOfLogits:
        return [MeanOfLogits]
    bare = {"class_path": f"opsin.callbacks.{name}", "init_args": {}}
    chosen = [bare] * _has_defaults(READERS[name]) + _examples(name)
    settings = [with_short_cadence(short(item, folder=folder)) for item in chosen]
    unlike = [item for index, item in enumerate(settings) if item not in settings[:index]]
    return [lambda item=item: built(item) for item in unlike]


def every_reader(folder: Path, task: str) -> list[Callback]:
    """All of one task, each as the documents show it if they do; the one that keeps the run comes last."""
    made = [ways[-1]() for name in READERS if task_of(name) == task and (ways := makers(name, folder))]
    return sorted(made, key=lambda reader: isinstance(reader, callbacks.KeepRun))
