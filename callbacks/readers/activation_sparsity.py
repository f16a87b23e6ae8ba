"""Neurons that are silent, always active, or active for one reason: a position or a token.

Legend: M members, B batch, L positions, N neurons.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from opsin.callbacks.readers.base import ProbeReader, Requirement, needs_neurons
from opsin.errors import ConfigError
from opsin.metrics.activity import always_on, by_position, by_tokens, dead
from opsin.model.sites import SiteTable
from opsin.records.axes import Axes
from opsin.task import Batch
from opsin.training.module import OpsinModule
from opsin.training.observers import Observation

NEURON_KINDS = ("dead", "always_on", "positional", "current_token", "previous_token", "bigram")
TOKEN_KINDS = NEURON_KINDS[3:]
"""Kinds that ask which token every position holds."""


class ActivationSparsity(ProbeReader):
    """Counts, in every layer, neurons that are never or always active, and those that one thing explains.

    A neuron is active where its pre-activation is above 0. Recorded and logged on the probe, under the interventions in
    force, is for every layer and kind the number of neurons ``neurons/LAYER/KIND``, ``[M]``; definitions after Voita et
    al. 2023 ("Neurons in large language models: Dead, n-gram, positional"), with these kinds:

    - ``dead``: active nowhere on the probe; ``always_on``: active everywhere on it;
    - ``positional``: more than ``explained`` of the variance of its being active is explained by the position;
    - ``current_token``, ``previous_token``, ``bigram``: the same by the token, by the one before it, by both together.

    Explained variance is corrected for the number of positions, tokens or pairs (``opsin.metrics.activity``). A neuron
    may be of several of the latter kinds; dead and always active ones are of none of them. A member whose activations
    are no numbers has no counts (nan).

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
        kinds: kinds of neurons that are counted, all six when None.
        explained: share of the variance above which one thing explains a neuron, from 0 to below 1.

    Raises:
        ConfigError: an unknown kind, or a share outside its range; when training starts, a model without MLPs, and
            kinds that ask for a token at every position on a task that has none there.
    """

    def __init__(
        self,
        every: int = 100,
        kinds: list[Literal["dead", "always_on", "positional", "current_token", "previous_token", "bigram"]]
        | None = None,
        explained: float = 0.5,
    ) -> None:
        super().__init__(every)
        chosen = list(NEURON_KINDS if kinds is None else kinds)
        unknown = [kind for kind in chosen if kind not in NEURON_KINDS]
        if unknown or not chosen:
            expected = f"any of {', '.join(NEURON_KINDS)}"
            raise ConfigError("ActivationSparsity.kinds", unknown[0] if unknown else [], expected)
        if not 0 <= explained < 1:
            raise ConfigError("ActivationSparsity.explained", explained, "a share from 0 to below 1")
        self.kinds, self.explained = chosen, explained

    def sites(self, table: SiteTable) -> list[str]:
        return [site.name for site in table if site.name.endswith(".mlp.hook_pre") and "L" in site.axes]

    def requirements(self) -> list[Requirement]:
        by_token = [kind for kind in self.kinds if kind in TOKEN_KINDS]

        def lacking(module: OpsinModule) -> list[str] | None:
            return by_token if by_token and module.task.layout.features else None

        without = ", ".join(kind for kind in NEURON_KINDS if kind not in TOKEN_KINDS)
        tokens = f"any of {without}: not every position of this task holds a token"
        return [
            needs_neurons("ActivationSparsity", "neurons: model.transformer.mlp_ratio"),
            Requirement("ActivationSparsity", self._lacking_rows, "one whose neurons read one position each"),
            Requirement("ActivationSparsity.kinds", lacking, tokens),
        ]

    def _lacking_rows(self, module: OpsinModule) -> str | None:
        return None if self.sites(module.sites) else f"a {type(module.network).__name__}"

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        layers = [sites[site].layer for site in self.sites(sites)]
        return {f"neurons/{layer}/{kind}": {} for layer in layers for kind in self.kinds}

    def measure(self, seen: Observation) -> None:
        counts = {}
        for site in self.sites(self._module.sites):
            layer, activation = self._module.sites[site].layer, seen.activations[site]
            known, active = activation.isfinite().flatten(1).all(1), activation > 0
            for kind in self.kinds:
                count = self._of_kind(kind, active, seen.batch).sum(1)
                counts[f"neurons/{layer}/{kind}"] = count.float().where(known, torch.nan)
        self._module.record(seen.step, counts)

    def _of_kind(self, kind: str, active: Bool[Tensor, "M B L N"], batch: Batch) -> Bool[Tensor, "M N"]:
        """Which neurons of a layer are of this kind."""
        match kind:
            case "dead":
                return dead(active)
            case "always_on":
                return always_on(active)
            case "positional":
                share = by_position(active)
            case "current_token":
                share = by_tokens(active, batch.tokens, 0)
            case "previous_token":
                # the token of the row before, and its neurons' activity one row later
                share = by_tokens(active[:, :, 1:], batch.tokens[..., :-1], 0)
            case _:
                share = by_tokens(active, batch.tokens, 1)
        return share > self.explained
