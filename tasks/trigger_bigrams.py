"""Bigrams with triggers: most tokens are followed as the whole language has it, a few as only this sequence has it.

The process of Bietti et al. (2023, "Birth of a Transformer: a memory viewpoint", section 2): a sequence has K trigger
tokens, each with a successor that is drawn anew; all other tokens are followed by a global bigram
distribution. Global bigrams can be learned as facts, successors of triggers only be looked up. Here the global
distributions are made from a seed and not counted from a text.

Legend: M members, B batch, L positions, T = L + 1 tokens drawn, K triggers, R = n sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from opsin.model.memory import check_memory
from opsin.objective import CLASS_MEASURES, CrossEntropy, Measure, accuracy, cross_entropy
from opsin.task import Batch, Reference
from opsin.tasks.shared.next_token import REPEATED_SPLIT, NextToken, entropy, repeat_first_half
from opsin.tasks.shared.references import after_token
from opsin.tasks.shared.streams import (
    UINT64_MAX,
    below,
    by_mass,
    stream_key,
    uniforms,
    without_replacement,
    zipf_masses,
)

_CHAIN_STREAM, _TRIGGER_STREAM = range(2)
"""Separate streams, so that other triggers leave the uniform numbers behind the tokens as they were."""

ROW_MASS = 2.0**40
"""Masses of a bigram row sum to about this, so that those of all rows stay whole numbers."""

MEASURED_SEQUENCES = 4096
"""Sequences over which the unigram and the bigram loss are measured, which no formula gives."""

COUNTED_DRAWS = 2**16
"""Draws of triggers in which the share of sequences with each is counted."""

NO_TRIGGER = 1e-6
"""Least probability that a token is no trigger: sequences of another process stay possible."""

DrawnBy = Literal["uniform", "unigram"]
"""How triggers that change from sequence to sequence are chosen."""

ScoredRows = Literal["all", "repeated_triggers"]
"""Rows whose loss is minimised."""


# ---- what is measured -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TriggerBatch(Batch):
    """A batch that says which rows look a successor up.

    Args:
        looked_up: rows of a trigger, that of its first occurrence among them.
    """

    looked_up: Bool[Tensor, "M B L"]

    def changed_fields(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Every field that has a batch axis, changed by one function."""
        return {**super().changed_fields(change), "looked_up": change(self.looked_up)}


def _mean_over(rows: Bool[Tensor, "M B L"], values: Float[Tensor, "M B L"]) -> Float[Tensor, " M"]:
    """Mean of every member over some rows; 0 where there are none."""
    return torch.where(rows, values, 0.0).sum((1, 2)) / rows.sum((1, 2)).clamp(min=1)


def trigger_loss(outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, " M"]:
    """Mean loss of rows whose trigger has occurred before, so that its successor can be copied (nats)."""
    return _mean_over(batch.truth.query, cross_entropy(outputs, batch))


def trigger_accuracy(outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, " M"]:
    """Share of rows whose trigger has occurred before that predict its successor."""
    return _mean_over(batch.truth.query, accuracy(outputs, batch))


def other_loss(outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, " M"]:
    """Mean loss of rows that are no trigger's, which follow the global bigrams (nats)."""
    assert isinstance(batch, TriggerBatch)
    return _mean_over(~batch.looked_up, cross_entropy(outputs, batch))


@dataclass(frozen=True)
class TriggerCrossEntropy(CrossEntropy):
    """Cross-entropy (nats) with the loss of triggers and of all other rows apart.

    Measures beside ``accuracy``: ``trigger_loss`` and ``trigger_accuracy`` over rows whose trigger has occurred before,
    and ``other_loss`` over rows that are no trigger's. They count all these rows alike, whichever the loss counts.

    Args:
        in_float64: whether the loss is computed in double precision.
    """

    measures = (
        *CLASS_MEASURES,
        Measure("trigger_loss", "down", trigger_loss, "nats", while_training=True),
        Measure("trigger_accuracy", "up", trigger_accuracy, while_training=True),
        Measure("other_loss", "down", other_loss, "nats", while_training=True),
    )

    @property
    def minimised(self) -> CrossEntropy:
        """The cross-entropy, to which it adds measures alone."""
        return CrossEntropy(self.in_float64)


# ---- the task ---------------------------------------------------------------------------------------


