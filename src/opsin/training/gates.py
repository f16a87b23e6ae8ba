"""The gates of every step, and what comes back: which rows of the plan fired, which members still learn.

Legend: M members, I rows of a plan, S optimizer steps of one Lightning batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opsin.errors import DivergedError, IdleError, log
from opsin.interventions.apply import Constants
from opsin.interventions.feedback import followed_series
from opsin.interventions.intervention import Intervention, Supply
from opsin.interventions.plan import Plan, PlannedIntervention, PlannedRow
from opsin.records.history import History
from opsin.records.schema import DIVERGED
from opsin.training.observers import Event
from opsin.training.step_inputs import StepCounts, StepGates
from opsin.training.weight_updates import no_skipped_updates

FEEDBACK_EVENT = "feedback"

PATIENCE = 100
"""Active steps after which a writer that has changed nothing counts as idle."""


class GateController:
    """Gates, clock, supplied tensors and the count of changes of one run.

    Args:
        plan: interventions and changes of weights of the run.
        constants: tensors of the run; supplies are changed in place.
        seeds: seeds of the run, one per member.
        history: records that schedules with feedback read, and to which they add what they do.
        idle: what happens to a run with a writer that was active and changed nothing.
        announce: called whenever a schedule with feedback switches on or off, and when a member ends.
        ended: how and when members ended that learn no more, by member; filled by this object.
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
        self._followed = {row.schedule.feedback.metric for row in plan.rows if row.schedule.feedback is not None}
        device = constants.table.device
        self.seeds = torch.tensor(seeds, device=device)
        shape = (len(plan.rows), len(seeds))
        self.active = np.zeros(shape, dtype=np.int64)
        self.ended = ended
        skipped = no_skipped_updates(plan.changes, len(seeds))
        self.counts = StepCounts(
            fired=torch.zeros(shape, dtype=torch.int64, device=device),
            alive=torch.ones(len(seeds), dtype=torch.bool, device=device),
            skipped={name: zeros.to(constants.table) for name, zeros in skipped.items()},
        )
        self._covers = plan.covered_members(len(seeds))
        self._warned: set[str] = set()
        self.unsupplied: set[Supply] = set()

    def at(self, step: int, without: Collection[Intervention] = ()) -> StepGates:
        """The gates of one step, from what the history holds now.

        Args:
            step: number of the optimizer step, from 0.
            without: interventions of the run's own pass that are switched off.
        """
        gates, clock = self._as_gates(self._strengths(step, 1))[0], self._clock(step, 1)[0]
        # those that learn no more stay under what was in force at their own last step
        for last in {how["stopped_at"] - 1 for how in self.ended.values()}:
            if 0 <= last < step:
                stopped = [member for member, how in self.ended.items() if how["stopped_at"] - 1 == last]
                gates[:, stopped] = self._as_gates(self._strengths(last, 1))[0][:, stopped]
                clock[stopped] = self._clock(last, 1)[0][stopped]
        gates[[row.gate for row in self.plan.interventions if row.intervention in without]] = 0
        return StepGates(gates, clock)

    def during(self, first: int, count: int, within_batch: bool = False) -> Iterator[StepGates]:
        """The gates of each of some steps, made when the step begins, and counted as active.

        Args:
            first: number of the first of these optimizer steps, from 0.
            count: S, how many steps.
            within_batch: whether the first is not the first of its Lightning batch, as in a run that ended in between.
        """
        clock = self._clock(first, count)
        learning = self._learning()
        for step in range(first, first + count):
            # strengths follow from what is measured, some of it between these steps
            if step == first or self._newly_measured(step):
                begin, strengths = step, self._strengths(step, first + count - step)
                gates = self._as_gates(strengths)
                if step > first or not within_batch or self._newly_measured(step):
                    self._announce_feedback(step)
            self.active += (strengths[step - begin] > 0) * self._covers * learning
            yield StepGates(gates[step - begin], clock[step - first])

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
        followed = (followed_series(name, self.history) for name in self._followed)
        return any(len(series.steps) > 0 and series.steps[-1] == step for series in followed)

    def _announce_feedback(self, step: int) -> None:
        """Record and announce every feedback whose strength is another than at the step before."""
        for name, row in self.plan.loops.items():
            feedback, covers = row.schedule.feedback, self._covers[row.gate] & self._learning()
            assert feedback is not None
            now, before = (feedback.reading(at, len(self.seeds), self.history) for at in (step, step - 1))
            was = before.strength if step else np.zeros(len(self.seeds))
            metric = f"feedback/{name}/strength"
            # a checkpoint saved while this step ran has its records already
            if self.history.ends_at(metric, step) or (now.strength == was)[covers].all():
                continue
            self.history.record(metric, step, now.strength * covers)
            self.history.record(f"feedback/{name}/value", step, now.value)
            self.history.record(f"feedback/{name}/measured_at", step, now.measured_at)
            for member in np.flatnonzero(((now.strength > 0) != (was > 0)) & covers).tolist():
                where = f" in member {member}" if len(self.seeds) > 1 else ""
                message = f"{name}{where}: {now.describe(feedback.metric, member)}"
                self.announce(Event(FEEDBACK_EVENT, step, member, message))

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
        fired = self.counts.fired.cpu().numpy()
        rows_of: dict[str, list[PlannedRow]] = defaultdict(list)
        for row in self.plan.rows:
            rows_of[row.name].append(row)
        for name, rows in rows_of.items():
            gates = [row.gate for row in rows]
            active = self.active[gates].max(0)
            idle = (active >= (1 if finished else PATIENCE)) & (fired[gates].sum(0) == 0) & ~self._diverged()
            if idle.any() and name not in self._warned:
                self._report_idle(name, rows, int(idle.argmax()), int(active[idle.argmax()]))

    def _report_idle(self, name: str, rows: Sequence[PlannedRow], member: int, active: int) -> None:
        targets = ", ".join(dict.fromkeys(row.target for row in rows))
        owner = f" of member {member}" if len(self.seeds) > 1 else ""
        changed = "activation" if isinstance(rows[0], PlannedIntervention) else "weight"
        text = f"{name}: was active for {active:,} steps and changed no {changed}{owner} (of {targets})"
        if self.idle == "stop":
            raise IdleError(f"{text}; model.idle: warn lets such a run go on")
        log.warning(f"opsin: {text}")
        self._warned.add(name)

    def check_diverged(self, first: int, finite: Bool[Tensor, "S M"]) -> None:
        """End members whose loss or gradient stopped being a number; the remaining ones go on without them.

        Args:
            first: number of the first of these optimizer steps.
            finite: whether each member still had a loss after each step.
        """
        for member in (~finite).any(0).nonzero().flatten().tolist():
            if member not in self.ended:
                step = first + int((~finite[:, member]).nonzero()[0])
                self.end(member, DIVERGED, step, f"its loss or gradient was no finite number at step {step:,}")

    def all_diverged(self) -> DivergedError | None:
        """The error that says so where every member has diverged; None where one has not."""
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
            member: number of the member in the run.
            status: how it ended, a word or two for the summary.
            step: optimizer steps that it has made.
            why: what happened, for people.
        """
        self.counts.alive[member] = False
        self.ended[member] = {"status": status, "stopped_at": step}
        if len(self.seeds) > 1:
            self.announce(Event(status, step, member, f"member {member} {status}: {why}"))

    def supply(self, supply: Supply, tensor: Tensor) -> None:
        """Put another tensor in a supply, from the next step on.

        Args:
            supply: one of the plan's supplies.
            tensor: what it is from now on, of the same shape.
        """
        self.constants.supplied[self.plan.supplies.index(supply)].copy_(tensor)

    def activity(self) -> list[dict[str, Any]]:
        """Per row and member: steps in which it was active, and in which it changed an activation (or a weight)."""
        return [
            {"writer": row.name, "site": row.target, "active_steps": active.tolist(), "changed_steps": fired.tolist()}
            for row, active, fired in zip(self.plan.rows, self.active, self.counts.fired.cpu(), strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, for a checkpoint."""
        supplied = [tensor.cpu().clone() for tensor in self.constants.supplied]
        skipped = {name: tensor.cpu().clone() for name, tensor in self.counts.skipped.items()}
        return {
            "fired": self.counts.fired.cpu().clone(),
            "active": torch.from_numpy(self.active),
            "supplied": supplied,
            "missed": skipped,
            "ended": {member: dict(how) for member, how in self.ended.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` has saved."""
        self.counts.fired.copy_(state["fired"])
        self.active = state["active"].numpy().copy()
        self.ended.update({int(member): dict(how) for member, how in state["ended"].items()})
        self.counts.alive[list(self.ended)] = False
        for supply, tensor, saved in zip(self.plan.supplies, self.constants.supplied, state["supplied"], strict=True):
            # a run that was forked had not all the supplies of its branch
            if saved is None:
                self.unsupplied.add(supply)
            else:
                tensor.copy_(saved)
        for name, tensor in self.counts.skipped.items():
            tensor.copy_(state["missed"][name])
