"""Which memories of the simplified transformer have formed: recall of its three matrices, facts, and attention.

Legend: M members, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure
from PIL.Image import Image
from torch import Tensor

from opsin.callbacks.readers.base import ProbeReader, Requirement
from opsin.callbacks.readers.run_folder import run_folder
from opsin.errors import ConfigError
from opsin.figures.memories import memory_figure
from opsin.figures.style import as_image, save_figure
from opsin.metrics.memories import (
    BirthWeights,
    above_chance,
    bigram_kl,
    copying_scores,
    finds_answer,
    finds_successor,
    looks_back,
    lookup_scores,
    previous_token_scores,
    recall,
)
from opsin.model.sites import SiteTable
from opsin.population.folder import Curve
from opsin.records.axes import Axes
from opsin.training.module import OpsinModule
from opsin.training.observers import Observation

MEMORIES = ("W_K1", "W_K2", "W_O2")
"""The paper's names of the keys of both layers and of the second layer's output."""

PATTERNS = ("blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern")
HEAD_MATRICES = ("W_K", "W_V", "W_O")
FEED_FORWARD = "blocks.1.mlp.W"


@runtime_checkable
class KnowsBigrams(Protocol):
    """A task of tokens that follow global bigrams, but for triggers."""

    @property
    def bigrams(self) -> Float[np.ndarray, "V V"]:
        """Probability [v, x] of x after v, if v is no trigger."""

    @property
    def constant_triggers(self) -> tuple[int, ...]:
        """Tokens that are triggers in every sequence; none where each sequence has its own."""


class MemoryRecall(ProbeReader):
    """Measures what the memories of ``BirthTransformer`` recall (Bietti et al. 2023, "Birth of a Transformer").

    Recorded and logged are, ``[M]`` each, shares from 0 to 1:

    - ``recall/W_K1``: positions t whose key is the best of the first layer's keys for the position after it;
    - ``recall/W_K2``: triggers v whose key, as the first layer wrote it, is the best of those of all triggers for v;
      all tokens where each sequence has triggers of its own;
    - ``recall/W_O2``: tokens v that have the largest logit where the second layer attends to v;
    - ``recall_above_chance/W_K1``, ``/W_K2``, ``/W_O2``: (R - 1/c) / (1 - 1/c), with c candidates;
    - ``attention/looks_back``: successors of triggers that the first layer leaves for the position before them;
    - ``attention/finds_answer``, ``attention/finds_successor``: rows of repeated triggers at which the second layer
      attends most to the right token, and right after the same token;
    - ``feed_forward_kl`` (nats), with a linear map: mean over tokens that are no trigger of the divergence of what
      the map says after a token from the task's bigrams.

    Attention is that on the probe under the interventions in force. ``memories.png`` in the run folder has the recall
    above chance of all members over training; W&B receives a member's.

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
        positions: positions from the first on that ``W_K1`` is asked about; all of a sequence when None.

    Raises:
        ConfigError: fewer than one step or two positions; when training starts, a model without these matrices, or a
            task without bigrams.
    """

    name = "memories"

    def __init__(self, every: int = 10, positions: int | None = None) -> None:
        super().__init__(every)
        if positions is not None and positions < 2:
            raise ConfigError("MemoryRecall.positions", positions, "at least 2, or null for all of a sequence")
        self.positions = positions

    def sites(self, table: SiteTable) -> list[str]:
        return list(PATTERNS)

    def requirements(self) -> list[Requirement]:
        needed = ["pos_embed.W_pos", *(f"blocks.{layer}.attn.{end}" for layer in range(2) for end in HEAD_MATRICES)]

        def without_matrices(module: OpsinModule) -> str | None:
            table = module.sites.weights
            fits = all(name in table for name in needed) and "blocks.0.attn.W_Q" not in table and table.size("H") == 1
            return None if fits else type(module.network).__name__

        def without_bigrams(module: OpsinModule) -> str | None:
            return None if isinstance(module.task, KnowsBigrams) else type(module.task).__name__

        return [
            Requirement("MemoryRecall", without_matrices, "BirthTransformer, or one with its weights"),
            Requirement("MemoryRecall", without_bigrams, "a task of bigrams with triggers"),
        ]

    def check(self, module: OpsinModule) -> None:
        most = module.task.layout.positions
        if self.positions is not None and self.positions > most:
            raise ConfigError("MemoryRecall.positions", self.positions, f"at most the sequence's {most}")

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        names = [f"{kind}/{memory}" for kind in ("recall", "recall_above_chance") for memory in MEMORIES]
        names += [f"attention/{name}" for name in ("looks_back", "finds_answer", "finds_successor")]
        return {name: {} for name in [*names, *(["feed_forward_kl"] if FEED_FORWARD in sites.weights else [])]}

    def measure(self, seen: Observation) -> None:
        first, second = (seen.activations[site][:, :, 0] for site in PATTERNS)
        found = {
            "attention/looks_back": looks_back(first, seen.batch),
            "attention/finds_answer": finds_answer(second, seen.batch),
            "attention/finds_successor": finds_successor(second, seen.batch),
        }
        self._module.record(seen.step, self._recalled() | found)

    def _recalled(self) -> dict[str, Float[Tensor, " M"]]:
        task = self._module.task
        named = {name: value.detach() for name, value in self._module.parameters_by_name().items()}
        weights, positions = _birth_weights(named), self.positions or task.layout.positions
        assert isinstance(task, KnowsBigrams)
        every, triggers = torch.arange(len(task.bigrams)), torch.tensor(task.constant_triggers, dtype=torch.int64)
        scores = {
            "W_K1": previous_token_scores(weights, positions),
            "W_K2": lookup_scores(weights, (triggers if len(triggers) > 1 else every).to(weights.embed.device)),
            "W_O2": copying_scores(weights),
        }
        found: dict[str, Tensor] = {}
        for name, of_all in scores.items():
            recalled = recall(of_all, torch.arange(of_all.shape[1], device=of_all.device))
            found |= {
                f"recall/{name}": recalled,
                f"recall_above_chance/{name}": above_chance(recalled, of_all.shape[2]),
            }
        if FEED_FORWARD in named:
            facts = torch.isin(every, triggers, invert=True).nonzero()[:, 0].to(weights.embed.device)
            said = weights.embed[:, facts] @ named[FEED_FORWARD] @ weights.unembed
            bigrams = torch.from_numpy(task.bigrams).to(said)[facts]
            found["feed_forward_kl"] = bigram_kl(said, bigrams)
        return found

    # ---- the figure -----------------------------------------------------------------------------

    def picture(self, member: int) -> Image | None:
        """One member's figure; None before anything is measured."""
        return as_image(self._figure(slice(member, member + 1))) if "recall/W_K1" in self._module.history else None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        save_figure(self._figure(slice(None)), run_folder(trainer) / f"{self.name}.png")

    def _figure(self, members: slice) -> Figure:
        shares = {f"recall of {name}": f"recall_above_chance/{name}" for name in MEMORIES}
        shares["copied right"] = "train/trigger_accuracy"
        nats = {"loss of triggers": "train/trigger_loss", "loss of others": "train/other_loss"}
        nats["feed-forward from bigrams"] = "feed_forward_kl"
        return memory_figure(*(self._curves(names, members) for names in (shares, nats)))

    def _curves(self, names: dict[str, str], members: slice) -> dict[str, Curve]:
        history, found = self._module.history, {}
        for label, metric in names.items():
            if metric in history:
                steps, values = history[metric].arrays()
                found[label] = history.sequences(steps), values[:, members]
        return found


def _birth_weights(named: dict[str, Tensor]) -> BirthWeights:
    matrices = {
        f"{kind}_{layer}": named[f"blocks.{layer}.attn.{end}"][:, 0]
        for layer in range(2)
        for kind, end in zip(("key", "value", "output"), HEAD_MATRICES, strict=True)
    }
    return BirthWeights(named["embed.W_E"], named["pos_embed.W_pos"], **matrices, unembed=named["unembed.W_U"])
