"""Settings of a module that are refused before a run begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import lightning.pytorch as pl

from opsin.errors import ConfigError, check_number
from opsin.model.protocol import Model
from opsin.optimizers.adam import SHORT_FORM
from opsin.task import Task
from opsin.training.objective import check_objective

MOST_STEPS_PER_BATCH = 1_000_000
"""Optimizer steps of one Lightning batch, whose results wait in memory."""

MOST_THREADS = 1024

LARGEST_SEED = 2**63 - 1
"""Seeds stand beside steps in one tensor of signed numbers."""


class Settings(Protocol):
    """The settings of an ``OpsinModule`` that are checked."""

    task: Task
    network: Model
    seeds: list[int]
    learning_rate: float | list[float]
    weight_decay: float | list[float]
    gradient_clip: float | None
    has_short_form: bool
    betas: tuple[float, float]
    eps: float
    steps_per_batch: int
    log_every: int
    probe_set: str | None
    probe_size: int
    evaluation_size: int
    threads: int
    idle: Literal["stop", "warn"]


def check_settings(module: Settings) -> None:
    """Refuse settings of a module that are out of their range, and an objective that could not be trained.

    Args:
        module: the module, its settings assigned.

    Raises:
        ConfigError: names the setting.
    """
    check_objective(module.task)
    module.task.time_axis  # noqa: B018 - refuses epochs of a task without any
    _check_offsets(module.task, module.network)
    sets = module.task.evaluations
    if module.probe_set is not None and module.probe_set not in sets:
        raise ConfigError("model.probe", module.probe_set, f"null, or an evaluation set of the task: {', '.join(sets)}")
    if not module.has_short_form:
        refuse_short_form({name: getattr(module, name) for name in SHORT_FORM if not _is_default(module, name)})
    for name in ("learning_rate", "weight_decay"):
        value = getattr(module, name)
        if isinstance(value, list) and len(value) != len(module.seeds):
            raise ConfigError(f"model.{name}", value, f"one number, or one for each of {len(module.seeds)} seeds")
        expected = "more than 0" if name == "learning_rate" else "0 or more"
        for number in value if isinstance(value, list) else [value]:
            check_number(f"model.{name}", number, expected, 0, open_low=name == "learning_rate")
    for name in ("steps_per_batch", "log_every", "probe_size", "evaluation_size", "threads"):
        check_number(f"model.{name}", getattr(module, name), "more than 0", 0, open_low=True)
    for name, most in {"steps_per_batch": MOST_STEPS_PER_BATCH, "threads": MOST_THREADS}.items():
        check_number(f"model.{name}", getattr(module, name), f"at most {most:,}", high=most)
    for beta in module.betas:
        if not 0 <= beta < 1:
            raise ConfigError("model.betas", list(module.betas), "two numbers of 0 or more and less than 1")
    check_number("model.eps", module.eps, "more than 0", 0, open_low=True)
    if module.idle not in ("stop", "warn"):
        raise ConfigError("model.idle", module.idle, "'stop' or 'warn'")
    if module.steps_per_batch % module.log_every:
        expected = f"a divisor of steps_per_batch {module.steps_per_batch}"
        raise ConfigError("model.log_every", module.log_every, expected)
    if not module.seeds or min(module.seeds) < 0 or max(module.seeds) > LARGEST_SEED:
        raise ConfigError("model.seed", module.seeds, "one or more seeds of 0 or more, below 2**63")
    if module.gradient_clip is not None:
        check_number("model.gradient_clip", module.gradient_clip, "more than 0, or null", 0, open_low=True)


def _check_offsets(task: Task, network: Model) -> None:
    """Refuse sequences that begin where the model's position code has ended, or where it has none."""
    room, length = network.positions_coded(task), task.layout.positions
    if task.offsets > room - length + 1:
        expected = f"at most {max(room - length + 1, 1)}: {type(network).__name__} codes {room} positions"
        raise ConfigError(f"{type(task).__name__}.offsets", task.offsets, expected)


def _is_default(module: Settings, name: str) -> bool:
    value = getattr(module, name)
    return (tuple(value) if name == "betas" else value) == SHORT_FORM[name]


def refuse_short_form(given: Mapping[str, Any]) -> None:
    """Refuse settings of AdamW beside an optimizer that is chosen by its class.

    Args:
        given: settings of the short form that the user has given, by name.

    Raises:
        ConfigError: there is one.
    """
    for name, value in given.items():
        raise ConfigError(f"model.{name}", value, "none beside model.optimizer, which has settings of its own")


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
