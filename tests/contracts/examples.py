"""Settings of callbacks and tasks as the documents and the recipes show them, made to fit a run of a few steps."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from opsin.task import Task
from tests.contracts.house import recipes
from tests.helpers.paths import ROOT

INLINE = re.compile(r"`([^`]*\{class_path: opsin[^`]*)`")
FENCED = re.compile(r"```(yaml|python)\n(.*?)```", re.DOTALL)
STEPS = 24
"""Optimizer steps of the longest run in these tests."""

Settings = dict[str, Any]


def described(class_path: str, init_args: Mapping[str, Any]) -> Settings:
    return {"class_path": class_path, "init_args": dict(init_args)}


@cache
def rows() -> tuple[tuple[str, tuple[Settings, ...]], ...]:
    """Callbacks that a document shows side by side, with the file: first docs, then the README."""
    found = []
    for path in (*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"):
        text, name = path.read_text(), str(path.relative_to(ROOT))
        for line in text.splitlines():
            pieces = [item for piece in INLINE.findall(line) for item in _outermost(yaml.safe_load(piece))]
            found += [(name, tuple(pieces))] if pieces else []
        for language, block in FENCED.findall(text):
            shown = list(_outermost(yaml.safe_load(block)) if language == "yaml" else _called_in(block))
            found += [(name, tuple(shown))] if shown else []
    # a writer may show its row in its own docstring
    for path in sorted((ROOT / "callbacks" / "writers").glob("*.py")):
        shown = [
            settings for piece in INLINE.findall(path.read_text()) for settings in _outermost(yaml.safe_load(piece))
        ]
        found += [(str(path.relative_to(ROOT)), tuple(shown))] if shown else []
    return tuple(found)


def _outermost(content: object) -> Iterator[Settings]:
    """Class paths with their settings that stand in no other."""
    if isinstance(content, Mapping) and "class_path" in content:
        yield described(content["class_path"], content.get("init_args") or {})
    elif isinstance(content, Mapping | list):
        for inside in content.values() if isinstance(content, Mapping) else content:
            yield from _outermost(inside)


def _described_in(content: object) -> Iterator[Settings]:
    """Class paths with their settings, those inside of others after them."""
    if isinstance(content, Mapping):
        if str(content.get("class_path", "")).startswith("opsin."):
            yield described(content["class_path"], content.get("init_args") or {})
        for inside in content.values():
            yield from _described_in(inside)
    elif isinstance(content, list | tuple):
        for inside in content:
            yield from _described_in(inside)


def _called_in(code: str) -> Iterator[Settings]:
    """Callbacks that a piece of Python makes from numbers and words."""
    from opsin import callbacks

    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in callbacks.__all__:
            names = list(inspect.signature(getattr(callbacks, node.func.id)).parameters)
            given = dict(zip(names, node.args, strict=False)) | {word.arg: word.value for word in node.keywords}
            settings = {name: ast.literal_eval(value) for name, value in given.items()}
            yield described(f"opsin.callbacks.{node.func.id}", settings)


@cache
def _shown() -> tuple[Settings, ...]:
    """Everything that has a class path, in docs, the README and recipes, in this order."""
    inside = [item for _, row in rows() for item in _described_in(list(row))]
    return (*inside, *(item for path in recipes() for item in _described_in(yaml.safe_load(path.read_text()))))


def examples_of(class_path: str) -> list[Settings]:
    """Settings that documents or recipes give to a class, in the order in which they are shown."""
    return [deepcopy(item) for item in _shown() if item["class_path"] == class_path]


def needs_an_example(kind: type) -> bool:
    """Whether a class cannot be made from its defaults."""
    given = list(inspect.signature(kind).parameters.values())
    return any(item.default is item.empty and item.kind is item.POSITIONAL_OR_KEYWORD for item in given)


def built(settings: Mapping[str, Any]) -> Any:
    """The callback or the task, made as the command line makes it.

    Raises:
        ConfigError: settings that the class refuses.
    """
    parser = _parser(Task if settings["class_path"].startswith("opsin.tasks.") else Callback)
    # the older name is deprecated where the newer one exists
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return make(parser.parse_object({"made": dict(settings)})).made


@cache
def _parser(base: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--made", type=base)
    return parser


def short(settings: Any, donor: Path | None = None, folder: Path | None = None) -> Any:
    """The same settings for a run of ``STEPS`` steps: schedules within it, measurements every few steps.

    Args:
        donor: file that stands in for every donor.
        folder: folder that stands in for every folder.
    """
    if isinstance(settings, list):
        return [short(item, donor, folder) for item in settings]
    if not isinstance(settings, dict):
        return settings
    found = {name: short(value, donor, folder) for name, value in settings.items()}
    if isinstance(found.get("schedule"), dict):
        found["schedule"] = _short_schedule(found["schedule"])
    if donor is not None and "donor" in found:
        found["donor"] = str(donor)
    if folder is not None and "folder" in found:
        found["folder"] = str(folder)
    return found | {name: few for name in found if (few := _few(name))}


def _few(setting: str) -> int | None:
    """Of a setting that counts steps, what suits a short run."""
    if setting == "every" or setting.endswith("_steps"):
        return 4
    return 12 if setting.endswith("_every") else None


def _short_schedule(schedule: Settings) -> Settings:
    late = {name: value for name, value in (("start", 0), ("stop", STEPS), ("period", 4)) if name in schedule}
    kept = {name: schedule[name] for name in ("duty", "random") if name in schedule}
    ramps = {name: 1 for name in ("ramp", "ramp_down") if schedule.get(name)}
    return {**late, **kept, **ramps}


def with_short_cadence(settings: Settings) -> Settings:
    """The same with every cadence that its class has by default set to a few steps."""
    kind = kind_of(settings)
    counted = inspect.signature(kind).parameters.items()
    few = {name: _few(name) for name, parameter in counted if isinstance(parameter.default, int) and _few(name)}
    return {**settings, "init_args": {**few, **settings["init_args"]}}


def kind_of(settings: Mapping[str, Any]) -> type:
    """The class that is described."""
    package, _, name = settings["class_path"].rpartition(".")
    return getattr(__import__(package, fromlist=[name]), name)
