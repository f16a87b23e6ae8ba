"""The training step of the members that still learn, so that one that has ended costs nothing any more.

Everywhere else a run keeps all its members. Once so many have ended that half of the slots would do, the step runs on
copies of the remaining ones (and, where these are fewer, of some that have ended, to fill the slots), which are written
back before anything else reads them. Halves, since every number of slots has a compiled graph of its own: at most
log2(M) more.

Which members are copied is a function of which have ended, and when, so a resumed run makes the same steps. A graph of
another size runs other kernels: what the remaining members learn from there on differs by rounding.

Legend: M members, C slots of the smaller step, I rows of a plan, S optimizer steps,
R numbers that a step reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opsin.interventions.apply import Constants
from opsin.training.optimizer_state import Hyper, OptimizerState
from opsin.training.step_inputs import StepCounts, StepGates

RunStep = Callable[
    [OptimizerState, Hyper, Constants, Mapping[str, Tensor], StepGates, StepCounts], Float[Tensor, "3 _"]
]
"""A training step of any number of members."""


def members_in_step(members: int, ended: Mapping[int, Mapping[str, Any]], last: int) -> list[int] | None:
    """Which members have a slot in the step; None where all have.

    Args:
        members: M, models of the run.
        ended: members that learn no more, with the step at which each was ``stopped_at``.
        last: members that stopped after more steps than this keep their slot: a smaller graph would not repay itself.
    """
    gone = [member for member in range(members) if member in ended and ended[member]["stopped_at"] <= last]
    stay = [member for member in range(members) if member not in gone]
    size = members
    while size > 1 and -(-size // 2) >= len(stay):
        size = -(-size // 2)
    return None if size == members else sorted(stay + gone[: size - len(stay)])


@dataclass
class _Copies:
    """What the smaller step works on, and what it was copied from.

    Args:
        members: number of the member in every slot.
        origin: state and counts of all members, to which the copies are written back.
        state: parameters of the members in the step, and what the optimizer keeps of them.
        constants: tensors of the run, cut to the members in the step.
        counts: what the smaller step counts.
    """

    members: Int[Tensor, " C"]
    origin: tuple[OptimizerState, StepCounts]
    state: OptimizerState
    constants: Constants
    counts: StepCounts


class ActiveMembers:
    """Runs the step of some members as if it were that of all.

    Args:
        step: training step of any number of members.
        members: M, models of the run.
    """

    def __init__(self, step: RunStep, members: int) -> None:
        self.step, self.members = step, members
        self.chosen: Sequence[int] | None = None
        self._copies: _Copies | None = None

    def choose(self, chosen: Sequence[int] | None) -> None:
        """Decide which members have a slot from the next step on.

        Args:
            chosen: their numbers in the run; None for all members.
        """
        self.write_back()
        self.chosen = chosen

    def __call__(
        self,
        state: OptimizerState,
        hyper: Hyper,
        constants: Constants,
        draw: Mapping[str, Tensor],
        gates: StepGates,
        counts: StepCounts,
    ) -> Float[Tensor, "R M"]:
        """Make one step, with the arguments of ``Step``; members without a slot have no results (nan)."""
        if self.chosen is None:
            return self.step(state, hyper, constants, draw, gates, counts)
        if self._copies is None:
            self._copies = self._copy(state, constants, counts)
        copies, at = self._copies, self._copies.members
        cut_gates = StepGates(gates.strength[:, at], gates.clock[at])
        cut_draw = {name: x[at] for name, x in draw.items()}
        found = self.step(copies.state, hyper.of_members(at), copies.constants, cut_draw, cut_gates, copies.counts)
        return found.new_full((len(found), self.members), torch.nan).index_copy(1, at, found)

    def _copy(self, state: OptimizerState, constants: Constants, counts: StepCounts) -> _Copies:
        at = torch.tensor(self.chosen, device=counts.alive.device)

        def cut(tensors: Sequence[Tensor]) -> list[Tensor]:
            # what is one for all members stays one
            return [x[at] if len(x) == self.members else x for x in tensors]

        with torch.no_grad():
            parameters = [x[at].requires_grad_() for x in state.parameters]
            kept = [{name: x[at] for name, x in tensors.items()} for tensors in state.kept]
            cut_state = OptimizerState(state.names, parameters, kept)
            masks, supplied, fresh = (cut(x) for x in (constants.masks, constants.supplied, constants.fresh))
            untrained = {name: x[at] for name, x in constants.untrained.items()}
            cut_constants = replace(constants, masks=masks, supplied=supplied, fresh=fresh, untrained=untrained)
            skipped = {name: x[at] for name, x in counts.skipped.items()}
            cut_counts = StepCounts(counts.fired[:, at], counts.alive[at], skipped)
        return _Copies(at, (state, counts), cut_state, cut_constants, cut_counts)

    def write_back(self) -> None:
        """Bring everything the steps have changed to where all members are kept."""
        if self._copies is None:
            return
        copies, (state, counts) = self._copies, self._copies.origin
        with torch.no_grad():
            for tensor, new in zip(state.tensors(), copies.state.tensors(), strict=True):
                tensor[copies.members] = new.detach()
            counts.fired[:, copies.members] = copies.counts.fired
            counts.alive[copies.members] = copies.counts.alive
            for name, new in copies.counts.skipped.items():
                counts.skipped[name][copies.members] = new
        self._copies = None
