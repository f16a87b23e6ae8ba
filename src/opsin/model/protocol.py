"""What a model is: a table of parameters, a table of sites, and one plain forward pass in which every activation taps.

A model is a frozen dataclass of settings, a subclass of ``Model``. Nothing else in the package knows how it stores a
weight or in which order it computes: whoever names a site or a weight asks the tables. ``Transformer`` is one such
model; a recipe names another under ``model.network``, one of the user's own too.

Legend: M members, B batch, L positions, V outputs, C columns of a table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.model.parameters import Parameters, ParameterTable
from opsin.model.sites import SiteTable
from opsin.task import Batch, Layout

Tap = Callable[[str, Tensor], Tensor]

ADDED: Mapping[str, bool] = {"added": True}
"""Metadata of a setting that runs have been made without: at its default it is no part of what a run is known by."""


def identity_tap(_: str, activation: Tensor) -> Tensor:
    """The tap that changes nothing."""
    return activation


class TaskSizes(Protocol):
    """What of a task shapes a model; a ``Task`` has it all."""

    @property
    def layout(self) -> Layout:
        """Which position holds what."""

    @property
    def n_features(self) -> int | None:
        """F, entries of a feature vector; None when the input is tokens only."""

    @property
    def n_tokens(self) -> int:
        """Size of the input vocabulary."""

    @property
    def n_outputs(self) -> int:
        """V, numbers that are predicted at a position."""


@dataclass(frozen=True)
class Sizes:
    """What of a task shapes a model, by itself.

    Args:
        layout: which position holds what.
        n_features: F, entries of a feature vector; None when the input is tokens only.
        n_tokens: size of the input vocabulary.
        n_outputs: V, numbers that are predicted at a position.
    """

    layout: Layout
    n_features: int | None
    n_tokens: int
    n_outputs: int

    @classmethod
    def of(cls, task: TaskSizes) -> Sizes:
        """The sizes of a task."""
        return cls(task.layout, task.n_features, task.n_tokens, task.n_outputs)

    def with_positions(self, positions: int) -> Sizes:
        """The same sizes for sequences of tokens of another length; themselves where the length is theirs."""
        if positions == self.layout.positions:
            return self
        return replace(self, layout=Layout((), tuple(range(positions)), (), (positions - 1,)))


class Model(ABC):
    """Settings of a model, from which everything about it follows; a subclass is a frozen dataclass.

    Attributes:
        setting: where a recipe writes the model, for messages.
    """

    setting: ClassVar[str] = "model.network"

    @abstractmethod
    def parameters(self, task: TaskSizes) -> ParameterTable:
        """Every parameter, in the order in which they are drawn.

        Args:
            task: what gives the sizes of input and output.

        Raises:
            ConfigError: a task that the model cannot be made for.
        """

    @abstractmethod
    def sites(self, task: TaskSizes) -> SiteTable:
        """Every activation in order of computation; ``hook_logits`` is the last.

        Args:
            task: what gives the sizes of input and output.

        Raises:
            ConfigError: a task that the model cannot be made for.
        """

    @abstractmethod
    def forward(
        self, parameters: Parameters, table: Float[Tensor, "2 L C"], batch: Batch, tap: Tap = identity_tap
    ) -> Float[Tensor, "M B L V"]:
        """Logits at every position. Every site passes the tap once, and what the tap returns goes on.

        Args:
            parameters: weights ``[M, ...]`` under the names of the table.
            table: ``position_table`` for sequences of this length.
            batch: sequences of every member.
            tap: what every activation passes, with the name of its site.
        """

    def position_table(self, length: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "2 L C"]:
        """Numbers that are fixed beforehand and given to the graph; no columns where a model needs none.

        Args:
            length: L, positions of a sequence.
            dtype: precision of the weights.
        """
        return torch.zeros(2, length, 0, dtype=dtype)

    def positions_coded(self, task: TaskSizes) -> int:
        """Positions that the position code has; those of a sequence where each begins at the first.

        Args:
            task: what says how long a sequence is.
        """
        return task.layout.positions

    def in_words(self) -> str:
        """The model's size in a few words, for messages."""
        return f"a {type(self).__name__}"


def refuse_other_rows(model: str, task: TaskSizes) -> None:
    """Refuse a task that scores other rows than the last, for a model that reads the whole sequence at once.

    Args:
        model: name of the model, for the message.
        task: what says which rows are scored.

    Raises:
        ConfigError: the model would see the answers of other rows.
    """
    last = task.layout.positions - 1
    if task.layout.scored != (last,):
        rows = f"a task that scores positions {list(task.layout.scored)}"
        raise ConfigError(model, rows, f"one that scores the last, {last}, alone: the whole sequence is read at once")


def init_parameters(model: Model, task: TaskSizes, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Fresh float32 parameters as the model's table says, one member a seed, stacked on the member axis.

    Args:
        model: settings of the model.
        task: what gives the sizes of input and output.
        seeds: seed of every member; its values depend on its own seed alone.
    """
    return model.parameters(task).draw(seeds)


def changed_settings(model: Model) -> dict[str, Any]:
    """Settings of a model by name, without those that earlier versions had not and that are at their default.

    Args:
        model: settings of the model.
    """
    if not is_dataclass(model):
        raise ConfigError("model.network", type(model).__name__, "a model that is a frozen dataclass")
    return {
        item.name: getattr(model, item.name)
        for item in fields(model)
        if not (item.metadata.get("added") and getattr(model, item.name) == item.default)
    }
