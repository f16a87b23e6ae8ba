"""How a plan acts: one batch on one set of weights, pass by pass, each activation through its tap.

Everything here is traced into the compiled step, so what is fixed before training is Python and what may
change is a tensor.

Legend: M members, I interventions, L positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opsin.interventions.plan import Plan, Taken
from opsin.model.transformer import Parameters, Tap, Transformer, forward
from opsin.task import Batch


def overwrite(x: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """``x`` moved toward ``value`` by ``weight`` in [0, 1].

    Weight 0 returns ``x`` and weight 1 returns ``value`` exactly (a zero may lose its sign); at weight
    1 the gradient into ``x`` is exactly zero. All three broadcast; both tensors and their difference
    must be finite.
    """
    return torch.lerp(x, value, weight)


Activations = dict[str, Tensor]


@dataclass(frozen=True)
class Constants:
    """Tensors that no gradient moves.

    Args:
        bank: the task's.
        table: position table of the model.
        masks: the plan's, in order.
        donors: weights of the plan's donors ``[1, ...]``, in order.
        donor_tables: their position tables.
        supplied: the plan's supplies, in order; their writers may change them in place between steps.
        fresh: what each of the plan's draws sets its parameter to, in order.
    """

    bank: Mapping[str, Tensor]
    table: Float[Tensor, "2 L half"]
    masks: Sequence[Tensor]
    donors: Sequence[Mapping[str, Tensor]] = ()
    donor_tables: Sequence[Tensor] = ()
    supplied: Sequence[Tensor] = ()
    fresh: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Scene:
    """One batch on one set of weights.

    Args:
        model: shape of the model that is trained.
        parameters: its weights.
        constants: of the run.
        batch: what it sees.
        gates: strength of every intervention.
        clock: seed of every member and the number of the step.
    """

    model: Transformer
    parameters: Parameters
    constants: Constants
    batch: Batch
    gates: Float[Tensor, "I M"]
    clock: Int[Tensor, "M 2"]


def constants_of(
    plan: Plan,
    bank: Mapping[str, Tensor],
    table: Float[Tensor, "2 L half"],
    members: int,
    dtype: torch.dtype,
    fresh: Sequence[Tensor] = (),
) -> Constants:
    """The constants of a run with this plan, on the device of its position table."""
    length, device = table.shape[1], table.device
    return Constants(
        {name: tensor.to(device) for name, tensor in bank.items()},
        table,
        [mask.to(device, dtype) for mask in plan.masks],
        [{name: x.to(device, dtype) for name, x in donor.parameters.items()} for donor in plan.donors],
        [donor.table(length).to(device, dtype) for donor in plan.donors],
        [supply.initial(members).to(device, dtype) for supply in plan.supplies],
        [value.to(device, dtype) for value in fresh],
    )


def run_passes(
    plan: Plan, scene: Scene, fired: dict[int, Tensor] | None = None, seen: dict[int, Activations] | None = None
) -> Tap:
    """Run every pass that a value is taken from, and return the tap of the run's own pass.

    Args:
        fired: receives, once the own pass has been run too, which members' activations each
            intervention changed: place in the plan and a bool tensor ``[M]``.
        seen: receives every activation of every pass as it goes on, by the place of the pass in the plan.
    """
    acting = _Acting(plan, scene, fired, seen)
    for number, planned in enumerate(plan.passes[:-1]):
        if not planned.inner:
            acting.kept[number] = acting.run(number, {})
    return acting.tap(len(plan.passes) - 1, _Running(scene.parameters))


@dataclass
class _Running:
    """One pass while it runs.

    Args:
        parameters: its weights.
        asking: what the pass that asked for it keeps.
        here: what it keeps itself.
        inner: what the passes inside it keep.
    """

    parameters: Parameters
    asking: Activations = field(default_factory=dict)
    here: Activations = field(default_factory=dict)
    inner: dict[int, Activations] = field(default_factory=dict)


@dataclass
class _Acting:
    """A plan at work on one scene."""

    plan: Plan
    scene: Scene
    fired: dict[int, Tensor] | None
    seen: dict[int, Activations] | None
    kept: dict[int, Activations] = field(default_factory=dict)

    def run(self, number: int, asking: Activations) -> Activations:
        """Run one pass; returns what it keeps."""
        scene, planned = self.scene, self.plan.passes[number]
        parameters, table, model = scene.parameters, scene.constants.table, scene.model
        if planned.donor is not None:
            members = scene.batch.tokens.shape[0]
            donated = scene.constants.donors[planned.donor]
            parameters = {name: x.expand(members, *x.shape[1:]) for name, x in donated.items()}
            table = scene.constants.donor_tables[planned.donor]
            model = self.plan.donors[planned.donor].model
        running = _Running(parameters, asking)
        forward(parameters, table, scene.batch, model, self.tap(number, running))
        return running.here

    def tap(self, number: int, running: _Running) -> Tap:
        """The tap of one pass."""
        planned = self.plan.passes[number]
        at_site: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        for group in planned.together:
            at_site[self.plan.interventions[group[0]].site].append(group)

        def tap(name: str, activation: Tensor) -> Tensor:
            for group in at_site.get(name, ()):
                taken = [self.take(need, running) for need in self.plan.taken[group[0]]]
                activation = self.apply(group, activation, taken)
            if name in planned.keeps:
                running.here[name] = activation
            if self.seen is not None:
                self.seen.setdefault(number, {})[name] = activation
            return activation

        return tap

    def take(self, need: Taken, running: _Running) -> Tensor:
        """What one value of a pass needs."""
        match need.kind:
            case "pass":
                found = self.kept[need.index][need.name]
            case "inner":
                if need.index not in running.inner:
                    running.inner[need.index] = self.run(need.index, running.here)
                found = running.inner[need.index][need.name]
            case "this":
                found = running.here[need.name]
            case "asking":
                found = running.asking[need.name]
            case "weight":
                found = running.parameters[need.name]
            case "supply":
                found = self.scene.constants.supplied[need.index]
            case _:
                found = self.scene.clock
        return found.detach() if need.detach else found

    def apply(self, group: Sequence[int], x: Tensor, taken: Sequence[Tensor]) -> Tensor:
        """Overwrite ``x`` as some interventions of one value say, and note which of them changed it."""
        chosen = self.plan.interventions[group[0]].value(x, self.scene.batch, *taken)
        always = self.plan.always[group[0]]
        weight = sum((self._weight(index, x) for index in group[1:]), start=self._weight(group[0], x))
        if chosen.where is not None:
            weight = weight * chosen.where.to(weight.dtype)
        whole = always and chosen.where is None and weight.numel() == 1
        after = chosen.value.expand_as(x) if whole else overwrite(x, chosen.value, weight)
        if self.fired is not None:
            self._note(group, after != x)
        return after

    def _weight(self, index: int, x: Tensor) -> Tensor:
        mask = self.scene.constants.masks[index]
        return mask if self.plan.always[index] else self.scene.gates[index].view(-1, *[1] * (x.dim() - 1)) * mask

    def _note(self, group: Sequence[int], different: Bool[Tensor, "M ..."]) -> None:
        assert self.fired is not None
        for index in group:
            own = different if len(group) == 1 else different & (self.scene.constants.masks[index] > 0)
            changed = own.flatten(1).any(1)
            self.fired[index] = changed | self.fired[index] if index in self.fired else changed


@dataclass(frozen=True)
class Moment:
    """What the interventions of one step are told; tensors, so that no schedule changes the graph.

    Args:
        gates: strength of every intervention, then of every change of weights.
        clock: seed of every member and the number of the step.
        fired: steps so far in which each of them changed an activation, or a weight; counted up in place.
        alive: members that still learn; one whose loss or gradient is no number stops before its weights are touched.
        missed: updates that have passed by the entries of every parameter that is ever changed; counted up in place.
    """

    gates: Float[Tensor, "I M"]
    clock: Int[Tensor, "M 2"]
    fired: Int[Tensor, "I M"]
    alive: Bool[Tensor, " M"]
    missed: Mapping[str, Tensor] = field(default_factory=dict)
