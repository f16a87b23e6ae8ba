"""Bigrams with triggers: most tokens are followed as the whole language has it, a few as only this sequence has it.

The process of Bietti et al. (2023, "Birth of a Transformer: a memory viewpoint", section 2): a sequence has K trigger
tokens, each with a successor that is drawn anew; all other tokens are followed by a global bigram
distribution. Global bigrams can be learned as facts, successors of triggers only be looked up. Here the global
distributions are made from a seed and not counted from a text.

Legend: M members, B batch, L positions, T = L + 1 tokens drawn, K triggers, R = n sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from opsin.model.memory import check_memory
from opsin.task import Reference
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

NO_TRIGGER = 1e-6
"""Least probability that a token is no trigger: sequences of another process stay possible."""


class TriggerBigrams(NextToken):
    """Global bigrams with trigger tokens, whose successor is drawn anew for every sequence.

    The first token follows the unigram of exponent ``zipf``. A token v that is no trigger is followed by token x with
    probability proportional to that unigram of x times exp(``spread`` g), g a normal number of the pair (v, x). Each
    trigger is always followed by its successor of this sequence, uniform over all tokens.

    Queries are the rows of a trigger that has occurred before. All its earlier occurrences have the same successor, so
    there is no ``other``. Evaluation sets: ``train``; ``repeated``: the second half repeats the first, and every row
    of it can be copied (there tokens that are no triggers have ``other``, too).

    Args:
        vocabulary: V, number of different tokens.
        triggers: K, trigger tokens of a sequence, less than V.
        fixed: the K likeliest tokens of the unigram are the triggers of every sequence; otherwise any K different
            ones, each choice equally likely.
        zipf: exponent of the unigram: token v (from 0) has mass 1 / (v + 1) ** zipf.
        spread: standard deviation of the log-ratio of bigrams to the unigram, nats; 0 for no difference.
        positions: L, tokens that the model sees.
        batch_size: B, sequences in a batch of one member.
        table_seed: seed of the bigram table, 0 .. 2**64 - 1.

    Raises:
        ConfigError: a value out of its range.
    """

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
    ) -> None:
        super().__init__(vocabulary, positions, batch_size, ("train", "repeated"))
        self.require("triggers", triggers, 1 <= triggers < vocabulary, f"1 .. {vocabulary - 1}")
        for name, value in (("zipf", zipf), ("spread", spread)):
            self.require(name, value, 0 <= value < math.inf, "a finite number, at least 0")
        self.require("table_seed", table_seed, 0 <= table_seed <= UINT64_MAX, "0 .. 2**64 - 1")
        check_memory("TriggerBigrams.vocabulary", vocabulary, 3 * 8 * vocabulary**2)
        self.triggers, self.fixed = triggers, fixed
        self._masses = zipf_masses(vocabulary, zipf)
        normal = np.random.Generator(np.random.Philox(table_seed)).standard_normal((vocabulary, vocabulary))
        # less the row's largest, so that no spread overflows
        tilt = np.exp(spread * (normal - normal.max(1, keepdims=True)))
        shares = self._masses * tilt
        shares /= shares.sum(1, keepdims=True)
        self._bigrams = np.maximum(1, np.round(ROW_MASS * shares)).astype(np.int64)

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
            triggers = without_replacement(u["which"], zipf_masses(self.n_tokens, 0.0))
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

    def _bigram_guess(self) -> Float[np.ndarray, "V V"]:
        """Probability [v, x] of x after v without a look-up."""
        if self.fixed:
            chance = (np.arange(self.n_tokens) < self.triggers).astype(float)
        else:
            chance = np.full(self.n_tokens, self.triggers / self.n_tokens)
        return (1 - chance[:, None]) * self.bigrams + chance[:, None] / self.n_tokens

    def baselines(self) -> dict[str, float]:
        """Losses (nats) of equal probabilities, of the unigram, and of knowing the bigrams and how likely a trigger is.

        The third is measured over 4,096 sequences; it gives triggers equal probabilities after them.
        """
        tokens = self._measured["tokens"]
        bigram = -np.log(self._bigram_guess())[tokens[:-1], tokens[1:]].mean()
        unigram = entropy(self.unigram().numpy())
        return {"uniform": math.log(self.n_outputs), "unigram": unigram, "bigram": float(bigram)}

    def references(self) -> Mapping[str, Reference]:
        """Those of every task of tokens, and ``bigram``: the bigrams, as far as a token may be a trigger uniform."""
        return {**super().references(), "bigram": after_token(torch.from_numpy(self._bigram_guess()))}

    def predict(self, tokens: Int[Tensor, "n L"]) -> Float[Tensor, "n L V"]:
        """Bayes' rule over the triggers and their successors, given the tokens up to each row.

        The best possible prediction in the training stream, but for one in a million that is left to the bigrams
        where a trigger is certain; evaluation sets are predicted as if they came from it.
        """
        bigrams = torch.from_numpy(self.bigrams)
        past = _Past(tokens, bigrams)
        trigger = (tokens < self.triggers).double() if self.fixed else past.trigger(self.triggers)
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

    def trigger(self, triggers: int) -> Float[Tensor, "n L"]:
        """Probability that the row's token is one of so many triggers, any choice of which is equally likely.

        A choice weighs the product of its tokens' odds, so sums over choices are elementary symmetric polynomials.
        """
        odds = self._log_odds()
        known = self.is_first[:, :, None] & self.earlier.T  # n i l: the token of i has been followed by something
        rivals = known & ~self.same  # known tokens other than the row's
        free = self.vocabulary - 1 - rivals.sum(1)  # tokens other than the row's that are not known: odds of 1
        size = torch.arange(triggers + 1)
        free = free[..., None].double()
        ways = torch.lgamma(free + 1) - torch.lgamma(size + 1) - torch.lgamma((free - size).clamp(min=0) + 1)
        weight = ways.masked_fill(size > free, -torch.inf)  # n l k: log of the sum over choices of k tokens
        for i in range(odds.shape[1]):
            rival = odds[:, i].masked_fill(~rivals[:, i], -torch.inf)[..., None]
            weight = torch.cat([weight[..., :1], torch.logaddexp(weight[..., 1:], weight[..., :-1] + rival)], -1)
        row = torch.where(known & self.same, odds, -torch.inf).amax(1)
        row = torch.where((known & self.same).any(1), row, torch.zeros_like(row))
        # no number where no choice explains the past: the sequence is of another process
        return torch.sigmoid(row + weight[..., -2] - weight[..., -1]).nan_to_num(nan=0.0)
