"""Ends the training of a member that has done what it was trained for; the other members go on without it.

It reads what a run records, as readers do, but it is none: it decides when the weights of a member stop.

Legend: M members.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
from jaxtyping import Bool
from lightning.pytorch import Callback, LightningModule, Trainer

from opsin.callbacks.readers.base import check_count
from opsin.errors import ConfigError
from opsin.interventions.feedback import PER_HEAD, Feedback, followed_series
from opsin.records.schema import FINISHED_EARLY, TRAIN_LOSS
from opsin.training.module import OpsinModule, callbacks_of, opsin_module
from opsin.training.observers import recorded_metrics


class StopWhen(Callback):
    """Ends a member once something that the run records has been past a level in enough records in a row.

    A member that has ended keeps its weights, costs no training time any more, and says ``finished early`` in the
    summary; when all have ended the run ends. It is looked at after every Lightning batch.

    Args:
        metric: metric that decides, as in ``metrics.csv``: ``train/loss``, ``val/SET/loss``, ``induction_strength``;
            ``METRIC/I:J`` for one number of a metric with further axes.
        head: ``"layer:head"`` for a metric with one value per head.
        above: level that the value must exceed; exactly one of ``above`` and ``below`` is given.
        below: level that the value must be less than.
        in_a_row: records in a row that must be past the level.
        members: members that may end; all when None.

    Raises:
        ConfigError: a value out of its range or, when training starts, something that the run does not record or
            members it does not have.
    """

    def __init__(
        self,
        metric: str = TRAIN_LOSS,
        head: str | None = None,
        above: float | None = None,
        below: float | None = None,
        in_a_row: int = 20,
        members: list[int] | None = None,
    ) -> None:
        check_count("StopWhen.in_a_row", in_a_row)
        if head in PER_HEAD:
            raise ConfigError("StopWhen.head", head, "a head as layer:head")
        self.in_a_row, self.members = in_a_row, members
        try:
            self.condition = Feedback(metric, head, above, below)
        except ConfigError as error:
            raise _named_as_written(error) from None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        module = opsin_module(pl_module)
        found = recorded_metrics(callbacks_of(trainer), module.sites, module.task, bool(trainer.limit_val_batches))
        try:
            self.condition.check("StopWhen", found)
        except ConfigError as error:
            raise _named_as_written(error) from None
        if self.members is not None and not {*self.members} <= {*range(module.n_members)}:
            raise ConfigError("StopWhen.members", self.members, f"members from 0 to {module.n_members - 1}")

    def decides(self) -> str:
        """When a member ends, as text."""
        return f"{self.condition} in {self.in_a_row} records, members {self.members}"

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        module = opsin_module(pl_module)
        done = module.steps_done
        for member in np.flatnonzero(self._holds(module)).tolist():
            if member not in module.ended and (self.members is None or member in self.members):
                condition = self.condition
                reason = f"{condition} in {self.in_a_row} records".replace("while ", "", 1)
                module.gates.end(member, FINISHED_EARLY, done, reason)
        if len(module.ended) == module.n_members:
            trainer.should_stop = True

    def _holds(self, module: OpsinModule) -> Bool[np.ndarray, " M"]:
        """Which members' last records all fulfil the condition."""
        values = followed_series(self.condition.metric, module.history).values
        if len(values) < self.in_a_row:
            return np.zeros(module.n_members, dtype=bool)
        return np.all([self.condition.holds(record) for record in islice(reversed(values), self.in_a_row)], axis=0)


def _named_as_written(error: ConfigError) -> ConfigError:
    """The error under the name of the setting that the user wrote."""
    field = error.field.removeprefix("StopWhen.").replace("schedule.feedback", "StopWhen", 1)
    return ConfigError(field, error.value, error.expected)
