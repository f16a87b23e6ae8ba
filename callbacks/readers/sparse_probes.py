"""SparseProbes: from how few units of a layer each declared feature of a task can be read, over training.

Legend: M members, P layers, F features, S numbers of units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure
from PIL.Image import Image

from opsin.callbacks.readers.base import check_count
from opsin.callbacks.readers.feature_reader import FeatureReader
from opsin.callbacks.readers.run_folder import run_folder
from opsin.errors import ConfigError
from opsin.figures.sparse_probes import sparse_probe_figure
from opsin.figures.style import as_image, save_figure
from opsin.metrics.sparse_probes import probe_accuracies
from opsin.records.axes import Axes
from opsin.task import Task
from opsin.training.module import OpsinModule
from opsin.training.observers import Observation


class SparseProbes(FeatureReader):
    """Records how well linear probes on the k best units of a layer read each declared feature, for several k.

    Gurnee et al. 2023, "Finding neurons in a haystack": a feature that one unit carries is read from k = 1, one in
    superposition only from many; the curve against k tells them apart. The probes are those of
    ``opsin.metrics.sparse_probes``, fitted on half of the probe and tried on the other half. Works on any task with
    ``Task.declared_features``. Read-only, under the interventions in force.

    Recorded and logged is ``sparse_probe``, the balanced accuracy, ``[M]`` with the axes ``layer``, ``feature`` and
    ``size``: indices of the site, of the feature in the order in which the task declares them, and of k in ``sizes``.
    The run folder receives ``sparse_probes.png``, which W&B shows while training.

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
        sizes: numbers of units k, ascending.
        sites: activations ``[M, B, .., D]`` from the first to the last layer; of every block the residual stream after
            it (``hook_resid_post``), or its neurons, where it is None.

    Raises:
        ConfigError: fewer than one step or unit; when training starts, more units than a site has, a site that is the
            same for all sequences, a model without blocks of which no site is named, or a task that declares no
            feature.
    """

    name = "sparse_probes"
    metric = "sparse_probe"

    def __init__(self, every: int = 500, sizes: Sequence[int] = (1, 2, 4, 8), sites: list[str] | None = None) -> None:
        super().__init__(every, sites)
        self.sizes = [check_count("SparseProbes.sizes", size, "unit") for size in sizes]
        if not self.sizes or self.sizes != sorted({*self.sizes}):
            raise ConfigError("SparseProbes.sizes", list(sizes), "different numbers of units, ascending")

    @property
    def state_key(self) -> str:
        return self._generate_state_key(every=self.every, sizes=self.sizes, sites=self.chosen)

    def check(self, module: OpsinModule) -> None:
        super().check(module)
        for name in self.sites(module.sites):
            site = module.sites[name]
            units = site.shape(1, 1)
            width = units[-1] if "L" in site.axes or "1" in site.axes else torch.Size(units).numel()
            if self.sizes[-1] > width:
                raise ConfigError("SparseProbes.sizes", self.sizes[-1], f"at most {width}, the units of {name}")

    def task_records(self, task: Task) -> dict[str, Axes]:
        features = len(task.declared_features())
        axes = {"layer": self._layers, "feature": features, "size": len(self.sizes)}
        return {self.metric: axes} if features else {}

    def measure(self, seen: Observation) -> None:
        classes = self.classes(seen)
        by_layer = [
            torch.stack([probe_accuracies(x, found, self.sizes) for found in classes.values()], 1)
            for x in self.representations(seen)
        ]
        self._module.record(seen.step, {self.metric: torch.stack(by_layer, 1).float()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (figure := self._figure(None)) is not None:
            save_figure(figure, run_folder(trainer) / f"{self.name}.png")

    def picture(self, member: int) -> Image | None:
        """Curves of one member against k; None before the first measurement."""
        figure = self._figure([member])
        return None if figure is None else as_image(figure)

    def _figure(self, members: Sequence[int] | None) -> Figure | None:
        """The newest curves of some members, of all when None; None before the first measurement."""
        module = self._module
        if self.metric not in module.history:
            return None
        series = module.history[self.metric]
        values = series.values[-1] if members is None else series.values[-1][list(members)]
        names, title = [*module.task.declared_features()], f"Sparse probes after step {series.steps[-1]:,}"
        return sparse_probe_figure(values, self.sizes, names, title)
