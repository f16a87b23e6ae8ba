"""Read-only callbacks: with or without them the weights are the same to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from opsin.errors import ConfigError
from opsin.metrics.heads import induction_strength, previous_token_strength
from opsin.model.sites import SiteTable
from opsin.task import Truth
from opsin.training.module import opsin_module
from opsin.training.observers import Observation


class HeadTracker(Callback):
    """Records one number per head on the probe, ``[M, layers, heads]`` under the metric's name.

    The probe is seen as the model sees its data at that step: under the interventions in force.

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
    """

    metric: str
    score: Callable[[Float[Tensor, "M B H L K"], Truth], Float[Tensor, "M H"]]

    def __init__(self, every: int = 100) -> None:
        if every < 1:
            raise ConfigError(f"{type(self).__name__}.every", every, "at least 1 optimizer step")
        self.every = every

    def records(self, sites: SiteTable) -> dict[str, tuple[int, ...]]:
        """Its metric, for schedules with feedback."""
        return {self.metric: (sites.layers, sites.size("H"))}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._module = opsin_module(pl_module)
        self._sites = [f"blocks.{layer}.attn.hook_pattern" for layer in range(self._module.sites.layers)]
        self._module.listen(self.every, self._record, self._sites)

    def _record(self, seen: Observation) -> None:
        patterns = [seen.activations[site] for site in self._sites]
        strengths = torch.stack([type(self).score(p, seen.batch.truth) for p in patterns], dim=1)
        self._module.record(seen.step, {self.metric: strengths})


class InductionHeads(HeadTracker):
    """Induction strength of every head: attention at the query to the right label minus to the wrong ones."""

    metric = "induction_strength"
    score = staticmethod(induction_strength)


class PreviousTokenHeads(HeadTracker):
    """Previous-token strength of every head: attention from labels to the token before them."""

    metric = "previous_token_strength"
    score = staticmethod(previous_token_strength)
