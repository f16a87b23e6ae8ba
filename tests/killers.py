"""Callbacks that end a run the hard way, for the tests of resuming."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from opsin.module import opsin_module
from opsin.watching import Observation


class KillAfter(Callback):
    """SIGKILL some milliseconds after a step; step and delay come from OPSIN_TEST_KILL, as STEP:MILLISECONDS."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if planned := os.environ.get("OPSIN_TEST_KILL"):
            self.step, delay = (int(part) for part in planned.split(":"))
            self.seconds = delay / 1000
            opsin_module(pl_module).listen(1, self._maybe)

    def _maybe(self, seen: Observation) -> None:
        if seen.step == self.step:
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            threading.Timer(self.seconds, kill).start() if self.seconds else kill()


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


def kill() -> None:
    """Ends the run without a chance to save anything but what is written already."""
    raise Killed
