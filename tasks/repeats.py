"""Repeats: tokens of a skewed distribution, with segments of the sequence copied further on.

Which token follows can be foreseen only inside a copy, and only by finding its original in the context. The task
of the case study in Stolfo et al. (2024, "Confidence regulation neurons in language models", the induction example),
with copies that a model trained from scratch has to discover.

Legend: M members, B batch, L positions, T = L + 1 tokens drawn, R sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from opsin.tasks.shared.next_token import REPEATED_SPLIT, NextToken, entropy, repeat_first_half
from opsin.tasks.shared.ngrams import NGRAM_ORDER, NGrams, ngram_baselines
from opsin.tasks.shared.segment_posterior import Segments, predict_next
from opsin.tasks.shared.streams import below, by_mass, uniforms, zipf_masses
from opsin.tasks.shared.text import read_text, windows

_FRESH_STREAM, _SEGMENT_STREAM, _REPLACEMENT_STREAM = range(3)
"""Separate streams, so that other segments or other noise leave every other choice as it was."""


class Repeats(NextToken):
    """Tokens drawn one by one, or windows of a text, into which segments of the same sequence are copied.

    Each of ``segments`` segments is there with ``segment_probability``. Its first token then stands at a place that
    is uniform over all from the ``longest``-th token on, its length is uniform from ``shortest`` to ``longest``, and
    its original is uniform over the stretches of that length that end before it begins (and may hold copies
    themselves). A segment goes on until it is complete, the sequence ends or another begins. Each token of a copy
    is replaced, with probability ``noise``, by one drawn by frequency.

    Queries are the rows where this token and the next are copied, neither replaced, from neighbours. Evaluation
    sets: ``train``; ``repeated``: the second half repeats the first, without noise and with no other segment.

    Args:
        vocabulary: V, number of different tokens; for a text, how many of its commonest characters are tokens, the
            rest being left out.
        zipf: exponent of the frequencies of tokens drawn one by one: token v (from 0) has probability proportional to
            1 / (v + 1) ** zipf.
        positions: L, tokens that the model sees.
        batch_size: B, sequences in a batch of one member.
        segments: greatest number of segments in a sequence.
        segment_probability: probability that a segment is there, for every segment alone.
        shortest, longest: least and greatest number of tokens of a segment.
        noise: probability that a copied token is replaced.
        text: path of a UTF-8 text whose windows are used in place of tokens drawn one by one; its end is followed by
            its beginning, so that every position has the characters' frequencies in the text.

    Raises:
        ConfigError: a value out of its range, or a text that cannot be read or is too short.
    """

    path_settings = ("text",)

    def __init__(
        self,
        vocabulary: int = 48,
        zipf: float = 1.0,
        positions: int = 48,
        batch_size: int = 64,
        segments: int = 3,
        segment_probability: float = 0.5,
        shortest: int = 4,
        longest: int = 12,
        noise: float = 0.05,
        text: str | None = None,
    ) -> None:
        super().__init__(vocabulary, positions, batch_size, ("train", "repeated"))
        self.require("zipf", zipf, 0 <= zipf < np.inf, "a finite number, at least 0")
        self.require("segments", segments, 1 <= segments <= positions, f"1 .. {positions}, the positions")
        for name, value in (("segment_probability", segment_probability), ("noise", noise)):
            self.require(name, value, 0 <= value <= 1, "a probability")
        self.require("shortest", shortest, shortest >= 2, "at least 2: a copy of one token cannot be foreseen")
        self.require("longest", longest, shortest <= longest <= positions - 1, f"{shortest} .. {positions - 1}")
        self.process = Segments(segments, segment_probability, shortest, longest, noise)
        self._text: Int64[np.ndarray, " N"] | None = None
        self._masses = zipf_masses(vocabulary, zipf)
        if text is not None:
            self._text = read_text(text, "Repeats.text", vocabulary, 0.0, positions + 1).train
            self._masses = np.bincount(self._text)
            found = len(self._masses)
            self.require("vocabulary", vocabulary, vocabulary <= found, f"at most {found}, the characters of {text}")

    def sequences(
        self, keys: list[np.ndarray], first: int, count: int, size: int, split: str
    ) -> dict[str, Int64[np.ndarray, "_ R"]]:
        """``tokens`` [T, R] and ``source`` [T, R]: the position that a token is a copy of, -1 where it is none."""
        span = (first, count, size)
        length = self.positions + 1
        position = np.arange(length)[:, None]
        if split == REPEATED_SPLIT:
            half = self.positions // 2
            tokens = repeat_first_half(self._fresh(keys, span, half), length)
            return {"tokens": tokens, "source": np.where(position < half, -1, position - half + 0 * tokens)}
        fresh, source = self._fresh(keys, span, length), self._sources(keys, span)
        if self.process.noise:
            u = uniforms(keys, _REPLACEMENT_STREAM, *span, {"replaced": length, "by": length})
            replaced = (source >= 0) & (u["replaced"] < self.process.noise)
            fresh[replaced] = by_mass(u["by"][replaced], self._masses)
            source[replaced] = -1
        origin = np.where(source < 0, position, source)
        # every hop leads into an earlier segment, and each look-up doubles the hops
        for _ in range(self.process.count.bit_length()):
            origin = np.take_along_axis(origin, origin, 0)
        return {"tokens": np.take_along_axis(fresh, origin, 0), "source": source}

    def _fresh(self, keys: list[np.ndarray], span: tuple[int, int, int], length: int) -> Int64[np.ndarray, "_ R"]:
        """Tokens before anything is copied."""
        if self._text is None:
            return by_mass(uniforms(keys, _FRESH_STREAM, *span, {"tokens": length})["tokens"], self._masses)
        return windows(self._text, uniforms(keys, _FRESH_STREAM, *span, {"start": 1})["start"][0], length)

    def _sources(self, keys: list[np.ndarray], span: tuple[int, int, int]) -> Int64[np.ndarray, "T R"]:
        """Which position each token is to be copied from, before noise; -1 for none."""
        process, end = self.process, self.positions + 1
        parts = dict.fromkeys(("presence", "start", "length", "original"), process.count)
        u = uniforms(keys, _SEGMENT_STREAM, *span, parts)
        length = process.shortest + below(u["length"], process.longest - process.shortest + 1)
        start = process.longest + below(u["start"], end - process.longest)
        back = start - (u["original"] * (start - length + 1)).astype(np.int64)
        start = np.where(u["presence"] < process.probability, start, end)
        order = start.argsort(0, kind="stable")
        start, length, back = (np.take_along_axis(array, order, 0) for array in (start, length, back))
        position = np.arange(end)[:, None]
        source = np.full((end, start.shape[1]), -1)
        for i in range(process.count):
            inside = np.where(position < start[i] + length[i], position - back[i], -1)
            source = np.where(position >= start[i], inside, source)
        return source

    def copied(self, draw: Mapping[str, Tensor]) -> Bool[Tensor, "M B L"]:
        """Rows where this token and the next are copies of neighbours."""
        source, next_source = draw["source"][..., :-1], draw["source"][..., 1:]
        return (source >= 0) & (next_source == source + 1)

    def unigram(self) -> Float[Tensor, " V"]:
        """How often each token occurs: at every position exactly, as what is copied is drawn without looking at it."""
        return torch.from_numpy(self._masses / self._masses.sum())

    def baselines(self) -> dict[str, float]:
        """Losses (nats) of equal probabilities and of the unigram; of a text also of its bigrams."""
        if self._text is not None:
            return ngram_baselines(self._text, self.n_outputs)
        return {"uniform": math.log(self.n_outputs), "unigram": entropy(self.unigram().numpy())}

    def predict(self, tokens: Int[Tensor, "n L"]) -> Float[Tensor, "n L V"]:
        """Bayes' rule over all starts, lengths and originals of segments, given the tokens up to each row.

        For tokens drawn one by one this is the best possible prediction in the training stream; evaluation sets are
        predicted as if they came from it. Of a text, tokens that are not copied are taken to follow its 4-grams
        (``opsin.tasks.shared.ngrams.NGrams``), whatever is copied before them.
        """
        unigram = self.unigram()
        fresh = unigram.expand(*tokens.shape, -1) if self._ngrams is None else self._ngrams.predict(tokens)
        return predict_next(tokens, fresh, unigram, self.process)

    @cached_property
    def _ngrams(self) -> NGrams | None:
        return None if self._text is None else NGrams(self._text, self.n_tokens, NGRAM_ORDER)
