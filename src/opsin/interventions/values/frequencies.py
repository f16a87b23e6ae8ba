"""Frequencies of the token embedding: what is left of it when some are taken away.

The rows of the embedding of the numbers 0 .. p - 1 are functions of a number x; their part of frequency k is what
cos(2 pi k x / p) and sin(2 pi k x / p) span.

Legend: M members, B batch, L positions, T tokens, P = p numbers, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from opsin.interventions.intervention import Overwrite, Value, Weight
from opsin.model.layers import looked_up
from opsin.task import Batch


@dataclass(frozen=True)
class WithoutFrequencies(Value):
    """The embedding of every number without its part of some frequencies; gradient flows, none of it along them.

    x - (Q W)[token], where W are the rows 0 .. p - 1 of ``W_E`` and Q projects these p rows on the frequencies. Other
    tokens, and positions without a token, stay as they are.

    Args:
        frequencies: frequencies that are taken away, 1 to below p / 2.
        modulus: p, how many numbers there are.
    """

    frequencies: tuple[int, ...]
    modulus: int

    @property
    def needs(self) -> tuple[Weight]:
        """The token embedding."""
        return (Weight("embed.W_E"),)

    @property
    def gradient(self) -> str:
        """``"flows"``, through the part of the embedding that is left."""
        return "flows"

    def __call__(self, x: Float[Tensor, "M B L D"], batch: Batch, *inputs: Tensor) -> Overwrite:
        (embedding,) = inputs  # M T D
        part = self._projection(embedding) @ embedding[:, : self.modulus]
        part = looked_up(batch.tokens, pad(part, (0, 0, 0, embedding.shape[1] - self.modulus)))
        positions = torch.tensor(batch.layout.tokens, device=x.device)
        return Overwrite(x - torch.zeros_like(x).index_copy(2, positions, part))

    def _projection(self, like: Tensor) -> Float[Tensor, "P P"]:
        """Q: the sum of (2 / p) cos(2 pi k (x - y) / p) over the frequencies k."""
        x = torch.arange(self.modulus, device=like.device)
        turns = [k * (x[:, None] - x) % self.modulus for k in self.frequencies]
        waves = [(turn.double() * (2 * math.pi / self.modulus)).cos() for turn in turns]
        return (torch.stack(waves).sum(0) * (2 / self.modulus)).to(like.dtype)
