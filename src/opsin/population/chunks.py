"""Populations: the members, seeds x conditions, and how they are cut into chunks that train in one process each.

A chunk is an ordinary run of several members. Members share a chunk only if they share its graph: the same task and the
same passes, so that no member pays for a pass that only another needs.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from opsin.errors import ConfigError
from opsin.population.changes import change_recipe, with_full_changes
from opsin.population.grid import GridValues, crossed_conditions
from opsin.population.optimizers import PER_MEMBER, optimizer_of_member, set_optimizer

NOT_IN_CHUNKS = ("population", "run_folder", "tune")
"""Settings of a recipe that its chunks do not have."""


@dataclass(frozen=True)
class Member:
    """One model of a population.

    Args:
        member: number of the member in the population, from 0.
        condition: name of the condition that it is trained under.
        seed: seed of its initial weights and of its data.
        seed_index: index of that seed among the seeds of its condition, from 0.
    """

    member: int
    condition: str
    seed: int
    seed_index: int


ConditionWindows = Mapping[str, Mapping[str, int] | None]
"""Start, length and unit of the window that each condition is, by name; None for one that is no window."""


class ExpandedConditions(NamedTuple):
    """Conditions of a recipe, those of windows and of a grid among them.

    Args:
        settings: plain settings of every condition, by name.
        windows: the window that each is; empty where the recipe has no windows.
        crossed: value of each key of the grid, by name of the condition; empty where the recipe has no grid.
    """

    settings: dict[str, dict[str, Any]]
    windows: ConditionWindows
    crossed: GridValues


@dataclass(frozen=True)
class UntrainedPopulation:
    """A population before it is trained.

    Args:
        recipe: resolved recipe of the population, as plain settings.
        conditions: plain settings of every condition, by name.
        windows: start, length and unit of the window that a condition is, by name; None for a condition that is no
            window. Empty where the recipe has no windows.
        crossed: value of each key of the recipe's grid, by name of the condition. Empty where it has no grid.
        members: all members, in the order of their numbers.
        graphs: what the graph of every condition depends on, by name; members of equal graphs may share a chunk.
        fit: number of members of the largest model that fit into the memory of one process.
    """

    recipe: Mapping[str, Any]
    conditions: Mapping[str, Mapping[str, Any]]
    windows: ConditionWindows
    crossed: GridValues
    members: Sequence[Member]
    graphs: Mapping[str, Hashable]
    fit: int


@dataclass(frozen=True)
class Chunking:
    """How many members train in one process, and how many processes at once.

    Args:
        processes: number of processes that train at once, each a chunk on one thread.
        members_per_process: largest number of members in one chunk.
        chosen_by: what chose that number: ``recipe``, ``rule`` (by the machine) or ``timing`` (``--tune``).
        tried: member-steps per second of all processes by number of members, where timing chose; else None.
    """

    processes: int
    members_per_process: int
    chosen_by: str
    tried: Mapping[str, float] | None = None

    def as_settings(self) -> dict[str, Any]:
        """What ``population.json`` holds of it under ``arrangement``."""
        return {name: value for name, value in vars(self).items() if value is not None}


def expanded(recipe: Mapping[str, Any]) -> ExpandedConditions:
    """The conditions of a resolved recipe as plain settings; those of windows or of a grid come last.

    Args:
        recipe: resolved recipe of a population, as plain settings.

    Raises:
        ConfigError: a grid that cannot be, or a change of a setting that a condition cannot change.
    """
    population = recipe["population"]
    conditions = {name: dict(settings or {}) for name, settings in (population.get("conditions") or {}).items()}
    crossed = {} if population.get("grid") is None else crossed_conditions(population["grid"])
    for name, values in crossed.items():
        if name in conditions:
            raise ConfigError("population.conditions", name, "another name: a condition of population.grid has it")
        conditions[name] = {"set": values}
    changed = {name: _with_full_changes(name, settings, recipe, crossed) for name, settings in conditions.items()}
    windows = population.get("windows")
    if windows is None:
        return ExpandedConditions(changed or {"all": {}}, {}, crossed)
    return _with_windows(changed or {"none": {}}, windows)


def _with_full_changes(
    name: str, settings: dict[str, Any], recipe: Mapping[str, Any], crossed: GridValues
) -> dict[str, Any]:
    field = "population.grid" if name in crossed else f"population.conditions.{name}.set"
    return with_full_changes(field, settings, recipe) if settings.get("set") else settings


def condition_label(name: str, crossed: GridValues) -> str:
    """What messages call a condition.

    Args:
        name: name of the condition.
        crossed: value of each key of the recipe's grid, by name of the condition.
    """
    return f"population.grid: {name}" if name in crossed else f"population.conditions.{name}"


def _with_windows(conditions: dict[str, dict[str, Any]], settings: Mapping[str, Any]) -> ExpandedConditions:
    windows: dict[str, dict[str, int] | None] = dict.fromkeys(conditions)
    for start in settings["starts"]:
        for length in settings["lengths"]:
            name = f"start_{start}_length_{length}"
            schedule = {"start": start, "stop": start + length, "unit": settings["unit"]}
            conditions[name] = {"callbacks": [_scheduled(c, schedule) for c in settings["callbacks"]]}
            windows[name] = {"start": start, "length": length, "unit": settings["unit"]}
    return ExpandedConditions(conditions, windows, {})


def _scheduled(callback: Mapping[str, Any], schedule: dict[str, Any]) -> dict[str, Any]:
    settings = copy.deepcopy(dict(callback))
    settings.setdefault("init_args", {})["schedule"] = schedule
    return settings


def members_of(seeds: int | Sequence[int], first: int, conditions: Sequence[str], paired: bool) -> list[Member]:
    """All members, condition by condition.

    Args:
        seeds: list of the seeds, or how many from ``first`` on.
        first: first of the seeds where only their number is given.
        conditions: names of the conditions, in the recipe's order.
        paired: whether all conditions have the same seeds; else no two members share one.
    """
    chosen = list(range(first, first + seeds)) if isinstance(seeds, int) else list(seeds)
    # without pairing, seeds that no other condition has
    step = 0 if paired else max(chosen) - min(chosen) + 1
    return [
        Member(index * len(chosen) + seed_index, name, seed + index * step, seed_index)
        for index, name in enumerate(conditions)
        for seed_index, seed in enumerate(chosen)
    ]


def cut_into_chunks(
    members: Sequence[Member], graphs: Mapping[str, Hashable], chunking: Chunking
) -> list[list[Member]]:
    """Chunks, largest first: members of one graph, at most so many, all processes busy where members suffice.

    Args:
        members: all members of the population.
        graphs: what the graph of every condition depends on, by name; members of equal graphs may share a chunk.
        chunking: number of processes, and largest number of members in a chunk.
    """
    groups: dict[Hashable, list[Member]] = defaultdict(list)
    for member in members:
        groups[graphs[member.condition]].append(member)
    # an even share keeps the last process from working alone at the end
    share = max(1, -(-len(members) // chunking.processes))
    chunks: list[list[Member]] = []
    for group in groups.values():
        size = min(chunking.members_per_process, share, len(group))
        parts = -(-len(group) // size)
        bounds = [round(part * len(group) / parts) for part in range(parts + 1)]
        chunks += [group[a:b] for a, b in pairwise(bounds)]
    return sorted(chunks, key=len, reverse=True)


def condition_recipe(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved recipe of a run under a condition, without what is of a single member: seed, optimizer, writers.

    Args:
        recipe: resolved recipe of the population, as plain settings.
        settings: plain settings of the condition, whose changes have full keys.
    """
    found = copy.deepcopy({name: value for name, value in recipe.items() if name not in NOT_IN_CHUNKS})
    found["task"]["init_args"] = merged(found["task"].get("init_args") or {}, settings.get("task") or {})
    found["trainer"]["callbacks"] = listed(found["trainer"].get("callbacks"))
    change_recipe(found, settings.get("set") or {})
    return found


