"""Values made from the activation alone: a number, a mean, another example, noise.

Legend: M members, B batch, L positions, N neurons.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.interventions.identity import DERIVED
from opsin.interventions.intervention import Clock, Overwrite, Value
from opsin.interventions.values.noise import another_example, hashed_normals
from opsin.task import Batch


@dataclass(frozen=True)
class Constant(Value):
    """The same number everywhere; gradient stops.

    Args:
        constant: the number, in the activation's unit.
    """

    constant: float = 0.0

    def __call__(self, x: Tensor, batch: Batch, *inputs: Tensor) -> Overwrite:
        return Overwrite(x.new_full((), self.constant).expand_as(x))


@dataclass(frozen=True)
class BatchMean(Value):
    """The activation's own mean over the batch, per member and entry; gradient stops."""

    def __call__(self, x: Tensor, batch: Batch, *inputs: Tensor) -> Overwrite:
        return Overwrite(x.detach().mean(1, keepdim=True).expand_as(x))


@dataclass(frozen=True)
class OverallMean(Value):
    """The activation's mean over the batch and all positions, per member and entry of the later axes; gradient stops.

    What Stolfo et al. 2024 ("Confidence regulation neurons in language models", section 3.2) hold a neuron at: one
    number, in which nothing is left of the position either.
    """

    def __call__(self, x: Float[Tensor, "M B L ..."], batch: Batch, *inputs: Tensor) -> Overwrite:
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

    def __call__(self, x: Float[Tensor, "M B L N"], batch: Batch, *inputs: Tensor) -> Overwrite:
        query, constant = batch.truth.query[..., None], x.detach()
        first = ~query
        count = first.sum((1, 2), keepdim=True)
        mean = (constant * first).sum((1, 2), keepdim=True) / count.clamp(min=1)
        beyond = constant >= mean if self.side == "above" else constant <= mean
        return Overwrite(mean.expand_as(x), query & beyond & (count > 0))


@dataclass(frozen=True)
class Resample(Value):
    """The activation of another example of the same batch; gradient stops.

    Which one is drawn at every step and for every member, and is the same at all sites of the step (resampling
    ablation, Chan et al. 2022, "Causal scrubbing"). In a batch of one it is the activation itself.
    """

    @property
    def needs(self) -> tuple[Clock]:
        """The clock, from which the random numbers are made."""
        return (Clock(),)

    def __call__(self, x: Float[Tensor, "M B ..."], batch: Batch, *inputs: Tensor) -> Overwrite:
        member = torch.arange(x.shape[0], device=x.device)[:, None]
        return Overwrite(x.detach()[member, another_example(inputs[0], x.shape[1])])


@dataclass(frozen=True)
class Noise(Value):
    """Normal noise with the activation's own mean and standard deviation over the batch; gradient stops.

    Mean and standard deviation (of the batch itself, divided by B) are per member and entry. What was there is
    replaced, not added to as Meng et al. (2022, "Locating and editing factual associations", section 2.1) do to
    embeddings. In a batch of one it is the activation itself.

    Args:
        salt: number of the site (``opsin.interventions.values.noise.salt_of``); different sites get unrelated noise.
    """

    salt: int = field(repr=False, metadata=DERIVED)

    @property
    def needs(self) -> tuple[Clock]:
        """The clock, from which the random numbers are made."""
        return (Clock(),)

    def __call__(self, x: Float[Tensor, "M B ..."], batch: Batch, *inputs: Tensor) -> Overwrite:
        spread, mean = torch.std_mean(x.detach(), 1, correction=0, keepdim=True)
        return Overwrite(mean + spread * hashed_normals(inputs[0], x, self.salt))
