"""Readers of attention patterns: how strongly each head does what an induction circuit needs.

Legend: M members, B batch, H heads, L positions (query side), K positions (key side).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.callbacks.readers.base import ProbeReader, Requirement, needs_labels
from opsin.metrics.heads import answer_attention, induction_strength, previous_token_strength
from opsin.model.sites import SiteTable
from opsin.records.axes import Axes
from opsin.task import Truth
from opsin.training.observers import Observation


def pattern_sites(table: SiteTable) -> list[str]:
    """The attention pattern of every layer; that of a first one too where there are none, which refuses the run."""
    return [f"blocks.{layer}.attn.hook_pattern" for layer in range(max(1, table.layers))]


def head_axes(table: SiteTable) -> Axes:
    """The axes of what has one number a head."""
    return {"layer": table.layers, "head": table.size("H")}


class HeadTracker(ProbeReader):
    """Records one number per head on the probe, ``[M, layers, heads]`` under the metric's name.

    The probe is seen as the model sees its data at that step: under the interventions in force.

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
    """

    metric: str
    score: Callable[[Float[Tensor, "M B H L K"], Truth], Float[Tensor, "M H"]]

    def __init__(self, every: int = 100) -> None:
        super().__init__(every)

    def sites(self, table: SiteTable) -> list[str]:
        return pattern_sites(table)

    def requirements(self) -> list[Requirement]:
        return [needs_labels(type(self).__name__)]

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        return {self.metric: head_axes(sites)}

    def measure(self, seen: Observation) -> None:
        patterns = [seen.activations[site] for site in pattern_sites(self._module.sites)]
        strengths = [type(self).score(pattern, seen.batch.truth) for pattern in patterns]
        self._module.record(seen.step, {self.metric: torch.stack(strengths, dim=1)})


class InductionHeads(HeadTracker):
    """Induction strength of every head: attention at the query to the right label minus to the wrong ones."""

    metric = "induction_strength"
    score = staticmethod(induction_strength)


class AnswerHeads(HeadTracker):
    """Attention of every head at the query to the labels that are right, summed over them (Reddy 2023)."""

    metric = "answer_attention"
    score = staticmethod(answer_attention)


class PreviousTokenHeads(HeadTracker):
    """Previous-token strength of every head: attention from labels to the token before them."""

    metric = "previous_token_strength"
    score = staticmethod(previous_token_strength)
