"""The W&B run of one member: numbers are gathered by step, and every step is sent once and in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opsin.callbacks.wandb.start import Ledger, finish, unharmed
from opsin.records.schema import DIVERGED
from opsin.task import TimeAxis
from opsin.training.observers import Event

if TYPE_CHECKING:
    import wandb


class MemberRun:
    """Sends one member to one W&B run; after a failure it sends nothing more, and the training goes on.

    Args:
        run: W&B run that was started; what the task's axis counts becomes its x-axis.
        ledger: what a resumed process must know of this run.
        batch_size: sequences that one training step sees.
        axis: what the x-axis counts, with the sequences of one unit.
    """

    def __init__(self, run: wandb.Run, ledger: Ledger, batch_size: int, axis: TimeAxis) -> None:
        self._run: wandb.Run | None = run
        self._ledger, self._batch_size, self._axis = ledger, batch_size, axis
        self._rows: dict[int, dict[str, Any]] = {}
        self._finished = False
        with unharmed(self._give_up):
            name = "step" if axis.unit == "steps" else axis.unit
            run.define_metric(name)
            run.define_metric("*", step_metric=name)

    @property
    def alive(self) -> bool:
        """Whether it still sends."""
        return self._run is not None

    def _give_up(self) -> None:
        self._run = None

    def lacks(self, key: str, step: int) -> bool:
        """Whether a step that is not sent yet has nothing under a key."""
        return self.alive and step > self._ledger.logged_until and key not in self._rows.get(step, {})

    def add(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Add to what is sent of a step."""
        position: dict[str, Any] = {"sequences": step * self._batch_size, "step": step}
        if self._axis.unit == "epochs":
            position["epochs"] = step * self._batch_size / self._axis.sequences
        self._rows.setdefault(step, position).update(numbers)

    def send(self, before: float = float("inf")) -> None:
        """Log finished steps, each once and in order, whatever a killed process or a checkpoint repeats."""
        rows = {step: self._rows.pop(step) for step in sorted(self._rows) if step < before}
        rows = {step: row for step, row in rows.items() if step > self._ledger.logged_until}
        if not rows or self._run is None:
            return
        # written first: a kill in between leaves a gap online (metrics.csv has it), never a step that goes back
        self._ledger.logged_until = max(rows)
        self._ledger.save()
        with unharmed(self._give_up):
            for step, row in rows.items():
                self._run.log(row, step=step, commit=True)

    def forget_unsent(self) -> None:
        """Send nothing of the steps that are not sent yet: a resumed run has them again."""
        self._rows.clear()

    def alert(self, event: Event) -> None:
        """Alert once: a resumed run lives through events that the killed process told already."""
        name = f"{event.kind}, step {event.step}, member {event.member}"
        if self._run is None or name in self._ledger.told:
            return
        # the run is this member's alone
        text = event.message.replace(f" in member {event.member}", "", 1)
        with unharmed(self._give_up):
            self._run.alert(title=event.kind, text=text)
            self._ledger.told.append(name)
            self._ledger.save()

    def finish(self, summary: Mapping[str, Any], interrupted: bool) -> None:
        """Send what is left and the summary; W&B shows a run that was interrupted or diverged as failed.

        Args:
            summary: what the run has found of this member.
            interrupted: whether the run was ended before it was trained.
        """
        self.send()
        if self._run is None:
            return
        with unharmed(self._give_up):
            self._run.summary.update(flat(summary))
            finish(self._run, exit_code=int(interrupted or summary.get("status") == DIVERGED))
            self._finished = not interrupted
        self._run = None

    def close(self) -> None:
        """Note that the run came to its end: after this a new run in its folder has a W&B run of its own."""
        if self._finished:
            self._ledger.finished = True
            self._ledger.save()


def flat(nested: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, as one mapping with keys like ``onset/value``."""
    numbers: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        numbers |= flat(value, f"{above}{name}/") if isinstance(value, Mapping) else {above + name: value}
    return numbers
