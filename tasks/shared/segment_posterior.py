"""The best prediction of a sequence into which segments of itself have been copied: exact Bayes for ``Repeats``.

Where segments begin, how long they are and what they copy is hidden; what has been seen so far says how likely each
possibility is. Segments begin as events of a chain whose state is only how many have yet to begin, so that one pass
over the positions where the latest segment may have begun sums over all histories (the forward recursion of a hidden
semi-Markov model; Rabiner 1989, "A tutorial on hidden Markov models", section IV.D).

All likelihoods are relative to that of the same tokens without any copy. Legend: n sequences, L positions,
V vocabulary, S segments, P positions where a segment can begin (the P-th is the target of the last row), A originals,
D lengths, E elapsed tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

MOST_PAIRS = 2**20
"""Sequences are computed in groups of about so many pairs of positions."""

LEAST_DIVISOR, LARGEST_EXPONENT = 1e-300, 600.0
"""Bounds that keep quotients and exponentials finite in double precision."""


@dataclass(frozen=True)
class Segments:
    """How segments come about: see ``opsin.tasks.Repeats``.

    Args:
        count: S, greatest number of segments in a sequence.
        probability: probability that a segment is there, for every segment alone.
        shortest, longest: least and greatest number of tokens of a segment, all lengths between equally likely.
        noise: probability that a copied token is replaced.
    """

    count: int
    probability: float
    shortest: int
    longest: int
    noise: float


def predict_next(
    tokens: Int[Tensor, "n L"], fresh: Float[Tensor, "n L V"], unigram: Float[Tensor, " V"], process: Segments
) -> Float[Tensor, "n L V"]:
    """Probabilities of the token after each position, given the tokens up to it.

    Args:
        tokens: sequences of the task, on the CPU.
        fresh: probabilities of the token after each position if it is no copy; positive.
        unigram: probabilities of the token that replaces a copied one.
        process: how many segments there are, how long, and how noisy.
    """
    size = max(1, MOST_PAIRS // tokens.shape[1] ** 2)
    parts = zip(tokens.split(size), fresh.double().split(size), strict=True)
    return torch.cat([_Posterior(*part, unigram.double(), process).predictions() for part in parts])


class _Posterior:
    """Sums over the histories of a group of sequences.

    A start p is the position ``longest`` + p of the sequence. ``share[e, p, a]`` is the probability that a segment
    that begins at p has the original a and more than e tokens.
    """

    def __init__(
        self, tokens: Int[Tensor, "n L"], fresh: Float[Tensor, "n L V"], unigram: Float[Tensor, " V"], process: Segments
    ) -> None:
        self.tokens, self.fresh, self.unigram, self.process = tokens, fresh, unigram, process
        self.first, self.length = process.longest, tokens.shape[1]
        self.starts = self.length + 1 - self.first
        self.originals = self.length + 1 - process.shortest
        # originals of impossible segments reach beyond the end; their share is zero
        self.padded = torch.nn.functional.pad(tokens, (0, process.longest), value=0)
        self.gain = self._gain()
        self.complete = self._complete()
        self.share = self.complete.flip(0).cumsum(0).flip(0)

    def _gain(self) -> Float[Tensor, "n _ _"]:
        """How much likelier token i (from the first start on) is as a copy of token j than fresh."""
        noise, later = self.process.noise, self.tokens[:, self.first :]
        expected = self.fresh[:, self.first - 1 : -1].gather(-1, later[..., None])
        same = (later[:, :, None] == self.padded[:, None]).double()
        return ((1 - noise) * same + noise * self.unigram[later][..., None]) / expected

    def _complete(self) -> Float[Tensor, "E P A"]:
        """Probability that a segment that begins at p has the original a and just e + 1 tokens."""
        position = self.first + torch.arange(self.starts)[:, None]
        original = torch.arange(self.originals)
        lengths = range(self.process.shortest, self.process.longest + 1)
        found = torch.zeros(self.process.longest, self.starts, self.originals, dtype=torch.float64)
        for length in lengths:
            room = position - length + 1
            found[length - 1] = (original < room) / (room * len(lengths))
        return found

    def _copies(self) -> Iterator[tuple[Float[Tensor, "n _ A"], Float[Tensor, "n _"]]]:
        """Likelihood of the first 0, 1, ... tokens of the segment (p, a), for starts after which they have been seen.

        Returned as a factor up to 1 and, for every start, the logarithm of another: their product may overflow.
        """
        values = self.gain.new_ones(len(self.tokens), self.starts, self.originals)
        scale = values.new_zeros(values.shape[:2])
        for e in range(min(self.process.longest + 1, self.starts)):
            if e:
                seen = self.starts - e
                values = values[:, :seen] * self.gain[:, e - 1 :, e - 1 : e - 1 + self.originals]
                values = values * (self.share[e - 1, :seen] > 0)
                largest = values.amax(-1).clamp(min=LEAST_DIVISOR)
                values, scale = values / largest[..., None], scale[:, :seen] + largest.log()
            yield values, scale

    def _likelihoods(self) -> tuple[Float[Tensor, "n P E"], Float[Tensor, "n P E"]]:
        """Logarithm of the likelihood of the e tokens after a beginning at p, and of that with the segment going on.

        E has one entry more than tokens in the longest segment: that of e that long or longer.
        """
        going = self.gain.new_full((len(self.tokens), self.starts, self.process.longest + 1), -torch.inf)
        over = torch.full_like(going, -torch.inf)
        for e, (values, scale) in enumerate(self._copies()):
            seen = values.shape[1]
            if e < self.process.longest:
                going[:, :seen, e] = (values * self.share[e, :seen]).sum(-1).log() + scale
            if e:
                ended = (values * self.complete[e - 1, :seen]).sum(-1).log() + scale
                over[:, :seen, e] = torch.logaddexp(over[:, :seen, e - 1], ended)
        return torch.logaddexp(going, over), going

    def _histories(self, likelihood: Float[Tensor, "n P E"]) -> Float[Tensor, "n P P"]:
        """Log-weight [q, p] of the latest segment having begun at p, for the target at start q, without the likelihood.

        Weights of a target are relative to the likelihood of all that was seen before it.
        """
        process, starts = self.process, self.starts
        begins = _begin_probabilities(process, starts).log()  # P, left before, left after
        beginning = begins.masked_fill(torch.eye(process.count + 1, dtype=torch.bool), -torch.inf)
        # by the latest segment's start, and how many are left after it; entry 0 stands for none so far
        weight = likelihood.new_full((len(self.tokens), starts + 1, process.count + 1), -torch.inf)
        weight[:, 0, -1] = 0
        found = likelihood.new_empty(len(self.tokens), starts, starts)
        for q in range(starts):
            before = torch.arange(q)
            so_far = likelihood[:, before, (q - before).clamp(max=process.longest)]
            so_far = torch.nn.functional.pad(so_far, (1, 0))
            state = (weight[:, : q + 1] + so_far[..., None]).logsumexp(1)
            total = state.logsumexp(-1)[:, None]
            weight = weight - total[..., None]
            weight[:, q + 1] = ((state - total)[..., None] + beginning[q]).logsumexp(1)
            weight[:, : q + 1] += begins[q].diagonal()
            found[:, q] = weight[:, 1:].logsumexp(-1)
        return found

    def predictions(self) -> Float[Tensor, "n L V"]:
        """Probabilities of the token after each position."""
        likelihood, going = self._likelihoods()
        history = self._histories(likelihood)
        found, copying = torch.zeros_like(self.fresh), self.fresh.new_zeros(self.tokens.shape)
        for e, (values, scale) in zip(range(self.process.longest), self._copies(), strict=False):
            seen = values.shape[1]
            weight = history.diagonal(-e, 1, 2)  # of the target e further on
            rows = slice(self.first - 1 + e, self.first - 1 + e + seen)
            # larger only where the segment cannot go on, and the share is zero
            posterior = (weight + scale).clamp(max=LARGEST_EXPONENT).exp()
            originals = posterior[..., None] * self.share[e, :seen] * values
            tokens = self.padded[:, None, e : e + self.originals].expand_as(originals)
            found[:, rows].scatter_add_(2, tokens, originals)
            copying[:, rows] += (weight + going[:, :seen, e]).exp()
        noise, copying = self.process.noise, copying[..., None].clamp(max=1)
        return (1 - noise) * found + noise * copying * self.unigram + (1 - copying) * self.fresh


def _begin_probabilities(process: Segments, starts: int) -> Float[Tensor, "P left after"]:
    """Probability that of the segments which have yet to begin so many are left after a start."""
    left = torch.arange(process.count + 1, dtype=torch.float64)
    start = torch.arange(starts, dtype=torch.float64)[:, None, None]
    # a segment begins at every start with the same probability, given that it has not begun before
    hazard = process.probability / (starts - process.probability * start)
    before, after = left[:, None], left
    ways = torch.lgamma(before + 1) - torch.lgamma(after + 1) - torch.lgamma((before - after).clamp(min=0) + 1)
    chance = ways.exp() * hazard ** (before - after).clamp(min=0) * (1 - hazard) ** after
    return chance * (before >= after)
