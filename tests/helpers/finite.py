"""A task with a fixed set: a table of 12 pairs, every sum of which is one of seven classes."""

import torch

from opsin.task import Batch, Layout, Truth
from opsin.tasks.shared.finite import FiniteTask


class Table(FiniteTask):
    """Pairs (a, b) with a in 0 .. 3 and b in 4 .. 6; a + b is the answer, less 4 a class of 0 .. 5."""

    n_features, n_tokens, n_outputs = None, 7, 6
    layout = Layout(features=(), tokens=(0, 1), labels=(), scored=(1,))

    def __init__(self, train_share: float = 0.5, split_seed: int = 0, batch_size: int | None = None) -> None:
        super().__init__(12, train_share, split_seed, batch_size)

    def bank(self):
        return {"pairs": torch.tensor([[a, b] for a in range(4) for b in range(4, 7)], dtype=torch.float32)}

    def assemble(self, bank, draw):
        tokens = bank["pairs"][draw["example"]].to(torch.int64)
        truth = Truth.without_queries(self.layout, *tokens.shape[:2], tokens.device)
        return Batch(None, tokens, tokens.sum(-1, keepdim=True) - 4, None, truth, self.layout)

    def baselines(self):
        return {"uniform": 1.791759469228055}
