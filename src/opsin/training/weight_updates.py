"""x."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opsin.interventions.apply import overwrite
from opsin.interventions.weights import Frozen, WeightChange


@dataclass(frozen=True)
class Changing:
    """The weight changes of one step at work, in place; without any it leaves no trace in the graph.

    Args:
        changes: the plan's.
        strengths: of each at every entry of its parameter, ``[M, ...]``.
        fresh: ``fresh_values``.
        missed: updates that have passed by each entry; counted up.
        clock: seed of every member and the number of the step.
        tensors: every parameter with its two running moments, by name.
    """

    changes: Sequence[WeightChange]
    strengths: Sequence[Float[Tensor, "M ..."]]
    fresh: Sequence[Float[Tensor, "..."]]
    missed: Mapping[str, Float[Tensor, "M ..."]]
    clock: Int[Tensor, "M 2"]
    tensors: Mapping[str, tuple[Tensor, Tensor, Tensor]]

    def renew(self) -> list[Bool[Tensor, " M"]]:
        """Set what a draw sets at this step, before it is used; returns whether that changed anything, per draw."""
        fired = []
        draws = [index for index, change in enumerate(self.changes) if change.kind != Frozen()]
        for index, fresh in zip(draws, self.fresh, strict=True):
            name, on = self.changes[index].parameter, self.strengths[index] > 0
            parameter, *moments = self.tensors[name]
            fired.append(((parameter != fresh) & on).flatten(1).any(1))
            parameter.copy_(torch.where(on, fresh, parameter))
            for moment in moments:
                moment.copy_(moment.masked_fill(on, 0.0))
            missed = self.missed[name]
            missed.copy_(torch.where(on, _along(self.clock[:, 1], missed).to(missed.dtype), missed))
        return fired

    def held(self) -> dict[str, Float[Tensor, "M ..."]]:
        """How still every frozen parameter stands; of several freezes of an entry the strongest counts."""
        held: dict[str, Tensor] = {}
        for change, strength in zip(self.changes, self.strengths, strict=True):
            if change.kind == Frozen():
                name = change.parameter
                held[name] = torch.maximum(held[name], strength) if name in held else strength
        return held

    def copies(self, held: Collection[str]) -> dict[str, list[Tensor]]:
        """What is frozen, as it is before the update."""
        return {name: [tensor.detach().clone() for tensor in self.tensors[name]] for name in held}

    def corrections(
        self, everywhere: Float[Tensor, "2"], betas: tuple[float, float]
    ) -> dict[str, list[Float[Tensor, "M ..."]]]:
        """Bias corrections of the parameters that are ever changed: by the updates that each entry has had.

        An entry that has missed none has exactly those of all others.
        """
        found = {}
        for name, missed in self.missed.items():
            had = _along(self.clock[:, 1], missed) + 1 - missed
            rates = [math.log(beta) if beta else -math.inf for beta in betas]
            found[name] = [
                torch.where(missed == 0, usual, -torch.expm1(had * rate))
                for usual, rate in zip(everywhere, rates, strict=True)
            ]
        return found

    def hold(
        self, held: Mapping[str, Float[Tensor, "M ..."]], before: Mapping[str, Sequence[Tensor]]
    ) -> list[Bool[Tensor, " M"]]:
        """Take the update back where weights are frozen; returns whether it would have moved them, per freeze."""
        fired = [
            ((self.tensors[change.parameter][0] != before[change.parameter][0]) & (strength > 0)).flatten(1).any(1)
            for change, strength in zip(self.changes, self.strengths, strict=True)
            if change.kind == Frozen()
        ]
        for name, still in held.items():
            for tensor, old in zip(self.tensors[name], before[name], strict=True):
                tensor.copy_(_between(tensor, old, still))
            self.missed[name].add_(still)
        return fired


def moving(
    gradients: Mapping[str, Float[Tensor, "M ..."]], held: Mapping[str, Float[Tensor, "M ..."]]
) -> list[Float[Tensor, "M ..."]]:
    """The gradients as far as their weights may move."""
    return [
        _between(gradient, torch.zeros_like(gradient), held[name]) if name in held else gradient
        for name, gradient in gradients.items()
    ]


def _along(x: Tensor, like: Tensor) -> Tensor:
    """``x`` [M] with the axes of ``like`` [M, ...]."""
    return x.view(-1, *[1] * (like.dim() - 1))


def _between(moved: Tensor, old: Tensor, held: Tensor) -> Tensor:
    """``moved`` where it is not held and ``old`` where it is, bit for bit, even where the other is no number."""
    return torch.where(held >= 1, old, torch.where(held <= 0, moved, overwrite(moved, old, held)))
