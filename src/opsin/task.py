"""What a task hands to the instrument: sequences, targets, and the truth about where to look.

Legend: M members, B batch, L positions (query side), K positions (key side), F features of a
continuous input, V outputs, Q scored positions, S steps drawn together.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def scored_rows(batch: Batch) -> Bool[Tensor, " L"]:
    """Rows whose prediction enters the loss."""
    rows = torch.zeros(batch.layout.positions, dtype=torch.bool, device=batch.tokens.device)
    rows[list(batch.layout.scored)] = True
    return rows


Draw = dict[str, Tensor]
"""The random choices behind some batches, small integers and floats; every tensor is ``[S, M, B, ...]``."""

Bank = dict[str, Tensor]
"""The constant tensors a task's batches are gathered from (for example the exemplars)."""


DRAWN_TOGETHER = 256
"""Steps times members whose random choices are made at once: in fewer calls they are faster, and take more memory."""


@dataclass(frozen=True)
class Layout:
    """Which position holds what, the same for every sequence of a task.

    Args:
        features: positions that carry a continuous vector, ascending.
        tokens: positions that carry a token (for few-shot: a label), ascending.
        labels: the token positions a label-only clamp applies to.
        scored: positions whose prediction enters the loss.
    """

    features: tuple[int, ...]
    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    scored: tuple[int, ...]

    @property
    def positions(self) -> int:
        """L, the length of a sequence."""
        return len(self.features) + len(self.tokens)


@dataclass(frozen=True)
class Truth:
    """Where induction should look in one batch.

    Args:
        previous: position of the token before each position; position 0 names itself.
        labels: positions that hold a label.
        query: rows that are queries: their prediction can be copied from the context.
        match: for each query row, the label positions that hold the right answer.
        other: for each query row, the other label positions it could be confused with.
    """

    previous: Int[Tensor, " L"]
    labels: Bool[Tensor, " L"]
    query: Bool[Tensor, "M B L"]
    match: Bool[Tensor, "M B L K"]
    other: Bool[Tensor, "M B L K"]