def chunk_recipe(recipe: Mapping[str, Any], conditions: Mapping[str, Any], members: Sequence[Member]) -> dict[str, Any]:
    """The resolved recipe of one chunk: an ordinary run, which trains without the rest of the population.

    Args:
        recipe: resolved recipe of the population, as plain settings.
        conditions: plain settings of every condition, by name.
        members: members of the chunk, by slot.
    """
    settings_of = [conditions[member.condition] or {} for member in members]
    found = condition_recipe(recipe, settings_of[0])
    model = found["model"]
    model["seed"] = [member.seed for member in members]
    set_optimizer(model, settings_of)
    paths = [settings.get("initial") for settings in settings_of]
    starts = [
        None if path is None else {"path": path, "place": m.seed_index} for path, m in zip(paths, members, strict=True)
    ]
    model["initial"] = starts if any(starts) else None
    found["trainer"]["callbacks"] = _callbacks(found["trainer"].get("callbacks"), conditions, members)
    found["trainer"]["enable_progress_bar"] = False
    return found


def _callbacks(common: Any, conditions: Mapping[str, Any], members: Sequence[Member]) -> list[dict[str, Any]]:
    found = listed(common)
    for callback in found:
        _refuse_members(callback, "trainer.callbacks")
    for name in dict.fromkeys(member.condition for member in members):
        slots = {member.seed: slot for slot, member in enumerate(members) if member.condition == name}
        settings = conditions[name] or {}
        for callback in settings.get("callbacks") or []:
            found.append(_acting_in([*slots.values()], callback, f"population.conditions.{name}.callbacks"))
        for seed, callbacks in (settings.get("by_seed") or {}).items():
            where = f"population.conditions.{name}.by_seed.{seed}"
            # a file has names where Python has numbers
            if int(seed) in slots:
                found += [_acting_in([slots[int(seed)]], callback, where) for callback in callbacks]
    return found


