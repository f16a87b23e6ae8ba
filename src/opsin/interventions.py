"""What a clamp does: pure functions of tensors, and the values an activation can be overwritten by.

Legend: M members, B batch, L positions (query side), K positions (key side), H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.noise import another_example, normals
from opsin.passes import Clock, Overwrite, Source, Value
from opsin.task import Batch, Truth

# low enough to vanish in the softmax, far above the causal mask so that a row of nothing else stays finite
DISALLOWED_SCORE = -1e9


def overwrite(x: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """``x`` moved toward ``value`` by ``weight`` in [0, 1].

    Weight 0 returns ``x`` and weight 1 returns ``value`` exactly (a zero may lose its sign); at weight
    1 the gradient into ``x`` is exactly zero. All three broadcast; both tensors and their difference
    must be finite.
    """
    return torch.lerp(x, value, weight)


@dataclass(frozen=True)
class Constant(Value):
    """The same number everywhere; gradient stops."""

    constant: float = 0.0

    def __call__(self, x: Tensor, batch: Batch, *taken: Tensor) -> Overwrite:
        return Overwrite(x.new_full((), self.constant).expand_as(x))


@dataclass(frozen=True)
class BatchMean(Value):
    """The activation's own mean over the batch, per member and entry; gradient stops."""

    def __call__(self, x: Tensor, batch: Batch, *taken: Tensor) -> Overwrite:
        return Overwrite(x.detach().mean(1, keepdim=True).expand_as(x))


@dataclass(frozen=True)
class OverallMean(Value):
    """The activation's mean over the batch and all positions, per member and entry of the later axes; gradient stops.

    What Stolfo et al. 2024 ("Confidence regulation neurons in language models", section 3.2) hold a neuron at: one
    number, in which nothing is left of the position either.
    """

    def __call__(self, x: Float[Tensor, "M B L ..."], batch: Batch, *taken: Tensor) -> Overwrite:
        return Overwrite(x.detach().mean((1, 2), keepdim=True).expand_as(x))


@dataclass(frozen=True)
class Clipped(Value):
    """At queries, the activation's mean over what is no query where it would pass that mean; gradient stops.

    The mean is over the batch and its rows that are no query (in a sequence with repeats, the first occurrence), per
    member and entry of the last axis. Stolfo et al. 2024 ("Confidence regulation neurons in language models"), the case
    study of induction. A member whose batch has queries only is left as it is.

    Args:
        side: which entries are moved: those ``above`` the mean, or ``below`` it.
    """

    side: Literal["above", "below"]

    def __call__(self, x: Float[Tensor, "M B L N"], batch: Batch, *taken: Tensor) -> Overwrite:
        query, held = batch.truth.query[..., None], x.detach()
        first = ~query
        count = first.sum((1, 2), keepdim=True)
        mean = (held * first).sum((1, 2), keepdim=True) / count.clamp(min=1)
        beyond = held >= mean if self.side == "above" else held <= mean
        return Overwrite(mean.expand_as(x), query & beyond & (count > 0))


@dataclass(frozen=True)
class Resample(Value):
    """The activation of another example of the same batch; gradient stops.

    Which one is drawn at every step and for every member, and is the same at all sites of the step (resampling
    ablation, Chan et al. 2022, "Causal scrubbing"). In a batch of one it is the activation itself.
    """

    @property
    def needs(self) -> tuple[Clock]:
        return (Clock(),)

    def __call__(self, x: Float[Tensor, "M B ..."], batch: Batch, *taken: Tensor) -> Overwrite:
        member = torch.arange(x.shape[0], device=x.device)[:, None]
        return Overwrite(x.detach()[member, another_example(taken[0], x.shape[1])])


@dataclass(frozen=True)
class Noise(Value):
    """Normal noise with the activation's own mean and standard deviation over the batch; gradient stops.

    Mean and standard deviation (of the batch itself, divided by B) are per member and entry. What was there is
    replaced, not added to as Meng et al. (2022, "Locating and editing factual associations", section 2.1) do to
    embeddings. In a batch of one it is the activation itself.

    Args:
        salt: of the site (``opsin.noise.salt_of``); others get unrelated noise.
    """

    salt: int = field(repr=False)

    @property
    def needs(self) -> tuple[Clock]:
        return (Clock(),)

    def __call__(self, x: Float[Tensor, "M B ..."], batch: Batch, *taken: Tensor) -> Overwrite:
        spread, mean = torch.std_mean(x.detach(), 1, correction=0, keepdim=True)
        return Overwrite(mean + spread * normals(taken[0], x, self.salt))


@dataclass(frozen=True)
class PreviousToken(Value):
    """Attention ``strength`` on the previous token and the rest on oneself; the first row attends to itself.

    Reference option ``prev_token_heads`` (Singh et al. 2024, figure 5 and appendix).

    Args:
        strength: attention paid to the previous token.
        labels_only: only rows that hold a label.
    """

    strength: float = 1.0
    labels_only: bool = False

    def __call__(self, x: Float[Tensor, "M B H L K"], batch: Batch, *taken: Tensor) -> Overwrite:
        pattern = previous_token_pattern(batch.truth, self.strength, x)
        rows = batch.truth.labels[:, None] if self.labels_only else None
        return Overwrite(pattern.expand_as(x), rows)


@dataclass(frozen=True)
class Induction(Value):
    """At each query, attention ``strength`` on every matching label and the rest on each other label.

    Reference option ``induction_heads``. Rows are not renormalised: they sum to 1 for one match and
    one other label.
    """

    strength: float = 1.0

    def __call__(self, x: Float[Tensor, "M B H L K"], batch: Batch, *taken: Tensor) -> Overwrite:
        truth = batch.truth
        pattern = self.strength * truth.match.to(x.dtype) + (1 - self.strength) * truth.other.to(x.dtype)
        return Overwrite(pattern[:, :, None].expand_as(x), truth.query[:, :, None, :, None])


