"""Values made from an activation of another forward pass of the same batch.

Legend: M members, B batch, L positions (query side), K positions (key side), H heads, D width, V outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.batch import scored_rows
from opsin.interventions.intervention import Overwrite, Source, Value
from opsin.interventions.values.patterns import DISALLOWED_SCORE
from opsin.task import Batch


@dataclass(frozen=True)
class FromPass(Value):
    """What the same activation, or another of its shape, is in another pass.

    Gradient flows into the other pass, unless the source is detached or that pass reaches no trained weight.

    Args:
        source: the activation of the other pass.
    """

    source: Source

    @property
    def needs(self) -> tuple[Source, ...]:
        """The activation of the other pass."""
        return (self.source,)

    def __call__(self, x: Tensor, batch: Batch, *inputs: Tensor) -> Overwrite:
        return Overwrite(inputs[0])


@dataclass(frozen=True)
class Tempered(Value):
    """Scores of another pass, those of some heads divided by a temperature.

    Reference option ``set_head_temperature``. Gradient flows into the other pass unless the source is detached.

    Args:
        source: the attention scores of the other pass, of all heads.
        temperatures: pairs of a head and its temperature; the scores of other heads stay as they are.
    """

    source: Source
    temperatures: tuple[tuple[int, float], ...]

    @property
    def needs(self) -> tuple[Source, ...]:
        """The activation of the other pass."""
        return (self.source,)

    def __call__(self, x: Float[Tensor, "M B H L K"], batch: Batch, *inputs: Tensor) -> Overwrite:
        divisor = x.new_ones(x.shape[2])
        for head, temperature in self.temperatures:
            divisor[head] = temperature
        return Overwrite(inputs[0] / divisor[:, None, None])


@dataclass(frozen=True)
class CopyOutput(Value):
    """Logits of a perfect copy: the score that one head gives a label is that label's logit.

    Reference option ``perfect_copy_from_head_pattern``. Outputs that no label of the context names get
    -1e9; of a label that occurs twice the later counts. Only rows whose prediction is scored. Gradient flows into
    the other pass unless the source is detached.

    Args:
        source: the attention scores of the other pass, of all heads.
        head: number of the head that answers, within the layer of the source.
    """

    source: Source
    head: int

    @property
    def needs_classes(self) -> bool:
        """True: the answer is one of the labels."""
        return True

    @property
    def needs(self) -> tuple[Source, ...]:
        """The activation of the other pass."""
        return (self.source,)

    def __call__(self, x: Float[Tensor, "M B L V"], batch: Batch, *inputs: Tensor) -> Overwrite:
        scores = inputs[0][:, :, self.head]  # M B L K
        value = torch.full_like(x, DISALLOWED_SCORE)
        outputs = torch.arange(x.shape[-1], device=x.device)
        for position in batch.layout.labels:
            token = batch.tokens[:, :, batch.layout.tokens.index(position)]
            named = (token[..., None] == outputs)[:, :, None]  # M B 1 V
            value = torch.where(named, scores[..., position, None], value)
        return Overwrite(value, scored_rows(batch)[:, None])


@dataclass(frozen=True)
class PreviousInput(Value):
    """Embeddings moved on by one position, as if perfect previous-token heads had replaced them.

    Rows whose prediction is scored keep the embedding of their position, and so does the first (reference manipulation
    ``perfect_prev_token_input``, pass 2). Gradient flows into the embeddings unless the source is detached.

    Args:
        source: the embeddings of the other pass, ``[M, B, L, D]``.
    """

    source: Source

    @property
    def needs(self) -> tuple[Source, ...]:
        """The activation of the other pass."""
        return (self.source,)

    def __call__(self, x: Float[Tensor, "M B L D"], batch: Batch, *inputs: Tensor) -> Overwrite:
        previous = batch.truth.previous
        position = torch.arange(previous.shape[0], device=previous.device)
        return Overwrite(inputs[0][:, :, torch.where(scored_rows(batch), position, previous)])
