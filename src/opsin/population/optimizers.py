"""The optimizer of a chunk: what the recipe says, and for each member what its condition changes.

Settings are plain, as files have them. Members of one chunk have the same class and the same settings that shape its
graph; hyper-parameters become lists with a value for each member where they differ.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from opsin.errors import ConfigError
from opsin.optimizers.adam import SHORT_FORM
from opsin.optimizers.base import Optimizer, is_per_member

PER_MEMBER = ("learning_rate", "weight_decay")
"""Settings of the short form that may differ between members, and that a condition has under the same names."""

ADAMW = "opsin.optimizers.AdamW"


def set_optimizer(model: MutableMapping[str, Any], conditions: Sequence[Mapping[str, Any]]) -> None:
    """Write the optimizer of a run into the section ``model`` of its recipe, in place.

    Args:
        model: settings of the module, with the optimizer of the recipe.
        conditions: settings of every member's condition, by slot.

    Raises:
        ConfigError: a condition with a list in place of one value.
    """
    chosen = [_chosen(model, settings) for settings in conditions]
    if not all(chosen):
        for name in PER_MEMBER:
            values = [model.get(name) if (value := settings.get(name)) is None else value for settings in conditions]
            if any(value is not None for value in values):
                model[name] = _joined(values)
        return
    for name in SHORT_FORM:
        model.pop(name, None)
    paths, settings = [path for path, _ in chosen], [init_args for _, init_args in chosen]  # type: ignore[misc]
    init_args = {name: _joined([one.get(name) for one in settings]) for name in settings[0]}
    model["optimizer"] = {"class_path": paths[0], "init_args": init_args}


def _chosen(model: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Class and settings of one member's optimizer; None where recipe and condition have the short form."""
    base, change = model.get("optimizer"), settings.get("optimizer") or {}
    if base is None and not change:
        return None
    base = base or {"class_path": ADAMW, "init_args": {name: model[name] for name in SHORT_FORM if name in model}}
    path, given = change.get("class_path", base["class_path"]), change.get("init_args") or {}
    for name, value in given.items():
        if (kind := optimizer_class(path)) and is_per_member(kind, name, value) and name in kind.hyper_names:
            raise ConfigError(f"optimizer.init_args.{name}", value, "one value: a condition is one setting")
    kept = base.get("init_args") or {} if path == base["class_path"] else {}
    rates = {name: settings[name] for name in PER_MEMBER if settings.get(name) is not None}
    return path, {**_defaults(path), **kept, **given, **rates}


def _joined(values: Sequence[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else list(values)


def optimizer_class(path: str) -> type[Optimizer] | None:
    """The class at a path; None where there is no such optimizer, which whoever builds the run says.

    Args:
        path: path of the class with dots, as a recipe has it.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None) if module else None
    except ImportError:
        return None
    return found if inspect.isclass(found) and issubclass(found, Optimizer) else None


def _defaults(path: str) -> dict[str, Any]:
    """Settings that a class has where a recipe gives none, as a file would have them."""
    kind = optimizer_class(path)
    settings = inspect.signature(kind).parameters.values() if kind else ()
    plain = {setting.name: setting.default for setting in settings if setting.default is not setting.empty}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def lists_of_members(spec: Mapping[str, Any] | None) -> dict[str, list[Any]]:
    """Hyper-parameters of an optimizer that have a value for each member, by name.

    Args:
        spec: class path and settings of the optimizer, or None for the short form.
    """
    kind = optimizer_class(spec["class_path"]) if spec else None
    if spec is None or kind is None:
        return {}
    given = spec.get("init_args") or {}
    return {name: given[name] for name in kind.hyper_names if name in given and is_per_member(kind, name, given[name])}


def optimizer_of_member(spec: Mapping[str, Any], member: int) -> dict[str, Any]:
    """The optimizer of a run of one member alone.

    Args:
        spec: class path and settings of the optimizer of all members.
        member: index of the member in the run.
    """
    alone = {name: values[member] for name, values in lists_of_members(spec).items()}
    return {**spec, "init_args": {**(spec.get("init_args") or {}), **alone}}
