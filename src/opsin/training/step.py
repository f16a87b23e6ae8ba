"""One training step as a pure function of tensors; eager and compiled are the same function.

Legend: M members, B batch, L positions, Q scored positions, V outputs, I rows of a plan,
R numbers that a step reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.interventions.apply import Constants, PassInputs, run_passes
from opsin.interventions.plan import Plan
from opsin.model.protocol import Model
from opsin.optimizers.base import Optimizer
from opsin.task import NeededRows, Task
from opsin.training.objective import scored_logits
from opsin.training.optimizer_state import Hyper, OptimizerState
from opsin.training.step_inputs import StepCounts, StepGates
from opsin.training.weight_updates import WeightUpdate


def needed_rows(model: Model, task: Task, plan: Plan) -> NeededRows | None:
    """The rows that the forward pass of a training step needs; None for all.

    Args:
        model: settings of the model that is trained.
        task: what says which rows are scored.
        plan: interventions of the run; what they act on, or take from the run's own pass, is needed at all rows.
    """
    scored = task.layout.scored
    unscored = tuple(row for row in range(task.layout.positions) if row not in scored)
    if not unscored:
        return None
    last_pass = plan.passes[-1]
    touched = {*last_pass.keeps, *(row.target for row in last_pass.rows)}
    names = [site.name for site in model.sites(task) if site.row_by_row and site.name in touched]
    return NeededRows(scored, unscored, names[-1] if names else None)


@dataclass(frozen=True)
class Step:
    """The step of one run: everything that is fixed before training and shapes the graph.

    Args:
        model: settings of the model that is trained.
        task: what the members learn, with its data.
        plan: interventions and changes of weights of the run.
        optimizer: the optimizer whose arithmetic moves the weights; its hyper-parameters are given to each step.
    """

    model: Model
    task: Task
    plan: Plan
    optimizer: Optimizer
    rows: NeededRows | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", needed_rows(self.model, self.task, self.plan))

    def __call__(
        self,
        state: OptimizerState,
        hyper: Hyper,
        constants: Constants,
        draw: Mapping[str, Tensor],
        gates: StepGates,
        counts: StepCounts,
    ) -> Float[Tensor, "R M"]:
        """Gather the batch, draw weights anew, forward, loss, gradient, update where nothing is frozen; in place.

        Args:
            state: parameters and what the optimizer keeps of them.
            hyper: hyper-parameters, clipping and clock of this step.
            constants: tensors of the run that no gradient moves.
            draw: the task's random choices for this step, ``[M, B, ...]``.
            gates: strength of every row of the plan, and the clock.
            counts: what the run counts.

        Returns:
            Loss (before the update), the measures that the objective has while training, and the gradient norm (of
            what may move) of every member: ``objective.step_metrics``.
        """
        objective = self.task.objective
        batch = self.task.assemble(constants.bank, draw)
        parameters = {**constants.untrained, **dict(zip(state.names, state.parameters, strict=True))}
        update = WeightUpdate(self.plan.changes, state, constants, gates, counts, self.optimizer)
        fired: dict[int, Tensor] = {}
        tap = run_passes(
            self.plan, PassInputs(self.model, parameters, constants, batch, gates.strength, gates.clock), fired
        )
        shown = self.task.shown(constants.bank, draw)
        if shown is not None and len(shown.vectors) >= shown.which[0].numel():
            shown = None
        needed = replace(batch, rows=self.rows, shown=shown)
        outputs = scored_logits(self.model.forward(parameters, constants.table, needed, tap), batch)
        loss = objective.member_loss(outputs, batch)
        # members do not mix, so the gradient of the sum holds each member's own
        gradients = torch.autograd.grad(loss.sum(), list(state.parameters))
        with torch.no_grad():
            norm, changed = update.apply(gradients, loss, hyper)
            changed = [*(fired[gate] for gate in sorted(fired)), *changed]
            if changed:
                counts.fired.add_(torch.stack(changed) & counts.alive)
            measures = [measure(outputs, batch) for measure in objective.measures_of(batch, while_training=True)]
            results = torch.stack([loss.detach(), *measures, norm])
            return results.masked_fill(~counts.alive, torch.nan)
