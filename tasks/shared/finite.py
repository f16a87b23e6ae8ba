"""What tasks with a fixed set of examples share: which are trained on, which are tested, and the epochs of training.

The training share is the first of a seeded permutation of all examples, for ever and for every member. A step sees the
whole of it, or a minibatch: epoch e goes through the training examples in an order that is a permutation made from
(seed, e), so a minibatch is a pure function of (seed, step) and needs no loader with a state. An epoch's last minibatch
goes on into the next epoch, so each example is seen once an epoch whatever the batch size. Evaluation sets are whole.

Legend: S steps drawn together, M members, B batch, E examples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from opsin.errors import ConfigError
from opsin.task import Batch, Draw, Task
from opsin.tasks.shared.streams import UINT64_MAX, check_draw, permutation, stream_key

_SHARE_STREAM, _EPOCH_STREAM = range(2)


class FiniteTask(Task):
    """A task whose sequences are numbered examples: a share to train on, and the rest to test on.

    A subclass defines ``assemble``, whose draw has ``example``: Int64 [M, B], the numbers of the examples shown. Its x-
    axis counts epochs unless it says otherwise. Evaluation sets: ``train``, all training examples, and ``test``, all
    others, both in the order of the permutation and the same for every seed.

    Args:
        examples: E, number of all examples.
        train_share: share of the examples that training uses, more than 0 and less than 1; rounded to whole examples.
        split_seed: seed of the permutation that parts them, 0 .. 2**64 - 1.
        batch_size: B, examples of a training step, at most the training examples; None for all of them in every step.

    Raises:
        ConfigError: a value out of its range, or a share that leaves no example to train on or to test on.
    """

    axis = "epochs"
    evaluations = ("train", "test")

    def __init__(self, examples: int, train_share: float, split_seed: int = 0, batch_size: int | None = None) -> None:
        self._refuse_unless(examples >= 2, "examples", examples, "at least 2: one to train on and one to test on")
        self._refuse_unless(0 <= split_seed <= UINT64_MAX, "split_seed", split_seed, "0 .. 2**64 - 1")
        in_range = 0 < train_share < 1
        count = round(train_share * examples) if in_range else 0
        left = "no test set" if train_share >= 1 or count == examples else "no training set"
        expected = f"a share of {examples} examples between 0 and 1, as {left} is left"
        self._refuse_unless(in_range and 0 < count < examples, "train_share", train_share, expected)
        fits = batch_size is None or 1 <= batch_size <= count
        self._refuse_unless(fits, "batch_size", batch_size, f"1 .. {count}, the training examples, or null for all")
        order = permutation(stream_key(split_seed, "examples", examples), _SHARE_STREAM, 0, examples)
        self._sets = {"train": order[:count], "eval/train": order[:count], "eval/test": order[count:]}
        self.batch_size = count if batch_size is None else batch_size

    def _refuse_unless(self, holds: bool, name: str, value: object, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{type(self).__name__}.{name}", value, expected)

    def set_size(self, split: str) -> int | None:
        """Examples of a split: those of an epoch, or of an evaluation set."""
        return len(self._sets[split])

    def examples_of(self, split: str) -> Int64[np.ndarray, " n"]:
        """Numbers of a split's examples, in the order of the permutation.

        Args:
            split: ``"train"`` or ``"eval/NAME"`` with one of ``evaluations``.
        """
        return self._sets[split]

    def draw(
        self, seeds: Sequence[int], first: int, count: int, split: str = "train", batch_size: int | None = None
    ) -> Draw:
        """The examples of batches ``first .. first + count - 1``, one member per seed.

        Args:
            seeds: one seed a member, each 0 .. 2**64 - 1; evaluation sets do not depend on it.
            first: index of the first batch, at least 0.
            count: S, number of batches to draw.
            split: ``"train"`` or ``"eval/NAME"`` with one of ``evaluations``.
            batch_size: B, examples in a batch, the task's setting when None; batches go through the split one after
                another, so that its size makes batch 0 the whole of it.

        Returns:
            ``example``: Int64 [S, M, B], numbers of the examples shown.
        """
        size = self.batch_size if batch_size is None else batch_size
        check_draw(type(self).__name__, self._sets, split, seeds, (first, count, size))
        chosen = self._sets[split]
        epoch, row = np.divmod(np.arange(first * size, (first + count) * size), len(chosen))
        in_order = split != "train" or size == len(chosen)
        # conditions of one seed share its data: shuffle that once
        rows = {seed: row if in_order else self._shuffled(seed, epoch, row) for seed in set(seeds)}
        found = chosen[np.stack([rows[seed] for seed in seeds], 1)].reshape(count, size, len(seeds)).transpose(0, 2, 1)
        return {"example": torch.from_numpy(np.ascontiguousarray(found))}

    def _shuffled(self, seed: int, epoch: Int64[np.ndarray, " n"], row: Int64[np.ndarray, " n"]) -> np.ndarray:
        """Which training example stands where in the order of each epoch."""
        key, length = stream_key(seed, "train", 0), len(self._sets["train"])
        found = np.empty_like(row)
        for number in np.unique(epoch).tolist():
            inside = epoch == number
            found[inside] = permutation(key, _EPOCH_STREAM, number, length)[row[inside]]
        return found

    @abstractmethod
    def assemble(self, bank: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> Batch:
        """One step's draw (``example``: Int64 [M, B]) as a batch."""
