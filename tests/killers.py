"""A callback that ends the process the hard way, for the tests of resuming."""

from __future__ import annotations

import os
import signal
import threading

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
