"""Weights that stand still or start anew while the others learn: which, how and when.

A change names weights as TransformerLens does (``blocks.0.attn.W_Q``); they are slices of the model's own
parameters. Changes come after the interventions in a plan. What they do to a step is in
``opsin.training.weight_updates``.

Legend: M members, D width, H heads, E head width, N neurons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions.feedback import by_head
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection
from opsin.model.parameters import NamedWeight, ParameterTable
from opsin.model.sites import Site


@dataclass(frozen=True)
class Frozen:
    """The weight and its running moments stay as they are, by the strength of the schedule."""


@dataclass(frozen=True)
class Fresh:
    """The weight is set to a draw of the initialiser, its running moments to zero, wherever the strength is above 0.

    Args:
        seed: seed of the draw for all members, or one per member; None for each member's own, which rewinds it.
    """

    seed: int | tuple[int, ...] | None = None

    def seeds(self, run: Sequence[int]) -> list[int]:
        """Seeds of the draw, one per member or a single one for all.

        Args:
            run: seeds of the run, one per member.
        """
        if self.seed is None:
            return list(run)
        return [self.seed] if isinstance(self.seed, int) else list(self.seed)


@dataclass(frozen=True)
class WeightChange:
    """One change of weights: where, how, when.

    Args:
        writer: name of the callback that asks for it, for messages.
        weight: name of the weight in the ``ParameterTable``.
        parameter: name of the parameter that the weight is, or is columns of.
        selection: which heads, neurons and members of the weight.
        kind: what becomes of the selected entries.
        schedule: how strongly it acts at which step.
        order: rank among draws that set the same entries; the later wins.
    """

    writer: str
    weight: str
    parameter: str
    selection: Selection
    kind: Frozen | Fresh
    schedule: Schedule = field(default_factory=Schedule)
    order: int | None = None

    def describe(self, name: str) -> dict[str, str]:
        """Its line of what ``opsin sites`` prints.

        Args:
            name: name of its writer, numbered where the run has several of its kind.
        """
        return {
            "pass": "weights",
            "writer": name,
            "site": self.weight,
            "selection": str(self.selection),
            "value": repr(self.kind),
            # a weight that stands still, or starts anew, hands gradient on to what comes before it
            "gradient": "flows",
            "schedule": str(self.schedule),
        }


@runtime_checkable
class WeightWriter(Protocol):
    """A callback that may change weights."""

    def weight_changes(self, weights: ParameterTable) -> list[WeightChange]:
        """What it wants changed in a model with these weights."""


def weight_mask(named: NamedWeight, selection: Selection, members: int, writer: str) -> Float[Tensor, "..."]:
    """1 at selected entries and 0 elsewhere, broadcastable to the parameter that holds the weight.

    Args:
        named: weight whose entries are selected.
        selection: heads, neurons and members of the weight.
        members: M, models of the run.
        writer: callback that selects, for messages.

    Raises:
        ConfigError: no such head, neuron or member.
    """
    mask = selection.mask(Site(named.name, "M" + named.stored, named.sizes, "a weight"), members, writer)
    if named.heads_are_one_axis:
        at, sizes = 1 + named.stored.index("H"), named.sizes
        split = [sizes[axis] if axis in "HE" else -1 for axis in named.stored]
        mask = mask.expand([-1, *split]).flatten(at, at + 1)
    return torch.nn.functional.pad(mask, (named.before, named.after)) if named.before or named.after else mask


@dataclass(frozen=True)
class NumberedChange:
    """A change of weights that has been checked.

    Args:
        change: which weights are changed, how, when.
        name: name of its writer, numbered where there are several of its kind.
        mask: 1 at selected entries and 0 elsewhere, broadcastable to the parameter.
    """

    change: WeightChange
    name: str
    mask: Float[Tensor, "..."]


def order_changes(writers: Iterable[WeightWriter], weights: ParameterTable, members: int) -> list[NumberedChange]:
    """Collect, check and order what all writers want changed: draws in order of application, then what is frozen.

    Args:
        writers: callbacks, in the order in which the recipe names them.
        weights: parameters of the model that is trained.
        members: M, models of the run.

    Raises:
        ConfigError: an unknown weight or selection, or two draws that set the same entries without an order.
    """
    found: list[tuple[WeightChange, int]] = []
    writers_seen: Counter[str] = Counter()
    for writer in writers:
        changes = by_head(writer.weight_changes(weights), lambda change: weights[change.weight].layer)
        writers_seen.update({change.writer for change in changes})
        found += [(change, writers_seen[change.writer]) for change in changes]
    found.sort(key=lambda item: (item[0].kind == Frozen(), item[0].order or 0))
    ordered = []
    for change, number in found:
        _check_seeds(change, members)
        named = weights[change.weight]
        if not named.trained:
            raise ConfigError(f"{change.writer}.weights", named.name, "a weight that is trained; this one never moves")
        mask = weight_mask(named, change.selection, members, change.writer)
        name = change.writer if writers_seen[change.writer] == 1 else f"{change.writer} {number}"
        ordered.append(NumberedChange(change, name, mask))
    for a, b in combinations(ordered, 2):
        _refuse_contested_weights(a, b)
    return ordered


def _check_seeds(change: WeightChange, members: int) -> None:
    seed = change.kind.seed if isinstance(change.kind, Fresh) else None
    if isinstance(seed, tuple) and len(seed) != members:
        raise ConfigError(f"{change.writer}.seed", list(seed), f"one seed, or one for each of {members} members")


def _refuse_contested_weights(first: NumberedChange, second: NumberedChange) -> None:
    """Refuse two draws of the same entries, neither of which is the later."""
    a, b = first.change, second.change
    if a.parameter != b.parameter or Frozen() in (a.kind, b.kind) or not (first.mask * second.mask).any():
        return
    if a.order is None or b.order is None or a.order == b.order:
        expected = f"two different orders, since {a.writer} and {b.writer} both set {b.weight}"
        raise ConfigError(f"{b.writer}.order", [a.order, b.order], expected)
