"""What a plan is told at every step, and what is heard back from it.

Legend: M members, I interventions, S optimizer steps of one Lightning batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opsin.errors import IdleError, log
from opsin.passes import Supply
from opsin.plan import Plan
from opsin.runs import History
from opsin.scene import Constants
from opsin.step import Moment

PATIENCE = 100
"""Active steps after which a writer that has changed nothing counts as idle."""


class Control:
    """Gates, clock, supplied tensors and the count of changes of one run.

    Args:
        plan: of the run.
        constants: of the run; its supplied tensors are changed in place.
        seeds: one per member.
        history: which schedules with feedback read.
        idle: what happens to a run with a writer that was active and changed nothing.
    """

    def __init__(
        self, plan: Plan, constants: Constants, seeds: Sequence[int], history: History, idle: Literal["stop", "warn"]
    ) -> None:
        self.plan, self.constants, self.history, self.idle = plan, constants, history, idle
        self.seeds = torch.tensor(seeds, device=constants.table.device)
        shape = (len(plan.interventions), len(seeds))
        self.fired = torch.zeros(shape, dtype=torch.int64, device=constants.table.device)
        self.active = np.zeros(shape, dtype=np.int64)
        self._covers = covered_members(plan, len(seeds))
        self._warned: set[str] = set()

    def moment(self, step: int) -> Moment:
        """What the plan is told at one step, from what the history holds now."""
        return Moment(self._gates(step, 1)[0], self._clock(step, 1)[0], self.fired)

    def moments(self, first: int, count: int) -> Iterator[Moment]:
        """What the plan is told at each of some steps; each is made when it is asked for, and counted as active."""
        clock = self._clock(first, count)
        for index in range(count):
            # only feedback can make the strength of a step depend on the one before it
            if index == 0 or self.plan.feedback:
                gates = self._gates(first + index, 1 if self.plan.feedback else count)
                self.active += (gates > 0).sum(0).cpu().numpy() * self._covers
            yield Moment(gates[0 if self.plan.feedback else index], clock[index], self.fired)

    def _gates(self, first: int, count: int) -> Float[Tensor, "S I M"]:
        gates = self.plan.gates(first, count, len(self.seeds), self.history)
        return torch.from_numpy(gates).to(self.constants.table)

    def _clock(self, first: int, count: int) -> Int[Tensor, "S M 2"]:
        steps = torch.arange(first, first + count, device=self.seeds.device)[:, None]
        return torch.stack(torch.broadcast_tensors(self.seeds, steps), -1)

    def check_idle(self, finished: bool) -> None:
        """Stop the run, or warn, where a writer was active and never changed an activation.

        Args:
            finished: whether this was the last step, after which nothing is given more time.

        Raises:
            IdleError: names the writer; only where idle writers stop the run.
        """
        fired = self.fired.cpu().numpy()
        for name in dict.fromkeys(self.plan.names):
            rows = [index for index, other in enumerate(self.plan.names) if other == name]
            active = self.active[rows].max(0)
            idle = (active >= (1 if finished else PATIENCE)) & (fired[rows].sum(0) == 0)
            if idle.any() and name not in self._warned:
                self._tell(name, rows, int(idle.argmax()), int(active[idle.argmax()]))

    def _tell(self, name: str, rows: list[int], member: int, active: int) -> None:
        sites = ", ".join(dict.fromkeys(self.plan.interventions[row].site for row in rows))
        of = f" of member {member}" if len(self.seeds) > 1 else ""
        text = f"{name}: was active for {active:,} steps and changed no activation{of} (of {sites})"
        if self.idle == "stop":
            raise IdleError(f"{text}; model.idle: warn lets such a run go on")
        log.warning(f"opsin: {text}")
        self._warned.add(name)

    def supply(self, supply: Supply, tensor: Tensor) -> None:
        """Put another tensor in the place of a supply, from the next step on."""
        self.constants.supplied[self.plan.supplies.index(supply)].copy_(tensor)

    def counts(self) -> list[dict[str, Any]]:
        """Per intervention and member: steps in which it was active, and in which it changed an activation."""
        return [
            {"writer": name, "site": item.site, "active_steps": active.tolist(), "changed_steps": fired.tolist()}
            for name, item, active, fired in zip(
                self.plan.names, self.plan.interventions, self.active, self.fired.cpu(), strict=True
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, for a checkpoint."""
        supplied = [tensor.cpu().clone() for tensor in self.constants.supplied]
        return {"fired": self.fired.cpu().clone(), "active": torch.from_numpy(self.active), "supplied": supplied}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore."""
        self.fired.copy_(state["fired"])
        self.active = state["active"].numpy().copy()
        for tensor, saved in zip(self.constants.supplied, state["supplied"], strict=True):
            tensor.copy_(saved)


def covered_members(plan: Plan, members: int) -> Bool[np.ndarray, "I M"]:
    """Which members each intervention selects."""
    rows = [mask.flatten(1).amax(1).expand(members).numpy() > 0 for mask in plan.masks]
    return np.stack(rows) if rows else np.zeros((0, members), dtype=bool)
