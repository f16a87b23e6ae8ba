"""Which settings of Lightning's Trainer, and which of Lightning's callbacks, a run works with; others are refused.

A run is one process on one device; it makes its optimizer steps itself, many in one Lightning batch, and its data from
(seed, step). A setting that changes how Lightning would do either has no effect here, or half of one, so it is refused
in one line. ``RULES`` names every such setting, ``WORKING`` every other one, and a test holds both to Lightning's list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.strategies import SingleDeviceStrategy

from opsin.errors import ConfigError

PRECISIONS = (None, 32, "32", "32-true", 64, "64", "64-true")


@dataclass(frozen=True)
class TrainerRule:
    """What a run accepts of one setting of the Trainer.

    Args:
        setting: name of the argument of ``Trainer``.
        accepts: whether a run works with a value, as a recipe writes it or as a built Trainer holds it.
        expected: what would do, for the message.
        value_of: value that a built Trainer holds; None where a built Trainer does not tell.
    """

    setting: str
    accepts: Callable[[Any], bool]
    expected: str
    value_of: Callable[[Any], Any] = lambda trainer: None

    def check(self, value: object) -> None:
        """Refuse a value that a run does not work with.

        Raises:
            ConfigError: names the setting.
        """
        if value is not None and not self.accepts(value):
            raise ConfigError(f"trainer.{self.setting}", value, self.expected)


def _one_device(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) == 1
    if isinstance(value, str):
        listed = [part for part in value.split(",") if part.strip()]
        return len(listed) == 1 and not (listed[0].strip().isdigit() and "," not in value and int(value) > 1)
    return not isinstance(value, int) or value <= 1


def _strategy(trainer: Trainer) -> object:
    # a strategy that a user made is not what "auto" makes on one device
    return "auto" if type(trainer.strategy) is SingleDeviceStrategy else type(trainer.strategy).__name__


def _plugins(trainer: Trainer) -> object:
    connector = trainer._accelerator_connector
    found = [connector.checkpoint_io, connector._layer_sync]
    foreign = [type(plugin).__name__ for plugin in found if plugin is not None and not _known_plugin(plugin)]
    return foreign or None


def _known_plugin(plugin: object) -> bool:
    return type(plugin) is TorchCheckpointIO or type(plugin).__module__.startswith("opsin.")


def _validation_seconds(trainer: Trainer) -> object:
    seconds = getattr(trainer, "_val_check_time_interval", None)
    return trainer.val_check_interval if seconds is None else f"{seconds:g} s"


def _positive(value: object) -> bool:
    return not isinstance(value, (int, float)) or value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _is_none(value: object) -> bool:
    return value is None


def _is_off(value: object) -> bool:
    return not value


RULES = (
    TrainerRule(
        "devices", _one_device, "1: a population trains many models, a process a core", lambda t: t.num_devices
    ),
    TrainerRule("num_nodes", lambda value: value == 1, "1: a run is one process", lambda t: t.num_nodes),
    TrainerRule("strategy", lambda value: value == "auto", "auto: a run is one process on one device", _strategy),
    TrainerRule(
        "precision",
        PRECISIONS.__contains__,
        "32-true or 64-true; the step, its optimizer and its records have no 16 bits",
        lambda t: t.precision,
    ),
    TrainerRule(
        "accumulate_grad_batches",
        lambda value: value == 1,
        "1: every optimizer step sees task.batch_size sequences",
        lambda t: t.accumulate_grad_batches,
    ),
    TrainerRule(
        "gradient_clip_val",
        _is_none,
        "null; model.gradient_clip is the largest gradient norm of a member",
        lambda t: t.gradient_clip_val,
    ),
    TrainerRule(
        "gradient_clip_algorithm",
        _is_none,
        "null; model.gradient_clip clips the norm of each member's gradient",
        lambda t: t.gradient_clip_algorithm,
    ),
    TrainerRule(
        "overfit_batches",
        _is_off,
        "0: data are made from (seed, step), and no epoch repeats them",
        lambda t: t.overfit_batches,
    ),
    TrainerRule(
        "fast_dev_run",
        _is_off,
        "false; trainer.max_steps says how long a short run is",
        lambda t: t.fast_dev_run,
    ),
    TrainerRule(
        "limit_train_batches",
        _positive,
        "more than 0, or null: trainer.max_steps says how long a run is",
        lambda t: t.limit_train_batches,
    ),
    TrainerRule(
        "limit_test_batches",
        lambda value: value == 1.0,
        "null: a run does not test",
        lambda t: t.limit_test_batches,
    ),
    TrainerRule(
        "limit_predict_batches",
        lambda value: value == 1.0,
        "null: a run does not predict",
        lambda t: t.limit_predict_batches,
    ),
    TrainerRule(
        "min_steps",
        _is_off,
        "null: a run ends at trainer.max_steps, or when a callback such as StopWhen ends it",
        lambda t: t.min_steps,
    ),
    TrainerRule(
        "min_epochs",
        _is_off,
        "null: a run ends at trainer.max_steps, or when a callback such as StopWhen ends it",
        lambda t: t.fit_loop.min_epochs,
    ),
    TrainerRule(
        "val_check_interval",
        _is_number,
        "a number of Lightning batches: what a clock decides could not be resumed to the same end",
        _validation_seconds,
    ),
    TrainerRule(
        "log_every_n_steps", lambda value: value >= 0, "0 or more Lightning batches", lambda t: t.log_every_n_steps
    ),
    TrainerRule(
        "detect_anomaly",
        _is_off,
        "false; a member whose loss or gradient is no number ends by itself",
        lambda t: t._detect_anomaly,
    ),
    TrainerRule("barebones", _is_off, "false; scripts/bench.py measures a bare run", lambda t: t.barebones),
    TrainerRule("plugins", _is_off, "null: a run is one process that keeps its own checkpoints", _plugins),
    TrainerRule("sync_batchnorm", _is_off, "false: a run is one process, and no model has such a norm"),
    TrainerRule(
        "use_distributed_sampler",
        bool,
        "true: a run is one process, and nothing is sampled",
        lambda t: t._accelerator_connector.use_distributed_sampler,
    ),
    TrainerRule(
        "reload_dataloaders_every_n_epochs",
        _is_off,
        "0: data are made from (seed, step) and never loaded",
        lambda t: t.reload_dataloaders_every_n_epochs,
    ),
    TrainerRule(
        "model_registry", _is_none, "null; opsin resume goes on from a run's folder", lambda t: t._model_registry
    ),
)
"""Settings that are refused where they would not do what they do elsewhere."""

WORKING = (
    *("accelerator", "logger", "callbacks", "max_epochs", "max_steps", "max_time", "limit_val_batches"),
    *("check_val_every_n_epoch", "num_sanity_val_steps", "enable_checkpointing", "enable_progress_bar"),
    *("enable_model_summary", "deterministic", "benchmark", "inference_mode", "profiler", "default_root_dir"),
    "enable_autolog_hparams",
)
"""Settings that do what Lightning's manual says."""

