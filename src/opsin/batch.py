"""One batch of sequences: what is shown, what is to be predicted, what counts, and where induction should look.

Legend: M members, B batch, L positions (query side), K positions (key side), F features of a continuous input,
V outputs, Q scored positions, I entries of a finite set of features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which position holds what, the same for every sequence of a task.

    Args:
        features: positions that carry a continuous vector, ascending; none for a task of tokens only.
        tokens: positions that carry a token (for few-shot: a label), ascending; none for a task of features only.
        labels: the positions a label-only clamp applies to; none where nothing is looked up.
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
        relevant: positions whose content decides the answer, the same in every sequence; None where that differs.
    """

    previous: Int[Tensor, " L"]
    labels: Bool[Tensor, " L"]
    query: Bool[Tensor, "M B L"]
    match: Bool[Tensor, "M B L K"]
    other: Bool[Tensor, "M B L K"]
    relevant: Bool[Tensor, " L"] | None = None

    @classmethod
    def without_queries(cls, layout: Layout, members: int, size: int, device: torch.device | None = None) -> Truth:
        """The truth of a task in which no answer can be copied from the context.

        Args:
            layout: which position holds what.
            members: M, number of members of the batch.
            size: B, sequences of one member.
            device: device of the batch; the default one when None.
        """
        position = torch.arange(layout.positions, device=device)
        labels = torch.zeros_like(position, dtype=torch.bool)
        labels[list(layout.labels)] = True
        nowhere = labels.new_zeros(()).expand(members, size, layout.positions, layout.positions)
        return cls((position - 1).clamp(min=0), labels, nowhere[..., 0], nowhere, nowhere)


@dataclass(frozen=True)
class NeededRows:
    """Which rows the activations of a pass are computed at, where it is not all of them.

    Activations that reach the outputs row by row are needed at the scored rows alone. Those that an intervention acts
    on, and those before them, are computed everywhere, but the scored rows apart from the others: what a member learns
    is then the same to the last bit, whatever interventions the plan has and however weakly they act.

    Args:
        scored: rows whose outputs are needed.
        unscored: all rows of the sequence that are not scored.
        until: name of the last site that is needed everywhere; None where none is.
    """

    scored: tuple[int, ...]
    unscored: tuple[int, ...]
    until: str | None = None

    def kept(self, site: str | None, x: Shaped[Tensor, "..."], axis: int = 2) -> Shaped[Tensor, "..."]:
        """What goes on of an activation: the scored rows alone, once the last site that is needed everywhere is behind.

        Args:
            site: name of the activation; None before the first that reaches the outputs row by row.
            x: activation at all rows, or at the scored ones already.
            axis: axis of the rows.
        """
        return self._at(self.scored, x, axis) if site == self.until else x

    def as_many(self, count: int, x: Shaped[Tensor, "..."], axis: int = 2) -> Shaped[Tensor, "..."]:
        """A tensor at the rows of another one, with which it is to meet.

        Args:
            count: number of rows of the other one: all, or the scored ones.
            x: tensor at all rows, or at the scored ones already.
            axis: axis of the rows.
        """
        return self._at(self.scored, x, axis) if count == len(self.scored) else x

    def apart(self, function: Callable[..., Tensor], *inputs: Shaped[Tensor, "..."], axis: int = 2) -> Tensor:
        """What a function makes of the scored rows and, where its inputs have them, of the others by another call.

        Args:
            function: function of the inputs that treats every row alike.
            inputs: tensors with their rows on the axis.
            axis: axis of the rows in the inputs and in what the function returns.
        """
        made = function(*(self._at(self.scored, x, axis) for x in inputs))
        if inputs[0].shape[axis] == len(self.scored):
            return made
        rest = function(*(self._at(self.unscored, x, axis) for x in inputs))
        shape = [*made.shape[:axis], inputs[0].shape[axis], *made.shape[axis + 1 :]]
        scored, unscored = (torch.tensor(rows, device=made.device) for rows in (self.scored, self.unscored))
        return made.new_zeros(shape).index_copy(axis, scored, made).index_copy(axis, unscored, rest)

    def _at(self, rows: tuple[int, ...], x: Tensor, axis: int) -> Tensor:
        if x.shape[axis] == len(self.scored):
            return x.contiguous()
        first, count = rows[0], len(rows)
        if rows == tuple(range(first, first + count)):
            return x.narrow(axis, first, count).contiguous()
        return x.index_select(axis, torch.tensor(rows, device=x.device))


@dataclass(frozen=True)
class Shown:
    """Features as entries of a finite set, which a model may embed once.

    Args:
        vectors: feature vectors of the set.
        which: entry of the set that each feature is.
    """

    vectors: Float[Tensor, "I F"]
    which: Int[Tensor, "M B Nf"]


@dataclass(frozen=True)
class Batch:
    """One batch of every member, ready for the model.

    Args:
        features: continuous inputs in the order of ``layout.features``; None for token tasks.
        tokens: tokens in the order of ``layout.tokens``; ``[M, B, 0]`` for tasks of features only.
        targets: right answers at ``layout.scored``, as the task's objective takes them: a class, ``[M, B, Q]``, or
            numbers for V outputs, ``[M, B, Q, V]``.
        plausible: outputs that occur in the context, for the accuracy restricted to them; None if
            the task has no such restriction.
        truth: where induction should look.
        layout: which position holds what.
        weights: how much each scored entry counts in means over the batch, 0 or more; None where all count alike.
        offset: position of a longer position code at which each sequence begins; None for the first.
        rows: rows that the training step needs; None for all. A model may ignore it and return all rows.
        shown: the features as entries of a finite set; the training step alone sets it, where that saves work.
    """

    features: Float[Tensor, "M B Nf F"] | None
    tokens: Int[Tensor, "M B Nt"]
    targets: Shaped[Tensor, "M B Q ..."]
    plausible: Bool[Tensor, "M B V"] | None
    truth: Truth
    layout: Layout
    weights: Float[Tensor, "M B Q"] | None = None
    offset: Int[Tensor, "M B"] | None = None
    rows: NeededRows | None = None
    shown: Shown | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor that has a batch axis changed by one function.

        Args:
            change: function of a tensor ``[M, B, ...]``; what it does to the axes M and B is the same for all tensors.
        """
        return replace(self, **self.changed_fields(change))

    def changed_fields(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Every field that has a batch axis, changed by one function; a subclass adds those of its own.

        Args:
            change: function of a tensor ``[M, B, ...]``; what it does to the axes M and B is the same for all tensors.
        """
        truth, names = self.truth, ("features", "plausible", "weights", "offset")
        known = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {
            **{name: change(value) for name, value in known.items()},
            "tokens": change(self.tokens),
            "targets": change(self.targets),
            "shown": None if self.shown is None else replace(self.shown, which=change(self.shown.which)),
            "truth": replace(truth, query=change(truth.query), match=change(truth.match), other=change(truth.other)),
        }

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
        full[:, :, torch.tensor(rows)[:, None], torch.tensor(keys, dtype=torch.int64)] = compared.to(full.dtype)
        return full

    def _dtype(self) -> torch.dtype:
        return torch.get_default_dtype() if self.features is None else self.features.dtype


def scored_rows(batch: Batch) -> Bool[Tensor, " L"]:
    """Rows whose prediction enters the loss."""
    rows = torch.zeros(batch.layout.positions, dtype=torch.bool, device=batch.tokens.device)
    rows[list(batch.layout.scored)] = True
    return rows
