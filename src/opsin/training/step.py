"""One training step as a pure function of tensors; eager and compiled are the same function.

Legend: M members, B batch, L positions, Q scored positions, V outputs, I rows of a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.interventions.apply import Constants, PassInputs, run_passes
from opsin.interventions.plan import Plan
from opsin.model.protocol import Model
from opsin.task import Task
from opsin.training.adam import Adam, AdamState, Hyper
from opsin.training.objective import accuracy, cross_entropy, scored_logits
from opsin.training.step_inputs import StepCounts, StepGates
from opsin.training.weight_updates import WeightUpdate


@dataclass(frozen=True)
class Step:
    """The step of one run: everything that is fixed before training and shapes the graph.

    Args:
        model: settings of the model that is trained.
        task: what the members learn, with its data.
        plan: interventions and changes of weights of the run.
        adam: what of the optimizer never changes.
    """

    model: Model
    task: Task
    plan: Plan
    adam: Adam

    def __call__(
        self,
        state: AdamState,
        hyper: Hyper,
        constants: Constants,
        draw: Mapping[str, Tensor],
        gates: StepGates,
        counts: StepCounts,
    ) -> Float[Tensor, "3 M"]:
        """Gather the batch, draw weights anew, forward, loss, gradient, update where nothing is frozen; in place.

        Args:
            state: parameters and their running moments.
            hyper: learning rate, decay, clipping and bias corrections of this step.
            constants: tensors of the run that no gradient moves.
            draw: the task's random choices for this step, ``[M, B, ...]``.
            gates: strength of every row of the plan, and the clock.
            counts: what the run counts.

        Returns:
            Loss (nats, before the update), accuracy and gradient norm (of what may move) of every member.
        """
        batch = self.task.assemble(constants.bank, draw)
        parameters = {**constants.untrained, **dict(zip(state.names, state.parameters, strict=True))}
        update = WeightUpdate(self.plan.changes, state, constants, gates, counts)
        fired: dict[int, Tensor] = {}
        tap = run_passes(
            self.plan, PassInputs(self.model, parameters, constants, batch, gates.strength, gates.clock), fired
        )
        logits = scored_logits(self.model.forward(parameters, constants.table, batch, tap), batch)
        loss = cross_entropy(logits, batch).mean((1, 2))
        # members do not mix, so the gradient of the sum holds each member's own
        gradients = torch.autograd.grad(loss.sum(), list(state.parameters))
        with torch.no_grad():
            norm, changed = update.apply(gradients, loss, hyper, self.adam)
            changed = [*(fired[gate] for gate in sorted(fired)), *changed]
            if changed:
                counts.fired.add_(torch.stack(changed) & counts.alive)
            results = torch.stack([loss.detach(), accuracy(logits, batch), norm])
            return results.masked_fill(~counts.alive, torch.nan)
