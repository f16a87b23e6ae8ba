"""What readers of declared features share: the representation of every layer, and the class of every sequence.

Legend: M members, B sequences of the probe, L positions, D units, F features.
"""

from __future__ import annotations

from abc import ABC

from jaxtyping import Float, Int
from torch import Tensor

from opsin.callbacks.readers.base import ProbeReader, Requirement
from opsin.errors import ConfigError
from opsin.model.sites import SiteTable
from opsin.records.axes import Axes
from opsin.training.module import OpsinModule
from opsin.training.observers import Observation

LAYER_SITES = ("hook_resid_post", "mlp.hook_post")
"""What stands for a layer's representation: of the first of these that a block has."""


class FeatureReader(ProbeReader, ABC):
    """A reader of the features that a task declares (``Task.declared_features``), in the layers of any model.

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
        sites: activations ``[M, B, .., D]`` from the first to the last layer; of every block the residual stream after
            it (``hook_resid_post``), or its neurons, where it is None.

    Raises:
        ConfigError: fewer than one step; when training starts, a site that is the same for all sequences, a model
            without blocks of which no site is named, or a task that declares no feature.
    """

    def __init__(self, every: int, sites: list[str] | None) -> None:
        super().__init__(every)
        if sites == []:
            expected = "names of activations, or null for those of all blocks"
            raise ConfigError(f"{type(self).__name__}.sites", [], expected)
        self.chosen, self._layers = sites, 1

    @property
    def state_key(self) -> str:
        return self._generate_state_key(every=self.every, sites=self.chosen)

    def sites(self, table: SiteTable) -> list[str]:
        if self.chosen is not None:
            return self.chosen
        names = [[f"blocks.{layer}.{site}" for site in LAYER_SITES] for layer in range(table.layers)]
        return [next((name for name in layer if name in table), layer[0]) for layer in names]

    def requirements(self) -> list[Requirement]:
        def without_features(module: OpsinModule) -> str | None:
            return None if module.task.declared_features() else type(module.task).__name__

        def without_blocks(module: OpsinModule) -> str | None:
            return None if self.sites(module.sites) else "a model without blocks"

        reader = type(self).__name__
        return [
            Requirement(reader, without_features, "a task that declares features"),
            Requirement(f"{reader}.sites", without_blocks, "names of activations of this model"),
        ]

    def check(self, module: OpsinModule) -> None:
        for name in self.sites(module.sites):
            axes = module.sites[name].axes
            if not axes.startswith("MB") or len(axes) < 3:
                expected = "activations that differ between sequences"
                raise ConfigError(f"{type(self).__name__}.sites", name, expected)

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        # all that it records depends on the task, one axis of it on the model: this is called first
        self._layers = max(1, len(self.sites(sites)))
        return {}

    def representations(self, seen: Observation) -> list[Float[Tensor, "M B D"]]:
        """What every layer holds of every sequence: at the last scored position, where it has positions.

        Args:
            seen: what the probe shows.
        """
        found = []
        for site in self.sites(self._module.sites):
            x, axes = seen.activations[site], self._module.sites[site].axes
            if "L" in axes:
                x = x.select(axes.index("L"), seen.batch.layout.scored[-1])
            found.append(x.flatten(2))
        return found

    def classes(self, seen: Observation) -> dict[str, Int[Tensor, "M B"]]:
        """The class of every sequence, by the name of the feature.

        Args:
            seen: what the probe shows.
        """
        return {name: feature(seen.batch) for name, feature in self._module.task.declared_features().items()}