@dataclass(frozen=True)
class Batch:
    """One batch of every member, ready for the model.

    Args:
        features: continuous inputs in the order of ``layout.features``; None for token tasks.
        tokens: tokens in the order of ``layout.tokens``.
        targets: right answers at ``layout.scored``.
        plausible: outputs that occur in the context, for the accuracy restricted to them; None if
            the task has no such restriction.
        truth: where induction should look.
        layout: which position holds what.
        offset: position of a longer position code at which each sequence begins; None for the first.
    """

    features: Float[Tensor, "M B Nf F"] | None
    tokens: Int[Tensor, "M B Nt"]
    targets: Int[Tensor, "M B Q"]
    plausible: Bool[Tensor, "M B V"] | None
    truth: Truth
    layout: Layout
    offset: Int[Tensor, "M B"] | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor that has a batch axis changed by one function.

        Args:
            change: function of a tensor ``[M, B, ...]``; what it does to the axes M and B is the same for all tensors.
        """
        truth = self.truth
        return replace(
            self,
            features=None if self.features is None else change(self.features),
            tokens=change(self.tokens),
            targets=change(self.targets),
            plausible=None if self.plausible is None else change(self.plausible),
            offset=None if self.offset is None else change(self.offset),
            truth=replace(truth, query=change(truth.query), match=change(truth.match), other=change(truth.other)),
        )

    def shared_by(self, members: int) -> Batch:
        """The batch of one member as that of several, without copies."""
        return self.map(lambda tensor: tensor.expand(members, *tensor.shape[1:]))

    def similarity(self) -> Float[Tensor, "M B L K"]:
        """How alike are the input at row l and the input that precedes key k, for scored rows.

        Cosine of the raw feature vectors where the task has them, else 1 for equal tokens and 0
        for different ones. Entries that compare nothing (a row that is not scored, a key that no
        input of the row's kind precedes) are -inf. No gradient flows: inputs are constants.
        """
        if self.features is not None:
            inputs, at = torch.nn.functional.normalize(self.features, dim=-1), self.layout.features
        else:
            inputs, at = self.tokens[..., None], self.layout.tokens
        rows = [row for row in self.layout.scored if row in at]
        keys = [key for key in self.layout.labels if key - 1 in at]
        left = inputs[:, :, [at.index(row) for row in rows], None]
        right = inputs[:, :, None, [at.index(key - 1) for key in keys]]
        # multiply-and-sum keeps equal vectors exactly equal, which a hard maximum relies on
        compared = (left * right).sum(-1) if self.features is not None else (left == right).all(-1)
        n = self.layout.positions
        full = torch.full((*self.tokens.shape[:2], n, n), -torch.inf, dtype=self._dtype(), device=self.tokens.device)
        full[:, :, torch.tensor(rows)[:, None], torch.tensor(keys)] = compared.to(full.dtype)
        return full

    def _dtype(self) -> torch.dtype:
        return torch.get_default_dtype() if self.features is None else self.features.dtype


class Task(ABC):
    """A synthetic sequence task.

    A batch is a pure function of (seed, step): ``draw`` makes the random choices from a
    counter-based generator on the CPU, ``assemble`` turns them into tensors and is traced into the
    compiled step, so it must be free of Python branches on values.

    Attributes:
        layout: which position holds what.
        batch_size: B, sequences of one training step.
        n_features: F, or None when the input is tokens only.
        n_tokens: size of the input vocabulary.
        n_outputs: V, number of classes predicted.
        evaluations: names of the evaluation sets, ``"train"`` (the training distribution, other
            draws) first.
        settings: what the task was made with, by the name of the argument; by these a resume knows its task.
    """

    layout: Layout
    batch_size: int
    n_features: int | None
    n_tokens: int
    n_outputs: int
    evaluations: tuple[str, ...]
    settings: Mapping[str, Any]

    def __new__(cls, *arguments: Any, **settings: Any) -> Self:
        """A task that knows the settings it is made with."""
        task = super().__new__(cls)
        # a copy is made without any, and takes over those of its original
        bound = inspect.signature(cls.__init__).bind_partial(task, *arguments, **settings)
        bound.apply_defaults()
        task.settings = dict([*bound.arguments.items()][1:])
        return task

    @abstractmethod
    def bank(self) -> Bank:
        """The constants that ``assemble`` gathers from, on the CPU, float32."""

    @abstractmethod
    def draw(
        self, seeds: Sequence[int], first: int, count: int, split: str = "train", batch_size: int | None = None
    ) -> Draw:
        """The choices behind batches ``first .. first + count - 1``, one member per seed.

        Args:
            seeds: one per member; the same seed gives the same data in every member.
            first: index of the first batch.
            count: S, how many batches.
            split: ``"train"`` for the training stream, ``"eval/NAME"`` for an evaluation set,
                whose draws never coincide with the training stream's.
            batch_size: B, the task's own when None.

        Returns:
            Tensors ``[S, M, B, ...]``; row s is a pure function of (seed, first + s, split).
        """

    @abstractmethod
    def assemble(self, bank: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> Batch:
        """One step's draw (tensors ``[M, B, ...]``, no S) as a batch."""

    @abstractmethod
    def baselines(self) -> dict[str, float]:
        """Losses (nats) of simple strategies, highest first.

        The last entry is the plateau that the phase change leaves: the best loss without looking
        up the answer (for few-shot: guessing among the labels of the context).
        """

    def unigram(self) -> Float[Tensor, " V"] | None:
        """How often each output is the right one over the training stream (probabilities); None where none is rarer.

        What token-frequency neurons move the output toward or away from.
        """
        return None

    def exact(self, batch: Batch) -> Float[Tensor, "M B Q V"] | None:
        """Log-probabilities (nats) of the best predictor the task knows, at the scored positions, or None.

        Bayes' rule where the task can apply it, an n-gram model where it says so in its docstring. A calibrated model
        that has learned the task has this predictor's entropy.
        """
        return None

    def batch(self, seed: int, step: int, split: str = "train", batch_size: int | None = None) -> Batch:
        """Batch ``step`` of one member, on the CPU (M = 1)."""
        draw = self.draw([seed], step, 1, split, batch_size)
        return self.assemble(self.bank(), {name: tensor[0] for name, tensor in draw.items()})


def drawn_steps(task: Task, seeds: Sequence[int], first: int, count: int) -> Iterator[Draw]:
    """The choices behind each of ``count`` training steps from ``first`` on, ``[M, B, ...]``."""
    together = max(1, DRAWN_TOGETHER // len(seeds))
    for begin in range(first, first + count, together):
        size = min(together, first + count - begin)
        drawn = task.draw(seeds, begin, size)
        for index in range(size):
            yield {name: tensor[index] for name, tensor in drawn.items()}
