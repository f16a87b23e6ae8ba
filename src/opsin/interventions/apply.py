"""How a plan acts: one batch on one set of weights, pass by pass, each activation through its tap.

Passes that values are taken from run first, each once; a nested pass runs inside the pass that asks for it, when that
one comes to need it. The tap of a pass overwrites an activation as its rows say, keeps what later values need, and
hands on the rest. Everything here is traced into the compiled step, so what is fixed before training is Python and
what may change is a tensor.

Legend: M members, I rows of a plan, L positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opsin.interventions.plan import InputAddress, Plan, PlannedIntervention
from opsin.model.parameters import Parameters
from opsin.model.protocol import Model, Tap
from opsin.task import Batch


def overwrite(x: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """``x`` moved toward ``value`` by ``weight`` in [0, 1].

    Weight 0 returns ``x`` and weight 1 returns ``value`` exactly (a zero may lose its sign); at weight
    1 the gradient into ``x`` is exactly zero. All three broadcast; both tensors and their difference
    must be finite.
    """
    return torch.lerp(x, value, weight)


Activations = dict[str, Tensor]
"""Activations of one pass as they go on after the tap, by the name of their site."""


@dataclass(frozen=True)
class Constants:
    """Tensors that no gradient moves.

    Args:
        bank: constants that the task's batches are gathered from.
        table: position table of the model that is trained.
        masks: mask of every row of the plan, by its gate.
        donors: weights of the plan's donors ``[1, ...]``, in order.
        donor_tables: position tables of the plan's donors, in order.
        supplied: the plan's supplies, in order; their writers may change them in place between steps.
        fresh: what each of the plan's draws sets its parameter to, in order.
        untrained: parameters ``[M, ...]`` that no optimizer moves, by name.
    """

    bank: Mapping[str, Tensor]
    table: Float[Tensor, "2 L half"]
    masks: Sequence[Tensor]
    donors: Sequence[Mapping[str, Tensor]] = ()
    donor_tables: Sequence[Tensor] = ()
    supplied: Sequence[Tensor] = ()
    fresh: Sequence[Tensor] = ()
    untrained: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PassInputs:
    """One batch on one set of weights, and how strongly every row of the plan acts on it.

    Args:
        model: settings of the model that is trained.
        parameters: weights of that model, ``[M, ...]`` by name.
        constants: tensors of the run that no gradient moves.
        batch: sequences that the model sees.
        gates: strength of every row of the plan, in [0, 1].
        clock: seed of every member and the number of the optimizer step.
    """

    model: Model
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
    untrained: Mapping[str, Tensor] | None = None,
) -> Constants:
    """The constants of a run with this plan, on the device of its position table.

    Args:
        plan: interventions and changes of weights of the run.
        bank: constants that the task's batches are gathered from.
        table: position table of the model that is trained.
        members: M, models of the run.
        dtype: precision of the weights, which all constants but the bank's get.
        fresh: what each of the plan's draws sets its parameter to, in order.
        untrained: parameters ``[M, ...]`` that no optimizer moves, by name; none when None.
    """
    length, device = table.shape[1], table.device
    return Constants(
        {name: tensor.to(device) for name, tensor in bank.items()},
        table,
        [row.mask.to(device, dtype) for row in plan.rows],
        [{name: x.to(device, dtype) for name, x in donor.parameters.items()} for donor in plan.donors],
        [donor.table(length).to(device, dtype) for donor in plan.donors],
        [supply.initial(members).to(device, dtype) for supply in plan.supplies],
        [value.to(device, dtype) for value in fresh],
        {name: x.to(device, dtype) for name, x in (untrained or {}).items()},
    )


def run_passes(
    plan: Plan,
    inputs: PassInputs,
    fired: dict[int, Tensor] | None = None,
    seen: dict[int, Activations] | None = None,
) -> Tap:
    """Run every pass that a value is taken from, and return the tap of the run's own pass.

    Args:
        plan: interventions of the run.
        inputs: batch, weights and gates.
        fired: receives, once the own pass has been run too, which members' activations each row changed: its gate and
            a bool tensor ``[M]``.
        seen: receives every activation of every pass as it goes on, by the number of the pass in the plan.
    """
    runner = _PassRunner(plan, inputs, fired, seen)
    for number, planned in enumerate(plan.passes[:-1]):
        if not planned.nested:
            runner.finished[number] = runner.run(number, asking_pass={})
    return runner.tap(len(plan.passes) - 1, _PassState(inputs.parameters))


@dataclass
class _PassState:
    """One pass while it runs.

    Args:
        parameters: weights that it runs, ``[M, ...]`` by name.
        asking_pass: what the pass that asks for this one has kept so far; empty where none asks.
        this_pass: what this pass has kept so far.
        nested_passes: what the passes nested in this one have kept, by their number in the plan.
    """

    parameters: Parameters
    asking_pass: Activations = field(default_factory=dict)
    this_pass: Activations = field(default_factory=dict)
    nested_passes: dict[int, Activations] = field(default_factory=dict)


@dataclass
class _PassRunner:
    """Runs the passes of a plan on one batch.

    Args:
        plan: interventions of the run.
        inputs: batch, weights and gates.
        fired: receives which members each row changed, by its gate; nothing is noted when None.
        seen: receives every activation of every pass; nothing is noted when None.
        finished: what the passes that have ended have kept, by their number in the plan.
    """

    plan: Plan
    inputs: PassInputs
    fired: dict[int, Tensor] | None
    seen: dict[int, Activations] | None
    finished: dict[int, Activations] = field(default_factory=dict)

    def run(self, number: int, asking_pass: Activations) -> Activations:
        """Run one pass to its end; returns what it keeps."""
        inputs, planned = self.inputs, self.plan.passes[number]
        parameters, table, model = inputs.parameters, inputs.constants.table, inputs.model
        if planned.donor is not None:
            members = inputs.batch.tokens.shape[0]
            donated = inputs.constants.donors[planned.donor]
            parameters = {name: x.expand(members, *x.shape[1:]) for name, x in donated.items()}
            table = inputs.constants.donor_tables[planned.donor]
            model = self.plan.donors[planned.donor].model
        state = _PassState(parameters, asking_pass)
        model.forward(parameters, table, inputs.batch, self.tap(number, state))
        return state.this_pass

    def tap(self, number: int, state: _PassState) -> Tap:
        """The tap of one pass."""
        planned = self.plan.passes[number]
        groups_at: dict[str, list[tuple[PlannedIntervention, ...]]] = defaultdict(list)
        for group in planned.groups:
            groups_at[group[0].target].append(group)

        def tap(site: str, activation: Tensor) -> Tensor:
            for group in groups_at.get(site, ()):
                inputs = [self.find(address, state) for address in group[0].inputs]
                activation = self.overwrite(group, activation, inputs)
            if site in planned.keeps:
                state.this_pass[site] = activation
            if self.seen is not None:
                self.seen.setdefault(number, {})[site] = activation
            return activation

        return tap

    def find(self, address: InputAddress, state: _PassState) -> Tensor:
        """The tensor that one need of a value is."""
        match address.kind:
            case "pass":
                found = self.finished[address.index][address.name]
            case "nested":
                if address.index not in state.nested_passes:
                    state.nested_passes[address.index] = self.run(address.index, asking_pass=state.this_pass)
                found = state.nested_passes[address.index][address.name]
            case "this":
                found = state.this_pass[address.name]
            case "asking":
                found = state.asking_pass[address.name]
            case "weight" if address.weight is not None:
                found = address.weight.read(state.parameters)
            case "supply":
                found = self.inputs.constants.supplied[address.index]
            case _:
                found = self.inputs.clock
        return found.detach() if address.detach else found

    def overwrite(self, group: Sequence[PlannedIntervention], x: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """Overwrite ``x`` as the rows of one group say, all by one value, and note which of them changed it."""
        chosen = group[0].intervention.value(x, self.inputs.batch, *inputs)
        weight = sum((self._weight(row, x) for row in group[1:]), start=self._weight(group[0], x))
        if chosen.where is not None:
            weight = weight * chosen.where.to(weight.dtype)
        whole = group[0].always and chosen.where is None and weight.numel() == 1
        after = chosen.value.expand_as(x) if whole else overwrite(x, chosen.value, weight)
        if self.fired is not None:
            self._note(self.fired, group, after != x)
        return after

    def _weight(self, row: PlannedIntervention, x: Tensor) -> Tensor:
        """Strength of one row at every entry, broadcastable to ``x``."""
        mask = self.inputs.constants.masks[row.gate]
        return mask if row.always else self.inputs.gates[row.gate].view(-1, *[1] * (x.dim() - 1)) * mask

    def _note(
        self, fired: dict[int, Tensor], group: Sequence[PlannedIntervention], different: Bool[Tensor, "M ..."]
    ) -> None:
        for row in group:
            selected = different if len(group) == 1 else different & (self.inputs.constants.masks[row.gate] > 0)
            changed = selected.flatten(1).any(1)
            fired[row.gate] = changed | fired[row.gate] if row.gate in fired else changed
