"""What a task hands to the instrument: sequences, targets, the truth about where to look, and what is minimised.

A batch and its parts are in ``opsin.batch``, objectives in ``opsin.objective``.

Legend: M members, B batch, F features of a continuous input, V outputs, Q scored positions, S steps drawn together.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from jaxtyping import Float, Shaped
from torch import Tensor

from opsin.batch import Batch as Batch
from opsin.batch import Layout as Layout
from opsin.batch import NeededRows as NeededRows
from opsin.batch import Shown as Shown
from opsin.batch import Truth as Truth
from opsin.errors import ConfigError
from opsin.objective import CrossEntropy, Objective

Draw = dict[str, Tensor]
"""The random choices behind some batches, small integers and floats; every tensor is ``[S, M, B, ...]``."""

Bank = dict[str, Tensor]
"""The constant tensors a task's batches are gathered from (for example the exemplars)."""

Reference = Callable[[Batch], Float[Tensor, "M B Q V"]]
"""A predictor that a task knows: what it would say at the scored positions of a batch, as outputs of a model."""

Feature = Callable[[Batch], Shaped[Tensor, "M B"]]
"""A property of whole sequences: from a batch to one whole number a sequence, the class that it belongs to."""

EXACT = "exact"
"""Name of the reference that is the best predictor a task knows."""

DRAWN_TOGETHER = 256
"""Steps times members whose random choices are made at once: in fewer calls they are faster, and take more memory."""


@dataclass(frozen=True)
class TimeAxis:
    """What an x-axis counts.

    Args:
        unit: ``sequences``, ``steps`` or ``epochs``.
        sequences: training sequences that one of them stands for.
    """

    unit: str
    sequences: int

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> TimeAxis:
        """The axis of a run, by the content of its ``summary.json``; one that does not say counts sequences."""
        return cls(**summary.get("axis", {"unit": "sequences", "sequences": 1}))


class Task(ABC):
    """A synthetic sequence task.

    A batch is a pure function of (seed, step): ``draw`` makes the random choices from a
    counter-based generator on the CPU, ``assemble`` turns them into tensors and is traced into the
    compiled step, so it must be free of Python branches on values.

    Attributes:
        layout: which position holds what.
        batch_size: B, sequences of one training step.
        n_features: F, or None when the input is tokens only.
        n_tokens: size of the input vocabulary; 0 when the input is features only.
        n_outputs: V, numbers that are predicted at a scored position: classes, or whatever the objective takes.
        objective: what is minimised and measured; the cross-entropy of classes unless a task says otherwise.
        evaluations: names of the evaluation sets, ``"train"`` (the training distribution, other
            draws) first.
        axis: what the x-axis of its figures counts: training sequences, optimizer steps, or epochs.
        offsets: number of positions of a longer position code that a sequence may begin at (``Batch.offset``).
        settings: what the task was made with, by the name of the argument; by these a resume knows its task.
    """

    layout: Layout
    batch_size: int
    n_features: int | None
    n_tokens: int
    n_outputs: int
    objective: Objective = CrossEntropy()
    evaluations: tuple[str, ...]
    axis: Literal["sequences", "steps", "epochs"] = "sequences"
    offsets: int = 1
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

    def shown(self, bank: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> Shown | None:
        """The features of one step's draw of the training stream as entries of a finite set; None where they are not.

        A model that embeds features one by one embeds the set instead, where it is smaller than a batch.

        Args:
            bank: constants that ``assemble`` gathers from.
            draw: random choices of one step, ``[M, B, ...]``.
        """
        return None

    def references(self) -> Mapping[str, Reference]:
        """Predictors that the task can compute on a batch, by name: chance, n-grams, least squares, Bayes' rule.

        Each is a pure function of a batch and returns what a model would have to put out to predict the same, so that
        the objective has a loss of it, and a distance of the model from it: for classes log-probabilities (or other
        logits), for squared errors numbers. The one called ``exact`` is the best predictor the task knows: Bayes' rule
        where it can be applied, else what the docstring of the task says. A name has letters, digits, ``_`` and ``-``.
        """
        # a task may override the best one alone
        return {} if type(self).exact is Task.exact else {EXACT: self.exact}  # type: ignore[dict-item]

    def baselines(self) -> dict[str, float]:
        """Losses of simple strategies over the training stream, in the objective's unit, highest first.

        The last entry is the plateau that the phase change leaves: the best loss without looking
        up the answer (for few-shot: guessing among the labels of the context). None are named by default.
        """
        return {}

    def unigram(self) -> Float[Tensor, " V"] | None:
        """How often each output is the right one over the training stream (probabilities); None where none is rarer.

        What token-frequency neurons move the output toward or away from.
        """
        return None

    def exact(self, batch: Batch) -> Float[Tensor, "M B Q V"] | None:
        """What the best predictor the task knows says at the scored positions, for classes in nats; None without one.

        A calibrated model that has learned the task has this predictor's entropy.
        """
        best = self.references().get(EXACT)
        return None if best is None else best(batch)

    def declared_features(self) -> Mapping[str, Feature]:
        """What is true of a whole sequence and may be found in a model's activations, by name.

        Each is a pure function of a batch and gives every sequence a class, a whole number. The right answer at the
        last scored position is one, ``target``, where answers are classes; a task adds those that it knows.
        """
        return {"target": _last_target} if self.objective.predicts_classes else {}

    def set_size(self, split: str) -> int | None:
        """Sequences of a split that has a fixed number of them; None where they are drawn for ever.

        Evaluation sets of a fixed size are evaluated whole; the size of ``"train"`` is an epoch.

        Args:
            split: ``"train"``, or ``"eval/NAME"`` of an evaluation set.
        """
        return None

    @property
    def time_axis(self) -> TimeAxis:
        """What the x-axis of its figures counts.

        Raises:
            ConfigError: epochs of a task that draws for ever.
        """
        units = {"sequences": 1, "steps": self.batch_size, "epochs": self.set_size("train")}
        sequences = units.get(self.axis)
        if sequences is None:
            expected = "sequences or steps, or epochs of a fixed training set"
            raise ConfigError(f"{type(self).__name__}.axis", self.axis, expected)
        return TimeAxis(self.axis, sequences)

    @property
    def plateau(self) -> float | None:
        """Loss that the phase change leaves, in the objective's unit; None where the task names no baselines."""
        return next(reversed(self.baselines().values()), None)

    def batch(self, seed: int, step: int, split: str = "train", batch_size: int | None = None) -> Batch:
        """Batch ``step`` of one member, on the CPU (M = 1)."""
        draw = self.draw([seed], step, 1, split, batch_size)
        return self.assemble(self.bank(), {name: tensor[0] for name, tensor in draw.items()})


def _last_target(batch: Batch) -> Shaped[Tensor, "M B"]:
    """The right answer at the last scored position."""
    return batch.targets[:, :, -1]


def drawn_steps(task: Task, seeds: Sequence[int], first: int, count: int) -> Iterator[Draw]:
    """The choices behind each of ``count`` training steps from ``first`` on, ``[M, B, ...]``."""
    together = max(1, DRAWN_TOGETHER // len(seeds))
    for begin in range(first, first + count, together):
        size = min(together, first + count - begin)
        drawn = task.draw(seeds, begin, size)
        for index in range(size):
            yield {name: tensor[index] for name, tensor in drawn.items()}
