"""One training step as a pure function of tensors; eager and compiled are the same function.

Legend: M members, B batch, L positions, Q scored positions, V outputs, I interventions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.interventions.apply import Constants, Moment, Scene, run_passes
from opsin.interventions.plan import Plan
from opsin.model.transformer import Transformer, forward
from opsin.task import Task
from opsin.training.objective import accuracy, cross_entropy, scored_logits
from opsin.training.optimizers import AdamState, Hyper, adam_update, member_norm
from opsin.training.weight_updates import Changing, moving


@dataclass(frozen=True)
class Step:
    """The step of one run: everything that is fixed before training and shapes the graph."""

    model: Transformer
    task: Task
    plan: Plan
    betas: tuple[float, float]
    eps: float

    def __call__(
        self,
        state: AdamState,
        hyper: Hyper,
        constants: Constants,
        draw: Mapping[str, Tensor],
        moment: Moment,
    ) -> Float[Tensor, "3 M"]:
        """Gather, draw weights anew, forward, loss, gradient and Adam where nothing is frozen, in place.

        Returns:
            Loss (nats, before the update), accuracy and gradient norm (of what may move) of every member.
        """
        batch = self.task.assemble(constants.bank, draw)
        parameters = dict(zip(state.names, state.parameters, strict=True))
        scene = Scene(self.model, parameters, constants, batch, moment.gates, moment.clock)
        changing = self._changing(state, constants, moment)
        with torch.no_grad():
            renewed = changing.renew()
        fired: dict[int, Tensor] = {}
        tap = run_passes(self.plan, scene, fired)
        logits = scored_logits(forward(parameters, constants.table, batch, self.model, tap), batch)
        loss = cross_entropy(logits, batch).mean((1, 2))
        # members do not mix, so the gradient of the sum holds each member's own
        gradients = torch.autograd.grad(loss.sum(), list(state.parameters))
        with torch.no_grad():
            held = changing.held()
            norm = member_norm(moving(dict(zip(state.names, gradients, strict=True)), held))
            # in place, so that what made it stop is the last that it saw
            moment.alive.logical_and_(loss.isfinite() & norm.isfinite())
            before, corrections = changing.copies(held), changing.corrections(hyper.correction, self.betas)
            adam_update(state, gradients, norm, hyper, moment.alive, self.betas, self.eps, corrections)
            counts = [*(fired[index] for index in sorted(fired)), *renewed, *changing.hold(held, before)]
            if counts:
                moment.fired.add_(torch.stack(counts) & moment.alive)
            seen = torch.stack([loss.detach(), accuracy(logits, batch), norm])
            return seen.masked_fill(~moment.alive, torch.nan)

    def _changing(self, state: AdamState, constants: Constants, moment: Moment) -> Changing:
        """The changes of weights of one step."""
        first = len(self.plan.interventions)
        strengths = [
            moment.gates[row].view(-1, *[1] * (mask.dim() - 1)) * mask
            for row, mask in enumerate(constants.masks[first:], first)
        ]
        tensors = zip(state.parameters, state.exp_avg, state.exp_avg_sq, strict=True)
        by_name = dict(zip(state.names, tensors, strict=True))
        return Changing(self.plan.changes, strengths, constants.fresh, moment.missed, moment.clock, by_name)
