"""What determines the numbers of a run, as named settings that two runs can be compared by, and their digest.

A setting has the name that it has on the command line: ``task.exemplars.seed``, ``model.learning_rate``. A setting that
is the path of a file counts by the file's content, so that data may move. Paths of other kinds, loggers, readers, the
number of steps and how often something is logged are left out, except where a schedule with feedback reads the records.

Legend: M members.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from opsin.interventions.plan import Plan
from opsin.model.protocol import Model, changed_settings
from opsin.objective import CrossEntropy
from opsin.optimizers.adam import SHORT_FORM
from opsin.optimizers.base import Optimizer
from opsin.task import Task
from opsin.training.optimizers import build_scheduler, member_optimizer

NUMBERS_VERSION = 1
"""Version of the code that makes numbers: raised whenever a run would come to other numbers than before."""

LONGEST_TEXT = 240
"""Characters of a text that are kept beside its hash."""

DEPTH = 6
"""Parts within parts of a task that are looked at."""

_MOVING = ("last_epoch", "_last_lr", "base_lrs", "_step_count", "best", "num_bad_epochs", "cooldown_counter")
"""What a scheduler's state has beside its settings."""


@runtime_checkable
class Deciding(Protocol):
    """A callback that is no writer and decides about numbers all the same."""

    def decides(self) -> str:
        """Its settings that matter, as text."""


class TrainedModule(Protocol):
    """The settings of an ``OpsinModule`` that determine its numbers."""

    task: Task
    network: Any
    seeds: list[int]
    optimizer: Optimizer
    has_short_form: bool
    gradient_clip: float | None
    lr_scheduler: Callable[..., Any] | None
    steps_per_batch: int
    log_every: int
    probe_set: str | None
    probe_size: int
    evaluation_size: int
    threads: int
    initial_weights: list[str | None]


def run_settings(module: TrainedModule, plan: Plan, trainer: Any) -> dict[str, Any]:
    """Every setting that determines the numbers of a run, by name; plain values, which a checkpoint can hold.

    Args:
        module: module of the run.
        plan: what the writers of the run do.
        trainer: Trainer of the run, with its callbacks.
    """
    found: dict[str, Any] = {"version": NUMBERS_VERSION, "trainer.precision": str(trainer.precision)}
    _add("task", module.task, found)
    found["task.draws"] = _draws(module.task, module.seeds)
    # what no setting may say; runs of earlier versions have none but this one
    if (minimised := module.task.objective.minimised) != CrossEntropy():
        _add("task.objective", minimised, found)
    _add(module.network.setting, module.network, found)
    found["model.seed"] = list(module.seeds)
    found["model.initial"] = list(module.initial_weights)
    found |= _optimizer_settings(module)
    for name in ("gradient_clip", "steps_per_batch", "probe_size", "evaluation_size"):
        found[f"model.{name}"] = getattr(module, name)
    if module.probe_set is not None:
        found["model.probe"] = module.probe_set
    if module.lr_scheduler is not None:
        _add_scheduler("model.lr_scheduler", _scheduler(module), found)
    found |= _interventions(plan)
    deciding = [callback for callback in trainer.callbacks if isinstance(callback, Deciding)]
    for name, callback in numbered((type(callback).__name__, callback) for callback in deciding):
        found[name] = callback.decides()
    if plan.feedback or deciding:
        # what they read depends on how often it is measured
        found["model.log_every"] = module.log_every
        found["trainer.val_check_interval"] = str(trainer.val_check_interval)
    return found


def surroundings(module: TrainedModule, compiled: bool) -> dict[str, Any]:
    """What may change the last digits of numbers, and never more.

    Args:
        module: module of the run.
        compiled: whether the step runs as one compiled graph.
    """
    device = next(module.parameters()).device.type  # type: ignore[attr-defined]
    return {"torch": str(torch.__version__), "device": device, "threads": module.threads, "compiled": compiled}


def digest(settings: Mapping[str, Any]) -> str:
    """A short hash of named settings; runs with equal settings have equal digests.

    Args:
        settings: plain values by name, as ``run_settings`` has them.
    """
    return _hash(json.dumps(settings, sort_keys=True).encode())


