"""Small runs that the contracts share: one task and one model that have everything a reader may need."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch

from opsin.callbacks import Ablate, Clamp
from opsin.interventions.schedules import Schedule
from opsin.model.birth import BirthTransformer
from opsin.model.protocol import Model
from opsin.model.transformer import Transformer
from opsin.task import Bank, Batch, Task, Truth
from opsin.tasks import Repeats
from opsin.training.module import OpsinModule
from tests.contracts.examples import STEPS

FEW = 8
"""Optimizer steps of a run that a single reader sees."""

QUIET = ("logger", "enable_checkpointing", "enable_model_summary")
WHOLE = Transformer(layers=2, width=16, heads=8, mlp_ratio=1, positions="learned", max_positions=12)
"""Heads as many as the documents name, LayerNorm and MLPs."""

MEMORIES = BirthTransformer(width=16, max_positions=12, linear_mlp=True)
"""What bigrams with triggers are learned by."""


class RichTask(Repeats):
    """Tokens of different frequency that repeat, two held-out sets, and a table of sums modulo eleven."""

    modulus = 11

    def __init__(self) -> None:
        super().__init__(vocabulary=11, positions=12, batch_size=4, segments=1, shortest=2, longest=4)
        self.evaluations = (*self.evaluations, "test")

    def table(self, bank: Bank) -> Batch:
        """All pairs, each at the beginning of a sequence of zeros."""
        a, b = torch.arange(121) // 11, torch.arange(121) % 11
        tokens = torch.zeros(1, 121, 12, dtype=torch.int64)
        tokens[0, :, 0], tokens[0, :, 1] = a, b
        targets = ((a + b) % 11)[None, :, None].expand(-1, -1, len(self.layout.scored))
        truth = Truth.without_queries(self.layout, 1, 121)
        return Batch(None, tokens, targets, None, truth, self.layout)

    def examples_of(self, split: str) -> np.ndarray:
        """Every second pair is trained on."""
        return np.arange(0, 121, 2)


def rich_task() -> Task:
    """A task that has everything a reader may need."""
    return RichTask()


def module(task: Task | None = None, model: Model = WHOLE, seeds: Sequence[int] = (3, 5)) -> OpsinModule:
    """A run of that task that is not trained yet."""
    small = {"steps_per_batch": 4, "log_every": 2, "probe_size": 40, "evaluation_size": 8}
    return OpsinModule(rich_task() if task is None else task, network=model, seed=list(seeds), **small, compile=False)


def fit(
    model: OpsinModule, callbacks: Sequence[pl.Callback], folder: Path, steps: int = STEPS, resume: Path | None = None
) -> pl.Trainer:
    """Train under an intervention that comes and goes, with an evaluation every second Lightning batch."""
    window, head = Schedule(start=2, stop=STEPS - 4, ramp=4), min(1, model.sites.size("H") - 1)
    clamp = Clamp(heads=[f"0:{max(head, 0)}"], pattern="previous_token", schedule=window)
    writer = clamp if model.sites.size("H") else Ablate(sites=["hook_pos_embed"], schedule=window)
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[*callbacks, writer],
        accelerator="cpu",
        default_root_dir=folder,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=2,
        log_every_n_steps=1,
        enable_progress_bar=any(isinstance(item, pl.callbacks.ProgressBar) for item in callbacks),
        **dict.fromkeys(QUIET, False),
    )
    trainer.fit(model, ckpt_path=resume, weights_only=True)
    return trainer


def weights(model: OpsinModule) -> torch.Tensor:
    """All parameters in one row."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def generators() -> tuple[str, ...]:
    """States of the global random generators, as short texts.

    That of ``random`` is left out: what checks shapes while tests run draws from it. Nothing in the house imports it.
    """
    states = (torch.get_rng_state().tolist(), np.random.get_state())
    return tuple(hashlib.sha256(repr(state).encode()).hexdigest()[:16] for state in states)
