"""What a task minimises and what is said of it: the loss of every scored entry, its unit, measures, and a distance.

An objective is a set of pure functions of a model's outputs and a batch; nothing outside of it knows what a loss is
made of. Means over a batch go by the batch's weights. A task names its objective as ``Task.objective``.

Legend: M members, B batch, Q scored entries of a sequence, V outputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opsin.batch import Batch

ABSENT_LOGIT = -1e20
"""What is added to the logit of an output that is ruled out."""


@dataclass(frozen=True)
class Measure:
    """One number that says how good outputs are, beside the loss.

    Args:
        name: last part of the metric's name in ``metrics.csv``.
        better: direction in which the number improves.
        of: pure function of outputs ``[M, B, Q, V]`` and batch: one number for every scored entry, ``[M, B, Q]``, whose
            mean by the batch's weights counts, or one a member, ``[M]``.
        unit: unit of the number, for people; empty where it has none.
        while_training: whether every training step measures it, and not evaluations alone.
        needs: field of the batch without which there is no such number; None where there always is one.
    """

    name: str
    better: Literal["up", "down"]
    of: Callable[[Float[Tensor, "M B Q V"], Batch], Float[Tensor, "M ..."]]
    unit: str = ""
    while_training: bool = False
    needs: str | None = None

    def __call__(self, outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, " M"]:
        """The number of every member."""
        found = self.of(outputs, batch)
        return found if found.dim() == 1 else entry_mean(found, batch)


@dataclass(frozen=True)
class LossScale:
    """How a loss is shown to people, and where it ends.

    Args:
        unit: unit of the loss; empty where it has none.
        lowest: loss of perfect outputs; None where a loss has no lower bound.
    """

    unit: str
    lowest: float | None

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> LossScale:
        """The scale of a run's losses, by the content of its ``summary.json``."""
        described = _described_in(summary)
        return cls(described["unit"], described["lowest"])

    @property
    def floor(self) -> float:
        """The lowest loss; minus infinity where there is no lower bound."""
        return -math.inf if self.lowest is None else self.lowest

    def titled(self, text: str) -> str:
        """A heading with the unit in brackets, where there is one."""
        return f"{text} ({self.unit})" if self.unit else text

    def with_unit(self, number: str) -> str:
        """A number with the unit after it, where there is one."""
        return f"{number} {self.unit}".rstrip()


