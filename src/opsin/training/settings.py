"""Settings of a module that are refused before a run begins."""

from __future__ import annotations

from typing import Literal, Protocol

import lightning.pytorch as pl

from opsin.errors import ConfigError


class Settings(Protocol):
    """The settings of an ``OpsinModule`` whose range is checked."""

    seeds: list[int]
    learning_rate: float | list[float]
    weight_decay: float | list[float]
    gradient_clip: float | None
    steps_per_batch: int
    log_every: int
    probe_size: int
    evaluation_size: int
    threads: int
    idle: Literal["stop", "warn"]


def check_settings(module: Settings) -> None:
    """Refuse settings of a module that are out of their range.

    Args:
        module: the module, its settings assigned.

    Raises:
        ConfigError: names the setting.
    """
    for name in ("learning_rate", "weight_decay"):
        value = getattr(module, name)
        if isinstance(value, list) and len(value) != len(module.seeds):
            raise ConfigError(f"model.{name}", value, f"one number, or one for each of {len(module.seeds)} seeds")
        lowest = min(value) if isinstance(value, list) else value
        if lowest < 0 or (lowest == 0 and name == "learning_rate"):
            raise ConfigError(f"model.{name}", value, "more than 0" if name == "learning_rate" else "0 or more")
    for name in ("steps_per_batch", "log_every", "probe_size", "evaluation_size", "threads"):
        if getattr(module, name) <= 0:
            raise ConfigError(f"model.{name}", getattr(module, name), "more than 0")
    if module.idle not in ("stop", "warn"):
        raise ConfigError("model.idle", module.idle, "'stop' or 'warn'")
    if module.steps_per_batch % module.log_every:
        expected = f"a divisor of steps_per_batch {module.steps_per_batch}"
        raise ConfigError("model.log_every", module.log_every, expected)
    if not module.seeds or min(module.seeds) < 0:
        raise ConfigError("model.seed", module.seeds, "one or more seeds of 0 or more")
    if module.gradient_clip is not None and module.gradient_clip <= 0:
        raise ConfigError("model.gradient_clip", module.gradient_clip, "more than 0, or null")


def refuse_uneven_checkpoints(trainer: pl.Trainer, steps_per_batch: int) -> None:
    """Refuse a ModelCheckpoint that would save between two Lightning batches.

    Args:
        trainer: the Trainer with all its callbacks.
        steps_per_batch: optimizer steps that one Lightning batch carries.

    Raises:
        ConfigError: its cadence is no multiple of a batch's optimizer steps.
    """
    for callback in trainer.checkpoint_callbacks:
        every = getattr(callback, "_every_n_train_steps", 0)
        if every and every % steps_per_batch:
            expected = f"a multiple of model.steps_per_batch = {steps_per_batch}"
            raise ConfigError("ModelCheckpoint.every_n_train_steps", every, expected)
