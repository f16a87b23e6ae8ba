"""Changes of a condition: settings of the recipe by their keys, for example ``model.transformer.heads``.

A key is what follows ``--`` on the line of ``opsin fit``, with dots. ``init_args`` may be left out of it, and a number
chooses an entry of a list: ``trainer.callbacks.0.every``. What moves the weights has a value for every member; all
other changes shape the run of a chunk.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from itertools import permutations
from typing import Any

from opsin.errors import ConfigError, nearest
from opsin.optimizers.adam import SHORT_FORM
from opsin.population.optimizers import ADAMW, PER_MEMBER

CHANGEABLE = ("task", "model", "trainer.callbacks")
"""Sections of a recipe that a condition may change."""

SHARED = {
    "model.seed": "; population.seeds chooses it",
    "model.initial": "; `initial` of a condition says what its members start from",
    **dict.fromkeys(("model.steps_per_batch", "model.log_every", "model.threads", "model.compile"), ""),
}
"""Settings of these sections that all members share all the same, and what is said of them."""

OPTIMIZER_KEY = "model.optimizer"

KeyPath = tuple[str, ...]
"""Parts of a key, with ``init_args`` wherever a class has settings."""


def full_changes(field: str, changes: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Changes under full keys, with ``init_args``.

    Args:
        field: where the changes stand, for messages.
        changes: value of each changed setting by its key.
        recipe: resolved recipe that is changed, as plain settings.

    Raises:
        ConfigError: a key that the recipe has not, one that all members share, or two keys for one setting.
    """
    known = _with_optimizer(recipe)
    classes = {key.removesuffix(".class_path") for key in changes if key.endswith(".class_path")}
    opened = {path for key in classes if (path := _path_of(known, key, ())) is not None}
    found = {}
    for key, value in changes.items():
        path = _path_of(known, key, opened)
        if path is None:
            raise ConfigError(
                field, key, nearest(_without_init_args(key), [*_known_keys(known)], "a setting of the recipe")
            )
        full = ".".join(path)
        _refuse_shared(field, key, full)
        if full in found:
            raise ConfigError(field, key, f"every setting once: another key changes {full}, too")
        found[full] = value
    for part, whole in permutations(found, 2) if len(found) > 1 else ():
        if part.startswith(f"{whole}."):
            raise ConfigError(field, part, f"none beside {whole}, of which it is a part")
    return found


