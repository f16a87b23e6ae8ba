"""The optimizer object that Lightning, its checkpoints and the learning-rate schedulers see.

The arithmetic of an update is in ``opsin.optimizers``; the step fuses it with the loss and the gradient. This object
holds the state that the arithmetic changes, and counts.

Legend: M members.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from opsin.errors import ConfigError
from opsin.optimizers.adam import AdamW
from opsin.optimizers.base import HyperValue, Optimizer
from opsin.records.schema import TRAIN_LOSS
from opsin.training.optimizer_state import Hyper, OptimizerState, with_trailing_axes

GROUP_KEYS: Mapping[str, str] = {"learning_rate": "lr"}
"""Hyper-parameters that schedulers know under another name."""


class MemberOptimizer(torch.optim.Optimizer):
    """An optimizer whose state carries the member axis and whose step is handed in as a closure.

    Members whose hyper-parameters are equal share a group of ``param_groups``, through which a scheduler changes each
    as it would change that of a run of its own; the parameters are all in the first.

    Args:
        named_parameters: names of the parameters and their tensors ``[M, ...]``.
        optimizer: the optimizer whose arithmetic moves them, with the hyper-parameters that it begins with.
        clip: largest gradient norm of a member; None for no clipping.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, Tensor]], optimizer: Optimizer, clip: float | None = None
    ) -> None:
        named = list(named_parameters)
        # not `optimizer`: Lightning takes whatever has one for a wrapper, and looks inside
        self.names, self.rule = [name for name, _ in named], optimizer
        self._keys = {name: GROUP_KEYS.get(name, name) for name in optimizer.hyper_names}
        self._derived: tuple[Any, dict[str, tuple[Tensor, Tensor]]] | None = None
        kinds, self._group_of = member_groups(optimizer, named[0][1].shape[0])
        self._begun = [{self._keys[name]: value for name, value in kind.items()} for kind in kinds]
        super().__init__([tensor for _, tensor in named], {**self._begun[0], "clip": clip, "steps": 0})
        for settings in self._begun[1:]:
            self.add_param_group({"params": [], **settings})
        for name, parameter in named:
            self.state[parameter] = optimizer.start(name, parameter.detach())

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors it updates."""
        return self.param_groups[0]["params"]

    @property
    def steps(self) -> int:
        """Updates made so far."""
        return self.param_groups[0]["steps"]

    def members_state(self) -> OptimizerState:
        """What the fused step changes in place."""
        return OptimizerState(self.names, self.parameters, [self.state[parameter] for parameter in self.parameters])

    def hyper(self) -> Hyper:
        """Hyper-parameters of the next update."""
        first, like = self.param_groups[0], self.parameters[0]
        kind = (tuple(self._group_of), like.dtype, like.device)
        columns = {name: tuple(group[key] for group in self.param_groups) for name, key in self._keys.items()}
        pairs = {name: _per_member(column, *kind) for name, column in columns.items()}
        # a schedule moves the rate at every step, and nothing is derived from it
        situation = ({name: column for name, column in columns.items() if name != "learning_rate"}, kind)
        if self._derived is None or self._derived[0] != situation:
            exact = {name: pair[0] for name, pair in pairs.items() if name != "learning_rate"}
            found = {name: (x, x.to(like.dtype)) for name, x in self.rule.derived(exact).items()}
            self._derived = (situation, found)
        pairs |= self._derived[1]
        exact = {name: pair[0] for name, pair in pairs.items()}
        updates = torch.full((len(self._group_of),), self.steps + 1, dtype=torch.float64, device=like.device)
        clock = {name: x.to(like.dtype) for name, x in self.rule.clock(exact, updates).items()}
        bound = float("inf") if first["clip"] is None else first["clip"]
        clip = _per_member((bound,), (0,) * len(self._group_of), like.dtype, like.device)[1]
        return Hyper({name: pair[1] for name, pair in pairs.items()}, clip, clock)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; what an earlier version did not save is as it was begun with.

        Args:
            state_dict: state as ``state_dict`` gave it.
        """
        super().load_state_dict(state_dict)
        for group, begun in zip(self.param_groups, self._begun, strict=True):
            for key, value in begun.items():
                saved = group.setdefault(key, value)
                group[key] = tuple(saved) if isinstance(saved, list) else saved

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update by calling the fused step.

        Args:
            closure: the fused training step, which changes parameters and state in place.

        Raises:
            ValueError: no closure; this object has no arithmetic of its own.
        """
        if closure is None:
            raise ValueError("MemberOptimizer.step: needs the fused training step as its closure")
        result = closure()
        self.param_groups[0]["steps"] += 1
        return result


class MemberAdam(MemberOptimizer):
    """The same for Adam; monitors of the rate make a column's name of the name of this class."""


