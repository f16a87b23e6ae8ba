"""What callbacks are told: events, and what the probe shows after a step.

Legend: M members, B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from opsin.task import Batch


@dataclass(frozen=True)
class Event:
    """Something worth telling: written to the run, shown in the terminal, sent as an alert.

    Args:
        kind: a word, for example ``"phase change"``.
        step: optimizer steps finished when it was noticed.
        member: whose.
        message: one line for people.
    """

    kind: str
    step: int
    member: int
    message: str


@dataclass(frozen=True)
class Observation:
    """What the probe showed after some step.

    Args:
        step: optimizer steps finished.
        batch: the probe.
        activations: the sites that were asked for, ``[M, B, ...]``.
    """

    step: int
    batch: Batch
    activations: dict[str, Tensor]


@dataclass(frozen=True)
class Listener:
    """Who wants to be told what the probe shows, and how often (in optimizer steps)."""

    every: int
    sites: tuple[str, ...]
    notify: Callable[[Observation], None]
