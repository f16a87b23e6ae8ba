"""The conditions of a population before it is trained: each is built as it will be, and what is alike only once.

Building a run takes a fifth of a second, which a grid of a thousand conditions has not. Conditions that differ by
hyper-parameters of the optimizer alone are one graph: the first of them is built whole, and with it a member of each
other, as the members of one run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsin.errors import ConfigError
from opsin.launch.recipe import BuiltRun, OpsinCLI, build_run
from opsin.launch.recipe_parser import parser_errors_raised
from opsin.launch.tune import cores, members_that_fit
from opsin.optimizers.adam import SHORT_FORM
from opsin.population.chunks import (
    ExpandedConditions,
    Member,
    chunk_recipe,
    condition_label,
    condition_recipe,
)
from opsin.population.optimizers import ADAMW, optimizer_class
from opsin.records.axes import Axes
from opsin.records.folder import write_yaml
from opsin.training.module import callbacks_of
from opsin.training.monitors import check_recorded_number
from opsin.training.observers import recorded_metrics

OF_WRITERS = ("callbacks", "by_seed", "initial")
"""Settings of a condition that shape neither its task nor its model, and are no hyper-parameters."""

BUILT_TOGETHER = 64
"""Conditions whose hyper-parameters are tried in one run at most."""


@dataclass(frozen=True)
class ConditionBuilder:
    """Builds the conditions of a population, so that one that cannot be trained stops before the folder is made.

    Args:
        recipe: resolved recipe of the population, as plain settings.
        conditions: conditions of the recipe, those of windows and of a grid among them.
        members: members of every condition, by its name.
        scratch: folder in which the recipes that are built are written.
    """

    recipe: Mapping[str, Any]
    conditions: ExpandedConditions
    members: Mapping[str, Sequence[Member]]
    scratch: Path

    def build(self) -> tuple[dict[str, Hashable], int]:
        """What the graph of every condition depends on, and how many members of the largest fit into one process.

        Raises:
            ConfigError: names the condition and its setting.
        """
        groups: dict[str, list[str]] = defaultdict(list)
        for name, settings in self.conditions.settings.items():
            _check_seeds_of_condition(name, settings, [member.seed for member in self.members[name]])
            groups[self._what_shapes_it(name)].append(name)
        graphs: dict[str, Hashable] = {}
        fits = []
        for names in groups.values():
            built = self._built_together(names)
            graphs |= dict.fromkeys(names, self._graph_of(names[0], built))
            fits.append(members_that_fit(built.module, self.recipe["population"].get("processes") or cores()))
        return graphs, min(fits)

    def _is_window(self, name: str) -> bool:
        return self.conditions.windows.get(name) is not None

    def _built(self, name: str, recipe: Mapping[str, Any]) -> BuiltRun:
        """The run of a recipe, whose errors name a condition."""
        path = write_yaml(self.scratch / "condition.yaml", recipe)
        try:
            with parser_errors_raised():
                cli = OpsinCLI(["--config", str(path)])
            built = build_run(cli)
            recorded = callbacks_of(cli.trainer), cli.model.sites, cli.model.task, bool(cli.trainer.limit_val_batches)
            check_compared(self.recipe["population"]["compare"], recorded_metrics(*recorded))
        except ConfigError as error:
            label = condition_label(name, self.conditions.crossed)
            raise ConfigError(f"{label}: {error.field}", error.value, error.expected) from error
        return built

    # ---- what is alike --------------------------------------------------------------------------------

    def _shared_of(self, name: str) -> dict[str, Any]:
        """Settings of a condition's recipe that members of one chunk share."""
        recipe = condition_recipe(self.recipe, self.conditions.settings[name])
        of_members = {*SHORT_FORM, "seed", "initial", "optimizer"}
        model = {setting: value for setting, value in recipe["model"].items() if setting not in of_members}
        return {"task": recipe["task"], "model": model, "callbacks": recipe["trainer"]["callbacks"]}

    def _what_shapes_it(self, name: str) -> str:
        """What a condition has beside hyper-parameters; windows differ by their schedule alone."""
        if self._is_window(name):
            return "window"
        settings = self.conditions.settings[name]
        writers = [settings.get(setting) for setting in OF_WRITERS]
        return _as_text([self._shared_of(name), self._without_hyper(settings.get("optimizer") or {}), writers])

    def _without_hyper(self, optimizer: Mapping[str, Any]) -> dict[str, Any] | None:
        """Settings of a condition's optimizer but its hyper-parameters; None where it changes no optimizer."""
        if not optimizer:
            return None
        base = self.recipe["model"].get("optimizer") or {"class_path": ADAMW}
        kind = optimizer_class(optimizer.get("class_path", base["class_path"]))
        hyper = () if kind is None else kind.hyper_names
        given = optimizer.get("init_args") or {}
        return {**optimizer, "init_args": {name: value for name, value in given.items() if name not in hyper}}

    def _graph_of(self, name: str, built: BuiltRun) -> Hashable:
        optimizer = built.module.optimizer
        kind = "" if built.module.has_short_form else f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        parts = [self._shared_of(name), kind, optimizer.graph_settings() if kind else {}]
        return (_as_text(parts), *built.plan.other_passes())

    def _built_together(self, names: Sequence[str]) -> BuiltRun:
        """The run of the first of some conditions that are alike, with a member of each other; of windows that alone.

        Where one is wrong they are built one by one, so that the error names it.
        """
        first, *more = names[:1] if self._is_window(names[0]) else names
        settings = {name: self._without_writers(name) for name in more} | {first: self.conditions.settings[first]}
        runs = []
        for start in range(0, max(len(more), 1), BUILT_TOGETHER):
            together = more[start : start + BUILT_TOGETHER]
            members = [*self.members[first], *(self.members[name][0] for name in together)]
            run = self._run_or_error(first, chunk_recipe(self.recipe, settings, members))
            if isinstance(run, ConfigError):
                for name in (first, *together):
                    self._built(name, chunk_recipe(self.recipe, self.conditions.settings, self.members[name]))
                raise run
            runs.append(run)
        return runs[0]

    def _run_or_error(self, name: str, recipe: Mapping[str, Any]) -> BuiltRun | ConfigError:
        try:
            return self._built(name, recipe)
        except ConfigError as error:
            return error

    def _without_writers(self, name: str) -> dict[str, Any]:
        return {key: value for key, value in self.conditions.settings[name].items() if key not in OF_WRITERS}


def check_compared(compare: Sequence[str], recorded: Mapping[str, Axes]) -> None:
    """Refuse to compare what runs do not record with one number a member, as a measure of another objective.

    Args:
        compare: names of the metrics that should be compared.
        recorded: axes of each metric that a run records, without that of members, by name.

    Raises:
        ConfigError: names the metric, and the nearest that is recorded.
    """
    for name in compare:
        check_recorded_number("population.compare", name, recorded)


def _check_seeds_of_condition(condition: str, settings: Mapping[str, Any], seeds: Sequence[int]) -> None:
    for seed in settings.get("by_seed") or {}:
        if int(seed) not in seeds:
            expected = f"a seed of it: {', '.join(map(str, seeds))}"
            raise ConfigError(f"population.conditions.{condition}.by_seed", int(seed), expected)


def _as_text(parts: Any) -> str:
    return json.dumps(parts, sort_keys=True, default=repr)
