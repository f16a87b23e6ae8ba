"""Forks: what a branch of a run takes over of the run's configuration and of its state.

A branch is an ordinary run. It starts from a checkpoint of the run that it branches from, rewritten for the branch's
own plan: weights, optimizer, schedulers, records and the counts of every intervention that both runs have are taken
over; an intervention that only the branch has begins with no counts.

Legend: M members, I interventions.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions.identity import identity
from opsin.interventions.plan import Plan, PlannedRow
from opsin.launch.recipe import BuiltRun
from opsin.population.chunks import listed, merged
from opsin.population.optimizers import set_optimizer
from opsin.training.module import OpsinModule
from opsin.training.optimizers import member_groups
from opsin.training.same_run import identity_of_run, rates_of, scheduler_with_rates, with_hyper
from opsin.training.weight_updates import no_skipped_updates

BRANCH_SETTINGS = ("callbacks", "learning_rate", "weight_decay", "optimizer", "task", "max_steps")
"""Settings that a branch may change, or add to those of the run that it branches from."""


@runtime_checkable
class Divisible(Protocol):
    """A callback whose saved state has a part for each member."""

    def member_state(self, state: dict[str, Any], member: int) -> dict[str, Any]:
        """The state of a run that has this member alone."""


# ---- the configuration ------------------------------------------------------------------------------


def branch_recipe(recipe: Mapping[str, Any], name: str, settings: Mapping[str, Any], start: Path) -> dict[str, Any]:
    """The resolved recipe of a branch: an ordinary run that starts from a checkpoint.

    Args:
        recipe: resolved recipe of the run that it branches from, which has a single member.
        name: name of the branch, for messages.
        settings: what the branch changes or adds, some of ``BRANCH_SETTINGS``.
        start: path of the checkpoint that the branch starts from.

    Raises:
        ConfigError: an unknown setting.
    """
    for setting, value in settings.items():
        if setting not in BRANCH_SETTINGS:
            raise ConfigError(f"conditions.{name}.{setting}", value, f"one of {', '.join(BRANCH_SETTINGS)}")
    if not isinstance(settings.get("task") or {}, Mapping):
        raise ConfigError(f"conditions.{name}.task", settings["task"], "settings of the task, by name")
    if not isinstance(settings.get("optimizer") or {}, Mapping):
        expected = "class_path and init_args, or one of them"
        raise ConfigError(f"conditions.{name}.optimizer", settings["optimizer"], expected)
    found = copy.deepcopy(dict(recipe)) | {"ckpt_path": str(start)}
    set_optimizer(found["model"], [settings])
    found["task"]["init_args"] = merged(found["task"].get("init_args") or {}, settings.get("task") or {})
    trainer = found["trainer"]
    added = copy.deepcopy(listed(settings.get("callbacks")))
    trainer["callbacks"] = [*listed(trainer.get("callbacks")), *added]
    trainer["enable_progress_bar"] = False
    if settings.get("max_steps") is not None:
        trainer["max_steps"] = settings["max_steps"]
    return found


def check_branch(branch: BuiltRun, trunk: BuiltRun, at: int, steps: int) -> None:
    """Refuse a branch that cannot go on from its run, and one with an intervention that could no longer act.

    Args:
        branch: the branch as a built run.
        trunk: the built run that it branches from, which has a single member.
        at: number of optimizer steps after which the run is forked.
        steps: number of optimizer steps at which the branch ends.

    Raises:
        ConfigError: names the setting.
    """
    if steps <= at:
        raise ConfigError("max_steps", steps, f"more than the fork's step {at}")
    size, batch = trunk.module.task.batch_size, branch.module.task.batch_size
    if batch != size:
        raise ConfigError("task.batch_size", batch, f"{size}, as the run has it, whose records count sequences")
    shapes = {name: tuple(tensor.shape) for name, tensor in trunk.module.state_dict().items()}
    for name, tensor in branch.module.state_dict().items():
        if shapes[name] != tuple(tensor.shape):
            raise ConfigError("task", tuple(tensor.shape), f"{name} of shape {shapes[name]}, as the run has it")
    if _kept_by(branch.module) != _kept_by(trunk.module):
        now, old = (type(run.module.optimizer).__name__ for run in (branch, trunk))
        raise ConfigError("optimizer", now, f"one with the state of {old}, which is taken over")
    plan = branch.plan
    for row, before in enumerate(StateTransfer(trunk.plan, plan).rows):
        schedule = plan.rows[row].schedule
        if before is None and not schedule.strength(np.arange(at, steps), batch).any():
            expected = f"to act in the branch, which has the steps {at} to {steps}"
            raise ConfigError(f"{plan.rows[row].name}.schedule", str(schedule), expected)


def _kept_by(module: OpsinModule) -> dict[str, list[str]]:
    """Names of what the optimizer keeps of every parameter."""
    parameters = module.trained_parameters()
    return {name: [*module.optimizer.start(name, torch.empty_like(x, device="meta"))] for name, x in parameters}


# ---- the state --------------------------------------------------------------------------------------


def state_of_member(saved: Mapping[str, Any], trunk: BuiltRun, alone: BuiltRun, member: int) -> dict[str, Any]:
    """The checkpoint of one member of a run, as of a run of its own.

    Args:
        saved: checkpoint of the run with all its members.
        trunk: the built run with all its members.
        alone: the built run of that member alone.
        member: index of the member in the run.
    """
    opsin = saved["opsin"]
    history = {
        name: {**entry, "values": entry["values"][:, member : member + 1]} for name, entry in opsin["history"].items()
    }
    events = [{**event, "member": 0} for event in opsin["events"] if event["member"] == member]
    control = _control_of_member(opsin["control"], member)
    group = member_groups(trunk.module.optimizer, trunk.module.n_members)[1][member]
    records = {"history": history, "events": events, "control": control, "seeds": [opsin["seeds"][member]]}
    if "batch" in opsin:
        records["batch"] = opsin["batch"][..., member : member + 1].clone()
    part = {
        **saved,
        "state_dict": _member(saved["state_dict"], member),
        "optimizer_states": [_optimizer_of_member(state, member, group) for state in saved["optimizer_states"]],
        "lr_schedulers": [_scheduler_of_group(state, group) for state in saved["lr_schedulers"]],
        "callbacks": _callbacks_of_member(saved["callbacks"], trunk.callbacks, member),
        "opsin": {**opsin, **records},
    }
    return branch_state(part, trunk, alone, member)


def _member(tensors: Mapping[Any, Tensor], member: int) -> dict[Any, Tensor]:
    return {name: tensor[member : member + 1].clone() for name, tensor in tensors.items()}


def _optimizer_of_member(state: Mapping[str, Any], member: int, group: int) -> dict[str, Any]:
    groups = state["param_groups"]
    # what schedulers change is in the member's group; the parameters and the count of steps are in the first
    alone = {**groups[0], **{name: value for name, value in groups[group].items() if name not in ("params", "steps")}}
    moments = {index: _member(tensors, member) for index, tensors in state["state"].items()}
    return {**state, "state": moments, "param_groups": [alone]}


def _scheduler_of_group(state: Mapping[str, Any], group: int) -> dict[str, Any]:
    found = {**state, **{name: [state[name][group]] for name in ("base_lrs", "_last_lr") if name in state}}
    if "_schedulers" in found:
        found["_schedulers"] = [_scheduler_of_group(inner, group) for inner in found["_schedulers"]]
    return found


def _control_of_member(control: Mapping[str, Any], member: int) -> dict[str, Any]:
    only = slice(member, member + 1)
    return {
        "fired": control["fired"][:, only],
        "active": control["active"][:, only],
        "supplied": [tensor[only].clone() for tensor in control["supplied"]],
        "missed": _member(control["missed"], member),
        "ended": {},
    }


def _callbacks_of_member(states: Mapping[str, Any], callbacks: Mapping[str, Any], member: int) -> dict[str, Any]:
    return {
        key: callback.member_state(state, member) if isinstance(callback := callbacks.get(key), Divisible) else state
        for key, state in states.items()
    }


def branch_state(saved: Mapping[str, Any], trunk: BuiltRun, branch: BuiltRun, member: int = 0) -> dict[str, Any]:
    """The first checkpoint of a branch.

    Args:
        saved: checkpoint of the run that it branches from, with a single member.
        trunk: the built run that it branches from.
        branch: the built branch, or the built run of one member alone.
        member: index of the saved member in the run that it branches from.
    """
    old = trunk.module.optimizer.per_member(trunk.module.n_members)[member : member + 1]
    new = branch.module.optimizer.per_member(1)
    transfer = StateTransfer(trunk.plan, branch.plan, member)
    # the records are the branch's own from now on, cut from the table of the run
    records = {name: part for name, part in saved["opsin"].items() if name != "metrics"}
    around = saved["opsin"].get("run", {}).get("surroundings", {})
    opsin = {
        **records,
        "run": identity_of_run(branch.settings, around, ()),
        "plan": branch.plan.digest(),
        "control": transfer.control(saved["opsin"]["control"]),
        "history": transfer.history(saved["opsin"]["history"]),
    }
    optimizers = [with_hyper(state, old, new) for state in saved["optimizer_states"]]
    schedulers = [scheduler_with_rates(state, rates_of(old), rates_of(new)) for state in saved["lr_schedulers"]]
    return {**saved, "optimizer_states": optimizers, "lr_schedulers": schedulers, "opsin": opsin}


@dataclass(frozen=True)
class StateTransfer:
    """Hands what one plan has counted and recorded to another plan that has some of its interventions.

    Args:
        old: plan of the run that is forked.
        new: plan of a branch, or of a run of one member alone.
        member: index of that member in the run that is forked.
    """

    old: Plan
    new: Plan
    member: int = 0

    @cached_property
    def rows(self) -> list[int | None]:
        """For every row of the new plan the row of the old one with the same intervention or change; None without."""
        known: dict[str, list[int]] = defaultdict(list)
        # a branch has one member alone, whatever its number was
        for row, text in zip(self.old.rows, self.old.row_identities(members=False), strict=True):
            if self._acts(row):
                known[text].append(row.gate)
        return [known[text].pop(0) if known[text] else None for text in self.new.row_identities(members=False)]

    def _acts(self, row: PlannedRow) -> bool:
        """Whether a row of the old plan selects anything of the member."""
        return bool(row.mask[self.member if len(row.mask) > 1 else 0].any())

    def control(self, control: Mapping[str, Any]) -> dict[str, Any]:
        """The state of the new plan's ``GateController``; a supply that the old plan does not have is None.

        Args:
            control: state of the old plan's ``GateController``, as in a checkpoint.
        """
        members = control["fired"].shape[1]
        counts = {name: torch.zeros(len(self.new.rows), members, dtype=torch.int64) for name in ("fired", "active")}
        for row, before in enumerate(self.rows):
            for name, count in counts.items():
                if before is not None:
                    count[row] = control[name][before]
        skipped = no_skipped_updates(self.new.changes, members)
        for name, tensor in skipped.items():
            if name in control["missed"]:
                tensor.copy_(control["missed"][name])
        return {**control, **counts, "missed": skipped, "supplied": self._supplied(control["supplied"])}

    def _supplied(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        active = [row.intervention for row in self.old.interventions if self._acts(row)]
        needed = {need for item in active for need in item.value.needs}
        known = {
            identity(supply, members=False): tensor
            for supply, tensor in zip(self.old.supplies, tensors, strict=True)
            if supply in needed
        }
        return [known.get(identity(supply, members=False)) for supply in self.new.supplies]

    def history(self, history: Mapping[str, Any]) -> dict[str, Any]:
        """Records of schedules with feedback under the names that their writers have in the new plan.

        Records of other members' writers are left out: a writer of this member may have the same number now.

        Args:
            history: entries of the old plan's run, by name of the metric.
        """
        labels = {row.gate: label for label, row in self.new.loops.items()}
        new_label = {before: labels.get(gate) for gate, before in enumerate(self.rows)}
        active = {label: row for label, row in self.old.loops.items() if self._acts(row)}
        foreign = tuple(f"feedback/{label}/" for label in self.old.loops if label not in active)
        names = {f"feedback/{label}/": f"feedback/{new_label.get(row.gate) or label}/" for label, row in active.items()}
        return {_with_prefix(name, names): entry for name, entry in history.items() if not name.startswith(foreign)}


def _with_prefix(name: str, names: Mapping[str, str]) -> str:
    found = next((prefix for prefix in names if name.startswith(prefix)), None)
    return name if found is None else names[found] + name.removeprefix(found)
