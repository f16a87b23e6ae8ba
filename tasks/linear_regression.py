"""In-context linear regression: every y is to be predicted from its x and the pairs (x, y) before it.

Inputs and outputs are numbers, no token; a sequence is x1 y1 x2 y2 .., its weights drawn anew, and which algorithm a
model has learned shows by which predictor it agrees with (Garg et al. 2022, "What can transformers learn in-context?";
Akyürek et al. 2022, "What learning algorithm is in-context learning?"; Pathak et al. 2023, "Transformers can optimally
learn regression mixture models").

Legend: S steps drawn together, M members, B batch, n examples of the context, Q = n + 1 queries, L = 2 n + 1 positions,
d entries of x, C components of the mixture, K further queries of one context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from opsin.errors import ConfigError, check_number
from opsin.model.memory import SINGLE, check_memory
from opsin.objective import SquaredError
from opsin.task import Bank, Batch, Draw, Layout, Reference, Task, Truth
from opsin.tasks.shared.references import (
    Learner,
    gradient_step,
    in_context,
    least_squares,
    likeliest_component,
    nearest_neighbours,
    posterior_mean,
    ridge,
)
from opsin.tasks.shared.streams import UINT64_MAX, below, check_draw, fill_normals, stream_key, uniforms

_INPUT_STREAM, _WEIGHT_STREAM, _ERROR_STREAM, _COMPONENT_STREAM = range(4)
"""Separate streams, so that noise or a mixture leave every other choice as it was."""


class LinearRegression(Task):
    """y = w.x + noise, with x from N(0, I) for every pair and w drawn for every sequence.

    w is from N(0, I), or one of ``components`` fixed vectors of norm sqrt(d) in random directions, equally likely. x is
    shown as [0, x] and y as [y, 0], d + 1 numbers each. Every y, the one after all examples too, is predicted at its x,
    under squared error; where no answer can be looked up, no position is a label.

    References, all by the pairs before a query: ``zero``; ``averaging``, w = X'y / n; ``nearest_neighbour``;
    ``gradient_step``, the best single step w = X'y / (n + d + 1 + noise**2), for E tr X'X = n d and E tr (X'X)^2 =
    n d (n + d + 1); ``least_squares``, w of the smallest norm; with noise ``ridge``, whose penalty noise**2 makes it
    Bayes' rule for N(0, I); of a mixture ``posterior_mean``, Bayes' rule for it, and ``likeliest_component``. Without
    a pair all say 0 but the posterior mean. With noise the expected error of least squares is infinite at d - 1, d and
    d + 1 pairs (``unbounded``): compare nothing with it there.

    Args:
        dimensions: d, entries of x.
        examples: n, pairs of a sequence before its last query.
        noise: standard deviation of the noise of every y.
        components: C, number of fixed weight vectors; None for weights from N(0, I).
        component_seed: seed that these vectors are drawn from, the same for all members.
        batch_size: B, sequences in a batch of one member.

    Raises:
        ConfigError: a value out of its range, or a mixture without noise, whose posterior is not defined.
    """

    n_tokens, n_outputs, evaluations = 0, 1, ("train",)
    objective = SquaredError()

    def __init__(
        self,
        dimensions: int = 3,
        examples: int = 8,
        noise: float = 0.0,
        components: int | None = None,
        component_seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        for name, value in (("dimensions", dimensions), ("examples", examples), ("batch_size", batch_size)):
            check_number(f"LinearRegression.{name}", value, "at least 1", 1)
        check_number("LinearRegression.noise", noise, "a finite number of 0 or more", 0)
        check_number("LinearRegression.component_seed", component_seed, "0 .. 2**64 - 1", 0, UINT64_MAX)
        if components is not None:
            check_number("LinearRegression.components", components, "at least 1, or null", 1)
            if noise == 0:
                raise ConfigError("LinearRegression.noise", noise, "more than 0: Bayes' rule for components needs it")
        numbers = (dimensions + 1) * (2 * examples + 1)
        check_memory("LinearRegression.examples", examples, SINGLE * numbers)
        check_memory("LinearRegression.batch_size", batch_size, SINGLE * numbers * batch_size)
        check_memory("LinearRegression.components", components, SINGLE * dimensions * (components or 0))
        self.dimensions, self.examples, self.noise, self.batch_size = dimensions, examples, noise, batch_size
        self.n_features = dimensions + 1
        every = tuple(range(2 * examples + 1))
        self.layout = Layout(features=every, tokens=(), labels=(), scored=every[::2])
        self.components = _components(components, dimensions, component_seed)

    @property
    def unbounded(self) -> tuple[int, ...]:
        """Numbers of examples after which the expected error of least squares is infinite; none without noise."""
        near = range(self.dimensions - 1, self.dimensions + 2)
        return tuple(count for count in near if 0 < count <= self.examples) if self.noise else ()

    # ---- sequences ------------------------------------------------------------------------------

    def bank(self) -> Bank:
        return {} if self.components is None else {"components": self.components}

    def draw(
        self, seeds: Sequence[int], first: int, count: int, split: str = "train", batch_size: int | None = None
    ) -> Draw:
        """The choices behind batches ``first .. first + count - 1``, one member per seed.

        Args:
            seeds: one seed a member, each 0 .. 2**64 - 1.
            first: index of the first batch, at least 0.
            count: S, number of batches to draw.
            split: training stream ``"train"``, or evaluation set ``"eval/train"``.
            batch_size: B, sequences in a batch, the task's setting when None.

        Returns:
            ``x`` [S, M, B, Q, d]; ``w`` [S, M, B, d], or ``component`` [S, M, B] of a mixture; with noise ``noise``
            [S, M, B, Q], of variance 1.
        """
        size = self.batch_size if batch_size is None else batch_size
        check_draw("LinearRegression", ("train", "eval/train"), split, seeds, (first, count, size))
        queries = self.examples + 1
        shapes: dict[str, tuple[int, tuple[int, ...]]] = {"x": (_INPUT_STREAM, (queries, self.dimensions))}
        if self.components is None:
            shapes["w"] = (_WEIGHT_STREAM, (self.dimensions,))
        if self.noise:
            shapes["noise"] = (_ERROR_STREAM, (queries,))
        found = {name: np.empty((count, len(seeds), size, *shape), np.float32) for name, (_, shape) in shapes.items()}
        keys = [stream_key(seed, split, size) for seed in seeds]
        for name, (stream, _) in shapes.items():
            for step, member in np.ndindex(count, len(seeds)):
                fill_normals(keys[member], stream, first + step, found[name][step, member])
        if self.components is not None:
            u = uniforms(keys, _COMPONENT_STREAM, first, count, size, {"component": 1})["component"]
            found["component"] = below(u, len(self.components)).reshape(count, len(seeds), size)
        return {name: torch.from_numpy(array) for name, array in found.items()}

    def assemble(self, bank: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> Batch:
        """One step's draw (tensors ``[M, B, ...]``) as a batch."""
        x = draw["x"]
        w = bank["components"][draw["component"]] if "component" in draw else draw["w"]
        y = (x * w[:, :, None].to(x)).sum(-1, keepdim=True)
        if "noise" in draw:
            y = y + self.noise * draw["noise"][..., None]
        pairs = torch.stack([pad(x, (1, 0)), pad(y, (0, self.dimensions))], 3).flatten(2, 3)
        members, size = x.shape[:2]
        tokens = torch.zeros(members, size, 0, dtype=torch.int64, device=x.device)
        truth = Truth.without_queries(self.layout, members, size, x.device)
        # the last answer is asked for and never shown
        return Batch(pairs[:, :, :-1], tokens, targets=y, plausible=None, truth=truth, layout=self.layout)

    def with_queries(self, batch: Batch, count: int, x: Float[Tensor, "K d"]) -> Batch:
        """Every context of a batch with each of K inputs as the query after ``count`` pairs, ``[M, B K, ...]``.

        What follows that query, and the targets, are those of the batch: under a causal model they do not matter.

        Args:
            batch: sequences of this task, whose first pairs are the contexts.
            count: number of pairs before the query.
            x: inputs that are put in the place of the query.
        """
        assert batch.features is not None
        size, queries = batch.features.shape[1], len(x)
        repeated = batch.map(lambda tensor: tensor.repeat_interleave(queries, 1))
        assert repeated.features is not None
        features = repeated.features.clone()
        features[:, :, 2 * count, 1:] = x.to(features).repeat(size, 1)
        return replace(repeated, features=features)

    # ---- what is known --------------------------------------------------------------------------

    def baselines(self) -> dict[str, float]:
        """Squared error of predicting 0: the variance of an answer."""
        return {"zero": self.dimensions + self.noise**2}

    def references(self) -> dict[str, Reference]:
        variance, d = self.noise**2, self.dimensions
        learners: dict[str, Learner] = {
            "zero": gradient_step(lambda n: 0.0),
            "averaging": gradient_step(lambda n: 1 / n),
            "nearest_neighbour": nearest_neighbours(1),
            "gradient_step": gradient_step(lambda n: 1 / (n + d + 1 + variance)),
            "least_squares": least_squares,
        }
        if variance:
            learners["ridge"] = ridge(variance)
        found = {name: self._in_context(learner) for name, learner in learners.items()}
        if self.components is not None:
            found["likeliest_component"] = self._in_context(likeliest_component(self.components))
            found["posterior_mean"] = self._in_context(posterior_mean(self.components, variance), fewest=0)
        return found

    def exact(self, batch: Batch) -> Float[Tensor, "M B Q 1"]:
        """Bayes' rule: the posterior mean of a mixture, else ridge, which without noise is least squares."""
        known = self.references()
        best = next(name for name in ("posterior_mean", "ridge", "least_squares") if name in known)
        return known[best](batch)

    def _in_context(self, learner: Learner, fewest: int = 1) -> Reference:
        """A learner that is asked at every query, in double precision."""

        def predict(batch: Batch) -> Float[Tensor, "M B Q 1"]:
            assert batch.features is not None
            shown = pad(batch.features.double(), (0, 0, 0, 1))  # the last query has no answer
            return in_context(shown[:, :, ::2, 1:], shown[:, :, 1::2, :1], learner, fewest)

        return predict


def _components(count: int | None, dimensions: int, seed: int) -> Float[Tensor, "C d"] | None:
    """Vectors of norm sqrt(d) in uniformly random directions; None of no mixture."""
    if count is None:
        return None
    found = np.empty((count, dimensions), np.float32)
    fill_normals(stream_key(seed, "components", count), 0, 0, found)
    found *= np.sqrt(dimensions) / np.linalg.norm(found, axis=1, keepdims=True)
    return torch.from_numpy(found)
