"""Attention that rests on the first token, and what it does to the last neurons.

Legend: M members, B batch, H heads, L positions (query side), K positions (key side), N neurons.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from opsin.callbacks.readers.base import Requirement, check_count
from opsin.callbacks.readers.heads import HeadTracker, head_axes, pattern_sites
from opsin.callbacks.readers.last_layer import last_layer_sites
from opsin.metrics.heads import attention_sink, with_attention_sunk
from opsin.model.sites import SiteTable
from opsin.records.axes import Axes
from opsin.task import Batch, Truth
from opsin.training.module import OpsinModule
from opsin.training.observers import Observation

SINK_EFFECT = "attention_sink_effect"
"""Metric of what a head does to the last neurons by resting on the first position."""


class AttentionSinks(HeadTracker):
    """Attention of every head on the first position, and what the last neurons would do if it were all of it.

    Recorded and logged, ``[M, layers, heads]`` each, on the probe under the interventions in force:

    - ``attention_sink``: attention on the first position, averaged over the batch and all later rows;
    - ``attention_sink_effect``: the mean absolute change of the last MLP's activations (``mlp.hook_post``; over the
      batch, later rows and neurons) when this head alone is made to pay all its attention there. After Stolfo et al.
      2024 ("Confidence regulation neurons in language models"), the case study of induction.

    Args:
        every: optimizer steps between measurements of attention; the first and the last state are always measured.
        effect_every: optimizer steps between measurements of effects, which cost one forward pass a head; no effects
            when None.

    Raises:
        ConfigError: fewer than one step; when training starts, effects on a model without MLPs.
    """

    metric = "attention_sink"

    def __init__(self, every: int = 100, effect_every: int | None = 1000) -> None:
        super().__init__(every)
        if effect_every is not None:
            check_count("AttentionSinks.effect_every", effect_every, "optimizer step, or null")
        self.effect_every = effect_every

    @staticmethod
    def score(pattern: Float[Tensor, "M B H L K"], truth: Truth) -> Float[Tensor, "M H"]:
        """Attention on the first position."""
        return attention_sink(pattern)

    def sites(self, table: SiteTable) -> list[str]:
        return pattern_sites(table) + ([] if self.effect_every is None else [last_layer_sites(table)[1]])

    def requirements(self) -> list[Requirement]:
        if self.effect_every is None:
            return []

        def lacking(module: OpsinModule) -> int | None:
            return None if module.sites.size("N") else self.effect_every

        return [Requirement("AttentionSinks.effect_every", lacking, "null: this model has no MLP")]

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        return super().records(sites) | ({} if self.effect_every is None else {SINK_EFFECT: head_axes(sites)})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        table = self._module.sites
        self._module.listen(self.every, self.measure, pattern_sites(table))
        if self.effect_every is not None:
            self._module.listen(self.effect_every, self._measure_effects, [last_layer_sites(table)[1]])

    def _measure_effects(self, seen: Observation) -> None:
        table = self._module.sites
        before = seen.activations[last_layer_sites(table)[1]]
        effects = [
            torch.stack([self._effect(seen.batch, site, head, before) for head in range(table.size("H"))], dim=1)
            for site in pattern_sites(table)
        ]
        self._module.record(seen.step, {SINK_EFFECT: torch.stack(effects, dim=1)})

    def _effect(self, batch: Batch, site: str, head: int, before: Float[Tensor, "M B L N"]) -> Float[Tensor, " M"]:
        """Mean absolute change of the last neurons when one head looks at the first position alone."""
        passes, last = self._module.forward_passes, last_layer_sites(self._module.sites)[1]
        tap = passes.tap(batch)

        def forcing(name: str, activation: Tensor) -> Tensor:
            activation = tap(name, activation)
            return with_attention_sunk(activation, head) if name == site else activation

        after = passes.activations(batch, [last], forcing)[last]
        return (after - before)[:, :, 1:].abs().mean((1, 2, 3))
