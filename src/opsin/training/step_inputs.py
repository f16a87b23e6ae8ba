"""What one step is told of its interventions, and what it counts in place.

All of it is tensors, so that no schedule changes the graph.

Legend: M members, I rows of a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class StepGates:
    """What one step is told.

    Args:
        strength: strength of every row of the plan, in [0, 1].
        clock: seed of every member and the number of the optimizer step.
    """

    strength: Float[Tensor, "I M"]
    clock: Int[Tensor, "M 2"]


@dataclass(frozen=True)
class StepCounts:
    """What the steps of a run count, in place.

    Args:
        fired: steps so far in which each row of the plan changed an activation, or a weight.
        alive: members that still learn; one whose loss or gradient is no number stops before its weights are touched.
        skipped: updates that have passed by the entries of every parameter that is ever changed, by name.
    """

    fired: Int[Tensor, "I M"]
    alive: Bool[Tensor, " M"]
    skipped: Mapping[str, Float[Tensor, "M ..."]] = field(default_factory=dict)
