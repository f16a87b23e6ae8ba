"""The next character of a text: windows that begin anywhere in a file, read by ``opsin.tasks.shared.text``.

Legend: M members, B batch, L positions, T = L + 1 tokens drawn, n or R sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from opsin.task import Reference
from opsin.tasks.shared.next_token import REPEATED_SPLIT, NextToken, repeat_first_half
from opsin.tasks.shared.ngrams import NGRAM_ORDER, NGrams, ngram_baselines
from opsin.tasks.shared.references import on_sequences
from opsin.tasks.shared.streams import uniforms
from opsin.tasks.shared.text import read_text, windows

_START_STREAM = 0


class Characters(NextToken):
    """The next character of a text, from windows that begin anywhere in it.

    The training part counts as a ring: its end is followed by its beginning, so that every position of a window has
    the characters' frequencies in it. A row is a query where the last three characters up to it have stood in the
    window before, at least once with the same character after them. Evaluation sets: ``train``; ``heldout``: windows
    of the held-out part, if there is one; ``repeated``: the second half repeats the first, which is a window of the
    held-out part, or of the training part if nothing is held out.

    Args:
        path: path of a text file in UTF-8.
        vocabulary: V, how many of the training part's commonest characters are tokens; the rest is left out. None for
            all. A character that the training part lacks is left out of the held-out part.
        positions: L, characters that the model sees.
        batch_size: B, sequences in a batch of one member.
        heldout: share of the text, at its end, that is held out, at least 0 and less than 1.

    Raises:
        ConfigError: a value out of its range, or a text that cannot be read or is too short.
    """

    context = 3
    path_settings = ("path",)

    def __init__(
        self, path: str, vocabulary: int | None = None, positions: int = 48, batch_size: int = 64, heldout: float = 0.1
    ) -> None:
        least = 2 if vocabulary is None else vocabulary
        super().__init__(max(least, 2), positions, batch_size, ("train", "heldout", "repeated"))
        self.require("vocabulary", vocabulary, least >= 2, "at least 2, or null")
        self.require("heldout", heldout, 0 <= heldout < 1, "a share, at least 0 and less than 1")
        self.text = read_text(path, "Characters.path", vocabulary, heldout, positions + 1)
        found = len(self.text.characters)
        self.require("path", path, found >= 2, "a text of at least 2 different characters")
        self.require("vocabulary", vocabulary, found >= least, f"at most {found}, the characters of {path}")
        self.n_tokens = self.n_outputs = found
        if not len(self.text.heldout):
            self.evaluations = ("train", "repeated")

    def sequences(
        self, keys: list[np.ndarray], first: int, count: int, size: int, split: str
    ) -> dict[str, Int64[np.ndarray, "_ R"]]:
        """``tokens`` [T, R]."""
        start = uniforms(keys, _START_STREAM, first, count, size, {"start": 1})["start"][0]
        from_heldout = split in ("eval/heldout", REPEATED_SPLIT) and len(self.text.heldout)
        part, length = self.text.heldout if from_heldout else self.text.train, self.positions + 1
        if split == REPEATED_SPLIT:
            return {"tokens": repeat_first_half(windows(part, start, self.positions // 2), length)}
        return {"tokens": windows(part, start, length)}

    def copied(self, draw: Mapping[str, Tensor]) -> Bool[Tensor, "M B L"]:
        """Every row: the truth finds those that can be copied."""
        return torch.ones_like(draw["tokens"][..., 1:], dtype=torch.bool)

    def unigram(self) -> Float[Tensor, " V"]:
        """How often each character occurs in the training part."""
        counts = np.bincount(self.text.train, minlength=self.n_tokens)
        return torch.from_numpy(counts / counts.sum())

    def baselines(self) -> dict[str, float]:
        """Losses (nats) on the training part of equal probabilities, of its unigram and of its bigrams."""
        return ngram_baselines(self.text.train, self.n_tokens)

    def references(self) -> Mapping[str, Reference]:
        """Those of every task of tokens, and ``bigram``: the 2-grams of the training part (``NGrams``)."""
        return {**super().references(), "bigram": partial(on_sequences, self._bigrams.predict)}

    def predict(self, tokens: Int[Tensor, "n L"]) -> Float[Tensor, "n L V"]:
        """The 4-grams of the training part (``NGrams``): no bound, a model may well do better."""
        return self._ngrams.predict(tokens)

    @cached_property
    def _ngrams(self) -> NGrams:
        return NGrams(self.text.train, self.n_tokens, NGRAM_ORDER)

    @cached_property
    def _bigrams(self) -> NGrams:
        return NGrams(self.text.train, self.n_tokens, 2)
