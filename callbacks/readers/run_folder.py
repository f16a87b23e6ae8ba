"""Keeps the run on disk: metrics as they come, a checkpoint to resume from, and the summary at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from opsin.callbacks.readers.base import Reader, check_count
from opsin.figures.run import summary_figure
from opsin.figures.style import save_figure
from opsin.records.checkpoint import write_last
from opsin.records.folder import RunFolder, write_atomically
from opsin.records.schema import CONFIG_FILE, LAST_CHECKPOINT, SUMMARY_FILE, SUMMARY_PICTURE
from opsin.training.module import callbacks_of


class KeepRun(Reader):
    """Writes everything a run leaves behind into one folder.

    What was logged is on disk before the checkpoint that counts on it, so a run killed at any
    moment resumes from ``checkpoints/last.ckpt`` and ends with the same folder. The checkpoint before
    it is ``checkpoints/previous.ckpt``, which a resume takes where the last is damaged. The records are in
    ``metrics.csv`` alone: a checkpoint holds how many bytes of it count, and their checksum.

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

    @cached_property
    def files(self) -> RunFolder:
        """The folder, made when it is first used, so that a run whose settings are refused leaves none."""
        return RunFolder(self.folder)

    @property
    def checkpoint(self) -> Path:
        """What a resume starts from."""
        return self.folder / LAST_CHECKPOINT

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started, self._finished = time.monotonic(), False
        if self.config is not None:
            write_atomically(self.files.path / CONFIG_FILE, self.config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._module.history.keep_in(self.files)
        self._last_saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._write()
        # Lightning would skip, on resuming, a validation that its checkpoint precedes
        if not _validation_follows(trainer):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._write()
            self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._started is not None:
            self._write()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = self._module
        # members that ended early are known without a PhaseChange, too
        ended = [dict(module.ended.get(member, {})) for member in range(module.n_members)]
        if "members" not in module.summary:
            module.summary.update(ended[0] if len(ended) == 1 else {"members": ended})
        module.summary["steps"] = trainer.global_step
        module.summary["sequences"] = trainer.global_step * module.task.batch_size
        module.summary["wall_time_seconds"] = round(self._seconds(), 1)
        module.summary["plan"] = module.plan.describe()
        module.summary["interventions"] = module.gates.activity()
        module.summary["plan_digest"] = module.plan.digest()
        if module.allowed:
            module.summary["allowed"] = module.allowed
        self.files.write_json(SUMMARY_FILE, module.summary)
        save_figure(summary_figure(module.history, module.summary), self.files.path / SUMMARY_PICTURE)
        # last, so that a run killed before its summary was written goes back and writes it
        self._finished = True
        self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds(), "finished": self._finished}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]

    def _seconds(self) -> float:
        assert self._started is not None
        return self._seconds_before + time.monotonic() - self._started

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
    """Where this run keeps its files; the Trainer's own folder where nothing keeps it."""
    keeper = keeper_of(trainer)
    return keeper.folder if keeper else Path(trainer.default_root_dir)


def _validation_follows(trainer: Trainer) -> bool:
    """Whether the Trainer validates after the batch that just ended."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
