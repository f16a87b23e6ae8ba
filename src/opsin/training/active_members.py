"""The training step of those members that still learn, so that one that has ended costs nothing any more.

Everywhere else a run keeps all its members. Once so many have ended that half of the places would do, the step runs on
copies of the others (and, where these are fewer, of some that have ended, to fill the places), which are written back
before anybody looks. Halves, since every number of places has a compiled graph of its own: at most log2(M) more.

Who is copied is a function of who has ended, and when, so a resumed run makes the same steps. Other sizes run other
kernels: what the others learn from there on differs by rounding from what they had learned beside all.

Legend: M members, C places, I interventions, S optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opsin.interventions.apply import Constants, Moment
from opsin.training.optimizers import AdamState, Hyper

RunStep = Callable[[AdamState, Hyper, Constants, Mapping[str, Tensor], Moment], Float[Tensor, "3 _"]]


def places(members: int, ended: Mapping[int, Mapping[str, Any]], last: int) -> list[int] | None:
    """Which members have a place in the step; None where all have.

    Args:
        members: M.
        ended: members that learn no more, with the step at which each was ``stopped_at``.
        last: those stopped after this many steps keep their place: a smaller graph would not repay itself.
    """
    gone = [member for member in range(members) if member in ended and ended[member]["stopped_at"] <= last]
    stay = [member for member in range(members) if member not in gone]
    size = members
    while size > 1 and -(-size // 2) >= len(stay):
        size = -(-size // 2)
    return None if size == members else sorted(stay + gone[: size - len(stay)])


@dataclass
class _Copies:
    """What one set of places works on, and what it was copied from."""

    at: Int[Tensor, " C"]
    everyone: tuple[AdamState, Moment]
    state: AdamState
    constants: Constants
    fired: Int[Tensor, "I C"]
    alive: Bool[Tensor, " C"]
    missed: Mapping[str, Tensor]


class Crew:
    """Runs the step of some members as if it were that of all.

    Args:
        step: of all members, or of any number.
        members: M.
    """

    def __init__(self, step: RunStep, members: int) -> None:
        self.step, self.members = step, members
        self.chosen: Sequence[int] | None = None
        self._copies: _Copies | None = None

    def choose(self, chosen: Sequence[int] | None) -> None:
        """Who has a place from the next step on; None for all."""
        self.write_back()
        self.chosen = chosen

    def __call__(
        self, state: AdamState, hyper: Hyper, constants: Constants, draw: Mapping[str, Tensor], moment: Moment
    ) -> Float[Tensor, "3 M"]:
        """Make one step; members without a place have no results (nan)."""
        if self.chosen is None:
            return self.step(state, hyper, constants, draw, moment)
        if self._copies is None:
            self._copies = self._copy(state, constants, moment)
        own, at = self._copies, self._copies.at
        now = Moment(moment.gates[:, at], moment.clock[at], own.fired, own.alive, own.missed)
        rates = Hyper(hyper.learning_rate[at], hyper.weight_decay[at], hyper.clip[at], hyper.correction)
        found = self.step(own.state, rates, own.constants, {name: x[at] for name, x in draw.items()}, now)
        return found.new_full((len(found), self.members), torch.nan).index_copy(1, at, found)

    def _copy(self, state: AdamState, constants: Constants, moment: Moment) -> _Copies:
        at = torch.tensor(self.chosen, device=moment.alive.device)

        def some(tensors: Sequence[Tensor]) -> list[Tensor]:
            # what is one for all members stays one
            return [x[at] if len(x) == self.members else x for x in tensors]

        with torch.no_grad():
            parameters = [x[at].requires_grad_() for x in state.parameters]
            own = AdamState(state.names, parameters, some(state.exp_avg), some(state.exp_avg_sq))
            masks, supplied, fresh = (some(x) for x in (constants.masks, constants.supplied, constants.fresh))
            given = replace(constants, masks=masks, supplied=supplied, fresh=fresh)
            missed = {name: x[at] for name, x in moment.missed.items()}
        return _Copies(at, (state, moment), own, given, moment.fired[:, at], moment.alive[at], missed)

    def write_back(self) -> None:
        """Bring everything the steps have changed to where all members are kept."""
        if self._copies is None:
            return
        own, (state, moment) = self._copies, self._copies.everyone
        with torch.no_grad():
            for name in ("parameters", "exp_avg", "exp_avg_sq"):
                for to, new in zip(getattr(state, name), getattr(own.state, name), strict=True):
                    to[own.at] = new.detach()
            moment.fired[:, own.at] = own.fired
            moment.alive[own.at] = own.alive
            for name, new in own.missed.items():
                moment.missed[name][own.at] = new
        self._copies = None