def numbered(named: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Parts with their names, numbered from the second of a name on: ``StopWhen``, ``StopWhen[1]``.

    Args:
        named: name and part, in order.
    """
    count: dict[str, int] = defaultdict(int)
    found = []
    for name, part in named:
        found.append((f"{name}[{count[name]}]" if count[name] else name, part))
        count[name] += 1
    return found


def _optimizer_settings(module: TrainedModule) -> dict[str, Any]:
    """The optimizer and its settings; of the short form its four settings under the names they have there."""
    found: dict[str, Any] = {}
    if not module.has_short_form:
        _add("model.optimizer", module.optimizer, found)
        for name in module.optimizer.hyper_names:
            _add(f"model.optimizer.{name}", getattr(module.optimizer, name), found)
        return found
    for name in SHORT_FORM:
        _add(f"model.{name}", getattr(module.optimizer, name), found)
    return found


def _interventions(plan: Plan) -> dict[str, Any]:
    """What every writer does, by its name."""
    texts: dict[str, list[str]] = defaultdict(list)
    for row, text in zip(plan.rows, plan.row_identities(), strict=True):
        texts[row.name].append(_short(text))
    return dict(texts)


def _draws(task: Task, seeds: Sequence[int]) -> str:
    """A hash of the choices behind the first batch, those that are whole numbers, which are alike on all machines."""
    drawn = task.draw(list(seeds[:1]), 0, 1)
    parts = hashlib.sha256()
    for name in sorted(drawn):
        values = drawn[name].cpu()
        parts.update(f"{name} {tuple(values.shape)}".encode())
        if not values.is_floating_point():
            parts.update(values.to(torch.int64).numpy().tobytes())
    return parts.hexdigest()[:16]


# ---- one setting ------------------------------------------------------------------------------------


def _add(name: str, value: Any, found: dict[str, Any], depth: int = 0) -> None:
    """Add a setting, and the settings inside it, under their names."""
    if value is None or isinstance(value, (bool, int, float)):
        found[name] = value
    elif isinstance(value, str):
        found[name] = _text(value)
    elif isinstance(value, Enum):
        found[name] = value.name
    elif isinstance(value, (np.ndarray, Tensor)):
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        found[name] = f"array {array.shape} {_hash(np.ascontiguousarray(array).tobytes())}"
    elif isinstance(value, (list, tuple)):
        _add_items(name, value, found, depth)
    elif isinstance(value, Path):
        found[name] = _text(str(value))
    elif callable(value) and hasattr(value, "__qualname__"):
        found[name] = f"{value.__module__}.{value.__qualname__}"
    elif depth < DEPTH:
        _add_parts(name, value, found, depth)


def _add_items(name: str, values: Sequence[Any], found: dict[str, Any], depth: int) -> None:
    if all(value is None or isinstance(value, (bool, int, float)) for value in values):
        found[name] = list(values)
        return
    for index, value in enumerate(values):
        _add(f"{name}[{index}]", value, found, depth + 1)
    found[name] = f"{len(values)} entries"


def _add_parts(name: str, value: Any, found: dict[str, Any], depth: int) -> None:
    if isinstance(value, Mapping):
        parts = {str(key): part for key, part in value.items()}
        found[name] = f"{len(parts)} entries"
    else:
        parts = _settings_of(value)
        found[name] = type(value).__qualname__
    for key, part in parts.items():
        _add(f"{name}.{key}", part, found, depth + 1)


def _settings_of(value: Any) -> dict[str, Any]:
    """The settings of a part by name; one that runs of earlier versions did not have only where it was chosen."""
    added = getattr(value, "added_settings", {})
    return {name: part for name, part in _all_settings_of(value).items() if name not in added or part != added[name]}


def _all_settings_of(value: Any) -> dict[str, Any]:
    if isinstance(value, Task) and value.settings:
        return dict(value.settings)
    if isinstance(value, Model):
        return changed_settings(value)
    if is_dataclass(value):
        return {item.name: getattr(value, item.name) for item in fields(value)}
    return {key: part for key, part in getattr(value, "__dict__", {}).items() if not key.startswith("_")}


def _text(value: str) -> str:
    """A text, or what the file that it is the path of holds."""
    try:
        path = Path(value).expanduser()
        if path.is_file():
            with path.open("rb") as file:
                return f"file {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except (OSError, ValueError, RuntimeError):
        pass
    return _short(value)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}... {_hash(text.encode())}"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


# ---- the scheduler ----------------------------------------------------------------------------------


def _scheduler(module: TrainedModule) -> Any:
    """The scheduler of a run, built on an optimizer of its own."""
    assert module.lr_scheduler is not None
    parameter = torch.nn.Parameter(torch.zeros(len(module.seeds), 1))
    optimizer = member_optimizer([("w", parameter)], module.optimizer, module.gradient_clip)
    return build_scheduler(module.lr_scheduler, optimizer)


def _add_scheduler(name: str, scheduler: LRScheduler | ReduceLROnPlateau, found: dict[str, Any]) -> None:
    found[name] = type(scheduler).__qualname__
    for key, value in scheduler.state_dict().items():
        if key == "_schedulers":
            for index, inner in enumerate(scheduler._schedulers):  # type: ignore[union-attr]
                _add_scheduler(f"{name}[{index}]", inner, found)
        elif key not in _MOVING and not key.startswith("_"):
            _add(f"{name}.{key}", value, found)
