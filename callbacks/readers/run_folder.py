"""Keeps the run on disk: metrics as they come, a checkpoint to resume from, and the summary at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import _TunerExitException

from opsin.callbacks.readers.base import Reader, check_count
from opsin.errors import ConfigError, log
from opsin.figures.run import summary_figure
from opsin.figures.style import save_figure
from opsin.records.checkpoint import write_last
from opsin.records.claim import Claim, claim_unless_held
from opsin.records.events import EventTable
from opsin.records.folder import FolderContent, RunFolder, content_of, write_atomically
from opsin.records.schema import CONFIG_FILE, LAST_CHECKPOINT, SUMMARY_FILE, SUMMARY_PICTURE
from opsin.records.user_files import real_path
from opsin.training.module import callbacks_of


class EndRequests(Protocol):
    """Whoever may ask a run to end while it trains."""

    def begin(self) -> None:
        """From now on the run ends by itself when it is asked to."""

    def requested(self) -> bool:
        """Whether the run is to end now."""


class _EndedUntrained(_TunerExitException):
    """Ends a run that was saved and is not trained; Lightning then returns from ``fit`` without the hooks of an end."""


class KeepRun(Reader):
    """Writes everything a run leaves behind into one folder.

    What was logged is on disk before the checkpoint that counts on it, so a run killed at any
    moment resumes from ``checkpoints/last.ckpt`` and ends with the same folder. The checkpoint before
    it is ``checkpoints/previous.ckpt``, which a resume takes where the last is damaged. The records are in
    ``metrics.csv`` alone: a checkpoint holds how many bytes of it count, and their checksum. A run that ends before it
    is trained (``max_time``, a signal on the command line) is saved where it stands and resumes, too. The folder is
    this process's alone while it trains, and never that of another run: one that has a run needs ``ckpt_path``, a
    checkpoint in it.

    Args:
        folder: folder that this run writes into; made when training starts.
        config: the resolved configuration as YAML, which the folder keeps; none when None.
        checkpoint_every: optimizer steps between checkpoints.
    """

    def __init__(self, folder: str | Path, config: str | None = None, checkpoint_every: int = 1_000) -> None:
        check_count("KeepRun.checkpoint_every", checkpoint_every, "optimizer step")
        self.folder, self.config, self.checkpoint_every = Path(folder), config, checkpoint_every
        self._seconds_before, self._last_saved, self._finished = 0.0, 0, False
        self._started: float | None = None
        self._claim: Claim | None = None
        self._begun = self._wrote = False
        self.goes_on = False
        """Whether the run in the folder is this one, which was killed before its first checkpoint."""
        self.ended_at: int | None = None
        """Optimizer steps after which the run ended untrained; None while it trains and when it is trained."""
        self.end_requests: EndRequests | None = None
        """Who may ask the run to end before its next step; nobody when None."""

    @cached_property
    def files(self) -> RunFolder:
        """The folder, made when it is first used, so that a run whose settings are refused leaves none."""
        return RunFolder(self.folder)

    @property
    def checkpoint(self) -> Path:
        """What a resume starts from."""
        return self.folder / LAST_CHECKPOINT

    # ---- start ----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._started, self._finished, self._begun, self.ended_at = None, False, False, None
            self._claim = claim_unless_held(self.folder)

    def begin(self, trainer: Trainer) -> None:
        """Refuse a folder that has another run, before anybody writes into it; called by all who do.

        Raises:
            ConfigError: the folder has a run, and this one does not go on from one of its checkpoints.
        """
        if self._started is not None:
            return
        start, content = trainer.ckpt_path, content_of(self.folder)
        inside = start is not None and real_path(start).is_relative_to(real_path(self.folder))
        continued = self.goes_on or (self._wrote and trainer.global_step > 0)
        if content != FolderContent.NEW and not (inside or continued):
            expected = f"a new folder: this one has {content.value}"
            expected += f", which goes on with ckpt_path {self.checkpoint}" if self.checkpoint.exists() else ""
            raise ConfigError("KeepRun.folder", str(self.folder), expected)
        self._started = time.monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin(trainer)
        if self.config is not None:
            write_atomically(self.files.path / CONFIG_FILE, self.config)
        self._wrote = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._module.history.keep_in(self.files)
        self._module.event_table = EventTable(self.files, [vars(event) for event in self._module.events])
        self._last_saved, self._begun = trainer.global_step, True
        # after all else of the batch: on resuming, Lightning would skip a validation that its checkpoint precedes
        self._module.after_batch(lambda: self._save_if_due(trainer))
        if self.end_requests is not None:
            self.end_requests.begin()
        self._module.end_when(self._end_requested, lambda: self._end_untrained(trainer))

    # ---- while it trains --------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._write()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._begun:
            self._write()

    # ---- end ----------------------------------------------------------------------------------------

    def _end_requested(self) -> bool:
        return self.end_requests is not None and self.end_requests.requested()

    def _end_untrained(self, trainer: Trainer) -> None:
        """Save the run as it stands, and end it."""
        self._write()
        # before the first step there is nothing that its beginning would not make again
        if trainer.global_step > self._last_saved:
            self._save(trainer)
        self._note_end(trainer)
        raise _EndedUntrained

    def _note_end(self, trainer: Trainer) -> None:
        self.ended_at = trainer.global_step
        if self.end_requests is None:
            steps = f"{trainer.global_step:,} of {trainer.max_steps:,}"
            log.warning(f"opsin: ended untrained after step {steps}; goes on with ckpt_path {self.checkpoint}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write()
        if not self._module.is_trained:
            # the Trainer came to the end of its epochs
            self._end_untrained(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._begun:
            self._write()
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        if self._claim is not None:
            self._claim.release()
            self._claim = None
        self._begun = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = self._module
        if not self._begun:
            # there was nothing to train: what the folder has of the run stays
            if not module.is_trained:
                self._note_end(trainer)
            return
        # members that ended early are known without a PhaseChange, too
        ended = [dict(module.ended.get(member, {})) for member in range(module.n_members)]
        if "members" not in module.summary:
            module.summary.update(ended[0] if len(ended) == 1 else {"members": ended})
        module.summary["steps"] = trainer.global_step
        module.summary["sequences"] = trainer.global_step * module.task.batch_size
        module.summary["wall_time_seconds"] = round(self._seconds(), 1)
        module.summary["objective"] = module.task.objective.describe()
        axis = module.task.time_axis
        if axis.unit != "sequences":
            module.summary["axis"] = asdict(axis)
        module.summary["plan"] = module.plan.describe()
        module.summary["interventions"] = module.gates.activity()
        module.summary["plan_digest"] = module.plan.digest()
        if module.allowed:
            module.summary["allowed"] = module.allowed
        self.files.write_json(SUMMARY_FILE, module.summary)
        save_figure(summary_figure(module.history, module.summary), self.files.path / SUMMARY_PICTURE)
        module.announce_completion()
        # last, so that a run killed before its summary was written or sent goes back and does it
        self._finished = True
        self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds(), "finished": self._finished}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # a limit of time is that of a process, and the run would end as soon as it is resumed
        checkpoint["callbacks"].pop(Timer.__qualname__, None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]

    def _seconds(self) -> float:
        # a callback may save before the run begins
        return self._seconds_before + (0.0 if self._started is None else time.monotonic() - self._started)

    def _write(self) -> None:
        self._module.history.write_out()

    def _save_if_due(self, trainer: Trainer) -> None:
        # the last step's checkpoint is that of the finished run
        ends = trainer.global_step >= trainer.max_steps or (trainer.should_stop and trainer.fit_loop._can_stop_early)
        if not ends and trainer.global_step - self._last_saved >= self.checkpoint_every:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        # the Trainer's own dictionary, in a file that is never half and has the one before it beside it
        content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        write_last(self.folder, content, self._finished)
        self._last_saved = trainer.global_step


def is_finished(saved: Mapping[str, Any]) -> bool:
    """Whether a run's last checkpoint is that of its end."""
    return saved["callbacks"][KeepRun.__qualname__]["finished"]


def keeper_of(trainer: Trainer) -> KeepRun | None:
    """The callback that keeps this run, if one does."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, KeepRun)), None)


def run_folder(trainer: Trainer) -> Path:
    """Where this run keeps its files, for one that writes there; the Trainer's own folder where nothing keeps it."""
    keeper = keeper_of(trainer)
    if keeper is None:
        return Path(trainer.default_root_dir)
    keeper.begin(trainer)
    return keeper.folder
