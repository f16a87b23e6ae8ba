"""Attention that rests on the first token, and what it does to the last neurons."""

from __future__ import annotations

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from opsin.callbacks.readers.heads import HeadTracker
from opsin.errors import ConfigError
from opsin.metrics.activity import attention_sink, sunk
from opsin.model.sites import SiteTable
from opsin.task import Batch, Truth
from opsin.training.module import opsin_module
from opsin.training.observers import Observation

EFFECT = "attention_sink_effect"


class AttentionSinks(HeadTracker):
    """Attention of every head on the first position, and what the last neurons would do if it were all of it.

    Recorded and logged, ``[M, layers, heads]`` each, on the probe under the interventions in force:

    - ``attention_sink``: attention on the first position, averaged over the batch and all later rows;
    - ``attention_sink_effect``: the mean absolute change of the last MLP's activations (``mlp.hook_post``; over the
      batch, later rows and neurons) when this head alone is made to pay all its attention there. After Stolfo et al.
      2024 ("Confidence regulation neurons in language models"), the case study of induction.

    Args:
        every: optimizer steps between measurements of attention; the first and the last state are always measured.
        effect_every: the same of effects, which cost one forward pass a head; no effects when None.

    Raises:
        ConfigError: fewer than one step; when training starts, effects on a model without MLPs.
    """

    metric = "attention_sink"

    def __init__(self, every: int = 100, effect_every: int | None = 1000) -> None:
        super().__init__(every)
        if effect_every is not None and effect_every < 1:
            raise ConfigError("AttentionSinks.effect_every", effect_every, "at least 1 optimizer step, or null")
        self.effect_every = effect_every

    @staticmethod
    def score(pattern: Float[Tensor, "M B H L K"], truth: Truth) -> Float[Tensor, "M H"]:
        """Attention on the first position."""
        return attention_sink(pattern)

    def records(self, sites: SiteTable) -> dict[str, tuple[int, ...]]:
        """Its metrics, for schedules with feedback."""
        shape = (sites.layers, sites.size("H"))
        return super().records(sites) | ({} if self.effect_every is None else {EFFECT: shape})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.effect_every is not None and not opsin_module(pl_module).sites.size("N"):
            raise ConfigError("AttentionSinks.effect_every", self.effect_every, "null: this model has no MLP")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.effect_every is not None:
            self._module.listen(self.effect_every, self._record_effects, [self._last])

    @property
    def _last(self) -> str:
        return f"blocks.{self._module.sites.layers - 1}.mlp.hook_post"

    def _record_effects(self, seen: Observation) -> None:
        before, heads = seen.activations[self._last], range(self._module.sites.size("H"))
        effects = [
            torch.stack(
                [(self._forced(seen.batch, site, head) - before)[:, :, 1:].abs().mean((1, 2, 3)) for head in heads]
            )
            for site in self._sites
        ]
        self._module.record(seen.step, {EFFECT: torch.stack(effects).movedim(2, 0)})

    def _forced(self, batch: Batch, site: str, head: int) -> Float[Tensor, "M B L N"]:
        """The last neurons when one head looks at the first position alone."""
        passes = self._module.forward_passes
        tap = passes.tap(batch)

        def forcing(name: str, activation: Tensor) -> Tensor:
            activation = tap(name, activation)
            return sunk(activation, head) if name == site else activation

        return passes.activations(batch, [self._last], forcing)[self._last]
