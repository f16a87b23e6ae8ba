"""Weights that stand still or start anew while the others learn: which, how and when.

A change names weights as TransformerLens does (``blocks.0.attn.W_Q``); they are slices of the model's own
parameters. Changes come after the interventions in a plan. What they do to a step is in
``opsin.training.weight_updates``.

Legend: M members, D width, H heads, E head width, N neurons.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
from opsin.model.sites import Site

QKV = ("W_Q", "W_K", "W_V")


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
        weight: name of the weight in the ``WeightTable``.
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

    def weight_changes(self, weights: WeightTable) -> list[WeightChange]:
        """What it wants changed in a model with these weights."""


@dataclass(frozen=True)
class NamedWeight:
    """A parameter, or the columns of one that have a name of their own.

    Args:
        parameter: name of the parameter, as ``init_parameters`` has it.
        entries: axes of the weight and their lengths; H and E, two axes, are one in the parameter.
        before: number of columns of the parameter that precede the weight.
        after: number of columns of the parameter that follow the weight.
    """

    parameter: str
    entries: Site
    before: int = 0
    after: int = 0

    def mask(self, selection: Selection, members: int, writer: str) -> Float[Tensor, "..."]:
        """1 at selected entries and 0 elsewhere, broadcastable to the parameter.

        Raises:
            ConfigError: no such head, neuron or member.
        """
        mask = selection.mask(self.entries, members, writer)
        if "H" in self.entries.axes:
            at, sizes = self.entries.axes.index("H"), self.entries.sizes
            split = [sizes[axis] if axis in "HE" else -1 for axis in self.entries.axes]
            mask = mask.expand(split).flatten(at, at + 1)
        return torch.nn.functional.pad(mask, (self.before, self.after))


@dataclass(frozen=True)
class WeightTable:
    """All weights of one model by name, in the order in which they are used."""

    weights: Mapping[str, NamedWeight]

    def __getitem__(self, name: str) -> NamedWeight:
        return self.weights[name]

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return 1 + max(named.entries.layer for named in self.weights.values() if named.entries.layer is not None)

    def size(self, axis: str) -> int:
        """Number of heads (``"H"``) or neurons (``"N"``) of a block; 0 if it has none."""
        return next((w.entries.sizes[axis] for w in self.weights.values() if axis in w.entries.sizes), 0)

    def find(self, name: str, field_name: str) -> list[str]:
        """The weight of that name; for ``blocks.0`` or ``embed``, all parameters whose names begin so.

        Raises:
            ConfigError: no such weight; names the field and the nearest names that exist.
        """
        if name in self.weights:
            return [name]
        whole = [known for known, named in self.weights.items() if known == named.parameter]
        if found := [known for known in whole if known.startswith(f"{name}.")]:
            return found
        near = difflib.get_close_matches(name, self.weights, n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ConfigError(field_name, name, f"a weight of this model, or a block such as blocks.0{hint}")


def weight_table(parameters: Mapping[str, Tensor], heads: int) -> WeightTable:
    """The weights of a model.

    Args:
        parameters: tensors ``[M, ...]`` under the names of ``init_parameters``.
        heads: H, number of heads of a block.
    """
    found: dict[str, NamedWeight] = {}
    for name, tensor in parameters.items():
        shape, end = tensor.shape[1:], name.rpartition(".")[2]
        axes = {"W_O": "MHED", "W_in": "MDN", "b_in": "MN", "W_out": "MND"}.get(end, "M" + "1" * len(shape))
        sizes = {"H": heads, "E": shape[0] // heads} if end == "W_O" else dict(zip(axes[1:], shape, strict=True))
        found[name] = NamedWeight(name, Site(name, axes, sizes, "a weight"))
        if end == "W_QKV":
            width = shape[0]
            for index, part in enumerate(QKV):
                third = name.removesuffix(end) + part
                entries = Site(third, "MDHE", {"H": heads, "E": width // heads}, "a weight")
                found[third] = NamedWeight(name, entries, index * width, (2 - index) * width)
    return WeightTable(found)


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


def order_changes(writers: Iterable[WeightWriter], weights: WeightTable, members: int) -> list[NumberedChange]:
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
        changes = by_head(writer.weight_changes(weights), lambda change: weights[change.weight].entries.layer)
        writers_seen.update({change.writer for change in changes})
        found += [(change, writers_seen[change.writer]) for change in changes]
    found.sort(key=lambda item: (item[0].kind == Frozen(), item[0].order or 0))
    ordered = []
    for change, number in found:
        _check_seeds(change, members)
        mask = weights[change.weight].mask(change.selection, members, change.writer)
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
