"""Delay: how much later one recorded number reaches a level than another.

Legend: M members.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer

from opsin.callbacks.readers.base import Reader
from opsin.errors import ConfigError, check_number
from opsin.model.sites import SiteTable
from opsin.records.axes import Axes
from opsin.records.history import is_at_least
from opsin.training.module import OpsinModule, callbacks_of
from opsin.training.monitors import check_recorded_number
from opsin.training.observers import recorded_metrics


class Delay(Reader):
    """Records when two numbers first reach a level, in optimizer steps, and the ratio of the two.

    For grokking: when the training accuracy reaches 0.99, when the test accuracy does, and how many times later that
    is. Recorded at the end of every validation, ``[M]`` each, are ``delay/first`` and ``delay/second``, the steps
    finished at the first record of at least the level, and ``delay/ratio``, the second over the first; nan as long as
    it is not reached. A population can compare all three. Read-only.

    Args:
        first: metric with one number a member, as in ``metrics.csv``.
        second: metric whose delay against the first is recorded.
        level: level that each is to reach from below.

    Raises:
        ConfigError: the same metric twice, or a level that is no number; when training starts, a metric that the run
            does not record.
    """

    def __init__(
        self, first: str = "val/train/accuracy", second: str = "val/test/accuracy", level: float = 0.99
    ) -> None:
        if first == second:
            raise ConfigError("Delay.second", second, "another metric than the first")
        check_number("Delay.level", level, "a finite number")
        self.metrics = {"first": first, "second": second}
        # one object, by which the history knows what it has answered
        self._reached = partial(is_at_least, level)

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        return {f"delay/{name}": {} for name in (*self.metrics, "ratio")}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._callbacks, self._validates = callbacks_of(trainer), bool(trainer.limit_val_batches)
        super().setup(trainer, pl_module, stage)

    def check(self, module: OpsinModule) -> None:
        recorded = recorded_metrics(self._callbacks, module.sites, module.task, self._validates)
        for setting, metric in self.metrics.items():
            check_recorded_number(f"Delay.{setting}", metric, recorded)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        steps = {name: self._steps(metric) for name, metric in self.metrics.items()}
        steps["ratio"] = steps["second"] / steps["first"]
        found = {f"delay/{name}": torch.from_numpy(values) for name, values in steps.items()}
        self._module.record(self._module.steps_done, found)

    def _steps(self, metric: str) -> Float[np.ndarray, " M"]:
        """Steps at the first record that reaches the level; nan where none has."""
        history, members = self._module.history, self._module.n_members
        steps = history[metric].first_or_nan(self._reached) if metric in history else np.nan
        return np.broadcast_to(steps, members)