def _acting_in(slots: list[int], callback: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A callback of a condition as one of its chunk, for the members at these slots."""
    _refuse_members(callback, where)
    settings = copy.deepcopy(dict(callback))
    settings.setdefault("init_args", {})["members"] = slots
    return settings


def _refuse_members(callback: Mapping[str, Any], where: str) -> None:
    # the numbers would be slots of every chunk, whichever members it holds
    members = (callback.get("init_args") or {}).get("members")
    if members is not None:
        raise ConfigError(where, {"members": members}, "no members: a condition chooses them")


def listed(callbacks: Any) -> list[dict[str, Any]]:
    """The callbacks of a resolved recipe, which may have none, or one without a list around it."""
    return list(callbacks) if isinstance(callbacks, list) else [callbacks] if callbacks else []


def merged(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with some replaced; settings inside settings are merged, too."""
    found = dict(settings)
    for name, value in overrides.items():
        inside = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = merged(found[name], value) if inside else value
    return found


def population_document(
    chunks: Sequence[Sequence[Member]], conditions: Sequence[str], **settings: Any
) -> dict[str, Any]:
    """The content of ``population.json``.

    Args:
        chunks: members of every chunk, by slot.
        conditions: names of the conditions, in the recipe's order.
        settings: further entries of the document, by name.
    """
    rows = [
        {**_member_entry(member), "chunk": number, "slot": slot}
        for number, chunk in enumerate(chunks)
        for slot, member in enumerate(chunk)
    ]
    return {"members": sorted(rows, key=lambda row: row["member"]), "conditions": list(conditions), **settings}


def _member_entry(member: Member) -> dict[str, Any]:
    return {"member": member.member, "condition": member.condition, "seed": member.seed, "place": member.seed_index}


def recipe_of_member(recipe: Mapping[str, Any], member: int) -> dict[str, Any]:
    """The resolved recipe of one member of a run, as a run of its own; of a single run, the recipe itself.

    Args:
        recipe: resolved recipe of the run, as plain settings.
        member: index of the member in the run, its slot where the run is a chunk.
    """
    found = copy.deepcopy(dict(recipe))
    model, seeds = found["model"], recipe["model"]["seed"]
    if isinstance(seeds, int) or len(seeds) == 1:
        return found
    model["seed"] = seeds[member]
    for name in PER_MEMBER:
        if isinstance(model.get(name), list):
            model[name] = model[name][member]
    if model.get("optimizer"):
        model["optimizer"] = optimizer_of_member(model["optimizer"], member)
    if model.get("initial"):
        model["initial"] = [model["initial"][member]]
    callbacks = listed(found["trainer"].get("callbacks"))
    found["trainer"]["callbacks"] = [
        _for_member(callback, member) for callback in callbacks if _acts_in(callback, member)
    ]
    return found


def _acts_in(callback: Mapping[str, Any], member: int) -> bool:
    chosen = (callback.get("init_args") or {}).get("members")
    return chosen is None or member in chosen


def _for_member(callback: Mapping[str, Any], member: int) -> dict[str, Any]:
    found = dict(callback)
    settings = dict(found.get("init_args") or {})
    if "members" in settings:
        settings["members"] = None
    # Reinitialise has a draw for every member
    if isinstance(settings.get("seed"), list):
        settings["seed"] = settings["seed"][member]
    return found | {"init_args": settings}
