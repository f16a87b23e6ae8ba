"""A resume proves that it is the same run: the settings of a checkpoint are compared with those of the run, by name.

A difference refuses the run, unless ``--allow NAME`` names it. What is allowed takes effect from the checkpoint's step
on and is recorded.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from opsin.errors import ConfigError, log
from opsin.training.optimizers import member_groups
from opsin.training.run_settings import TrainedModule, digest

FIXED = ("model.transformer", "model.network", "model.steps_per_batch", "version")
"""Settings that cannot change within a run, whoever allows it: weights or counts would not fit."""

OPTIMIZER = {"model.gradient_clip": "clip", "model.betas": "betas"}
"""Settings that the state of the optimizer holds, and their names there."""

SCHEDULER = "model.lr_scheduler"
_ABSENT = "none"


def identity_of_run(
    settings: Mapping[str, Any], surroundings: Mapping[str, Any], allowed: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a checkpoint says of its run.

    Args:
        settings: named settings that determine the numbers.
        surroundings: what may change their last digits, by name.
        allowed: changes that the user has allowed so far.
    """
    return {
        "digest": digest(settings),
        "settings": dict(settings),
        "surroundings": dict(surroundings),
        "allowed": [dict(change) for change in allowed],
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Names of the settings that differ, with their values before and now; ``"none"`` where there is none.

    Args:
        before: named settings of a checkpoint.
        now: named settings of the run that is to go on from it.
    """
    names = [*before, *(name for name in now if name not in before)]
    pairs = {name: (before.get(name, _ABSENT), now.get(name, _ABSENT)) for name in names}
    found = {name: (old, new) for name, (old, new) in pairs.items() if not _equal(old, new)}
    # a hash of the data names no setting: the others do
    if len(found) > 1 and any(name.startswith(("task.", "model.seed")) and name != "task.draws" for name in found):
        found.pop("task.draws", None)
    return found


def _equal(one: Any, other: Any) -> bool:
    # as text, since no number that is none equals itself
    return one == other or json.dumps(one) == json.dumps(other)


def check_same_run(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str], step: int
) -> list[dict[str, Any]]:
    """Refuse to go on with another run's settings.

    Args:
        before: named settings of the checkpoint.
        now: named settings of the run that is to go on from it.
        allowed: names that may differ; one that ends before a dot allows what it has inside.
        step: number of optimizer steps that the checkpoint has seen.

    Returns:
        The changes that were allowed: setting, what it was, what it is, and the step.

    Raises:
        ConfigError: names the setting that differs.
    """
    for name in allowed:
        if not any(_permits(name, setting) for setting in (*before, *now)):
            near = difflib.get_close_matches(name, [*now], n=1) or sorted(now)[:1]
            raise ConfigError("--allow", name, f"a setting that determines numbers, for example {near[0]}")
    found = differences(before, now)
    refused = [name for name in found if not any(_permits(allow, name) for allow in allowed) or _is_fixed(name)]
    if refused:
        old, new = found[refused[0]]
        further = f"; {', '.join(refused[1:4])} differ as well" if refused[1:] else ""
        expected = f"{_excerpt(old, new)!r} as the run was begun with{further}; {_way_out(refused[0])}"
        raise ConfigError(refused[0], _excerpt(new, old), expected)
    changes = [{"setting": name, "from": old, "to": new, "step": step} for name, (old, new) in found.items()]
    for change in changes:
        log.warning(
            f"opsin: from step {step:,} on with {change['setting']} {change['to']!r} in place of {change['from']!r}"
        )
    return changes


def _permits(allowed: str, setting: str) -> bool:
    return setting == allowed or setting.startswith((allowed + ".", allowed + "["))


def _is_fixed(name: str) -> bool:
    return any(_permits(fixed, name) for fixed in FIXED) or name == SCHEDULER or _is_writer(name)


def _is_writer(name: str) -> bool:
    return not name.startswith(("task", "model.", "trainer.", "version", "StopWhen"))


def _way_out(name: str) -> str:
    if _is_writer(name):
        return "`opsin fork` begins a branch with other interventions"
    if _is_fixed(name):
        return "it cannot change within a run"
    return f"--allow {name} goes on and records it"


def _excerpt(value: Any, other: Any) -> Any:
    """A value as a line shows it: of a long text, where it begins to differ."""
    if isinstance(value, list) and other == _ABSENT:
        return f"{len(value)} intervention{'s' * (len(value) > 1)}"
    if isinstance(value, list) and len(value) == 1:
        value, other = value[0], other[0] if isinstance(other, list) and other else other
    if not (isinstance(value, str) and isinstance(other, str) and len(value) > 60):
        return value
    start = next((i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), 0)
    return "..." + value[max(0, start - 20) : start + 40] + "..."


def warn_of_surroundings(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> None:
    """Say where the last digits of numbers may differ from those of an undisturbed run.

    Args:
        before: surroundings of the checkpoint, by name.
        now: surroundings of the run that goes on from it.
        step: number of optimizer steps that the checkpoint has seen.
    """
    changed = [f"{name} {now.get(name)} ({name} {old} before)" for name, old in before.items() if now.get(name) != old]
    if changed:
        log.warning(f"opsin: {', '.join(changed)}: from step {step:,} on the last digits of numbers may differ")


# ---- what an allowed change does --------------------------------------------------------------------


def apply_changes(checkpoint: dict[str, Any], module: TrainedModule, changes: Sequence[Mapping[str, Any]]) -> None:
    """Put allowed settings in the place of those that the states of optimizer and schedulers hold.

    Args:
        checkpoint: checkpoint that the run goes on from, changed in place.
        module: module of the run, with its settings as they are now.
        changes: changes as ``check_same_run`` returns them.

    Raises:
        ConfigError: rates that are shared between members otherwise than before.
    """
    before = {change["setting"]: change["from"] for change in changes}
    members = len(module.seeds)
    old_rate = before.get("model.learning_rate", module.learning_rate)
    old = member_groups(old_rate, before.get("model.weight_decay", module.weight_decay), members)
    new = member_groups(module.learning_rate, module.weight_decay, members)
    if old[1] != new[1]:
        expected = f"{old_rate!r}, or as many different rates, for the same members"
        raise ConfigError("model.learning_rate", module.learning_rate, expected)
    rates, decays = ([pair[0] for pair in old[0]], [pair[0] for pair in new[0]]), [pair[1] for pair in new[0]]
    held = {key: getattr(module, name.removeprefix("model.")) for name, key in OPTIMIZER.items() if name in before}
    checkpoint["optimizer_states"] = [
        with_rates(state, *rates, decays, held) for state in checkpoint["optimizer_states"]
    ]
    inside = {
        change["setting"].removeprefix(SCHEDULER + "."): change["to"]
        for change in changes
        if change["setting"].startswith(SCHEDULER + ".")
    }
    checkpoint["lr_schedulers"] = [
        {**scheduler_with_rates(state, *rates), **inside} for state in checkpoint["lr_schedulers"]
    ]


def with_rates(
    optimizer: Mapping[str, Any],
    old: Sequence[float],
    new: Sequence[float],
    decays: Sequence[float],
    held: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The state of an optimizer under other rates.

    Args:
        optimizer: state of the optimizer, as in a checkpoint.
        old, new: rates that each group began with, and is to have begun with.
        decays: weight decay of each group from now on.
        held: further settings of all groups, by name.
    """
    groups = [
        {
            **group,
            **(held or {}),
            **{name: _moved(group[name], *rates) for name in ("lr", "initial_lr") if name in group},
            "weight_decay": decay,
        }
        for group, *rates, decay in zip(optimizer["param_groups"], old, new, decays, strict=True)
    ]
    return {**optimizer, "param_groups": groups}


def scheduler_with_rates(state: Mapping[str, Any], old: Sequence[float], new: Sequence[float]) -> dict[str, Any]:
    """The state of a scheduler under other rates.

    Args:
        state: state of the scheduler, as in a checkpoint.
        old, new: rates that each group began with, and is to have begun with.
    """
    found = dict(state)
    for name in ("base_lrs", "_last_lr"):
        if name in found:
            found[name] = [_moved(*rates) for rates in zip(found[name], old, new, strict=True)]
    # a scheduler may be made from schedulers
    if "_schedulers" in found:
        found["_schedulers"] = [scheduler_with_rates(inner, old, new) for inner in found["_schedulers"]]
    return found


def _moved(rate: float, old: float, new: float) -> float:
    """A scheduled rate that began at ``old``, as it would be had it begun at ``new``."""
    # exact where nothing changes, and for a rate that no scheduler has moved
    return rate if new == old else new if rate == old else rate * (new / old)
