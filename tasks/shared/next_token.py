"""What the tasks of plain tokens share: every position predicts the token that follows it.

Legend: S steps drawn together, M members, B batch, L positions (query side), K positions (key side),
T = L + 1 tokens drawn (the last is a target only), H tokens of a first half, n or R = S M B sequences, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from opsin.errors import ConfigError
from opsin.model.memory import check_memory
from opsin.task import EXACT, Bank, Batch, Draw, Layout, Reference, Task, Truth
from opsin.tasks.shared.references import always, chance, on_sequences
from opsin.tasks.shared.streams import check_draw, stream_key

REPEATED_SPLIT = "eval/repeated"
"""The split whose second half repeats the first."""


class NextToken(Task):
    """Tokens at all positions, each of which predicts the next one and is scored.

    Truth: row l is a query where the next token is a copy of one before it (what counts as a copy is the task's)
    and can be found: some key k <= l follows an earlier occurrence of the row's context, which is the last
    ``context`` tokens up to and with l. Among those keys ``match`` are the ones that hold the next token, ``other``
    the ones that hold another. Keys that follow something else are neither: an attention to them is no confusion.
    Every position but the first is a label.

    Args:
        vocabulary: V, number of different tokens.
        positions: L, tokens that the model sees.
        batch_size: B, sequences in a batch of one member.
        evaluations: names of the evaluation sets, ``"train"`` first.

    Raises:
        ConfigError: a value out of its range.
    """

    n_features = None
    context = 1

    def __init__(self, vocabulary: int, positions: int, batch_size: int, evaluations: Sequence[str]) -> None:
        self.require("vocabulary", vocabulary, vocabulary >= 2, "at least 2")
        self.require("positions", positions, positions >= 4, "at least 4")
        self.require("batch_size", batch_size, batch_size >= 1, "at least 1")
        # where induction should look, twice
        check_memory(f"{type(self).__name__}.positions", positions, 2 * positions**2)
        check_memory(f"{type(self).__name__}.batch_size", batch_size, batch_size * 2 * positions**2)
        check_memory(f"{type(self).__name__}.vocabulary", vocabulary, 16 * vocabulary)
        self.n_tokens = self.n_outputs = vocabulary
        self.positions, self.batch_size, self.evaluations = positions, batch_size, tuple(evaluations)
        every = tuple(range(positions))
        self.layout = Layout(features=(), tokens=every, labels=every[1:], scored=every)

    def require(self, name: str, value: object, holds: bool, expected: str) -> None:
        """Refuse a setting that is out of its range.

        Args:
            name: name of the setting in the task's constructor.
            value: value that the user gave.
            holds: whether the value is in its range.
            expected: words for the range, which end the message.

        Raises:
            ConfigError: the value is out of its range.
        """
        if not holds:
            raise ConfigError(f"{type(self).__name__}.{name}", value, expected)

    def bank(self) -> Bank:
        """Nothing: tokens are drawn, not gathered."""
        return {}

    @abstractmethod
    def sequences(
        self, keys: list[np.ndarray], first: int, count: int, size: int, split: str
    ) -> dict[str, Int64[np.ndarray, "_ R"]]:
        """The choices by name, ``tokens`` among them: Int64 [T, R].

        Args:
            keys: Philox keys, as ``stream_key`` makes them, one a different seed.
            first: index of the first step, at least 0.
            count: S, number of steps.
            size: B, sequences of each step and key.
            split: ``"train"`` or ``"eval/NAME"`` with one of ``evaluations``.
        """

    @abstractmethod
    def copied(self, draw: Mapping[str, Tensor]) -> Bool[Tensor, "M B L"]:
        """Rows whose next token is a copy of an earlier one; they are queries where the truth finds the original.

        Args:
            draw: choices of one step, as ``sequences`` names them.
        """

    def draw(
        self, seeds: Sequence[int], first: int, count: int, split: str = "train", batch_size: int | None = None
    ) -> Draw:
        """The choices behind batches ``first .. first + count - 1``, one member per seed.

        Args:
            seeds: one seed a member, each 0 .. 2**64 - 1.
            first: index of the first batch, at least 0.
            count: S, number of batches to draw.
            split: ``"train"`` or ``"eval/NAME"`` with one of ``evaluations``.
            batch_size: B, sequences in a batch, the task's setting when None; another size is another stream.

        Returns:
            ``tokens``: Int64 [S, M, B, T], and whatever else the task says.
        """
        size = self.batch_size if batch_size is None else batch_size
        splits = ("train", *(f"eval/{name}" for name in self.evaluations))
        check_draw(type(self).__name__, splits, split, seeds, (first, count, size))
        distinct = sorted(set(seeds))  # conditions of one seed share its data: draw that once
        keys = [stream_key(seed, split, size) for seed in distinct]
        shape = (count, len(distinct), size)
        member = [distinct.index(seed) for seed in seeds]
        found = {}
        for name, array in self.sequences(keys, first, count, size, split).items():
            rows = np.ascontiguousarray(array.T).reshape(*shape, -1)
            found[name] = torch.from_numpy(rows if list(seeds) == distinct else rows[:, member])
        return found

    def assemble(self, bank: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> Batch:
        """One step's draw (tensors ``[M, B, ...]``, no S) as a batch."""
        tokens, targets = draw["tokens"][..., :-1], draw["tokens"][..., 1:]
        position = torch.arange(self.positions, device=tokens.device)
        follows = follows_context(tokens, self.context)
        right = tokens[..., None, :] == targets[..., None]
        query = self.copied(draw) & (follows & right).any(-1)
        found = query[..., None] & follows
        truth = Truth((position - 1).clamp(min=0), position > 0, query, found & right, found & ~right)
        return Batch(None, tokens, targets, None, truth, self.layout)

    @abstractmethod
    def predict(self, tokens: Int[Tensor, "n L"]) -> Float[Tensor, "n L V"]:
        """Probabilities of the token after each position, given the tokens up to it.

        Args:
            tokens: sequences on the CPU, whatever member they belong to.
        """

    def references(self) -> Mapping[str, Reference]:
        """``uniform``, ``unigram`` where some tokens are rarer, and ``exact``: what ``predict`` gives."""
        unigram = self.unigram()
        known = {} if unigram is None else {"unigram": always(unigram)}
        return {"uniform": chance(self.n_outputs), **known, EXACT: partial(on_sequences, self.predict)}


def follows_context(tokens: Int[Tensor, "M B L"], context: int) -> Bool[Tensor, "M B L K"]:
    """Keys k <= l right before which row l's context has stood.

    Args:
        tokens: tokens of the input at every position.
        context: number of tokens up to and with row l that make its context, at least 1.
    """
    length = tokens.shape[-1]
    position = torch.arange(length, device=tokens.device)
    # the context up to each row, and that which ends just before each key; what wraps around the start is cut off below
    up_to_row = torch.stack([tokens.roll(back, -1) for back in range(context)], -1)
    before_key = torch.stack([tokens.roll(1 + back, -1) for back in range(context)], -1)
    same = (up_to_row[..., :, None, :] == before_key[..., None, :, :]).all(-1)
    return same & (position >= context) & (position <= position[:, None])


def repeat_first_half(array: Int64[np.ndarray, "H R"], length: int) -> Int64[np.ndarray, "T R"]:
    """The first half of sequences, repeated until they are long enough.

    Args:
        array: tokens of the first half, H of them.
        length: T, number of tokens of the whole sequences.
    """
    return array[np.arange(length) % len(array)]


def entropy(probabilities: Float[np.ndarray, " V"]) -> float:
    """Entropy (nats) of positive probabilities."""
    return float(-(probabilities * np.log(probabilities)).sum())
