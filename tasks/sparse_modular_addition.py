"""SparseModularAddition: the sum of the first tokens modulo p; all later tokens are of no account.

Odonnat, Bouaziz and Cabannes 2024, "Clustering head": a sequence of T tokens, uniform in 0 .. p - 1, of which the first
k are summed modulo p. Training and test sequences are drawn once.

Legend: E examples, T positions, k relevant ones, M members, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product

import torch
from jaxtyping import Int64
from torch import Tensor

from opsin.task import Bank, Batch, Feature, Layout, Truth
from opsin.tasks.shared.finite import FiniteTask
from opsin.tasks.shared.streams import below, stream_key, uniforms

_TABLE_STREAM = 2

MOST_CLUSTERINGS = 256
"""Largest number of shifts whose clusters are all looked at."""


class SparseModularAddition(FiniteTask):
    """T uniform tokens below p, and after the last of them the sum of the first k modulo p.

    Training and test sequences are drawn once from ``split_seed``, independently of each other; a sequence may occur
    in both. ``Truth.relevant`` says which positions decide. Features: ``target``, the sum modulo p, and ``counts``, how
    often each token stands at a relevant position: for p = 2 the number of ones, else one number for each such table
    of counts. Baseline: guessing, log(p) nats.

    Args:
        modulus: p, number of different tokens and of answers.
        positions: T, tokens of a sequence.
        relevant: k, how many of the first tokens are summed.
        vocabulary: vectors of the token table and outputs of the model; those from p on never occur.
        train_sequences, test_sequences: number of sequences of the training set and of the test set.
        split_seed: seed that both sets are drawn from, 0 .. 2**64 - 1.
        batch_size: B, sequences of a training step, at most the training set; None for all of it in every step.

    Raises:
        ConfigError: a value out of its range.
    """

    n_features = None

    def __init__(
        self,
        modulus: int = 2,
        positions: int = 12,
        relevant: int = 5,
        vocabulary: int = 3,
        train_sequences: int = 2048,
        test_sequences: int = 2048,
        split_seed: int = 0,
        batch_size: int | None = 32,
    ) -> None:
        for name, value, least in (("modulus", modulus, 2), ("positions", positions, 1), ("relevant", relevant, 1)):
            self._refuse_unless(value >= least, name, value, f"at least {least}")
        self._refuse_unless(relevant <= positions, "relevant", relevant, f"at most the {positions} positions")
        self._refuse_unless(vocabulary >= modulus, "vocabulary", vocabulary, f"at least the modulus {modulus}")
        for name, value in (("train_sequences", train_sequences), ("test_sequences", test_sequences)):
            self._refuse_unless(value >= 1, name, value, "at least 1")
        examples = train_sequences + test_sequences
        super().__init__(examples, train_sequences / examples, split_seed, batch_size)
        self.modulus, self.positions, self.relevant, self._seed = modulus, positions, relevant, split_seed
        self.n_tokens = self.n_outputs = vocabulary
        everywhere = tuple(range(positions))
        self.layout = Layout(features=(), tokens=everywhere, labels=(), scored=everywhere[-1:])

    def bank(self) -> Bank:
        """``sequences``: Int64 [E, T], the tokens of every example."""
        count = self.set_size("train") + self.set_size("eval/test")
        key = stream_key(self._seed, "sequences", count)
        u = uniforms([key], _TABLE_STREAM, 0, 1, count, {"tokens": self.positions})["tokens"]
        return {"sequences": torch.from_numpy(below(u.T.copy(), self.modulus))}

    def assemble(self, bank: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> Batch:
        tokens = bank["sequences"][draw["example"]]  # M B T
        summed = tokens[..., : self.relevant].sum(-1, keepdim=True) % self.modulus
        truth = Truth.without_queries(self.layout, tokens.shape[0], tokens.shape[1], tokens.device)
        decisive = torch.arange(self.positions, device=tokens.device) < self.relevant
        truth = replace(truth, relevant=decisive)
        return Batch(None, tokens, targets=summed, plausible=None, truth=truth, layout=self.layout)

    def declared_features(self) -> Mapping[str, Feature]:
        return {**super().declared_features(), "counts": self._counts}

    def _counts(self, batch: Batch) -> Int64[Tensor, "M B"]:
        return self._counted(batch.tokens[..., : self.relevant])

    def _counted(self, tokens: Int64[Tensor, "M B k"]) -> Int64[Tensor, "M B"]:
        """The numbers of 1s, 2s .. p - 1s as the digits of one number."""
        base = self.relevant + 1
        weights = [0, *(base**power for power in range(self.modulus - 1))]
        return torch.tensor(weights, device=tokens.device)[tokens].sum(-1)

    def shifts(self) -> list[tuple[int, ...]]:
        """What may be added to tokens at relevant positions, modulo p, without a change of the task; 0 at the first.

        The sum changes by a constant then, so a model may as well count shifted tokens: for p = 2, ones at some
        positions and noughts at others. Where there are more than ``MOST_CLUSTERINGS``, the first alone, which is 0
        everywhere.
        """
        count = self.modulus ** (self.relevant - 1)
        if count > MOST_CLUSTERINGS:
            return [(0,) * self.relevant]
        return [(0, *shift) for shift in product(range(self.modulus), repeat=self.relevant - 1)]

    def clusterings(self, batch: Batch) -> Iterator[Int64[Tensor, "M B"]]:
        """Cluster of every sequence by the counts of its relevant tokens after each of ``shifts``, plain counts first.

        Args:
            batch: sequences of this task.
        """
        for shift in self.shifts():
            added = torch.tensor(shift, device=batch.tokens.device)
            yield self._counted((batch.tokens[..., : self.relevant] + added) % self.modulus)

    def baselines(self) -> dict[str, float]:
        return {"guessing": math.log(self.modulus)}
