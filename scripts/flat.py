"""Measures that a long run stays flat: resident memory, time per step and the size of a checkpoint.

    .venv/bin/python scripts/flat.py [--steps 200000] [--parts 20]

A tiny run trains eagerly with trackers, a schedule with feedback and checkpoints; after every part one line is printed.
The exit code is 1 if, from a tenth of the steps on, resident memory or the size of a checkpoint grows by more than 5 %,
or the time per step (processor time; the mean of the last three parts against that of the first three) does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np

from opsin import OpsinModule, Transformer
from opsin.callbacks import Clamp, InductionHeads, KeepRun, PhaseChange
from opsin.interventions.feedback import Feedback
from opsin.interventions.schedules import Schedule
from opsin.tasks import FewShot, GaussianClusters

ALLOWED = 0.05
"""Share by which a measure may grow."""


class Gauge(pl.Callback):
    """Notes memory, time and size after every part of a run.

    Args:
        every: optimizer steps in a part.
        checkpoint: path of the checkpoint whose size is noted.
    """

    def __init__(self, every: int, checkpoint: Path) -> None:
        self.every, self.checkpoint = every, checkpoint
        self.rows: list[tuple[int, float, float, int]] = []
        self._begun = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % self.every == 0 and self.checkpoint.exists():
            now = time.process_time()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            row = (trainer.global_step, pages * 4096 / 2**20, (now - self._begun) / self.every, self._size())
            print("step {:>9,}  {:8.1f} MiB  {:8.1f} us a step  {:,} bytes".format(*row[:2], row[2] * 1e6, row[3]))
            self.rows.append(row)
            self._begun = now

    def _size(self) -> int:
        return self.checkpoint.stat().st_size


def measured(steps: int, parts: int, folder: Path) -> list[tuple[int, float, float, int]]:
    """Step, resident memory (MiB), processor time per step (s) and size of the checkpoint (bytes), of each part.

    Args:
        steps: optimizer steps of the run.
        parts: number of parts that the run is cut into.
        folder: run folder of the run.
    """
    task = FewShot(GaussianClusters(12, 2, 8), batch_size=4, train_classes=8)
    settings = {"steps_per_batch": 50, "log_every": 10, "probe_size": 8, "evaluation_size": 8, "compile": False}
    module = OpsinModule(task, Transformer(width=8, heads=2), idle="warn", **settings)
    schedule = Schedule(feedback=Feedback("train/loss", below=0.01))
    keeper = KeepRun(folder, checkpoint_every=steps // parts // 5)
    gauge = Gauge(steps // parts, keeper.checkpoint)
    callbacks = [Clamp(heads=["0:0"], pattern="previous_token", schedule=schedule), InductionHeads(every=50)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[*callbacks, PhaseChange(), keeper, gauge],
        enable_checkpointing=False,
        check_val_every_n_epoch=None,
        val_check_interval=20,
        **quiet,
    )
    trainer.fit(module)
    return gauge.rows


def growth(rows: list[tuple[int, float, float, int]], steps: int) -> dict[str, float]:
    """By which share each measure grows from a tenth of the steps on.

    Args:
        rows: measures of each part, as ``measured`` returns them.
        steps: optimizer steps of the run.
    """
    flat = np.array([row[1:] for row in rows if row[0] >= steps // 10])
    first, last = flat[:3], flat[-3:]
    return {
        "memory": float(last[-1, 0] / first[0, 0] - 1),
        "time per step": float(last[:, 1].mean() / first[:, 1].mean() - 1),
        "checkpoint": float(last[-1, 2] / first[0, 2] - 1),
    }


def main() -> int:
    """Measure, and say by how much each measure grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--parts", type=int, default=20)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = growth(measured(parsed.steps, parsed.parts, Path(scratch) / "run"), parsed.steps)
    print(", ".join(f"{name} {share:+.1%}" for name, share in found.items()))
    return int(max(found.values()) > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