REFUSED_CALLBACKS: Mapping[type[Callback], str] = {
    lightning_callbacks.BaseFinetuning: "opsin.callbacks.Freeze, which keeps weights as they are for a while",
    lightning_callbacks.BasePredictionWriter: "none: a run does not predict",
    lightning_callbacks.BatchSizeFinder: "a number as task.batch_size, which decides what every step sees",
    lightning_callbacks.GradientAccumulationScheduler: "none: every optimizer step sees task.batch_size sequences",
    lightning_callbacks.LearningRateFinder: "a number as model.learning_rate: a rate found at the start would be found "
    "again, and be another one, when the run is resumed",
    lightning_callbacks.ModelPruning: "opsin.callbacks.Ablate or Reinitialise: pruning would rename parameters",
    lightning_callbacks.SpikeDetection: "opsin.callbacks.StopWhen, which sees the loss of every member",
    lightning_callbacks.StochasticWeightAveraging: "none: it replaces the scheduler and the weights behind the records",
    lightning_callbacks.WeightAveraging: "none: it replaces the weights behind the records",
}
"""Callbacks of Lightning that do not work with a run, and what does instead."""


def check_recipe_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of a recipe before a Trainer is built from them.

    Args:
        settings: section ``trainer`` of the recipe, by name.

    Raises:
        ConfigError: names the first setting that a run does not work with.
    """
    for rule in RULES:
        rule.check(settings.get(rule.setting))


def check_trainer(trainer: Trainer) -> None:
    """Refuse a built Trainer whose settings or callbacks a run does not work with.

    Raises:
        ConfigError: names the first of them.
    """
    for rule in RULES:
        rule.check(rule.value_of(trainer))
    check_callbacks(trainer.callbacks)  # type: ignore[attr-defined]


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks of Lightning that do not work with a run.

    Raises:
        ConfigError: names the first of them.
    """
    for callback in callbacks:
        for refused, expected in REFUSED_CALLBACKS.items():
            if isinstance(callback, refused):
                raise ConfigError("trainer.callbacks", type(callback).__name__, expected)