@dataclass(frozen=True)
class Match(Value):
    """At each query, attention by similarity of the raw inputs that precede the labels.

    Reference option ``match_heads``: at temperature 0 the weight is 1 on every label whose input is
    the most similar (ties all get 1), above 0 a softmax of cosine over temperature.
    """

    temperature: float = 0.0

    def __call__(self, x: Float[Tensor, "M B H L K"], batch: Batch, *taken: Tensor) -> Overwrite:
        pattern = match_pattern(batch, self.temperature).to(x.dtype)
        return Overwrite(pattern[:, :, None].expand_as(x), batch.truth.query[:, :, None, :, None])


@dataclass(frozen=True)
class Disallow(Value):
    """Scores so low that nothing is attended there; the rest of the row shares what was paid.

    Reference options ``disallow_prev_token_heads`` and ``final_layer_silence_non_label_attn``.

    Args:
        what: ``previous_token``: the token before, in every row but the first. ``non_labels``: in
            rows whose prediction is scored, every key that holds no label, the row's own included.
        labels_only: only rows that hold a label.
    """

    what: Literal["previous_token", "non_labels"]
    labels_only: bool = False

    def __call__(self, x: Float[Tensor, "M B H L K"], batch: Batch, *taken: Tensor) -> Overwrite:
        where = disallowed(self.what, batch)
        if self.labels_only:
            where = where & batch.truth.labels[:, None]
        return Overwrite(x.new_full((), DISALLOWED_SCORE).expand_as(x), where)


@dataclass(frozen=True)
class FromPass(Value):
    """What the same activation, or another of its shape, is in another pass."""

    source: Source

    @property
    def needs(self) -> tuple[Source, ...]:
        return (self.source,)

    def __call__(self, x: Tensor, batch: Batch, *taken: Tensor) -> Overwrite:
        return Overwrite(taken[0])


@dataclass(frozen=True)
class Tempered(Value):
    """Scores of another pass, those of some heads divided by a temperature.

    Reference option ``set_head_temperature``.

    Args:
        source: the scores.
        temperatures: head and its temperature; other heads keep theirs.
    """

    source: Source
    temperatures: tuple[tuple[int, float], ...]

    @property
    def needs(self) -> tuple[Source, ...]:
        return (self.source,)

    def __call__(self, x: Float[Tensor, "M B H L K"], batch: Batch, *taken: Tensor) -> Overwrite:
        divisor = x.new_ones(x.shape[2])
        for head, temperature in self.temperatures:
            divisor[head] = temperature
        return Overwrite(taken[0] / divisor[:, None, None])


@dataclass(frozen=True)
class CopyOutput(Value):
    """Logits of a perfect copy: the score that one head gives a label is that label's logit.

    Reference option ``perfect_copy_from_head_pattern``. Outputs that no label of the context names get
    -1e9; of a label that occurs twice the later counts. Only rows whose prediction is scored.
    """

    source: Source
    head: int

    @property
    def needs(self) -> tuple[Source, ...]:
        return (self.source,)

    def __call__(self, x: Float[Tensor, "M B L V"], batch: Batch, *taken: Tensor) -> Overwrite:
        scores = taken[0][:, :, self.head]  # M B L K
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

    Rows whose prediction is scored keep their own, and so does the first (reference manipulation
    ``perfect_prev_token_input``, pass 2).
    """

    source: Source

    @property
    def needs(self) -> tuple[Source, ...]:
        return (self.source,)

    def __call__(self, x: Float[Tensor, "M B L D"], batch: Batch, *taken: Tensor) -> Overwrite:
        previous = batch.truth.previous
        own = torch.arange(previous.shape[0], device=previous.device)
        return Overwrite(taken[0][:, :, torch.where(scored_rows(batch), own, previous)])


def scored_rows(batch: Batch) -> Bool[Tensor, " L"]:
    """Rows whose prediction enters the loss."""
    rows = torch.zeros(batch.layout.positions, dtype=torch.bool, device=batch.tokens.device)
    rows[list(batch.layout.scored)] = True
    return rows


def disallowed(what: Literal["previous_token", "non_labels"], batch: Batch) -> Bool[Tensor, "L K"]:
    """Entries of the scores that ``Disallow`` overwrites."""
    truth, length = batch.truth, batch.layout.positions
    position = torch.arange(length, device=truth.previous.device)
    if what == "previous_token":
        return (truth.previous[:, None] == position) & (truth.previous != position)[:, None]
    return scored_rows(batch)[:, None] & ~truth.labels


def previous_token_pattern(truth: Truth, strength: float, like: Tensor) -> Float[Tensor, "L K"]:
    """``strength`` on the previous token, the rest on oneself."""
    length = truth.previous.shape[0]
    own = torch.eye(length, dtype=like.dtype, device=like.device)
    return own + strength * (own[truth.previous] - own)


def match_pattern(batch: Batch, temperature: float) -> Float[Tensor, "M B L K"]:
    """Attention of a perfect match head; zero at keys that are no label and in rows that are no query."""
    candidate = batch.truth.match | batch.truth.other
    similarity = batch.similarity().masked_fill(~candidate, -torch.inf)
    if temperature == 0:
        best = similarity == similarity.amax(-1, keepdim=True)
        return (best & candidate).to(similarity.dtype)
    return (similarity / temperature).softmax(-1).masked_fill(~candidate, 0.0)


def check_share(field: str, value: float) -> None:
    """A strength must lie in [0, 1].

    Raises:
        ConfigError: it does not.
    """
    if not 0 <= value <= 1:
        raise ConfigError(field, value, "a number from 0 to 1")
