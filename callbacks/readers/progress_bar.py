"""A progress bar that counts optimizer steps and shows the loss, what the objective measures and the strongest head."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from opsin.callbacks.readers.base import Reader
from opsin.training.module import OpsinModule
from opsin.training.observers import Event

PLAIN_LINES = 20
"""Lines that a whole run prints where there is no terminal."""


class Progress(Reader, ProgressBar):
    """Live in a terminal; about twenty plain lines where there is none (a log file, a cluster job)."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm | None = None

    def disable(self) -> None:
        """Print and draw nothing from now on, as in processes that are not the first."""
        self._enabled = False

    def enable(self) -> None:
        """Print and draw again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._module.on_event(self._print_event)
        self._lines_printed = trainer.global_step * PLAIN_LINES // trainer.max_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self._enabled:
            return
        text = status(self._module)
        if not sys.stderr.isatty():
            return self._print_line(trainer, text)
        # not before: while the step is compiled there is nothing to draw, and other lines would mix with it
        if self._bar is None:
            self._bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, unit="step", dynamic_ncols=True)
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def _print_line(self, trainer: Trainer, text: str) -> None:
        line = trainer.global_step * PLAIN_LINES // trainer.max_steps
        if line > self._lines_printed:
            self._lines_printed = line
            print(f"step {trainer.global_step:,}/{trainer.max_steps:,}  {text}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print_event(self, event: Event) -> None:
        if self._bar is not None:
            self._bar.write(event.message)
        elif self._enabled:
            print(event.message, flush=True)


def status(module: OpsinModule) -> str:
    """Loss and measures averaged over members, and the head with the greatest induction strength."""
    history = module.history
    parts = [
        f"{name.removeprefix('train/')} {history[name].values[-1].mean():.3f}"
        for name in module.step_metrics[:-1]
        if name in history
    ]
    if "induction_strength" in history:
        strength = history["induction_strength"].values[-1].mean(0)
        layer, head = divmod(int(strength.argmax()), strength.shape[1])
        parts.append(f"strongest head {layer}:{head} {strength.max():.2f}")
    return "  ".join(parts)
