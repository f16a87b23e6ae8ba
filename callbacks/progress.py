"""A progress bar that counts optimizer steps and shows loss, accuracy and the strongest head."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from opsin.module import OpsinModule, opsin_module
from opsin.watching import Event

LINES = 20


class Progress(ProgressBar):
    """Live in a terminal; about twenty plain lines where there is none (a log file, a cluster job)."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = opsin_module(pl_module)
        module.on_event(self._tell)
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            unit="step",
            dynamic_ncols=True,
            disable=not self._enabled or not sys.stderr.isatty(),
        )
        self._lines_printed = trainer.global_step * LINES // trainer.max_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        module = opsin_module(pl_module)
        self._bar.set_postfix_str(status(module), refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)
        line = trainer.global_step * LINES // trainer.max_steps
        if self._enabled and self._bar.disable and line > self._lines_printed:
            self._lines_printed = line
            print(f"step {trainer.global_step:,}/{trainer.max_steps:,}  {status(module)}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_bar"):
            self._bar.close()

    def _tell(self, event: Event) -> None:
        if self._enabled:
            self._bar.write(event.message) if not self._bar.disable else print(event.message, flush=True)


def status(module: OpsinModule) -> str:
    """Loss and accuracy averaged over members, and the head with the greatest induction strength."""
    history = module.history
    parts = [
        f"{name.removeprefix('train/')} {history[name].values[-1].mean():.3f}"
        for name in ("train/loss", "train/accuracy")
        if name in history
    ]
    if "induction_strength" in history:
        strength = history["induction_strength"].values[-1].mean(0)
        layer, head = divmod(int(strength.argmax()), strength.shape[1])
        parts.append(f"strongest head {layer}:{head} {strength.max():.2f}")
    return "  ".join(parts)