class TriggerBigrams(NextToken):
    """Global bigrams with trigger tokens, whose successor is drawn anew for every sequence.

    The first token follows the unigram of exponent ``zipf``. A token v that is no trigger is followed by token x with
    probability proportional to that unigram of x times exp(``spread`` g), g a normal number of the pair (v, x). Each
    trigger is always followed by its successor of this sequence, uniform over all tokens.

    The objective tells the losses of triggers and of other rows apart (``TriggerCrossEntropy``).

    Queries are the rows of a trigger that has occurred before. All its earlier occurrences have the same successor, so
    there is no ``other``. Evaluation sets: ``train``; ``repeated``: the second half repeats the first, and every row
    of it can be copied (there tokens that are no triggers have ``other``, too).

    Args:
        vocabulary: V, number of different tokens.
        triggers: K, trigger tokens of a sequence, less than V.
        fixed: the K likeliest tokens of the unigram are the triggers of every sequence; otherwise each has its own.
        drawn_by: how triggers that are not fixed are drawn, one after another and each once: all tokens equally likely
            (``uniform``), or in proportion to the unigram.
        scored_rows: rows whose loss is minimised: all, or those whose trigger has occurred before
            (``repeated_triggers``), the only ones that can be copied.
        zipf: exponent of the unigram: token v (from 0) has mass 1 / (v + 1) ** zipf.
        spread: standard deviation of the log-ratio of bigrams to the unigram, nats; 0 for no difference.
        positions: L, tokens that the model sees.
        batch_size: B, sequences in a batch of one member.
        table_seed: seed of the bigram table, 0 .. 2**64 - 1.

    Raises:
        ConfigError: a value out of its range.
    """

    objective = TriggerCrossEntropy()
    added_settings: ClassVar[Mapping[str, Any]] = {"drawn_by": "uniform", "scored_rows": "all"}

    def __init__(
        self,
        vocabulary: int = 48,
        triggers: int = 3,
        fixed: bool = True,
        zipf: float = 1.0,
        spread: float = 1.0,
        positions: int = 48,
        batch_size: int = 64,
        table_seed: int = 0,
        drawn_by: DrawnBy = "uniform",
        scored_rows: ScoredRows = "all",
    ) -> None:
        super().__init__(vocabulary, positions, batch_size, ("train", "repeated"))
        self.require("triggers", triggers, 1 <= triggers < vocabulary, f"1 .. {vocabulary - 1}")
        for name, value in (("zipf", zipf), ("spread", spread)):
            self.require(name, value, 0 <= value < math.inf, "a finite number, at least 0")
        self.require("table_seed", table_seed, 0 <= table_seed <= UINT64_MAX, "0 .. 2**64 - 1")
        for name, chosen, choices in (("drawn_by", drawn_by, DrawnBy), ("scored_rows", scored_rows, ScoredRows)):
            self.require(name, chosen, chosen in get_args(choices), f"one of {', '.join(get_args(choices))}")
        self.require("drawn_by", drawn_by, not fixed or drawn_by == "uniform", "uniform where triggers are fixed")
        check_memory("TriggerBigrams.vocabulary", vocabulary, 3 * 8 * vocabulary**2)
        self.triggers, self.fixed, self.scored_rows = triggers, fixed, scored_rows
        self._masses = zipf_masses(vocabulary, zipf)
        self._trigger_masses = self._masses if drawn_by == "unigram" else zipf_masses(vocabulary, 0.0)
        normal = np.random.Generator(np.random.Philox(table_seed)).standard_normal((vocabulary, vocabulary))
        # less the row's largest, so that no spread overflows
        tilt = np.exp(spread * (normal - normal.max(1, keepdims=True)))
        shares = self._masses * tilt
        shares /= shares.sum(1, keepdims=True)
        self._bigrams = np.maximum(1, np.round(ROW_MASS * shares)).astype(np.int64)

    @property
    def constant_triggers(self) -> tuple[int, ...]:
        """Tokens that are triggers in every sequence; none where each sequence has its own."""
        return tuple(range(self.triggers)) if self.fixed else ()

    @property
    def bigrams(self) -> Float[np.ndarray, "V V"]:
        """Probability [v, x] of x after v, if v is no trigger."""
        return self._bigrams / self._bigrams.sum(1, keepdims=True)

    def sequences(
        self, keys: list[np.ndarray], first: int, count: int, size: int, split: str
    ) -> dict[str, Int64[np.ndarray, "_ R"]]:
        """``tokens`` [T, R] and ``looked_up`` [L, R]: 1 where the successor is that of a trigger, or a repetition."""
        span, half = (first, count, size), self.positions // 2
        u = uniforms(keys, _TRIGGER_STREAM, *span, {"which": self.triggers, "successor": self.triggers})
        if self.fixed:
            triggers = np.broadcast_to(np.arange(self.triggers)[:, None], u["which"].shape)
        else:
            triggers = without_replacement(u["which"], self._trigger_masses)
        length = half if split == REPEATED_SPLIT else self.positions + 1
        tokens = self._chain(
            uniforms(keys, _CHAIN_STREAM, *span, {"tokens": length})["tokens"], triggers, u["successor"]
        )
        if split == REPEATED_SPLIT:
            tokens = repeat_first_half(tokens, self.positions + 1)
        looked_up = (tokens[:-1, None] == triggers).any(1)
        if split == REPEATED_SPLIT:
            looked_up |= np.arange(self.positions)[:, None] >= half
        return {"tokens": tokens, "looked_up": looked_up.astype(np.int64)}

    def _chain(
        self, u: Float[np.ndarray, "T R"], triggers: Int64[np.ndarray, "K R"], successor: Float[np.ndarray, "K R"]
    ) -> Int64[np.ndarray, "T R"]:
        """Tokens one after another."""
        successors = below(successor, self.n_tokens)
        ends = self._bigrams.cumsum().reshape(self._bigrams.shape)  # of all rows, one after another
        totals = self._bigrams.sum(1)
        starts = ends[:, -1] - totals
        tokens = np.empty(u.shape, np.int64)
        tokens[0] = by_mass(u[0], self._masses)
        for i in range(1, len(u)):
            now = tokens[i - 1]
            ticket = starts[now] + (u[i] * totals[now]).astype(np.int64)
            following = np.searchsorted(ends.ravel(), ticket, side="right") - now * self.n_tokens
            for trigger, answer in zip(triggers, successors, strict=True):
                following = np.where(now == trigger, answer, following)
            tokens[i] = following
        return tokens

    def copied(self, draw: Mapping[str, Tensor]) -> Bool[Tensor, "M B L"]:
        """Rows of triggers, and in repetitions every row."""
        return draw["looked_up"] > 0

    def assemble(self, bank: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> TriggerBatch:
        """One step's draw (tensors ``[M, B, ...]``, no S) as a batch that knows the rows of triggers."""
        plain, looked_up = super().assemble(bank, draw), self.copied(draw)
        query = plain.truth.query
        weights = query.to(torch.get_default_dtype()) if self.scored_rows == "repeated_triggers" else None
        tokens, targets = plain.tokens, plain.targets
        return TriggerBatch(None, tokens, targets, None, plain.truth, self.layout, weights, looked_up=looked_up)

    @cached_property
    def _measured(self) -> Mapping[str, Int64[np.ndarray, "_ R"]]:
        return self.sequences([stream_key(0, "measured", MEASURED_SEQUENCES)], 0, 1, MEASURED_SEQUENCES, "train")

    def unigram(self) -> Float[Tensor, " V"]:
        """How often each token is the next one, measured over 4,096 sequences of a stream that nothing else draws from.

        Of a row that is no trigger's its whole bigram distribution counts, so that no token is without.
        """
        tokens, looked_up = self._measured["tokens"], self._measured["looked_up"] > 0
        given = np.bincount(tokens[:-1][~looked_up], minlength=self.n_tokens) @ self.bigrams
        found = given + np.bincount(tokens[1:][looked_up], minlength=self.n_tokens)
        return torch.from_numpy(found / found.sum())

    @cached_property
    def trigger_shares(self) -> Float[np.ndarray, " V"]:
        """Share of sequences in which each token is a trigger; counted in 65,536 draws where no formula gives it."""
        if self.fixed:
            return (np.arange(self.n_tokens) < self.triggers).astype(float)
        if (self._trigger_masses == self._trigger_masses[0]).all():
            return np.full(self.n_tokens, self.triggers / self.n_tokens)
        u = np.random.Generator(np.random.Philox(0)).random((self.triggers, COUNTED_DRAWS))
        drawn = without_replacement(u, self._trigger_masses)
        return np.bincount(drawn.ravel(), minlength=self.n_tokens) / COUNTED_DRAWS

    def _bigram_guess(self) -> Float[np.ndarray, "V V"]:
        """Probability [v, x] of x after v without a look-up."""
        chance = self.trigger_shares
        return (1 - chance[:, None]) * self.bigrams + chance[:, None] / self.n_tokens

    def baselines(self) -> dict[str, float]:
        """Losses (nats) of equal probabilities, of the unigram, and of knowing the bigrams and how likely a trigger is.

        The third is measured over 4,096 sequences; it gives triggers equal probabilities after them. Where repeated
        triggers alone are scored, nothing is better than equal probabilities without a look-up.
        """
        uniform = {"uniform": math.log(self.n_outputs)}
        if self.scored_rows == "repeated_triggers":
            return uniform
        tokens = self._measured["tokens"]
        bigram = -np.log(self._bigram_guess())[tokens[:-1], tokens[1:]].mean()
        return {**uniform, "unigram": entropy(self.unigram().numpy()), "bigram": float(bigram)}

    def references(self) -> Mapping[str, Reference]:
        """Those of every task of tokens, and ``bigram``: the bigrams, as far as a token may be a trigger uniform."""
        return {**super().references(), "bigram": after_token(torch.from_numpy(self._bigram_guess()))}

    def predict(self, tokens: Int[Tensor, "n L"]) -> Float[Tensor, "n L V"]:
        """Bayes' rule over the triggers and their successors, given the tokens up to each row.

        The best possible prediction in the training stream, but for one in a million that is left to the bigrams
        where a trigger is certain; evaluation sets are predicted as if they came from it. Where triggers are drawn by
        the unigram, a choice of them weighs the product of its tokens' shares, which is nearly how often it is drawn.
        """
        bigrams = torch.from_numpy(self.bigrams)
        past = _Past(tokens, bigrams)
        masses = torch.from_numpy(self._trigger_masses)
        trigger = (tokens < self.triggers).double() if self.fixed else past.trigger(self.triggers, masses)
        certain = torch.nn.functional.one_hot(past.successor.clamp(min=0), self.n_tokens).double()
        known = (past.successor >= 0)[..., None]
        looked_up = torch.where(known, certain, torch.full_like(certain, 1 / self.n_tokens))
        trigger = trigger[..., None].clamp(max=1 - NO_TRIGGER)
        return trigger * looked_up + (1 - trigger) * bigrams[tokens]


class _Past:
    """Which tokens are triggers, as far as the tokens up to each row say.

    Args:
        tokens: sequences of the task, on the CPU.
        bigrams: probability [v, x] of x after v, if v is no trigger.
    """

    def __init__(self, tokens: Int[Tensor, "n L"], bigrams: Float[Tensor, "V V"]) -> None:
        self.tokens, self.vocabulary = tokens, len(bigrams)
        length = tokens.shape[1]
        self.same = tokens[:, :, None] == tokens[:, None]  # n L L
        position = torch.arange(length)
        self.earlier = position < position[:, None]
        before = self.same & self.earlier
        self.is_first = ~before.any(-1)
        where = torch.where(before, position, length).amin(-1)
        following = torch.cat([tokens[:, 1:], tokens.new_full((len(tokens), 2), -1)], 1)
        self.successor = following.gather(1, where)  # of the row's token at its first occurrence; -1: none so far
        # log-probability of what came after each position, were its token no trigger
        self.surprise = bigrams.log()[tokens[:, :-1], tokens[:, 1:]]

    def _log_odds(self) -> Float[Tensor, "n L L"]:
        """Logarithm [i, l] of how much likelier, at row l, what came after the token of i is of a trigger.

        Of a token that first occurs at i; minus infinity if it was not always followed by the same token.
        """
        after = torch.nn.functional.pad(self.same[:, :, :-1] * -self.surprise[:, None], (1, 0))  # seen at row l
        differs = self.tokens[:, None, 1:] != torch.cat([self.tokens[:, 1:], self.tokens[:, -1:]], 1)[:, :, None]
        broken = torch.nn.functional.pad(self.same[:, :, :-1] & differs & self.earlier.T[None, :, :-1], (1, 0))
        return (after.cumsum(-1) - math.log(self.vocabulary)).masked_fill(broken.cumsum(-1) > 0, -torch.inf)

    def trigger(self, triggers: int, masses: Int[Tensor, " V"]) -> Float[Tensor, "n L"]:
        """Probability that the row's token is one of so many triggers.

        A choice weighs the product of its tokens' masses and odds, so sums over choices are elementary symmetric
        polynomials.

        Args:
            triggers: K, number of triggers of a sequence.
            masses: relative weight of every token in a choice.
        """
        known = self.is_first[:, :, None] & self.earlier.T  # n i l: the token of i has been followed by something
        learned = torch.where(known, self._log_odds().double(), 0.0)
        share = (masses.double() / masses.sum()).log()[None, :, None].expand(len(self.tokens), -1, known.shape[2])
        odds = share.scatter_add(1, self.tokens[:, :, None].expand_as(learned), learned)  # n V l
        weight = torch.full((*self.tokens.shape, triggers + 1), -torch.inf, dtype=odds.dtype)
        weight[..., 0] = 0.0  # n l k: log of the sum over choices of k tokens other than the row's
        for v in range(self.vocabulary):
            rival = odds[:, v].masked_fill(self.tokens == v, -torch.inf)[..., None]
            weight = torch.cat([weight[..., :1], torch.logaddexp(weight[..., 1:], weight[..., :-1] + rival)], -1)
        row = odds.gather(1, self.tokens[:, None])[:, 0]
        # no number where no choice explains the past: the sequence is of another process
        return torch.sigmoid(row + weight[..., -2] - weight[..., -1]).nan_to_num(nan=0.0)
