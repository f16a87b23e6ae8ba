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
from opsin.interventions.apply import Constants, PassInputs, constants_of, run_passes
from opsin.interventions.build_plan import Writer, build_plan
from opsin.interventions.intervention import Intervention, Pass, Source, Supply
from opsin.interventions.plan import Plan
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection
from opsin.model.parameters import Parameters
from opsin.model.protocol import Model
from opsin.model.sites import SiteTable
from opsin.objective import Objective
from opsin.records.schema import BASE_LINE
from opsin.task import Batch
from opsin.training.objective import scored_logits


@dataclass(frozen=True)
class Copies:
    """Where on the member axis each set finds its members.

    Args:
        members: M, models of the run.
        sets: S, number of sets, the base line among them.
    """

    members: int
    sets: int

    def in_set(self, item: Intervention, number: int) -> Intervention:
        """The intervention in the copies of one set; passes that it takes from hold for every set.

        Args:
            item: intervention as its writer wants it in the M members.
            number: index of the set; 0 is the base line.
        """
        members = range(self.members) if item.selection.members is None else item.selection.members
        copies = tuple(number * self.members + member for member in members)
        return replace(item, selection=replace(item.selection, members=copies), value=self._in_every_set(item.value))

    def _in_every_set(self, part: Any) -> Any:
        """The value with members selected in every set, wherever a pass inside it selects some."""
        if isinstance(part, tuple):
            return tuple(self._in_every_set(item) for item in part)
        if isinstance(part, Selection) and part.members is not None:
            everywhere = tuple(s * self.members + member for s in range(self.sets) for member in part.members)
            return replace(part, members=everywhere)
        if not is_dataclass(part) or isinstance(part, (type, Supply)):
            return part
        found = {field.name: getattr(part, field.name) for field in fields(part)}
        changed = {name: new for name, old in found.items() if (new := self._in_every_set(old)) is not old}
        return replace(part, **changed) if changed else part

    def repeat(self, x: Float[Tensor, "M ..."] | Int[Tensor, "M ..."] | Bool[Tensor, "M ..."]) -> Tensor:
        """``[C, ...]``: all members of the first set, all of the second, and so on."""
        return x.expand(self.sets, *x.shape).flatten(0, 1)


@dataclass(frozen=True)
class Measures:
    """Named sets of interventions, checked and planned for one batched pass. Build with ``build_measures``.

    Args:
        names: name of every set, the base line first.
        copies: where on the member axis each set finds its members.
        plan: interventions of all sets, planned for C members.
    """

    names: tuple[str, ...]
    copies: Copies
    plan: Plan

    def covers(self) -> Bool[Tensor, "S M"]:
        """Which members each set intervenes in."""
        covered = torch.from_numpy(self.plan.covered_members(self.copies.sets * self.copies.members))
        return covered[[row.gate for row in self.plan.passes[-1].rows]].any(0).view(self.copies.sets, -1)


@dataclass(frozen=True)
class _SetWriter:
    """Everything that one set wants overwritten, in the copies of that set alone.

    Args:
        writers: the writers of the set.
        copies: where on the member axis each set finds its members.
        number: index of the set; 0 is the base line.
    """

    writers: Sequence[Writer]
    copies: Copies
    number: int

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        return [
            self.copies.in_set(item, self.number) for writer in self.writers for item in writer.interventions(sites)
        ]


def build_measures(
    sets: Mapping[str, Sequence[Writer]], sites: SiteTable, members: int, batch_size: int, field_name: str
) -> Measures:
    """Check every set as if it were the plan of a run, and plan all of them together.

    Args:
        sets: writers of every set, by its name.
        sites: activations of the model that is trained.
        members: M, models of the run.
        batch_size: sequences a training step sees.
        field_name: setting that holds the sets, for messages.

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
    restricted = [_SetWriter(writers, copies, number) for number, writers in enumerate(sets.values(), 1)]
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
    """The constants of the batched pass.

    Args:
        measures: sets of interventions, planned.
        constants: tensors of the run.
    """
    table = constants.table
    found = constants_of(measures.plan, constants.bank, table, measures.copies.members, table.dtype)
    return replace(found, supplied=[measures.copies.repeat(tensor) for tensor in found.supplied])


@dataclass(frozen=True)
class MeasuredSets:
    """What weights would do under every set.

    Args:
        loss: mean loss over the batch, in the objective's unit.
        measures: values ``[S, M]`` of what the objective measures while training, by name.
        changed: whether some activation of the member was overwritten by something else than it was.
    """

    loss: Float[Tensor, "S M"]
    measures: Mapping[str, Float[Tensor, "S M"]]
    changed: Bool[Tensor, "S M"]


def measure(
    measures: Measures,
    model: Model,
    parameters: Parameters,
    constants: Constants,
    batch: Batch,
    clock: Int[Tensor, "M 2"],
    objective: Objective,
) -> MeasuredSets:
    """Evaluate M members under every set in one pass of S x M members, without gradient.

    Values from other passes cost one pass of S x M members for each different pass.

    Args:
        measures: sets of interventions, planned.
        model: settings of the model that is trained.
        parameters: weights ``[M, ...]`` of the members, by name.
        constants: what ``measure_constants`` has made.
        batch: sequences that every member sees.
        clock: seed of every member and the number of the optimizer step.
        objective: what is measured of the outputs.
    """
    copies, plan = measures.copies, measures.plan
    weights = {name: copies.repeat(x) for name, x in parameters.items()}
    gates = constants.table.new_ones(len(plan.interventions), copies.sets * copies.members)
    inputs = PassInputs(model, weights, constants, batch.map(copies.repeat), gates, copies.repeat(clock))
    fired: dict[int, Tensor] = {}
    with torch.no_grad():
        tap = run_passes(plan, inputs, fired)
        logits = scored_logits(model.forward(weights, constants.table, inputs.batch, tap), inputs.batch)
        loss = objective.member_loss(logits, inputs.batch)
        chosen = objective.measures_of(inputs.batch, while_training=True)
        measured = {item.name: item(logits, inputs.batch) for item in chosen}
    changed = torch.stack([fired[row.gate] for row in plan.passes[-1].rows]).any(0)
    shape = (copies.sets, copies.members)
    shaped = {name: values.view(shape) for name, values in measured.items()}
    return MeasuredSets(loss.view(shape), shaped, changed.view(shape))
