"""Callbacks that save a run or end it the hard way, and runs that are ended so, for the tests of resuming."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from opsin.training.module import opsin_module
from opsin.training.observers import Observation
from tests.helpers.processes import opsin


class KillAfter(Callback):
    """SIGKILL some milliseconds after a step; step and delay come from OPSIN_TEST_KILL, as STEP:MILLISECONDS.

    With OPSIN_TEST_HOLD, a number of seconds, training stands still for so long before.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if planned := os.environ.get("OPSIN_TEST_KILL"):
            self.step, delay = (int(part) for part in planned.split(":"))
            self.seconds = delay / 1000
            opsin_module(pl_module).listen(1, self._maybe)

    def _maybe(self, seen: Observation) -> None:
        if seen.step == self.step:
            time.sleep(float(os.environ.get("OPSIN_TEST_HOLD", 0)))
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            threading.Timer(self.seconds, kill).start() if self.seconds else kill()


class SignalAfter(Callback):
    """Raises signals in this process after steps that a test has planned, in the middle of a Lightning batch too."""

    planned: ClassVar[dict[int, int]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        opsin_module(pl_module).listen(1, self._raise)

    def _raise(self, seen: Observation) -> None:
        if number := self.planned.pop(seen.step, None):
            signal.raise_signal(number)


class StopAfter(Callback):
    """Sets the Trainer's ``should_stop`` after the batch that reaches a step, as a callback of a user may."""

    planned: ClassVar[set[int]] = set()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step in self.planned:
            self.planned.discard(trainer.global_step)
            trainer.should_stop = True


class SaveAt(Callback):
    """Saves a checkpoint after the batch that reaches a step."""

    def __init__(self, step: int, path: Path | str) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Killed(BaseException):
    """Stands in for SIGKILL where the process must live on."""


class EndAt(Callback):
    """Does at one hook of one step what a test has planned; nothing without a plan."""

    planned: ClassVar[tuple[str, int, Callable[[], Any]] | None] = None

    def _maybe(self, hook: str, trainer: Trainer) -> None:
        if self.planned is not None and self.planned[:2] == (hook, trainer.global_step):
            self.planned[2]()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._maybe("on_train_batch_start", trainer)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self._maybe("on_validation_start", trainer)

    def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
        self._maybe("on_fit_end", trainer)


class KillAt(Callback):
    """Raises ``Killed`` at the end of the Lightning batch that reaches a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            kill()


class Begun(Callback):
    """Notes whether a run was built and has begun, if it is the first of its callbacks."""

    def __init__(self) -> None:
        self.seen = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen = True


def kill() -> None:
    """Ends the run without a chance to save anything but what is written already."""
    raise Killed


def whole_and_killed(folder: Path, recipe: str, steps: int, kills: int) -> tuple[Path, Path]:
    """The folders of an uninterrupted run and of one killed so many times; the recipe has a ``KillAfter``."""
    (folder / "recipe.yaml").write_text(recipe)
    start = ["fit", "--config", "recipe.yaml", "--checkpoint_every", str(steps // 10), "--run_folder"]
    opsin(*start, "whole", folder=folder)
    # any moment will do; a fixed seed only keeps a failure repeatable
    chance = random.Random(0)
    moments = sorted(chance.sample(range(1, steps), kills))
    planned = [f"{step}:{chance.choice([0, 0, 3, 20])}" for step in moments]
    for moment, arguments in zip(planned, [[*start, "killed"], *[["resume", "killed"]] * kills], strict=False):
        ended = opsin(*arguments, folder=folder, check=False, OPSIN_TEST_KILL=moment)
        assert ended.code == -signal.SIGKILL, ended
    opsin("resume", "killed", folder=folder)
    return folder / "whole", folder / "killed"


def checkpoint(run: Path) -> dict[str, Any]:
    """The last checkpoint of a run."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_equal_weights(runs: tuple[Path, Path]) -> None:
    """Bit for bit."""
    whole, killed = (checkpoint(run)["state_dict"] for run in runs)
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def assert_equal_optimizers(runs: tuple[Path, Path], steps: int) -> None:
    """Bit for bit."""
    whole, killed = (checkpoint(run)["optimizer_states"][0] for run in runs)
    assert whole["param_groups"] == killed["param_groups"] and whole["param_groups"][0]["steps"] == steps
    for index, state in whole["state"].items():
        assert all(torch.equal(value, killed["state"][index][name]) for name, value in state.items())
