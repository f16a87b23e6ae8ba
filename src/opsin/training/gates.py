"""What a plan is told at every step, and what is heard back from it.

Legend: M members, I interventions, S optimizer steps of one Lightning batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opsin.errors import DivergedError, IdleError, log
from opsin.interventions.apply import Constants, Moment
from opsin.interventions.intervention import Intervention, Supply
from opsin.interventions.plan import Plan, covered_members
from opsin.interventions.weights import missed_updates
from opsin.records.history import History
from opsin.records.schema import DIVERGED
from opsin.training.observers import Event

KIND = "feedback"

PATIENCE = 100
"""Active steps after which a writer that has changed nothing counts as idle."""


class Control:
    """Gates, clock, supplied tensors and the count of changes of one run.

    Args:
        plan: of the run.
        constants: of the run; its supplied tensors are changed in place.
        seeds: one per member.
        history: which schedules with feedback read, and in which they record what they do.
        idle: what happens to a run with a writer that was active and changed nothing.
        announce: is told whenever a schedule with feedback switches on or off, and when a member ends.
        ended: how and when members ended that learn no more; filled here.
    """

    def __init__(
        self,
        plan: Plan,
        constants: Constants,
        seeds: Sequence[int],
        history: History,
        idle: Literal["stop", "warn"],
        announce: Callable[[Event], None],
        ended: dict[int, dict[str, Any]],
    ) -> None:
        self.plan, self.constants, self.history, self.idle = plan, constants, history, idle
        self.announce = announce
        self._followed = {schedule.feedback.metric for schedule in plan.schedules if schedule.feedback is not None}
        self.seeds = torch.tensor(seeds, device=constants.table.device)
        shape = (len(plan.masks), len(seeds))
        self.fired = torch.zeros(shape, dtype=torch.int64, device=constants.table.device)
        self.active = np.zeros(shape, dtype=np.int64)
        self.alive = torch.ones(len(seeds), dtype=torch.bool, device=constants.table.device)
        self.ended = ended
        missed = missed_updates(plan.changes, plan.masks[len(plan.interventions) :], len(seeds))
        self.missed = {name: zeros.to(constants.table) for name, zeros in missed.items()}
        self._covers = covered_members(plan, len(seeds))
        self._warned: set[str] = set()
        self.unsupplied: set[Supply] = set()

    def moment(self, step: int, without: Collection[Intervention] = ()) -> Moment:
        """What the plan is told at one step, from what the history holds now.

        Args:
            without: interventions of the run's own pass that are switched off.
        """
        gates, clock = self._as_gates(self._strengths(step, 1))[0], self._clock(step, 1)[0]
        # those that learn no more stay under what was in force at their own last step
        for last in {how["stopped_at"] - 1 for how in self.ended.values()}:
            if 0 <= last < step:
                those = [member for member, how in self.ended.items() if how["stopped_at"] - 1 == last]
                gates[:, those] = self._as_gates(self._strengths(last, 1))[0][:, those]
                clock[those] = self._clock(last, 1)[0][those]
        gates[[index for index, item in enumerate(self.plan.interventions) if item in without]] = 0
        return Moment(gates, clock, self.fired, self.alive, self.missed)

    def moments(self, first: int, count: int) -> Iterator[Moment]:
        """What the plan is told at each of some steps; each is made when it is asked for, and counted as active."""
        clock = self._clock(first, count)
        learning = self._learning()
        for step in range(first, first + count):
            # strengths follow from what is measured, some of it between these steps
            if step == first or self._newly_measured(step):
                begin, strengths = step, self._strengths(step, first + count - step)
                gates = self._as_gates(strengths)
                self._tell_changes(step)
            self.active += (strengths[step - begin] > 0) * self._covers * learning
            yield Moment(gates[step - begin], clock[step - first], self.fired, self.alive, self.missed)

    def _strengths(self, first: int, count: int) -> Float[np.ndarray, "S I M"]:
        return self.plan.gates(first, count, len(self.seeds), self.history)

    def _as_gates(self, strengths: Float[np.ndarray, "S I M"]) -> Float[Tensor, "S I M"]:
        return torch.from_numpy(strengths).to(self.constants.table)

    def _learning(self) -> Bool[np.ndarray, " M"]:
        return np.array([member not in self.ended for member in range(len(self.seeds))])

    def _diverged(self) -> Bool[np.ndarray, " M"]:
        return np.array([self.ended.get(member, {}).get("status") == DIVERGED for member in range(len(self.seeds))])

    def _newly_measured(self, step: int) -> bool:
        """Whether a feedback has a record of just this many steps."""
        return any(name in self.history and self.history[name].steps[-1] == step for name in self._followed)

    def _tell_changes(self, step: int) -> None:
        """Record and announce every feedback whose strength is another than at the step before."""
        for name, row in self.plan.loops.items():
            feedback, covers = self.plan.schedules[row].feedback, self._covers[row] & self._learning()
            assert feedback is not None
            now, before = (feedback.reading(at, len(self.seeds), self.history) for at in (step, step - 1))
            was = before.strength if step else np.zeros(len(self.seeds))
            metric = f"feedback/{name}/strength"
            # a checkpoint saved while this step ran has its records already
            told = metric in self.history and self.history[metric].steps[-1] == step
            if told or (now.strength == was)[covers].all():
                continue
            self.history.record(metric, step, now.strength * covers)
            self.history.record(f"feedback/{name}/value", step, now.value)
            self.history.record(f"feedback/{name}/measured_at", step, now.measured_at)
            for member in np.flatnonzero(((now.strength > 0) != (was > 0)) & covers).tolist():
                who = f" in member {member}" if len(self.seeds) > 1 else ""
                message = f"{name}{who}: {now.tells(feedback.metric, member)}"
                self.announce(Event(KIND, step, member, message))

    def _clock(self, first: int, count: int) -> Int[Tensor, "S M 2"]:
        steps = torch.arange(first, first + count, device=self.seeds.device)[:, None]
        return torch.stack(torch.broadcast_tensors(self.seeds, steps), -1)

    def check_idle(self, finished: bool) -> None:
        """Stop the run, or warn, where a writer was active and never changed an activation, or a weight.

        Args:
            finished: whether this was the last step, after which nothing is given more time.

        Raises:
            IdleError: names the writer; only where idle writers stop the run.
        """
        fired = self.fired.cpu().numpy()
        for name in dict.fromkeys(self.plan.names):
            rows = [index for index, other in enumerate(self.plan.names) if other == name]
            active = self.active[rows].max(0)
            idle = (active >= (1 if finished else PATIENCE)) & (fired[rows].sum(0) == 0) & ~self._diverged()
            if idle.any() and name not in self._warned:
                self._tell(name, rows, int(idle.argmax()), int(active[idle.argmax()]))

    def _tell(self, name: str, rows: list[int], member: int, active: int) -> None:
        sites = ", ".join(dict.fromkeys(self.plan.places[row] for row in rows))
        of = f" of member {member}" if len(self.seeds) > 1 else ""
        what = "activation" if rows[0] < len(self.plan.interventions) else "weight"
        text = f"{name}: was active for {active:,} steps and changed no {what}{of} (of {sites})"
        if self.idle == "stop":
            raise IdleError(f"{text}; model.idle: warn lets such a run go on")
        log.warning(f"opsin: {text}")
        self._warned.add(name)

    def check_diverged(self, first: int, finite: Bool[Tensor, "S M"]) -> None:
        """Take leave of members whose loss or gradient stopped being a number; the others go on without them.

        Args:
            first: the first of these steps.
            finite: whether each member still had a loss.
        """
        for member in (~finite).any(0).nonzero().flatten().tolist():
            if member not in self.ended:
                step = first + int((~finite[:, member]).nonzero()[0])
                self.end(member, DIVERGED, step, f"its loss or gradient was no finite number at step {step:,}")

    def all_diverged(self) -> DivergedError | None:
        """What to tell where every member has diverged."""
        if not self._diverged().all():
            return None
        step, member = min((how["stopped_at"], member) for member, how in self.ended.items())
        return DivergedError(
            f"train/loss: got no finite number at step {step} of member {member}, expected a finite loss and "
            "gradient; the run up to there is kept (try a lower model.learning_rate)"
        )

    def end(self, member: int, status: str, step: int, why: str) -> None:
        """Let a member learn no more; its weights stay as they are.

        Args:
            status: in a word or two, for the summary.
            step: optimizer steps it has made.
            why: for people.
        """
        self.alive[member] = False
        self.ended[member] = {"status": status, "stopped_at": step}
        if len(self.seeds) > 1:
            self.announce(Event(status, step, member, f"member {member} {status}: {why}"))

    def supply(self, supply: Supply, tensor: Tensor) -> None:
        """Put another tensor in the place of a supply, from the next step on."""
        self.constants.supplied[self.plan.supplies.index(supply)].copy_(tensor)

    def counts(self) -> list[dict[str, Any]]:
        """Per row and member: steps in which it was active, and in which it changed an activation (or a weight)."""
        return [
            {"writer": name, "site": place, "active_steps": active.tolist(), "changed_steps": fired.tolist()}
            for name, place, active, fired in zip(
                self.plan.names, self.plan.places, self.active, self.fired.cpu(), strict=True
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, for a checkpoint."""
        supplied = [tensor.cpu().clone() for tensor in self.constants.supplied]
        missed = {name: tensor.cpu().clone() for name, tensor in self.missed.items()}
        active = torch.from_numpy(self.active)
        return {
            "fired": self.fired.cpu().clone(),
            "active": active,
            "supplied": supplied,
            "missed": missed,
            "ended": {member: dict(how) for member, how in self.ended.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore."""
        self.fired.copy_(state["fired"])
        self.active = state["active"].numpy().copy()
        self.ended.update({int(member): dict(how) for member, how in state["ended"].items()})
        self.alive[list(self.ended)] = False
        for supply, tensor, saved in zip(self.plan.supplies, self.constants.supplied, state["supplied"], strict=True):
            # a run that was forked had not all the supplies of its branch
            if saved is None:
                self.unsupplied.add(supply)
            else:
                tensor.copy_(saved)
        for name, tensor in self.missed.items():
            tensor.copy_(state["missed"][name])
