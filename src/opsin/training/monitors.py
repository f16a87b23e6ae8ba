"""What Lightning's callbacks watch: names that the run records, at times at which the run validates.

EarlyStopping and ModelCheckpoint look for their ``monitor`` among the Trainer's metrics. There they find what
``metrics.csv`` records, averaged over the members: ``train/loss``, ``val/SET/loss``, ``METRIC/LAYER:HEAD`` (or the
indices of whatever axes a metric has). A name that
nobody records is refused before the first step, and so is a callback that would never look.

Legend: M members.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, LearningRateMonitor
from torch import Tensor

from opsin.errors import ConfigError
from opsin.records.axes import Axes, find_number, number_names
from opsin.task import Task
from opsin.training.observers import Recorder

OF_A_CHECKPOINT = ("epoch", "step")
"""What a ModelCheckpoint finds beside metrics."""

RATES = ("lr-MemberAdam", "lr-MemberOptimizer")
"""What a LearningRateMonitor shows: the rate under the name of the optimizer's class."""

KNOWN_PACKAGES = ("lightning.", "opsin.")
"""Whoever comes from elsewhere may log what nobody can know beforehand."""


# ---- when the run validates -------------------------------------------------------------------------


@dataclass(frozen=True)
class ValidationTimes:
    """When a run evaluates the task's evaluation sets, and which of them.

    Args:
        trainer: the Trainer of the run.
        task: the task, which has the evaluation sets.
        steps_per_batch: optimizer steps that one Lightning batch carries.
    """

    trainer: Trainer
    task: Task
    steps_per_batch: int

    @property
    def batches(self) -> int:
        """Lightning batches of the whole run."""
        return -(-self.trainer.max_steps // self.steps_per_batch)

    @property
    def epoch(self) -> int:
        """Lightning batches of an epoch: one more than the run has, unless they are limited."""
        return _limited(self.batches + 1, self.trainer.limit_train_batches)

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the evaluation sets that a validation sees; none where the run never validates."""
        if not self.happens:
            return ()
        return tuple(self.task.evaluations[: _limited(len(self.task.evaluations), self.trainer.limit_val_batches)])

    @property
    def happens(self) -> bool:
        """Whether the run validates before its end."""
        trainer = self.trainer
        if not trainer.limit_val_batches:
            return False
        interval, every = trainer.val_check_interval, trainer.check_val_every_n_epoch
        between = interval if isinstance(interval, int) else max(1, int(self.epoch * interval))
        if every is None:
            return between <= self.batches
        # within the first epoch that is validated, however far the run comes in it
        return between <= min(self.epoch, self.batches - self.epoch * (every - 1))

    def check(self) -> None:
        """Refuse limits that leave nothing to train on or to evaluate, in the run's words.

        Raises:
            ConfigError: names the setting.
        """
        trainer, sets = self.trainer, len(self.task.evaluations)
        if self.epoch < 1:
            expected = f"null, or enough for one of the run's {self.batches + 1:,} Lightning batches"
            raise ConfigError("trainer.limit_train_batches", trainer.limit_train_batches, expected)
        if trainer.limit_val_batches and not _limited(sets, trainer.limit_val_batches):
            expected = f"0, or enough for one of the task's {sets} evaluation sets"
            raise ConfigError("trainer.limit_val_batches", trainer.limit_val_batches, expected)
        interval = trainer.val_check_interval
        within = trainer.check_val_every_n_epoch is not None and bool(trainer.limit_val_batches)
        if within and isinstance(interval, int) and interval > self.epoch:
            expected = f"at most the {self.epoch:,} Lightning batches of an epoch, or check_val_every_n_epoch: null"
            raise ConfigError("trainer.val_check_interval", interval, expected)


def _limited(count: int, limit: float | int) -> int:
    """How many of some batches a limit leaves: a number of them, or a share."""
    return min(count, limit) if isinstance(limit, int) else int(count * limit)


# ---- what is monitored ------------------------------------------------------------------------------


def monitors(callbacks: Iterable[Callback]) -> list[Any]:
    """Those of some callbacks that monitor a number."""
    return [callback for callback in callbacks if isinstance(getattr(callback, "monitor", None), str)]


def monitored_numbers(
    callbacks: Iterable[Callback], recorded: Mapping[str, Axes], times: ValidationTimes, foreign_module: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Metric and index of every number that a callback monitors and the module does not log by itself.

    Args:
        callbacks: all callbacks of the run.
        recorded: axes of one member's values of every metric that the run records, by name.
        times: when the run validates.
        foreign_module: whether the module is a user's own, which may log what it wants.

    Raises:
        ConfigError: a name that nobody records, or a callback that never looks.
    """
    callbacks = list(callbacks)
    seen = tuple(f"val/{name}/" for name in times.sets)
    shown = {name: axes for name, axes in recorded.items() if not name.startswith("val/") or name.startswith(seen)}
    anything = foreign_module or any(_is_foreign(callback) for callback in callbacks)
    found = {}
    for callback in monitors(callbacks):
        _check_looks(callback, times)
        name = callback.monitor
        number = find_number(name, shown)
        if number is not None:
            found[name] = number
            # a record may come later than the first look
            callback.strict = False
        elif not (anything or name in _other_names(callback, callbacks)):
            raise ConfigError(f"{type(callback).__name__}.monitor", name, nearest_metric(name, number_names(shown)))
    return {name: number for name, number in found.items() if not name.startswith(("train/", "val/"))}


def _is_foreign(callback: Callback) -> bool:
    return not (type(callback).__module__.startswith(KNOWN_PACKAGES) or isinstance(callback, Recorder))


def _other_names(callback: Callback, callbacks: Iterable[Callback]) -> tuple[str, ...]:
    """What a callback can monitor that is no record of the run."""
    rates = any(isinstance(other, LearningRateMonitor) for other in callbacks)
    return (*(OF_A_CHECKPOINT if isinstance(callback, Checkpoint) else ()), *(RATES if rates else ()))


def check_recorded_number(field: str, name: str, recorded: Mapping[str, Axes]) -> None:
    """Refuse a metric that a run does not record with one number a member.

    Args:
        field: setting that names it, for the message.
        name: name of the metric.
        recorded: axes of each metric that the run records, without that of members, by name.

    Raises:
        ConfigError: names the field, and the nearest metric that is recorded.
    """
    numbers = [metric for metric, axes in recorded.items() if not axes]
    if name not in numbers:
        raise ConfigError(field, name, nearest_metric(name, numbers))


def nearest_metric(name: str, numbers: list[str]) -> str:
    """What would do in the place of a name that nobody records: the one most like it, and where the others are.

    Args:
        name: name of a metric that the user wrote.
        numbers: names of what the run records.
    """
    # one whose last word is the same, first
    alike = [number for number in numbers if number.endswith(name.replace("_", "/").rpartition("/")[2])]
    nearest = difflib.get_close_matches(name, alike, 1, 0) or difflib.get_close_matches(name, numbers, 1, 0)
    return f"a metric that this run records, as in metrics.csv; the nearest is {nearest[0]!r} of {len(numbers)}"


def _check_looks(callback: Callback, times: ValidationTimes) -> None:
    """Refuse an EarlyStopping that looks at the end of validations or epochs of which the run has none."""
    if not isinstance(callback, EarlyStopping):
        return
    if callback._check_on_train_epoch_end:
        if times.epoch > times.batches:
            expected = "false: the run is one epoch (check_val_every_n_epoch=None, and val_check_interval a number of "
            expected += f"Lightning batches up to {times.batches:,}, let it look after validations)"
            raise ConfigError("EarlyStopping.check_on_train_epoch_end", True, expected)
    elif not times.happens:
        expected = f"at most {times.batches:,} Lightning batches: EarlyStopping looks after validations"
        raise ConfigError("trainer.val_check_interval", times.trainer.val_check_interval, expected)


def show_to_monitors(
    trainer: Trainer,
    monitored: Mapping[str, tuple[str, tuple[int, ...]]],
    metrics: Mapping[str, Float[Tensor, "M ..."]],
) -> None:
    """Put numbers that are monitored where callbacks look for them, averaged over the members that have one.

    Args:
        trainer: the Trainer of the run.
        monitored: metric and index of every monitored number, by its name.
        metrics: values ``[M, ...]`` by metric.
    """
    for name, (metric, index) in monitored.items():
        if metric in metrics:
            values = metrics[metric]
            for axis in reversed(range(len(index))):
                values = values.select(axis + 1, index[axis])
            trainer.callback_metrics[name] = values.float().nanmean()