def measures_in(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Unit, better direction, and whether training measures it, of every measure of a run, by its ``summary.json``."""
    return _described_in(summary)["measures"]


def _described_in(summary: Mapping[str, Any]) -> dict[str, Any]:
    # a run of an earlier version had cross-entropy and does not say so
    return summary.get("objective") or CrossEntropy().describe()


class Objective(ABC):
    """What is minimised: the mean over scored entries, by the batch's weights, of a loss that each entry has.

    A subclass is frozen and defines ``loss``; the attributes below have values that fit most losses.

    Attributes:
        unit: unit of the loss, for people; empty where it has none.
        lowest: loss of perfect outputs; None where a loss has no lower bound.
        predicts_classes: whether the V outputs are logits of classes, and each target names one of them.
        in_float64: whether the loss is computed in double precision, whatever the outputs have.
        measures: numbers beside the loss, in the order in which they are recorded.
        distance_name: last part of the name of distances between outputs; None where the objective knows none.
        distance_unit: unit of these distances; empty where they have none.
    """

    unit: str = ""
    lowest: float | None = 0.0
    predicts_classes: bool = False
    in_float64: bool = False
    measures: tuple[Measure, ...] = ()
    distance_name: str | None = None
    distance_unit: str = ""

    @abstractmethod
    def loss(self, outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
        """Loss of every scored entry; pure, differentiable, and without a branch on values.

        Args:
            outputs: what the model says at the scored positions.
            batch: sequences with their targets.
        """

    @property
    def minimised(self) -> Objective:
        """The objective with this loss: itself, or a simpler one to which it adds measures alone."""
        return self

    def distance(self, outputs: Float[Tensor, "M B Q V"], reference: Float[Tensor, "M B Q V"]) -> Tensor:
        """How far outputs are from those of a reference at every scored entry, ``[M, B, Q]``, at least 0.

        Args:
            outputs: what the model says at the scored positions.
            reference: what a reference would say there.
        """
        raise NotImplementedError(f"{type(self).__name__} names no distance")

    def reduce(self, losses: Float[Tensor, "M B Q"], batch: Batch) -> Float[Tensor, " M"]:
        """The loss of every member from those of its entries: their mean by the batch's weights."""
        return entry_mean(losses, batch)

    # ---- what is made of the above --------------------------------------------------------------

    def entry_loss(self, outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
        """Loss of every scored entry, in the precision that the objective asks for."""
        return self.loss(outputs.double() if self.in_float64 else outputs, batch)

    def member_loss(self, outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, " M"]:
        """Loss of every member, which training minimises."""
        return self.reduce(self.entry_loss(outputs, batch), batch)

    def measures_of(self, batch: Batch, while_training: bool = False) -> list[Measure]:
        """The measures that exist on a batch.

        Args:
            batch: sequences that outputs are measured on.
            while_training: whether only those that every training step measures are wanted.
        """
        found = [item for item in self.measures if item.needs is None or getattr(batch, item.needs) is not None]
        return [item for item in found if item.while_training or not while_training]

    def measured(self, outputs: Float[Tensor, "M B Q V"], batch: Batch) -> dict[str, Float[Tensor, " M"]]:
        """The loss of every member and all measures, by name."""
        measures = {measure.name: measure(outputs, batch) for measure in self.measures_of(batch)}
        return {"loss": self.member_loss(outputs, batch), **measures}

    @property
    def scale(self) -> LossScale:
        """How its losses are shown to people, and where they end."""
        return LossScale(self.unit, self.lowest)

    def describe(self) -> dict[str, Any]:
        """What ``summary.json`` says of it: name, unit and lowest value of the loss, and every measure by name."""
        measures = {
            measure.name: {"unit": measure.unit, "better": measure.better, "while_training": measure.while_training}
            for measure in self.measures
        }
        return {"name": type(self).__name__, "unit": self.unit, "lowest": self.lowest, "measures": measures}


def entry_mean(values: Float[Tensor, "M B Q"], batch: Batch) -> Float[Tensor, " M"]:
    """Mean of one number for every scored entry: the sum of weight times number over the sum of weights.

    An entry of weight 0 counts for nothing even where its number is not finite, but a loss must have a finite
    derivative there; a member whose weights are all 0 has a mean of 0 and, as a loss, no gradient.

    Args:
        values: one number for every scored entry.
        batch: batch with the weights; all entries count alike where it has none.
    """
    if batch.weights is None:
        return values.mean((1, 2))
    weights = batch.weights.to(values.dtype)
    total = weights.sum((1, 2))
    counted = torch.where(weights > 0, weights * values, 0.0).sum((1, 2))
    return counted / torch.where(total > 0, total, 1.0)


# ---- classes ----------------------------------------------------------------------------------------


def cross_entropy(outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
    """Negative log-likelihood of the targets, in nats."""
    return -outputs.log_softmax(-1).gather(-1, batch.targets[..., None]).squeeze(-1)


def accuracy(outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
    """1 where the most likely output is the target, else 0."""
    return (outputs.argmax(-1) == batch.targets).to(outputs.dtype)


def margin(outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
    """Logit of the target less the highest other one; above 0 where the answer is right."""
    targets = batch.targets[..., None]
    highest_other = outputs.scatter(-1, targets, -torch.inf).amax(-1)
    return outputs.gather(-1, targets).squeeze(-1) - highest_other


def least_margin(outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, " M"]:
    """Smallest margin among the scored entries of a member, whatever their weights."""
    return margin(outputs, batch).amin((1, 2))


def restrict(outputs: Float[Tensor, "M B Q V"], plausible: Bool[Tensor, "M B V"]) -> Float[Tensor, "M B Q V"]:
    """Logits with outputs that do not occur in the context ruled out."""
    return outputs + ABSENT_LOGIT * (~plausible[:, :, None]).to(outputs.dtype)


def _plausible_logits(outputs: Tensor, batch: Batch) -> Tensor:
    assert batch.plausible is not None
    return restrict(outputs, batch.plausible)


def accuracy_in_context(outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
    """1 where the most likely output among the plausible ones is the target, else 0."""
    return accuracy(_plausible_logits(outputs, batch), batch)


def probability_in_context(outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
    """Probability of the target among the plausible outputs."""
    return (-cross_entropy(_plausible_logits(outputs, batch), batch)).exp()


CLASS_MEASURES: tuple[Measure, ...] = (
    Measure("accuracy", "up", accuracy, while_training=True),
    Measure("accuracy_in_context", "up", accuracy_in_context, needs="plausible"),
    Measure("probability_in_context", "up", probability_in_context, needs="plausible"),
)
"""Measures of outputs that are logits of classes."""


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Negative log-likelihood (nats) of a class: outputs are logits, targets ``[M, B, Q]`` are their indices.

    Measures: ``accuracy``; ``accuracy_in_context`` and ``probability_in_context`` among ``Batch.plausible``, where the
    batch has it. The distance ``kl`` from a reference is the Kullback-Leibler divergence KL(reference || model), in
    nats; both are given as logits, such as log-probabilities.

    Args:
        in_float64: whether the loss is computed in double precision.
    """

    in_float64: bool = False
    unit = "nats"
    predicts_classes = True
    measures = CLASS_MEASURES
    distance_name = "kl"
    distance_unit = "nats"

    def loss(self, outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
        return cross_entropy(outputs, batch)

    def distance(self, outputs: Float[Tensor, "M B Q V"], reference: Float[Tensor, "M B Q V"]) -> Tensor:
        p = reference.log_softmax(-1).exp()
        # where the reference rules an output out it adds nothing
        return (-torch.special.entr(p) - p * outputs.log_softmax(-1)).sum(-1)


@dataclass(frozen=True)
class LogCrossEntropy(CrossEntropy):
    """The logarithm of a member's mean cross-entropy, which goes on falling when the cross-entropy is tiny.

    The gradient is that of the cross-entropy divided by it: a learning rate that grows as the loss falls (Lyu et al.
    2024, "Dichotomy of early and late phase implicit biases can provably induce grokking"). In double precision unless
    told otherwise.

    Args:
        in_float64: whether the loss is computed in double precision.
    """

    in_float64: bool = True
    unit = "log nats"
    lowest = None

    def reduce(self, losses: Float[Tensor, "M B Q"], batch: Batch) -> Float[Tensor, " M"]:
        return entry_mean(losses, batch).log()


# ---- numbers ----------------------------------------------------------------------------------------

OverOutputs = Literal["mean", "sum"]
"""How the V outputs of one scored entry are put together."""


def _over_outputs(values: Float[Tensor, "M B Q V"], how: OverOutputs) -> Float[Tensor, "M B Q"]:
    return values.mean(-1) if how == "mean" else values.sum(-1)


def r_squared(outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, " M"]:
    """Share of the targets' variance that the outputs explain: 1 less squared error over squared deviation.

    The deviation is from each output's mean over the member's entries, by the batch's weights; 1 is perfect, 0 what
    that mean would have, and below 0 is worse.
    """
    targets = batch.targets.to(outputs.dtype)
    weights = torch.ones_like(targets[..., 0]) if batch.weights is None else batch.weights.to(outputs.dtype)
    share = (weights / weights.sum((1, 2), keepdim=True))[..., None]
    mean = (share * targets).sum((1, 2), keepdim=True)
    error, deviation = (share * (targets - other).square() for other in (outputs, mean))
    return 1 - error.sum((1, 2, 3)) / deviation.sum((1, 2, 3))


@dataclass(frozen=True)
class SquaredError(Objective):
    """Squared difference of outputs and targets ``[M, B, Q, V]``, over the V outputs of an entry by mean or by sum.

    Measure: ``r_squared``, the share of the targets' variance that is explained. The distance ``squared_distance`` from
    a reference is the squared difference of the two outputs, put together like the loss.

    Args:
        over_outputs: how the V squared differences of one entry are put together.
        unit: unit of the loss, that of the targets squared; empty where they have none.
        in_float64: whether the loss is computed in double precision.
    """

    over_outputs: OverOutputs = "mean"
    unit: str = ""
    in_float64: bool = False
    measures = (Measure("r_squared", "up", r_squared),)
    distance_name = "squared_distance"

    @property
    def distance_unit(self) -> str:  # type: ignore[override]
        """Unit of the distances, which is that of the loss."""
        return self.unit

    def loss(self, outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
        return _over_outputs((outputs - batch.targets.to(outputs.dtype)).square(), self.over_outputs)

    def distance(self, outputs: Float[Tensor, "M B Q V"], reference: Float[Tensor, "M B Q V"]) -> Tensor:
        return _over_outputs((outputs - reference).square(), self.over_outputs)


def bits_right(outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
    """Share of the V binary outputs of an entry that are on the target's side of probability 1/2."""
    return ((outputs > 0) == (batch.targets > 0)).to(outputs.dtype).mean(-1)


def all_bits_right(outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
    """1 where all binary outputs of an entry are right, else 0."""
    return ((outputs > 0) == (batch.targets > 0)).all(-1).to(outputs.dtype)


@dataclass(frozen=True)
class BinaryCrossEntropy(Objective):
    """Negative log-likelihood (nats) of V independent bits, over the outputs of an entry by sum or by mean.

    Outputs are the log-odds of 1, targets ``[M, B, Q, V]`` are 0 or 1. Measures: ``accuracy``, the share of bits that
    are right, and ``all_right``, that of entries whose bits all are. The distance ``kl`` from a reference, given as
    log-odds, is KL(reference || model) in nats, put together like the loss.

    Args:
        over_outputs: how the V losses of one entry are put together; their sum is the likelihood of all bits.
        in_float64: whether the loss is computed in double precision.
    """

    over_outputs: OverOutputs = "sum"
    in_float64: bool = False
    unit = "nats"
    measures = (
        Measure("accuracy", "up", bits_right, while_training=True),
        Measure("all_right", "up", all_bits_right),
    )
    distance_name = "kl"
    distance_unit = "nats"

    def loss(self, outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
        return _over_outputs(_binary_loss(outputs, batch.targets.to(outputs.dtype)), self.over_outputs)

    def distance(self, outputs: Float[Tensor, "M B Q V"], reference: Float[Tensor, "M B Q V"]) -> Tensor:
        p = reference.sigmoid()
        entropy = torch.special.entr(p) + torch.special.entr((-reference).sigmoid())
        return _over_outputs(_binary_loss(outputs, p.to(outputs.dtype)) - entropy, self.over_outputs)


def _binary_loss(log_odds: Tensor, p: Tensor) -> Tensor:
    """Cross-entropy (nats) of a bit that is 1 with probability p; exact for large log-odds of either sign."""
    return log_odds.clamp(min=0) - log_odds * p + (-log_odds.abs()).exp().log1p()