def change_recipe(recipe: MutableMapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Change a recipe in place; where a class is replaced, its settings begin with their defaults.

    Args:
        recipe: resolved recipe, as plain settings.
        changes: value of each changed setting by its full key.
    """
    if any(key.split(".")[:2] == ["model", "network"] for key in changes):
        # the short form, which is not used beside another model
        recipe["model"].pop("transformer", None)
    for key, value in sorted(changes.items(), key=lambda item: not item[0].endswith(".class_path")):
        *path, last = key.split(".")
        holder: Any = recipe
        for part in path:
            holder = _standing_at(holder, part)
        if last == "class_path" and holder.get(last) != value:
            holder.clear()
        holder[int(last) if isinstance(holder, list) else last] = copy.deepcopy(value)


def with_full_changes(field: str, settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A condition whose changes have full keys, those of its optimizer beside them as if written by themselves.

    Args:
        field: where the changes stand, for messages.
        settings: plain settings of the condition.
        recipe: resolved recipe of the population, as plain settings.

    Raises:
        ConfigError: a change that cannot be, or a setting that the condition changes twice.
    """
    changes = full_changes(field, settings.get("set") or {}, recipe)
    found = {**settings, "set": {key: value for key, value in changes.items() if not _is_of_members(key)}}
    for name in settings.get("task") or {}:
        if any(key.split(".")[:3] == ["task", "init_args", name] for key in changes) or "task" in changes:
            raise ConfigError(field, f"task.init_args.{name}", "none: `task` of the condition changes it, too")
    optimizer = copy.deepcopy(dict(settings.get("optimizer") or {}))
    for key, value in changes.items():
        if _is_of_members(key):
            _add_of_members(field, key, value, found, optimizer)
    if optimizer:
        found["optimizer"] = optimizer
    for name in PER_MEMBER:
        if found.get(name) is not None and name in (optimizer.get("init_args") or {}):
            raise ConfigError(field, f"model.{name}", f"none beside {OPTIMIZER_KEY}.init_args.{name}")
    return found


# ---- what moves the weights -------------------------------------------------------------------------


def _is_of_members(key: str) -> bool:
    """Whether a setting has a value for every member of a chunk."""
    return key in {f"model.{name}" for name in SHORT_FORM} or f"{key}.".startswith(f"{OPTIMIZER_KEY}.")


def _add_of_members(field: str, key: str, value: Any, settings: dict[str, Any], optimizer: dict[str, Any]) -> None:
    """Add a change of what moves the weights to the settings of a condition and to those of its optimizer."""
    name = key.rpartition(".")[2]
    if key == f"model.{name}" and name in PER_MEMBER:
        if value is None or isinstance(value, list):
            raise ConfigError(f"{field}.{key}", value, "one number: a condition is one setting")
        _set_once(field, key, settings, name, value)
    elif key == OPTIMIZER_KEY:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{field}.{key}", value, "class_path and init_args, or one of them")
        for part in ("class_path", "init_args"):
            if part in value:
                _set_once(field, key, optimizer, part, value[part])
    elif key in (f"{OPTIMIZER_KEY}.class_path", f"{OPTIMIZER_KEY}.init_args"):
        _set_once(field, key, optimizer, name, value)
    else:
        _set_once(field, key, optimizer.setdefault("init_args", {}), name, value)


def _set_once(field: str, key: str, settings: dict[str, Any], name: str, value: Any) -> None:
    if settings.get(name) is not None:
        raise ConfigError(field, key, f"none: the condition has {name} = {settings[name]!r} already")
    settings[name] = value


# ---- keys -------------------------------------------------------------------------------------------


def _path_of(recipe: Mapping[str, Any], key: str, opened: Collection[KeyPath]) -> KeyPath | None:
    """The parts of a key with ``init_args`` filled in; None where the recipe has no such setting.

    Args:
        recipe: resolved recipe, as plain settings.
        key: key of a setting.
        opened: paths of what has another class, whose settings are not known before it is built.
    """
    path: list[str] = []
    value: Any = recipe
    parts = key.split(".")
    for index, part in enumerate(parts):
        is_open = tuple(path) in opened
        if part not in ("class_path", "init_args") and (is_open or _has_class(value)):
            path.append("init_args")
            value = {} if is_open else value.get("init_args") or {}
        if is_open:
            return (*path, *parts[index:])
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            return None
        path.append(part)
    return tuple(path)


def _has_class(value: Any) -> bool:
    return isinstance(value, Mapping) and "class_path" in value


def _with_optimizer(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with the optimizer that its short form stands for."""
    model = recipe["model"]
    if model.get("optimizer") is not None:
        return dict(recipe)
    short = {"class_path": ADAMW, "init_args": {name: model.get(name) for name in SHORT_FORM}}
    return {**recipe, "model": {**model, "optimizer": short}}


def _refuse_shared(field: str, key: str, full: str) -> None:
    may_change = any(f"{full}.".startswith(f"{section}.") for section in CHANGEABLE)
    if full in SHARED or full == "model" or not may_change:
        hint = SHARED.get(full, "")
        expected = f"a setting of task, model or trainer.callbacks; all members share this one{hint}"
        raise ConfigError(field, key, expected)


def _known_keys(recipe: Mapping[str, Any]) -> Iterator[str]:
    """Keys of what a condition may change, without ``init_args``."""
    for section in CHANGEABLE:
        value: Any = recipe
        for part in section.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        yield from (key for key in _keys_in(value, section) if key not in SHARED)


def _keys_in(value: Any, key: str) -> Iterator[str]:
    yield key
    inside = (value.get("init_args") or {}) if _has_class(value) else value
    if isinstance(inside, Mapping):
        for name, entry in inside.items():
            yield from _keys_in(entry, f"{key}.{name}")
    elif isinstance(inside, list) and any(isinstance(entry, Mapping) for entry in inside):
        for index, entry in enumerate(inside):
            yield from _keys_in(entry, f"{key}.{index}")


def _without_init_args(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != "init_args")


def _standing_at(holder: Any, part: str) -> Any:
    """What stands under a part of a key; settings by name where nothing does."""
    if isinstance(holder, list):
        return holder[int(part)]
    if holder.get(part) is None:
        holder[part] = {}
    return holder[part]