def member_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]], optimizer: Optimizer, clip: float | None = None
) -> MemberOptimizer:
    """The object for an optimizer, with the arguments of ``MemberOptimizer``."""
    kind = MemberAdam if isinstance(optimizer, AdamW) else MemberOptimizer
    return kind(named_parameters, optimizer, clip)


def member_groups(optimizer: Optimizer, members: int) -> tuple[list[dict[str, HyperValue]], list[int]]:
    """The different hyper-parameters of members, and which of them each member has.

    Args:
        optimizer: the optimizer, with one value for all members or one for each.
        members: M, models of the run.

    Returns:
        Hyper-parameters by name, in the order of the first members that have them, and the index of every member's.
    """
    columns = optimizer.per_member(members)
    kinds = [column for index, column in enumerate(columns) if column not in columns[:index]]
    return kinds, [kinds.index(column) for column in columns]


def build_scheduler(build: Callable[..., Any], optimizer: MemberOptimizer) -> Any:
    """The scheduler of an optimizer.

    Args:
        build: function that builds a scheduler from an optimizer.
        optimizer: the optimizer whose groups of members it moves.

    Raises:
        ConfigError: the schedule moves what this optimizer does not have, or has settings that cannot be.
    """
    try:
        return build(optimizer)
    except ConfigError:
        raise
    except ValueError as error:
        expected = f"a schedule of what {type(optimizer.rule).__name__} has"
        raise ConfigError("model.lr_scheduler", str(error), expected) from error


def check_scheduler(scheduler: object, members: int) -> None:
    """Refuse a schedule that members cannot share.

    Args:
        scheduler: learning-rate scheduler that was built on the optimizer.
        members: M, models of the run.

    Raises:
        ConfigError: it follows one loss, or another metric.
    """
    if isinstance(scheduler, ReduceLROnPlateau) and members > 1:
        expected = f"a schedule that follows no loss: {members} members share it"
        raise ConfigError("model.lr_scheduler", "ReduceLROnPlateau", expected)
    monitor = getattr(scheduler, "monitor", TRAIN_LOSS)
    if monitor != TRAIN_LOSS:
        expected = f"{TRAIN_LOSS!r}: the rate follows the mean training loss of every Lightning batch"
        raise ConfigError("model.lr_scheduler.monitor", monitor, expected)


def check_optimizer(optimizer: Optimizer, members: int) -> None:
    """Refuse an optimizer that does not do what it declares, on an update of a small matrix and a small vector.

    Args:
        optimizer: the optimizer of a run.
        members: M, models of the run.

    Raises:
        ConfigError: names what it does otherwise.
    """
    name = type(optimizer).__name__
    if "learning_rate" not in optimizer.hyper_names:
        raise ConfigError(f"{name}.hyper_names", list(optimizer.hyper_names), "learning_rate among them")
    for shape in ((members, 2, 3), (members, 2)):
        tried = MemberOptimizer([("weight", torch.full(shape, 0.5))], optimizer)
        state, hyper = tried.members_state(), tried.hyper()
        before = [tensor.clone() for tensor in state.tensors()]
        values, clock = (with_trailing_axes(part, len(shape) - 1) for part in (hyper.values, hyper.clock))
        moved, kept = optimizer.update(state.parameters[0], torch.ones(shape), state.kept[0], values, clock)
        if {*kept} != {*state.kept[0]}:
            raise ConfigError(f"{name}.update", [*kept], f"the state that start gives: {[*state.kept[0]]}")
        for key, tensor in {"the parameter": moved, **kept, **state.kept[0]}.items():
            if tuple(tensor.shape) != shape:
                raise ConfigError(f"{name}: {key}", tuple(tensor.shape), f"the shape of the parameter, {shape}")
        if any(not torch.equal(old, new) for old, new in zip(before, state.tensors(), strict=True)):
            raise ConfigError(f"{name}.update", "a change in place", "new tensors: it must be a pure function")


@functools.lru_cache(maxsize=256)
def _per_member(
    column: tuple[Any, ...], group_of: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Values of groups as those of members, ``[M]`` or ``[n, M]``, in double precision and in that of the weights."""
    values = [column[group] for group in group_of]
    exact = torch.tensor(values, dtype=torch.float64, device=device).movedim(0, -1).contiguous()
    return exact, exact.to(dtype)
