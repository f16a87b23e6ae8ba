"""Associations: every input belongs to one output, and some inputs are far rarer than others.

Cabannes et al. 2023, "Scaling laws for associative memories": inputs x = 0 .. N - 1 come with probability proportional
to 1 / (x + 1) ** alpha, and y = x mod M. What a matrix of limited width, or limited data, leaves out is the error
sum_x p(x) [argmax != y], which is exact: it is a sum over all inputs.

Legend: S steps drawn together, M members, B batch, N inputs, V outputs, T samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opsin.errors import ConfigError, check_number
from opsin.objective import CLASS_MEASURES, CrossEntropy, Measure, accuracy
from opsin.task import Bank, Batch, Draw, Layout, Reference, Task, Truth
from opsin.tasks.shared.next_token import entropy
from opsin.tasks.shared.references import after_token, always, chance
from opsin.tasks.shared.streams import by_mass, check_draw, stream_key, uniforms, zipf_masses

_PAIR_STREAM, _SAMPLE_STREAM = range(2)

WHOLE_SET = "inputs"
"""Evaluation set of every input once, weighted by how often it comes."""

LARGEST = 10**6
"""Most inputs, outputs, and samples that are kept."""


def error(outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
    """1 where the most likely output is not the target, else 0."""
    return 1 - accuracy(outputs, batch)


@dataclass(frozen=True)
class AssociationCrossEntropy(CrossEntropy):
    """Cross-entropy (nats) that measures the share of wrong answers, too.

    Args:
        in_float64: whether the loss is computed in double precision.
    """

    measures = (*CLASS_MEASURES, Measure("error", "down", error, while_training=True))

    @property
    def minimised(self) -> CrossEntropy:
        """The cross-entropy, to which it adds a measure alone."""
        return CrossEntropy(self.in_float64)


class Associations(Task):
    """One input at a time, whose output is its number modulo the number of outputs; inputs follow Zipf's law.

    Evaluation sets: ``train``, other draws of the same law; ``inputs``, each input once, weighted by its probability,
    so that ``val/inputs/error`` is the exact error sum_x p(x) [argmax != y].

    Args:
        inputs: N, number of different inputs.
        outputs: V, number of outputs, at most the inputs; input x belongs to output x mod V.
        zipf: alpha, exponent of the law: input x (from 0) has probability proportional to 1 / (x + 1) ** alpha.
        samples: T, draws of a member that its training goes through again and again; fresh draws for ever when None.
        batch_size: B, inputs of a training step of one member.

    Raises:
        ConfigError: a value out of its range.
    """

    n_features = None
    evaluations = ("train", WHOLE_SET)
    layout = Layout(features=(), tokens=(0,), labels=(), scored=(0,))
    objective = AssociationCrossEntropy()

    def __init__(
        self,
        inputs: int = 100,
        outputs: int = 5,
        zipf: float = 2.0,
        samples: int | None = None,
        batch_size: int = 1024,
    ) -> None:
        check_number("Associations.inputs", inputs, f"2 .. {LARGEST:,}", 2, LARGEST)
        check_number("Associations.outputs", outputs, f"2 .. {inputs:,}, the inputs", 2, inputs)
        check_number("Associations.batch_size", batch_size, f"1 .. {LARGEST:,}", 1, LARGEST)
        if samples is not None:
            check_number("Associations.samples", samples, f"1 .. {LARGEST:,}, or null", 1, LARGEST)
        if not 0 <= zipf < math.inf:
            raise ConfigError("Associations.zipf", zipf, "a finite number, at least 0")
        self.n_tokens, self.n_outputs, self.batch_size, self.samples = inputs, outputs, batch_size, samples
        self._masses = zipf_masses(inputs, zipf)

    @property
    def probabilities(self) -> Float[np.ndarray, " N"]:
        """How likely each input is."""
        return self._masses / self._masses.sum()

    def bank(self) -> Bank:
        """The probability of every input."""
        return {"probability": torch.from_numpy(self.probabilities).float()}

    def set_size(self, split: str) -> int | None:
        """All inputs of their evaluation set, and the samples of training where they are limited."""
        return {f"eval/{WHOLE_SET}": self.n_tokens, "train": self.samples}.get(split)

    def _samples(self, seed: int) -> Int64[np.ndarray, " T"]:
        """The samples of one seed, in the order in which training sees them."""
        assert self.samples is not None
        key = stream_key(seed, "train", 0)
        return by_mass(uniforms([key], _SAMPLE_STREAM, 0, 1, self.samples, {"input": 1})["input"][0], self._masses)

    def draw(
        self, seeds: Sequence[int], first: int, count: int, split: str = "train", batch_size: int | None = None
    ) -> Draw:
        """The inputs of batches ``first .. first + count - 1``, one member per seed.

        Args:
            seeds: one seed a member, each 0 .. 2**64 - 1.
            first: index of the first batch, at least 0.
            count: S, number of batches to draw.
            split: ``"train"`` or ``"eval/NAME"`` with one of ``evaluations``.
            batch_size: B, inputs of a batch, the task's setting when None.

        Returns:
            ``input``: Int64 [S, M, B]; ``counted``: Int64 [S, M, B], 1 where the input counts by its probability.
        """
        size = self.batch_size if batch_size is None else batch_size
        check_draw(
            type(self).__name__,
            ["train", *(f"eval/{name}" for name in self.evaluations)],
            split,
            seeds,
            (first, count, size),
        )
        span = np.arange(first * size, (first + count) * size)
        if split == f"eval/{WHOLE_SET}":
            found = np.broadcast_to(span % self.n_tokens, (len(seeds), len(span)))
        elif split == "train" and self.samples is not None:
            found = np.stack([self._samples(seed)[span % self.samples] for seed in seeds])
        else:
            keys = [stream_key(seed, split, size) for seed in seeds]
            u = uniforms(keys, _PAIR_STREAM, first, count, size, {"input": 1})["input"][0]
            found = by_mass(u, self._masses).reshape(count, len(seeds), size).swapaxes(0, 1).reshape(len(seeds), -1)
        rows = np.array(found.reshape(len(seeds), count, size).swapaxes(0, 1), order="C")
        weighted = np.full_like(rows, split == f"eval/{WHOLE_SET}")
        return {"input": torch.from_numpy(rows), "counted": torch.from_numpy(weighted)}

    def assemble(self, bank: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> Batch:
        """One step's draw as a batch of sequences of one token."""
        tokens = draw["input"][..., None]
        weights = torch.where(draw["counted"][..., None] > 0, bank["probability"][tokens], 1.0)
        members, size, _ = tokens.shape
        truth = Truth.without_queries(self.layout, members, size, tokens.device)
        return Batch(None, tokens, tokens % self.n_outputs, None, truth, self.layout, weights)

    def unigram(self) -> Float[Tensor, " V"]:
        """How often each output is the right one."""
        output = np.arange(self.n_tokens) % self.n_outputs
        return torch.from_numpy(np.bincount(output, self.probabilities, minlength=self.n_outputs))

    def baselines(self) -> dict[str, float]:
        """Losses (nats) of equal probabilities and of the unigram."""
        return {"uniform": math.log(self.n_outputs), "unigram": entropy(self.unigram().numpy())}

    def references(self) -> Mapping[str, Reference]:
        """``uniform``, ``unigram``, and ``exact``: the output of every input."""
        right = torch.nn.functional.one_hot(torch.arange(self.n_tokens) % self.n_outputs, self.n_outputs).double()
        known = {"uniform": chance(self.n_outputs), "unigram": always(self.unigram())}
        return {**known, "exact": after_token(right)}
