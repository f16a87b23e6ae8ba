"""Weights at chosen steps: spread evenly over the logarithm of training, and close together around a phase change.

Legend: M members.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from opsin.callbacks.readers.base import LARGEST_COUNT, MOST_PER_DECADE, Reader, check_count, log_spaced
from opsin.callbacks.readers.phase_change import PHASE_CHANGE
from opsin.callbacks.readers.run_folder import run_folder
from opsin.model.saved import saved_model
from opsin.records.checkpoint import write_checkpoint
from opsin.records.folder import PART_SUFFIX
from opsin.training.observers import Event, Observation

MOST_STATES = {"per_decade": MOST_PER_DECADE, "ring": 2**20, "every": LARGEST_COUNT}
"""Largest number of each of its settings."""


class Snapshots(Reader):
    """Writes weights to ``snapshots/step_0001234.pt`` in the run folder.

    Written are the first and the last state, log-spaced steps in between, and around each announced
    phase change every ``every``-th step: the last ``ring`` of them before it, which wait in memory, and as many
    after it. Without a ``KeepRun`` the files go to the Trainer's ``default_root_dir``.

    A file holds ``{"step", "sequences", "seeds": one a member, "run_digest": hash of what determines the run's numbers,
    "transformer": its settings (of another model ``"network"``: class and settings), "sizes": of input and output,
    "parameters": {name: tensor [M, ...]}}`` and loads with
    ``torch.load(path, weights_only=True)``; its checksum is at its end (``opsin.records.checkpoint``). A killed and
    resumed run ends with the same files as one left alone.

    Args:
        per_decade: snapshots in each tenfold of steps, from step 1 on.
        ring: states kept in memory, as large as the weights each; checkpoints carry them.
        every: optimizer steps between the states of the ring.

    Raises:
        ConfigError: a number below 1.
    """

    def __init__(self, per_decade: int = 8, ring: int = 32, every: int = 100) -> None:
        for name, value in {"per_decade": per_decade, "ring": ring, "every": every}.items():
            check_count(f"Snapshots.{name}", value, most=MOST_STATES[name])
        self.per_decade, self.ring, self.every = per_decade, ring, every
        self._forget()

    def _forget(self) -> None:
        self._recent: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=self.ring)
        self._dense_until = -1

    @property
    def state_key(self) -> str:
        return self._generate_state_key(per_decade=self.per_decade, ring=self.ring, every=self.every)

    def state_dict(self) -> dict[str, Any]:
        recent = [{"step": step, "parameters": parameters} for step, parameters in self._recent]
        return {"recent": recent, "dense_until": self._dense_until}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recent.extend((entry["step"], entry["parameters"]) for entry in state_dict["recent"])
        self._dense_until = state_dict["dense_until"]

    def member_state(self, state: dict[str, Any], member: int) -> dict[str, Any]:
        """The state of a run that has this member alone."""
        recent = [
            {**entry, "parameters": {name: x[member : member + 1].clone() for name, x in entry["parameters"].items()}}
            for entry in state["recent"]
        ]
        return {**state, "recent": recent}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = run_folder(trainer) / "snapshots"
        self._folder.mkdir(parents=True, exist_ok=True)
        for half_written in self._folder.glob("*" + PART_SUFFIX):
            half_written.unlink()
        self._last = trainer.max_steps
        self._spaced = log_spaced(self._last, self.per_decade)
        # log-spaced steps have no common cadence, and between snapshots the handler only compares numbers
        self._module.listen(1, self._keep)
        self._module.on_event(self._on_event)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a run that ended early, whose last step was no special one until then
        if not self._path(self._module.steps_done).exists():
            values = self._module.parameters_by_name()
            self._write(self._module.steps_done, {name: _copy(tensor) for name, tensor in values.items()})

    def _keep(self, seen: Observation) -> None:
        step, recent = seen.step, seen.step % self.every == 0
        write = step in self._spaced or step == self._last or (recent and step <= self._dense_until)
        if not (write or recent):
            return
        parameters = {name: _copy(tensor) for name, tensor in self._module.parameters_by_name().items()}
        if write:
            self._write(step, parameters)
        else:
            self._recent.append((step, parameters))

    def _on_event(self, event: Event) -> None:
        if event.kind != PHASE_CHANGE:
            return
        # counted from the event's own step, which a resume does not move
        self._dense_until = max(self._dense_until, event.step + self.ring * self.every)
        while self._recent:
            self._write(*self._recent.popleft())

    def _path(self, step: int) -> Path:
        return self._folder / f"step_{step:07d}.pt"

    def _write(self, step: int, parameters: dict[str, Tensor]) -> None:
        module = self._module
        content = {
            "step": step,
            "sequences": step * module.task.batch_size,
            "seeds": list(module.seeds),
            "run_digest": module.run_identity()["digest"],
            **saved_model(module.network, module.task),
            "parameters": parameters,
        }
        write_checkpoint(self._path(step), content)


def _copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, so that a ring takes no accelerator memory and looks the same after a resume."""
    return tensor.detach().to("cpu", copy=True)
