"""The next token of a text by counting: n-grams that predict it, and the losses of the simplest ones.

Legend: n sequences, L positions, N tokens of a text, V vocabulary, C contexts that occur.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from opsin.tasks.shared.next_token import entropy

NGRAM_ORDER = 4
"""Tokens of the longest n-gram that tasks count: the next character given three before it."""


class NGrams:
    """The next token given up to ``order`` - 1 before it, by counting.

    Counts of long contexts are smoothed by those of shorter ones in Witten and Bell's way ("The zero-frequency
    problem", 1991, method C; interpolated): with c occurrences of a context, u different tokens after it and n of
    token x among them, P(x) = (n + u P'(x)) / (c + u), where P' is that of the context less its first token. The
    shortest is the unigram, unsmoothed. A context that never occurs is shortened until it does.

    Args:
        tokens: a text, its end followed by its beginning, in which every token occurs.
        vocabulary: V, number of different tokens.
        order: n, tokens of the longest stretch that is counted.
    """

    def __init__(self, tokens: Int64[np.ndarray, " N"], vocabulary: int, order: int) -> None:
        self.vocabulary = vocabulary
        unigram = np.bincount(tokens, minlength=vocabulary) / len(tokens)
        self._levels = [(np.zeros(1, np.int64), unigram[None])]
        context = np.zeros_like(tokens)
        for length in range(1, order):
            # the latest token is the lowest digit, so that a shorter context is a remainder
            context = context + np.roll(tokens, length) * vocabulary ** (length - 1)
            names, row = np.unique(context, return_inverse=True)
            counts = np.bincount(row * vocabulary + tokens, minlength=len(names) * vocabulary)
            self._levels.append((names, self._smoothed(names, counts.reshape(-1, vocabulary), length)))

    def _smoothed(
        self, names: Int64[np.ndarray, " C"], counts: Int64[np.ndarray, "C V"], length: int
    ) -> Float[np.ndarray, "C V"]:
        shorter, table = self._levels[-1]
        lower = table[np.searchsorted(shorter, names % self.vocabulary ** (length - 1))]
        different = (counts > 0).sum(1, keepdims=True)
        return (counts + different * lower) / (counts.sum(1, keepdims=True) + different)

    def predict(self, tokens: Int[Tensor, "n L"]) -> Float[Tensor, "n L V"]:
        """Probabilities of the token after each position, given the tokens up to it.

        Args:
            tokens: sequences on the CPU.
        """
        given = tokens.numpy()
        names, table = self._levels[0]
        found = np.broadcast_to(table[0], (*given.shape, self.vocabulary)).copy()
        context = np.zeros_like(given)
        for length, (names, table) in enumerate(self._levels[1:], 1):
            context = context + np.roll(given, length - 1, 1) * self.vocabulary ** (length - 1)
            row = np.searchsorted(names, context).clip(max=len(names) - 1)
            known = (names[row] == context) & (np.arange(given.shape[1]) >= length - 1)
            found[known] = table[row[known]]
        return torch.from_numpy(found)


def ngram_baselines(tokens: Int64[np.ndarray, " N"], vocabulary: int) -> dict[str, float]:
    """Losses (nats) of equal probabilities, of the text's unigram and of its bigrams.

    Args:
        tokens: a text, its end followed by its beginning.
        vocabulary: V, number of different tokens.
    """
    single = np.bincount(tokens, minlength=vocabulary) / len(tokens)
    pairs = np.unique(np.roll(tokens, 1) * vocabulary + tokens, return_counts=True)[1] / len(tokens)
    unigram = entropy(single)
    return {"uniform": math.log(vocabulary), "unigram": unigram, "bigram": entropy(pairs) - unigram}
