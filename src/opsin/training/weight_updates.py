"""One optimizer update under the plan's changes of weights: some are drawn anew before it, some stand still through it.

Everything here is traced into the compiled step, so what is fixed before training is Python and what may change is a
tensor. A plan without changes of weights leaves no trace in the graph.

Legend: M members, I rows of a plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opsin.interventions.apply import Constants, overwrite
from opsin.interventions.plan import PlannedChange
from opsin.interventions.weights import Fresh, Frozen
from opsin.model.protocol import Model, init_parameters
from opsin.optimizers.base import Optimizer, Tensors
from opsin.task import Task
from opsin.training.optimizer_state import Hyper, OptimizerState, member_norm, update_members, with_trailing_axes
from opsin.training.step_inputs import StepCounts, StepGates

ByParameter = Mapping[str, Float[Tensor, "M ..."]]
"""A tensor for some of the parameters, by name, broadcastable to them."""


class WeightUpdate:
    """The update of one step: draws weights anew when it is made, and everything else when it is ``applied``.

    Between the two the step computes loss and gradient from the weights that this object has drawn. At strength 1 a
    frozen entry and its state stay as they are, bit for bit; its gradient does not count in the norm, and an
    update that passes it by does not count in its clock.

    Args:
        changes: rows of the plan that change weights.
        state: parameters and what the optimizer keeps of them, changed in place.
        constants: tensors of the run; holds the masks and the values that are drawn.
        gates: strength of every row of the plan at this step.
        counts: what the run counts, changed in place.
        optimizer: the optimizer whose arithmetic moves the weights, and which says with what state weights begin.
    """

    def __init__(
        self,
        changes: Sequence[PlannedChange],
        state: OptimizerState,
        constants: Constants,
        gates: StepGates,
        counts: StepCounts,
        optimizer: Optimizer,
    ) -> None:
        self.state, self.counts, self.optimizer = state, counts, optimizer
        self.steps = gates.clock[:, 1]
        self._tensors = {
            name: (parameter, *kept.values())
            for name, parameter, kept in zip(state.names, state.parameters, state.kept, strict=True)
        }
        strengths = [
            (row.change, _with_axes(gates.strength[row.gate], constants.masks[row.gate]) * constants.masks[row.gate])
            for row in changes
        ]
        self._draws = [(change, strength) for change, strength in strengths if change.kind != Frozen()]
        self._freezes = [(change, strength) for change, strength in strengths if change.kind == Frozen()]
        with torch.no_grad():
            self._drawn = self._draw(constants.fresh)

    def _draw(self, values: Sequence[Float[Tensor, "..."]]) -> list[Bool[Tensor, " M"]]:
        """Set what is drawn anew at this step; returns whether that changed anything, per draw."""
        changed = []
        for (change, strength), value in zip(self._draws, values, strict=True):
            selected = strength > 0
            parameter, *kept = self._tensors[change.parameter]
            changed.append(((parameter != value) & selected).flatten(1).any(1))
            parameter.copy_(torch.where(selected, value, parameter))
            begun = self.optimizer.start(change.parameter, parameter)
            for tensor, first in zip(kept, begun.values(), strict=True):
                tensor.copy_(torch.where(selected, first, tensor))
            skipped = self.counts.skipped[change.parameter]
            skipped.copy_(torch.where(selected, _with_axes(self.steps, skipped).to(skipped.dtype), skipped))
        return changed

    def apply(
        self, gradients: Sequence[Float[Tensor, "M ..."]], loss: Float[Tensor, " M"], hyper: Hyper
    ) -> tuple[Float[Tensor, " M"], list[Bool[Tensor, " M"]]]:
        """Move every weight that may move, in every member whose loss and gradient are numbers.

        Args:
            gradients: gradient of every parameter, in the order of the state.
            loss: loss of every member, to see which have stopped being numbers.
            hyper: hyper-parameters, clipping and clock of this step.

        Returns:
            Gradient norm of what may move, and for every change of weights whether it changed anything, in the
            plan's order: draws, then freezes.
        """
        held = self._held()
        norm = member_norm(_free_gradients(dict(zip(self.state.names, gradients, strict=True)), held))
        # in place, so that what made a member stop is the last that it saw
        self.counts.alive.logical_and_(loss.isfinite() & norm.isfinite())
        before = {name: [tensor.detach().clone() for tensor in self._tensors[name]] for name in held}
        clocks = self._clocks(hyper)
        update_members(self.state, gradients, norm, hyper, self.counts.alive, self.optimizer, clocks)
        return norm, [*self._drawn, *self._hold(held, before)]

    def _held(self) -> dict[str, Float[Tensor, "M ..."]]:
        """How still every frozen parameter stands, in [0, 1]; of several freezes of an entry the strongest counts."""
        held: dict[str, Tensor] = {}
        for change, strength in self._freezes:
            name = change.parameter
            held[name] = torch.maximum(held[name], strength) if name in held else strength
        return held

    def _clocks(self, hyper: Hyper) -> dict[str, Tensors]:
        """Clocks of the parameters that are ever changed: by the updates that each entry has had.

        An entry that no update has passed by has exactly that of all other parameters.
        """
        found: dict[str, Tensors] = {}
        for name, skipped in self.counts.skipped.items():
            axes = skipped.dim() - 1
            updates = _with_axes(self.steps, skipped) + 1 - skipped
            usual = with_trailing_axes(hyper.clock, axes)
            clock = self.optimizer.clock(with_trailing_axes(hyper.values, axes), updates)
            found[name] = {key: torch.where(skipped == 0, usual[key], clock[key]) for key in usual}
        return found

    def _hold(self, held: ByParameter, before: Mapping[str, Sequence[Tensor]]) -> list[Bool[Tensor, " M"]]:
        """Take the update back where weights are frozen; returns whether it would have moved them, per freeze."""
        changed = [
            ((self._tensors[change.parameter][0] != before[change.parameter][0]) & (strength > 0)).flatten(1).any(1)
            for change, strength in self._freezes
        ]
        for name, still in held.items():
            for tensor, old in zip(self._tensors[name], before[name], strict=True):
                tensor.copy_(_between(tensor, old, still))
            self.counts.skipped[name].add_(still)
        return changed


def drawn_values(
    changes: Sequence[PlannedChange], model: Model, task: Task, seeds: Sequence[int]
) -> list[Float[Tensor, "..."]]:
    """What each draw sets its parameter to, ``[M, ...]`` or ``[1, ...]``: a pure function of the configuration.

    Args:
        changes: rows of the plan that change weights; those that freeze have no such value.
        model: settings of the model that is trained.
        task: what is learned, which decides on the sizes of input and output.
        seeds: seeds of the run, one per member.
    """
    draws = [(row.change.kind, row.change.parameter) for row in changes if isinstance(row.change.kind, Fresh)]
    drawn = {kind: init_parameters(model, task, kind.seeds(seeds)) for kind in {kind: None for kind, _ in draws}}
    return [drawn[kind][parameter] for kind, parameter in draws]


def no_skipped_updates(changes: Sequence[PlannedChange], members: int) -> dict[str, Float[Tensor, "M ..."]]:
    """Zeros: how many updates have passed by the entries of every parameter that is ever changed.

    Args:
        changes: rows of the plan that change weights; no tensor has more axes longer than 1 than their masks have.
        members: M, models of the run.
    """
    shapes: dict[str, torch.Size] = {}
    for row in changes:
        smallest = (members, *[1] * (row.mask.dim() - 1))
        name = row.change.parameter
        shapes[name] = torch.broadcast_shapes(row.mask.shape, shapes.get(name, smallest))
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def _free_gradients(gradients: ByParameter, held: ByParameter) -> list[Float[Tensor, "M ..."]]:
    """The gradients as far as their weights may move."""
    return [
        _between(gradient, torch.zeros_like(gradient), held[name]) if name in held else gradient
        for name, gradient in gradients.items()
    ]


def _with_axes(x: Tensor, like: Tensor) -> Tensor:
    """``x`` [M] with the axes of ``like`` [M, ...]."""
    return x.view(-1, *[1] * (like.dim() - 1))


def _between(moved: Tensor, old: Tensor, held: Tensor) -> Tensor:
    """``moved`` where it is not held and ``old`` where it is, bit for bit, even where the other is no number."""
    return torch.where(held >= 1, old, torch.where(held <= 0, moved, overwrite(moved, old, held)))
