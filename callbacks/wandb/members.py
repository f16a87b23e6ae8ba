"""What Weights & Biases receives of each member: its name, its group and tags, its own settings, its own summary.

Legend: I interventions and changes of weights, M members.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from inspect import signature
from typing import Any

import numpy as np
import yaml
from jaxtyping import Bool

from opsin.callbacks.readers.run_folder import KeepRun
from opsin.model.saved import class_path
from opsin.model.transformer import Transformer
from opsin.population.chunks import recipe_of_member
from opsin.population.folder import rows_of_chunk
from opsin.training.module import OpsinModule

LONGEST_TAG = 64
"""Characters; W&B refuses a run with a longer one."""

OF_THE_PLAN = ("plan", "interventions")
"""Keys of the summary whose lists have one entry an intervention and not one a member."""


def about_members(
    module: OpsinModule, keeper: KeepRun | None, name: str | None, group: str | None, tags: Sequence[str]
) -> list[dict[str, Any]]:
    """Name, group, tags and configuration of every member's W&B run, as ``wandb.init`` takes them.

    A member of a population is called ``CONDITION seed N`` and tagged with both, in the group of the population's
    folder; one of several seeds ``NAME seed N`` and tagged with its seed, in the group of the run's folder. A run of
    one model has only what the user gave it, and its folder's name.

    Args:
        module: module whose members are described.
        keeper: callback that keeps the run, which may be a population's chunk; None where nothing keeps it.
        name, group, tags: settings that the user gave, which come before what the population adds.
    """
    config = resolved_config(module, keeper.config if keeper else None)
    folder = keeper.folder.absolute() if keeper else None
    population, rows = (folder and rows_of_chunk(folder)) or (folder, [])
    title = name or (None if rows or folder is None else folder.name)
    apart = bool(rows) or module.n_members > 1
    found = []
    for slot, seed in enumerate(module.seeds):
        settings = recipe_of_member(config, slot) | {"seed": seed, "plan": plan_of(module, slot)}
        words = [f"seed {seed}"] if apart else []
        if rows:
            settings |= {name: rows[slot][name] for name in ("condition", "member")}
            words = [rows[slot]["condition"], *words]
        about = {
            "name": " ".join(filter(None, (title, *words))) or None,
            "group": group or (population.name if apart and population else None),
            "tags": [*dict.fromkeys([*tags, *(word[:LONGEST_TAG] for word in words)])],
        }
        found.append({**about, "config": settings})
    return found


def resolved_config(module: OpsinModule, text: str | None) -> dict[str, Any]:
    """The resolved configuration (YAML) or, without one, the module's settings; with the digest of the plan."""
    config = yaml.safe_load(text) if text else None
    if not isinstance(config, dict):
        settings = {name: getattr(module, name, None) for name in signature(type(module)).parameters}
        short = isinstance(module.network, Transformer)
        settings["transformer"], settings["network"] = module.network if short else None, as_part(module.network, short)
        settings["optimizer"] = as_part(module.optimizer, module.has_short_form)
        config = {
            "task": {"class_path": type(module.task).__name__, "init_args": plain(vars(module.task))},
            "model": plain(settings | {"seed": module.seeds, "compile": module.compile_setting}),
            "trainer": {"max_steps": module.trainer.max_steps},
        }
    return {**config, "plan_digest": module.plan.digest()}


def as_part(part: object, short: bool) -> dict[str, Any] | None:
    """A model or an optimizer as a recipe names it; None where the recipe has it in its short form.

    Args:
        part: the model or the optimizer of a run.
        short: whether the recipe gives its settings without a class.
    """
    return None if short else {"class_path": class_path(type(part)), "init_args": plain(vars(part))}


def plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The public attributes that JSON can hold."""
    kept = {}
    for name, value in attributes.items():
        if name.startswith("_"):
            continue
        try:
            kept[name] = json.loads(json.dumps(value, default=asdict))
        except TypeError:
            continue
    return kept


def plan_of(module: OpsinModule, slot: int) -> list[dict[str, str]]:
    """What is done to one member, as ``opsin sites`` prints it."""
    plan, covers = module.plan, _covers(module)
    return [line for row, line in zip(plan.rows, plan.describe(), strict=True) if covers[row.gate, slot]]


def _covers(module: OpsinModule) -> Bool[np.ndarray, "I M"]:
    return module.plan.covered_members(module.n_members)


def summary_of(module: OpsinModule, slot: int) -> dict[str, Any]:
    """One member's part of the run's summary, and how it ended if that was before the others."""
    found = dict(module.summary)
    if module.n_members > 1:
        # what readers found of every member
        lists = {name: rows for name, rows in found.items() if name not in OF_THE_PLAN and isinstance(rows, list)}
        found |= {name: rows[slot] for name, rows in lists.items() if len(rows) == module.n_members}
    found |= found.pop("members", {})
    if "plan" in found:
        found["plan"] = plan_of(module, slot)
    if "interventions" in found:
        rows = zip(found["interventions"], _covers(module)[:, slot], strict=True)
        found["interventions"] = [_cut(row, slot) for row, covered in rows if covered]
    return found | module.ended.get(slot, {})


def _cut(row: Mapping[str, Any], slot: int) -> dict[str, Any]:
    """A row of counts with the numbers of one member alone."""
    return {name: value[slot] if isinstance(value, list) else value for name, value in row.items()}
