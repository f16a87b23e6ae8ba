"""What an optimizer declares, so that everything else works for all of them without knowing which.

An optimizer names its hyper-parameters, says with what state a parameter starts, and how one update changes both. The
step, ended members, frozen weights and weights that are drawn anew, checkpoints, forks, schedules of the rate and the
estimate of memory read these declarations. A page of one's own is enough for another optimizer.

Legend: M members.
"""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError

Tensors = Mapping[str, Float[Tensor, "..."]]
"""Tensors by name. Those of the state have the parameter's shape ``[M, ...]``. Hyper-parameters are ``[M]``, or
``[n, M]`` for a setting of n numbers; an update gets them with an axis of 1 for each further axis of the parameter."""

HyperValue = float | tuple[float, ...]
"""A hyper-parameter of one member."""


class Optimizer(ABC):
    """Base of all optimizers: settings are attributes under the names that ``__init__`` takes.

    Members never mix: an update computes member by member, whatever it does inside of one. It is traced into the
    compiled step, so what depends on values is arithmetic and no branch.
    """

    hyper_names: ClassVar[tuple[str, ...]] = ("learning_rate",)
    """Settings that are hyper-parameters: a value for all members, or a list with one for each. They are inputs of the
    step, so that a schedule, a condition or a resume may change them; all other settings shape its graph."""

    def start(self, name: str, parameter: Float[Tensor, "M ..."]) -> dict[str, Tensor]:
        """State with which a parameter begins, and begins anew where it is drawn anew; none, if not overridden.

        Args:
            name: name of the parameter, for example ``blocks.0.attn.W_O``.
            parameter: values of the parameter at that time, with the member axis.
        """
        return {}

    def derived(self, hyper: Tensors) -> dict[str, Tensor]:
        """Numbers that an update wants beside its hyper-parameters and that follow from them, in double precision.

        Args:
            hyper: every hyper-parameter but the learning rate in double precision, by name.
        """
        return {}

    def clock(self, hyper: Tensors, updates: Float[Tensor, "..."]) -> dict[str, Tensor]:
        """Numbers of an update that follow from how many there have been, such as bias corrections.

        Args:
            hyper: hyper-parameters and what is derived from them, by name.
            updates: number of this update, from 1; of a parameter that is ever frozen or drawn anew each entry has its
                own, which a freeze that is partial makes a fraction.
        """
        return {}

    @abstractmethod
    def update(
        self, parameter: Tensor, gradient: Tensor, state: Tensors, hyper: Tensors, clock: Tensors
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One update of one parameter, without changing anything in place.

        Args:
            parameter: values ``[M, ...]`` before the update.
            gradient: gradient ``[M, ...]`` of every member's loss, clipped.
            state: state of this parameter, under the names that ``start`` gave.
            hyper: hyper-parameters and what is derived from them, by name.
            clock: what follows from the number of this update, by name.

        Returns:
            The parameter and its state after the update.
        """

    # ---- what the house asks of every optimizer ---------------------------------------------------

    def per_member(self, members: int) -> list[dict[str, HyperValue]]:
        """The hyper-parameters of every member, by name.

        Args:
            members: M, models that are trained at once.

        Raises:
            ConfigError: a list that has not one value for each member.
        """
        columns = {name: self._column(name, members) for name in self.hyper_names}
        return [{name: column[member] for name, column in columns.items()} for member in range(members)]

    def _column(self, name: str, members: int) -> list[HyperValue]:
        value = getattr(self, name)
        if not is_per_member(type(self), name, value):
            return [_plain(value)] * members
        if len(value) != members:
            raise ConfigError(f"{type(self).__name__}.{name}", value, f"one value, or one for each of {members} seeds")
        return [_plain(entry) for entry in value]

    def graph_settings(self) -> dict[str, Any]:
        """Settings that shape the graph of the step, by name: all that are no hyper-parameters."""
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {name: value for name, value in settings.items() if name not in self.hyper_names}

    def changed(self, settings: Mapping[str, Any]) -> Self:
        """The same optimizer with some settings replaced.

        Args:
            settings: values of the settings that are replaced, by name.
        """
        found = copy.copy(self)
        for name, value in settings.items():
            object.__setattr__(found, name, value)
        return found

    def state_numbers(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Numbers of the state of one member.

        Args:
            shapes: shape of every parameter without the member axis, by name.
        """
        # one entry an axis: sizes may be so large that nothing of them can be made
        small = {name: torch.empty([1] * (len(shape) + 1), device="meta") for name, shape in shapes.items()}
        return sum(len(self.start(name, small[name])) * math.prod(shape) for name, shape in shapes.items())

    def check_hyper(self, name: str, expected: str, low: float, high: float = math.inf, *, above: bool = False) -> None:
        """Refuse a hyper-parameter that is out of its range, for all members or for one.

        Args:
            name: name of the hyper-parameter.
            expected: words for the range, for the message.
            low: smallest number of the range.
            high: smallest number beyond the range.
            above: whether the smallest number is out of the range itself.

        Raises:
            ConfigError: names the optimizer's setting.
        """
        value = getattr(self, name)
        for number in _numbers_of(value):
            inside = isinstance(number, (int, float)) and math.isfinite(number) and low <= number < high
            if not inside or (above and number == low):
                raise ConfigError(f"{type(self).__name__}.{name}", value, expected)


def is_per_member(kind: type, name: str, value: object) -> bool:
    """Whether the value of a hyper-parameter is a list with one for each member.

    Args:
        kind: class of the optimizer, by whose default is seen whether the setting is several numbers itself.
        name: name of the hyper-parameter.
        value: value of the setting, from Python or from a file.
    """
    if not isinstance(value, (list, tuple)):
        return False
    setting = inspect.signature(kind).parameters.get(name)
    several = setting is not None and isinstance(setting.default, tuple)
    return not several or any(isinstance(entry, (list, tuple)) for entry in value)


def zeros_like(parameter: Tensor, *names: str) -> dict[str, Tensor]:
    """State of zeros for a parameter.

    Args:
        parameter: the parameter, whose shape the state has.
        names: names of the tensors of the state.
    """
    return {name: torch.zeros_like(parameter, requires_grad=False) for name in names}


def _plain(value: Any) -> HyperValue:
    return tuple(float(number) for number in value) if isinstance(value, (list, tuple)) else float(value)


def _numbers_of(value: Any) -> list[Any]:
    return [number for entry in value for number in _numbers_of(entry)] if isinstance(value, (list, tuple)) else [value]
