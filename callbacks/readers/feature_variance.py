"""FeatureVariance: how much of the variance of a model's representations each declared feature of a task explains.

Legend: M members, P layers, F features.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from PIL.Image import Image

from opsin.callbacks.readers.feature_reader import FeatureReader
from opsin.callbacks.readers.run_folder import run_folder
from opsin.figures.feature_variance import feature_variance_figure
from opsin.figures.style import as_image, save_figure
from opsin.metrics.clusters import explained_share
from opsin.records.axes import Axes
from opsin.task import Task
from opsin.training.observers import Observation


class FeatureVariance(FeatureReader):
    """Records the share of the variance of every layer's representation that each declared feature explains.

    Lampinen, Chan and Hermann 2024, "Learned feature representations are biased by complexity, learning order,
    position, and more": of features that are all read out without an error, the easy ones take up far more of the
    variance. The share is the R^2 of a regression of all units on the feature
    (``opsin.metrics.clusters.explained_share``), on the probe, at the last scored position where the activation has
    positions. Works on any task with ``Task.declared_features``. Read-only, under the interventions in force.

    Recorded and logged are ``feature_variance``, ``[M]`` with the axes ``layer`` (index of the site) and ``feature``
    (index in the order in which the task declares them), and ``feature_variance/NAME``, ``[M]``, of the last site. The
    run folder receives ``feature_variance.png``, which W&B shows while training. The module's summary receives under
    ``feature_variance`` the final share of every feature by site, for several members as a list.

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
        sites: activations ``[M, B, .., D]`` from the first to the last layer; of every block the residual stream after
            it (``hook_resid_post``), or its neurons, where it is None.

    Raises:
        ConfigError: fewer than one step; when training starts, a site that is the same for all sequences, a model
            without blocks of which no site is named, or a task that declares no feature.
    """

    name = "feature_variance"

    def __init__(self, every: int = 100, sites: list[str] | None = None) -> None:
        super().__init__(every, sites)

    def task_records(self, task: Task) -> dict[str, Axes]:
        features = task.declared_features()
        if not features:
            return {}
        shares = {self.name: {"layer": self._layers, "feature": len(features)}}
        return {**shares, **{f"{self.name}/{feature}": {} for feature in features}}

    def measure(self, seen: Observation) -> None:
        classes = self.classes(seen)
        by_layer = [
            torch.stack([explained_share(x, found) for found in classes.values()], 1)
            for x in self.representations(seen)
        ]
        shares = torch.stack(by_layer, 1).float()  # M P F
        last = {f"{self.name}/{name}": shares[:, -1, index] for index, name in enumerate(classes)}
        self._module.record(seen.step, {self.name: shares, **last})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, names = self._module, [*self._module.task.declared_features()]
        if self.name not in module.history:
            return
        final = module.history[self.name].values[-1]
        rows: list[Any] = [
            {name: [_finite_share(x) for x in final[member, :, index]] for index, name in enumerate(names)}
            for member in range(module.n_members)
        ]
        self.summarise(self.name, rows)
        save_figure(feature_variance_figure(module.history, names), run_folder(trainer) / f"{self.name}.png")

    def picture(self, member: int) -> Image | None:
        """Shares of one member over training and by layer; None before the first measurement."""
        history, names = self._module.history, [*self._module.task.declared_features()]
        return as_image(feature_variance_figure(history, names, [member])) if self.name in history else None


def _finite_share(value: float) -> float | None:
    """A number for a JSON document; None where there is none."""
    return float(value) if value == value else None
