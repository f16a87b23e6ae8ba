"""Forward passes on fixed sequences: what the model does with them under the interventions in force.

Legend: M members, B batch, Q scored positions, V outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.interventions.apply import Constants, PassInputs, run_passes
from opsin.interventions.intervention import Intervention
from opsin.interventions.plan import Plan
from opsin.model.parameters import Parameters
from opsin.model.protocol import Model, Tap
from opsin.task import Batch, Task
from opsin.training.gates import GateController
from opsin.training.objective import scored_logits

PROBE_SEED = 0
"""Seed of the probe and of every evaluation set, whatever the seeds of the members."""


class ForwardPasses:
    """Forward passes of the current weights on given sequences, under the plan as it stood at the last step.

    No gradient reaches the weights, and nothing that a run counts or draws is touched.

    Args:
        model: settings of the model that is trained.
        task: task that the evaluation sets belong to.
        plan: interventions of the run.
        constants: tensors of the run that no gradient moves.
        gates: controller that knows the strength of every row of the plan at a step.
        parameters: function that returns the current weights ``[M, ...]`` by name.
        steps_done: function that returns the number of optimizer steps finished.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        plan: Plan,
        constants: Constants,
        gates: GateController,
        parameters: Callable[[], Parameters],
        steps_done: Callable[[], int],
    ) -> None:
        self.model, self.task, self.plan, self.constants, self.gates = model, task, plan, constants, gates
        self._parameters, self._steps_done = parameters, steps_done
        self._evaluation_sets: dict[tuple[str, int], Batch] = {}

    def evaluation_set(self, name: str, size: int) -> Batch:
        """Fixed sequences of an evaluation set, equal for every member and every run of the task.

        Args:
            name: evaluation set of the task; ``train`` has the distribution of training.
            size: number of sequences B.
        """
        if (name, size) not in self._evaluation_sets:
            draw = self.task.draw([PROBE_SEED], 0, 1, f"eval/{name}", size)
            device = self.constants.table.device
            choices = {key: tensor[0].to(device) for key, tensor in draw.items()}
            batch = self.task.assemble(self.constants.bank, choices)
            self._evaluation_sets[name, size] = batch.shared_by(len(self.gates.seeds))
        return self._evaluation_sets[name, size]

    def tap(self, batch: Batch, without: Collection[Intervention] = ()) -> Tap:
        """The tap of one forward pass on a batch; what interventions take from other passes is computed at once.

        Args:
            batch: sequences that the other passes see.
            without: interventions of the run's own pass that are switched off.
        """
        gates = self.gates.at(max(self._steps_done() - 1, 0), without)
        inputs = PassInputs(self.model, self._weights(), self.constants, batch, gates.strength, gates.clock)
        return run_passes(self.plan, inputs)

    def observe(
        self, batch: Batch, sites: Collection[str], without: Collection[Intervention] = ()
    ) -> dict[str, Tensor]:
        """Activations ``[M, B, ...]`` by site, without gradient.

        Args:
            batch: sequences that the model sees.
            sites: names of the activations; the forward pass ends where the last of them has been computed.
            without: interventions of the run's own pass that are switched off.
        """
        return self.activations(batch, sites, self.tap(batch, without))

    def activations(self, batch: Batch, sites: Collection[str], tap: Tap) -> dict[str, Tensor]:
        """Activations ``[M, B, ...]`` by site of a forward pass through a given tap, without gradient.

        Args:
            batch: sequences that the model sees.
            sites: names of the activations; the forward pass ends where the last of them has been computed.
            tap: what every activation passes, for example one that adds to ``self.tap``.
        """
        return observe(self.model, self._weights(), self.constants.table, batch, tap, sites)

    def logits(self, batch: Batch, tap: Tap | None = None) -> Float[Tensor, "M B Q V"]:
        """Logits at the scored positions; gradient flows into the sequences and the tap.

        Args:
            batch: sequences that the model sees.
            tap: what every activation passes; that of the interventions in force when None.
        """
        tap = self.tap(batch) if tap is None else tap
        return scored_logits(self.model.forward(self._weights(), self.constants.table, batch, tap), batch)

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters().items()}


class _AllSeen(Exception):
    """Every activation that is observed has been computed."""


def observe(
    model: Model,
    parameters: Mapping[str, Tensor],
    table: Float[Tensor, "2 L half"],
    batch: Batch,
    tap: Tap,
    sites: Collection[str],
) -> dict[str, Tensor]:
    """The activations of ``sites`` as they go on after the tap, without gradient.

    The forward pass ends where the last of them has been computed.

    Args:
        model: shape that the parameters were made with.
        parameters: weights ``[M, ...]`` by name.
        table: position table of the model for sequences of this length.
        batch: sequences that the model sees.
        tap: what every activation passes.
        sites: names of the activations that are returned.
    """
    kept: dict[str, Tensor] = {}

    def keeping(name: str, activation: Tensor) -> Tensor:
        activation = tap(name, activation)
        if name in sites:
            kept[name] = activation
            if len(kept) == len(sites):
                raise _AllSeen
        return activation

    with torch.no_grad(), suppress(_AllSeen):
        model.forward(parameters, table, batch, keeping)
    return kept
