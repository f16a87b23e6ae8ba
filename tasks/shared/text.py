"""Characters of a text file, and what can be said of the next one by counting.

Legend: M members, B batch, L positions, T = L + 1 tokens drawn, N characters of a text, R sequences, V vocabulary,
C contexts that occur.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from opsin.errors import ConfigError
from opsin.tasks.shared.next_token import entropy
from opsin.tasks.shared.streams import below

ORDER = 4
"""Of the n-grams that are counted: the next character given three before it."""


@dataclass(frozen=True)
class Text:
    """A text as tokens.

    Args:
        characters: token v stands for the v-th; the commonest of the training part first.
        train: the training part; every token occurs in it.
        heldout: what follows it, less characters that are no token.
    """

    characters: str
    train: Int64[np.ndarray, " N"]
    heldout: Int64[np.ndarray, " _"]


def read_text(path: str, field: str, vocabulary: int | None, heldout: float, least: int) -> Text:
    """A UTF-8 file as tokens.

    Args:
        path: of the file.
        field: name of the setting, for errors.
        vocabulary: so many of the training part's commonest characters are tokens, others are left out; None for all.
        heldout: share of the file, at its end, that is held out.
        least: tokens that the training part must have, and the held-out part unless it is empty.

    Raises:
        ConfigError: a file that cannot be read, is not UTF-8 or is too short.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise ConfigError(field, path, "a readable text file in UTF-8") from problem
    codes = np.frombuffer(content.encode("utf-32-le"), np.uint32)
    seen = len(codes) - round(heldout * len(codes))
    kinds, counts = np.unique(codes[:seen], return_counts=True)
    kept = kinds[np.argsort(-counts, kind="stable")[:vocabulary]]
    train, rest = _tokens(codes[:seen], kept), _tokens(codes[seen:], kept)
    if len(train) < least or (seen < len(codes) and len(rest) < least):
        short = f"{path} of {len(train)} training and {len(rest)} held-out characters"
        raise ConfigError(field, short, f"at least {least} of each")
    return Text("".join(map(chr, kept.tolist())), train, rest)


def _tokens(codes: np.ndarray, kept: np.ndarray) -> Int64[np.ndarray, " _"]:
    """The place among the kept characters of every one that is kept."""
    place = {kind: token for token, kind in enumerate(kept.tolist())}
    kinds, which = np.unique(codes, return_inverse=True)
    tokens = np.array([place.get(kind, -1) for kind in kinds.tolist()], np.int64)[which]
    return tokens[tokens >= 0]


def windows(text: Int64[np.ndarray, " N"], u: Float[np.ndarray, " R"], length: int) -> Int64[np.ndarray, "_ R"]:
    """Stretches that begin at uniform places; the end of the text is followed by its beginning."""
    return text[(below(u, len(text)) + np.arange(length)[:, None]) % len(text)]


class NGrams:
    """The next token given up to ``order`` - 1 before it, by counting.

    Counts of long contexts are smoothed by those of shorter ones in Witten and Bell's way ("The zero-frequency
    problem", 1991, method C; interpolated): with c occurrences of a context, u different tokens after it and n of
    token x among them, P(x) = (n + u P'(x)) / (c + u), where P' is that of the context less its first token. The
    shortest is the unigram, unsmoothed. A context that never occurs is shortened until it does.

    Args:
        tokens: a text, its end followed by its beginning, in which every token occurs.
        vocabulary: V.
        order: longest stretch that is counted.
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
        """Probabilities of the token after each position, given those up to it."""
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


def text_baselines(tokens: Int64[np.ndarray, " N"], vocabulary: int) -> dict[str, float]:
    """Losses (nats) of equal probabilities, of the text's unigram and of its bigrams."""
    single = np.bincount(tokens, minlength=vocabulary) / len(tokens)
    pairs = np.unique(np.roll(tokens, 1) * vocabulary + tokens, return_counts=True)[1] / len(tokens)
    unigram = entropy(single)
    return {"uniform": math.log(vocabulary), "unigram": unigram, "bigram": entropy(pairs) - unigram}
