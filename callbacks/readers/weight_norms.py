"""WeightNorms: how large the weights are, by kind, over training.

Legend: M members.
"""

from __future__ import annotations

from opsin.callbacks.readers.base import ProbeReader
from opsin.metrics.weight_norms import ALL, norms_by_kind
from opsin.model.sites import SiteTable
from opsin.records.axes import Axes
from opsin.training.observers import Observation


class WeightNorms(ProbeReader):
    """Records the 2-norm of all weights of each kind, and of all together, ``[M]`` each.

    The names are ``weight_norm/embed``, ``weight_norm/attention``, ``weight_norm/mlp``, .., and ``weight_norm/all``.
    Kinds are those that the model declares of its parameters; biases count with the part that they belong to.
    Read-only.

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
    """

    def __init__(self, every: int = 50) -> None:
        super().__init__(every)

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        return {f"weight_norm/{kind}": {} for kind in (*dict.fromkeys(_kinds(sites).values()), ALL)}

    def measure(self, seen: Observation) -> None:
        found = norms_by_kind(self._module.parameters_by_name(), _kinds(self._module.sites))
        self._module.record(seen.step, {f"weight_norm/{kind}": norm for kind, norm in found.items()})


def _kinds(sites: SiteTable) -> dict[str, str]:
    """The kind of each parameter by its name."""
    return {parameter.name: parameter.kind for parameter in sites.weights}
