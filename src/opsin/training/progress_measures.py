"""Progress measures: the loss that weights would have under interventions they are not trained with.

Several sets of interventions are evaluated in one batched pass. Every set has a copy of every member on the member
axis: copy ``s * M + m`` is member m under set s, and set 0 is the base line without any intervention. Each
set's interventions select its own copies alone, so that the sets cannot meet.

Legend: M members, S sets (the base line first), C copies (S x M), ... the other axes of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions.apply import Constants, Scene, constants_of, run_passes
from opsin.interventions.intervention import Intervention, Pass, Source, Supply
from opsin.interventions.plan import Plan, Writer, build_plan, covered_members
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection
from opsin.model.sites import SiteTable
from opsin.model.transformer import Parameters, Transformer, forward
from opsin.records.schema import BASE_LINE
from opsin.task import Batch
from opsin.training.objective import accuracy, cross_entropy, scored_logits


@dataclass(frozen=True)
class Copies:
    """Where on the member axis each set finds its members.

    Args:
        members: M.
        sets: S.
    """

    members: int
    sets: int

    def of_set(self, item: Intervention, place: int) -> Intervention:
        """The same intervention in the copies of one set; passes that it takes from hold for every set."""
        chosen = range(self.members) if item.selection.members is None else item.selection.members
        own = tuple(place * self.members + member for member in chosen)
        return replace(item, selection=replace(item.selection, members=own), value=self._of_all(item.value))

    def _of_all(self, part: Any) -> Any:
        """The same value with members selected in every set, wherever a pass inside it selects some."""
        if isinstance(part, tuple):
            return tuple(self._of_all(each) for each in part)
        if isinstance(part, Selection) and part.members is not None:
            everywhere = tuple(s * self.members + member for s in range(self.sets) for member in part.members)
            return replace(part, members=everywhere)
        if not is_dataclass(part) or isinstance(part, (type, Supply)):
            return part
        found = {field.name: getattr(part, field.name) for field in fields(part)}
        changed = {name: new for name, old in found.items() if (new := self._of_all(old)) is not old}
        return replace(part, **changed) if changed else part

    def repeat(self, x: Float[Tensor, "M ..."] | Int[Tensor, "M ..."] | Bool[Tensor, "M ..."]) -> Tensor:
        """``[C, ...]``: all members of the first set, all of the second, and so on."""
        return x.expand(self.sets, *x.shape).flatten(0, 1)


@dataclass(frozen=True)
class Measures:
    """Named sets of interventions, checked and planned for one batched pass. Build with ``build_measures``.

    Args:
        names: of the sets, the base line first.
        copies: of the members.
        plan: of all sets, for C members.
    """

    names: tuple[str, ...]
    copies: Copies
    plan: Plan

    def covers(self) -> Bool[Tensor, "S M"]:
        """Which members each set intervenes in."""
        own = torch.from_numpy(covered_members(self.plan, self.copies.sets * self.copies.members))
        return own[list(self.plan.passes[-1].items)].any(0).view(self.copies.sets, self.copies.members)


@dataclass(frozen=True)
class _OfSet:
    """Everything one set wants overwritten, in its own copies."""

    writers: Sequence[Writer]
    copies: Copies
    place: int

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        return [self.copies.of_set(item, self.place) for writer in self.writers for item in writer.interventions(sites)]


def build_measures(
    sets: Mapping[str, Sequence[Writer]], sites: SiteTable, members: int, batch_size: int, field_name: str
) -> Measures:
    """Check every set as if it were the plan of a run, and plan all of them together.

    Args:
        members: M of the run.
        field_name: the setting that holds the sets, for messages.

    Raises:
        ConfigError: a set that could not be the plan of a run, or that changes while training; names the set.
    """
    for name, writers in sets.items():
        try:
            for writer in writers:
                _refuse_moving(writer.interventions(sites))
            build_plan(writers, sites, members, 1, batch_size)
        except ConfigError as error:
            raise ConfigError(f"{field_name}.{name}.{error.field}", error.value, error.expected) from error
    copies = Copies(members, len(sets) + 1)
    restricted = [_OfSet(writers, copies, place) for place, writers in enumerate(sets.values(), 1)]
    plan = build_plan(restricted, sites, members * copies.sets, 1, batch_size)
    return Measures((BASE_LINE, *sets), copies, plan)


def _refuse_moving(items: Iterable[Intervention]) -> None:
    """Refuse what follows training, here or in a pass that is taken from."""
    for item in items:
        if item.schedule != Schedule():
            raise ConfigError(f"{item.writer}.schedule", str(item.schedule), "none: a measure is always in force")
        for need in item.value.needs:
            if isinstance(need, Supply) and not need.fixed:
                expected = "a writer whose tensors are given: nothing renews them inside a measure"
                raise ConfigError(item.writer, type(item.value).__name__, expected)
            if isinstance(need, Source) and isinstance(need.of, Pass):
                _refuse_moving(need.of.interventions)


def measure_constants(measures: Measures, constants: Constants) -> Constants:
    """The constants of the batched pass, from those of the run."""
    table = constants.table
    own = constants_of(measures.plan, constants.bank, table, measures.copies.members, table.dtype)
    return replace(own, supplied=[measures.copies.repeat(tensor) for tensor in own.supplied])


@dataclass(frozen=True)
class Measured:
    """What weights would do under every set.

    Args:
        loss: mean over the batch, in nats.
        accuracy: share of scored positions whose most likely output is the target.
        changed: whether some activation of the member was overwritten by something else than it was.
    """

    loss: Float[Tensor, "S M"]
    accuracy: Float[Tensor, "S M"]
    changed: Bool[Tensor, "S M"]


def evaluate(
    measures: Measures,
    model: Transformer,
    parameters: Parameters,
    constants: Constants,
    batch: Batch,
    clock: Int[Tensor, "M 2"],
) -> Measured:
    """Evaluate M members under every set in one pass of S x M members, without gradient.

    Values from other passes cost one pass of S x M members for each different pass.

    Args:
        parameters: of the M members.
        constants: from ``measure_constants``.
        batch: of the M members.
        clock: seed of every member and the number of the step.
    """
    copies, plan = measures.copies, measures.plan
    weights = {name: copies.repeat(x) for name, x in parameters.items()}
    gates = constants.table.new_ones(len(plan.interventions), copies.sets * copies.members)
    scene = Scene(model, weights, constants, batch.map(copies.repeat), gates, copies.repeat(clock))
    fired: dict[int, Tensor] = {}
    with torch.no_grad():
        tap = run_passes(plan, scene, fired)
        logits = scored_logits(forward(weights, constants.table, scene.batch, model, tap), scene.batch)
        loss = cross_entropy(logits, scene.batch).mean((1, 2))
        right = accuracy(logits, scene.batch)
    changed = torch.stack([fired[index] for index in plan.passes[-1].items]).any(0)
    shape = (copies.sets, copies.members)
    return Measured(loss.view(shape), right.view(shape), changed.view(shape))
