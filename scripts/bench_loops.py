"""The loops that a bench compares: a plain eager PyTorch loop, and Opsin held until it is its turn."""

from __future__ import annotations

import math
import threading
import time

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.model.transformer import Transformer
from opsin.tasks import FewShot
from opsin.training.module import OpsinModule

REFERENCE = Transformer(layers=2, width=64, heads=8)
STEPS_PER_TURN = {"eager": 100, "opsin": 500, "interventions": 100}
LEARNING_RATE = 1e-5


class EagerBlock(nn.Module):
    """One pre-norm attention block as one would write it by hand."""

    def __init__(self, width: int, heads: int, positions: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        channel = torch.arange(0, width // heads, 2)
        angle = torch.arange(positions)[:, None] * 10_000.0 ** (-channel / (width // heads))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.register_buffer("future", torch.ones(positions, positions, dtype=torch.bool).triu(1))

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1).flatten(-2)

    def forward(self, h: Tensor) -> Tensor:
        batch, length, width = h.shape
        q, k, v = self.qkv(self.norm(h)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = self.rotate(q) @ self.rotate(k).transpose(-1, -2) / math.sqrt(width // self.heads)
        z = scores.masked_fill(self.future, -torch.inf).softmax(-1) @ v
        return h + self.out(z.transpose(1, 2).reshape(batch, length, width))


class EagerModel(nn.Module):
    """The reference model without taps or members."""

    def __init__(self, task: FewShot) -> None:
        super().__init__()
        width, positions = REFERENCE.width, task.layout.positions
        self.examples, self.labels = nn.Linear(task.n_features, width), nn.Embedding(task.n_tokens, width)
        self.blocks = nn.Sequential(*(EagerBlock(width, REFERENCE.heads, positions) for _ in range(REFERENCE.layers)))
        self.norm, self.unembed = nn.LayerNorm(width), nn.Linear(width, task.n_outputs)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        pairs = torch.stack([self.examples(features[:, :-1]), self.labels(labels)], 2).flatten(1, 2)
        h = torch.cat([pairs, self.examples(features[:, -1:])], 1)
        return self.unembed(self.norm(self.blocks(h))[:, -1])


class EagerLoop:
    """Gather, forward, backward, Adam; data drawn beforehand."""

    def __init__(self, task: FewShot, threads: int) -> None:
        self.threads, self.model = threads, EagerModel(task)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        self.bank = task.bank()["exemplars"]
        self.draws = {name: tensor[:, 0] for name, tensor in task.draw([0], 0, STEPS_PER_TURN["eager"]).items()}

    def turn(self, steps: int = STEPS_PER_TURN["eager"]) -> float:
        """Steps per second over one turn."""
        torch.set_num_threads(self.threads)
        began = time.perf_counter()
        for index in (step % STEPS_PER_TURN["eager"] for step in range(steps)):
            labels = self.draws["labels"][index]
            features = self.bank[self.draws["classes"][index], self.draws["exemplars"][index]]
            loss = F.cross_entropy(self.model(features, labels[:, :-1]), labels[:, -1])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        seconds = time.perf_counter() - began
        torch.set_num_threads(1)
        return steps / seconds


class TurnTaking(pl.Callback):
    """Holds the Trainer between Lightning batches until it is its turn."""

    def __init__(self) -> None:
        self.allowed, self.finished = threading.Semaphore(0), threading.Semaphore(0)

    def on_train_batch_start(self, *_: object) -> None:
        self.allowed.acquire()

    def on_train_batch_end(self, *_: object) -> None:
        self.finished.release()


class OpsinLoop:
    """A fit that trains, in a thread of its own, as far as it is told to."""

    def __init__(
        self, task: FewShot, callbacks: list[pl.Callback], steps: int, seeds: int = 1, threads: int = 1, on: str = "cpu"
    ) -> None:
        self.turns = TurnTaking()
        settings = {"learning_rate": LEARNING_RATE, "compile": True, "threads": threads}
        self.module = OpsinModule(task, REFERENCE, list(range(seeds)), **settings)
        self.trainer = pl.Trainer(
            max_steps=steps,
            callbacks=[self.turns, *callbacks],
            accelerator=on,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        self.thread = threading.Thread(target=self.trainer.fit, args=(self.module,), daemon=True)
        self.thread.start()

    def turn(self, steps: int = STEPS_PER_TURN["opsin"]) -> float:
        """Steps per second over one turn."""
        batches = steps // self.module.steps_per_batch
        began = time.perf_counter()
        for _ in range(batches):
            self.turns.allowed.release()
        for _ in range(batches):
            self.turns.finished.acquire()
        return steps / (time.perf_counter() - began)
