"""Tasks with other objectives than the cross-entropy of classes, small and made of features alone."""

from __future__ import annotations

import numpy as np
import torch

from opsin.objective import BinaryCrossEntropy, CrossEntropy, LogCrossEntropy, SquaredError
from opsin.task import Batch, Layout, Task, Truth
from opsin.tasks.shared.references import chance, gradient_step, in_context, least_squares, nearest_neighbours, ridge
from opsin.tasks.shared.streams import fill_normals, stream_key

OBJECTIVES = {
    "cross-entropy": CrossEntropy(),
    "cross-entropy in float64": CrossEntropy(in_float64=True),
    "log cross-entropy": LogCrossEntropy(),
    "squared error": SquaredError(),
    "summed squared error": SquaredError(over_outputs="sum", unit="m^2"),
    "bits": BinaryCrossEntropy(),
    "mean over bits": BinaryCrossEntropy(over_outputs="mean"),
}


class Pairs(Task):
    """In-context linear regression of two numbers, or their signs as bits, or the larger one as a class.

    A sequence is x1 y1 x2 y2 .., both padded to one width; what is predicted at x_i is y_i = W x_i.
    """

    batch_size, n_features, n_tokens, n_outputs, evaluations = 6, 4, 0, 2, ("train", "far")
    pairs, entries = 3, 2
    layout = Layout(features=tuple(range(6)), tokens=(), labels=(), scored=(0, 2, 4))

    def __init__(self, objective="squared error", weighted=False):
        self.objective, self.weighted = OBJECTIVES[objective], weighted

    def bank(self):
        return {}

    def draw(self, seeds, first, count, split="train", batch_size=None):
        size = self.batch_size if batch_size is None else batch_size
        shape = (count, len(seeds), size)
        x, w = np.empty((*shape, 3, 2), np.float32), np.empty((*shape, 2, 2), np.float32)
        for step in range(count):
            for member, seed in enumerate(seeds):
                key = stream_key(seed, split, size)
                fill_normals(key, 0, first + step, x[step, member])
                fill_normals(key, 1, first + step, w[step, member])
        return {"x": torch.from_numpy(x) * (3 if split == "eval/far" else 1), "w": torch.from_numpy(w)}

    def assemble(self, bank, draw):
        x = draw["x"].double() if torch.get_default_dtype() == torch.float64 else draw["x"]
        y = x @ draw["w"].to(x)
        zeros = torch.zeros_like(x)
        shown = torch.stack([torch.cat([zeros, x], -1), torch.cat([y, zeros], -1)], 3).flatten(2, 3)
        targets = y
        if isinstance(self.objective, CrossEntropy):
            targets = y.argmax(-1)
        elif isinstance(self.objective, BinaryCrossEntropy):
            targets = (y > 0).to(torch.int64)
        members, size = x.shape[:2]
        tokens = torch.zeros(members, size, 0, dtype=torch.int64, device=x.device)
        truth = Truth.without_queries(self.layout, members, size, x.device)
        # the first pair can only be guessed, and counts in every other sequence alone
        weights = torch.ones_like(x[..., 0]) if self.weighted else None
        if weights is not None:
            weights[:, ::2, 0] = 0
        return Batch(shown, tokens, targets, None, truth, self.layout, weights)

    def references(self):
        if isinstance(self.objective, CrossEntropy):
            return {"uniform": chance(2)}
        if isinstance(self.objective, BinaryCrossEntropy):
            return {"uniform": lambda batch: torch.zeros_like(batch.features[:, :, ::2, :2])}

        def learned(learner):
            return lambda batch: in_context(batch.features[:, :, ::2, 2:], batch.features[:, :, 1::2, :2], learner)

        learners = {"least_squares": least_squares, "ridge": ridge(0.1), "nearest": nearest_neighbours(1)}
        learners["gradient_step"] = gradient_step(lambda n: 1 / (n + 3))
        return {name: learned(learner) for name, learner in learners.items()}

    def baselines(self):
        return {"zero": 2.0} if isinstance(self.objective, SquaredError) else {"chance": float(np.log(2))}
