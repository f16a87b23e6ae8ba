"""Paths of a recipe: found from the working folder or beside the recipe, and saved so that any folder finds them.

A class says which of its settings are paths: ``path_settings`` of what it reads, ``folder_settings`` of what it writes.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace


class RecipePaths:
    """Finds the paths of a parsed recipe.

    Args:
        recipes: files that the recipe was read from.
        absolute: whether paths of what exists become absolute; else one that is right as it is written stays so.
    """

    def __init__(self, recipes: Sequence[Path], absolute: bool = False) -> None:
        self.absolute, self.folders = absolute, [path.parent for path in reversed(recipes)]

    def locate(self, path: str) -> str:
        """The path of a file or folder that exists; a path of nothing stays as it is written, ``~`` apart.

        Args:
            path: path as the user wrote it, from the working folder or from that of a recipe.
        """
        written = os.path.expanduser(path)
        found = next((str(near) for folder in self.folders if (near := folder / written).exists()), written)
        found = written if os.path.exists(written) else found
        return os.path.abspath(found) if self.absolute and os.path.exists(found) else found

    def fix(self, config: Namespace | dict[str, Any]) -> None:
        """Change the paths of a configuration in place.

        Args:
            config: parsed recipe or plain settings, with all sections that a recipe has.
        """
        self.fix_classes(config)
        for start in config["model"].get("initial") or ():
            self._fix_setting(start, "path")
        population = config.get("population")
        if isinstance(config.get("ckpt_path"), str):
            config["ckpt_path"] = self.locate(config["ckpt_path"])
        if isinstance(config.get("run_folder"), str):
            config["run_folder"] = os.path.expanduser(config["run_folder"])
        if population is not None:
            self._fix_population(population, config)

    def _fix_population(self, population: Any, config: Namespace | dict[str, Any]) -> None:
        settings, task = population.get("init_args", population), _named_class(config["task"]["class_path"])
        self._fix_keys(settings.get("grid") or {}, config)
        for condition in (settings.get("conditions") or {}).values():
            inside = {} if condition is None else condition.get("init_args", condition)
            self._fix_setting(inside, "initial")
            for name in getattr(task, "path_settings", ()):
                self._fix_setting(inside.get("task") or {}, name)
            self._fix_keys(inside.get("set") or {}, config)

    def _fix_keys(self, changes: dict[str, Any], config: Namespace | dict[str, Any]) -> None:
        """Settings by their keys, those that are paths of what has them in the recipe; of a grid lists of values."""
        for key in changes:
            *path, name = (part for part in key.split(".") if part != "init_args")
            if name in getattr(_class_at(config, path), "path_settings", ()):
                self._fix_setting(changes, key)

    def fix_classes(self, settings: Any) -> None:
        """Change the paths among the settings of classes in place.

        Args:
            settings: parsed or plain settings, in which classes may stand anywhere.
        """
        if isinstance(settings, list):
            for entry in settings:
                self.fix_classes(entry)
        if not isinstance(settings, dict | Namespace):
            return
        if isinstance(settings.get("class_path"), str) and settings.get("init_args"):
            described = _named_class(settings["class_path"])
            for name in getattr(described, "path_settings", ()):
                self._fix_setting(settings["init_args"], name)
            for name in getattr(described, "folder_settings", ()):
                if isinstance(folder := settings["init_args"].get(name), str):
                    folder = os.path.expanduser(folder)
                    settings["init_args"][name] = os.path.abspath(folder) if self.absolute else folder
        for entry in (vars(settings) if isinstance(settings, Namespace) else settings).values():
            self.fix_classes(entry)

    def _fix_setting(self, settings: Any, name: str) -> None:
        """One setting that is a path, a list of paths, or something else, which stays."""
        if settings is None or name not in settings:
            return
        settings[name] = self._located(settings[name])

    def _located(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.locate(value)
        return [self._located(entry) for entry in value] if isinstance(value, list) else value


def _class_at(config: Namespace | dict[str, Any], path: Sequence[str]) -> type | None:
    """The class that a recipe names at a key; None where there is none."""
    value: Any = config
    for part in path:
        value = (value.get("init_args") or value).get(part) if isinstance(value, dict | Namespace) else None
    class_path = value.get("class_path") if isinstance(value, dict | Namespace) else None
    return _named_class(class_path) if isinstance(class_path, str) else None


def _named_class(class_path: str) -> type | None:
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None) if module else None
    except ImportError:
        # a class inside of a class; none of Opsin's is
        return None
