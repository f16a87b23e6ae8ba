"""Preserve: hold what heads attend to, or LayerNorms divide by, at what it is without the other writers."""

from __future__ import annotations

from typing import Literal

from opsin.callbacks.writers.base import ActivationWriter, check_layer
from opsin.errors import ConfigError
from opsin.interventions.intervention import Intervention, Source
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.passes import FromPass
from opsin.model.sites import SiteTable

PRESERVED = {
    "patterns": "attn.hook_pattern",
    "values": "attn.hook_v",
    "queries": "attn.hook_rot_q",
    "keys": "attn.hook_rot_k",
}
"""What a block's heads can be held at, and the name of its site within the block."""

SCALE_SUFFIX = ".hook_scale"


class Preserve(ActivationWriter):
    """Hold patterns, values, queries, keys or LayerNorm scales at what they are in a pass without interventions.

    Beside an ablation this isolates the paths that do not run through what is preserved. Reference
    options ``preserve_patterns``, ``preserve_values``, ``preserve_queries``, ``preserve_keys``. With the scale of the
    last LayerNorm preserved, ablated neurons of the last layer have their direct effect alone: none of it runs through
    the standard deviation that the LayerNorm divides by (Stolfo et al. 2024, "Confidence regulation neurons in
    language models", section 3; the mean is taken off anew).

    Gradient: flows into the pass without interventions unless ``detach``. That pass runs at every step.

    Args:
        what: any of ``patterns``, ``values``, ``queries``, ``keys`` (the latter two after rotation) and ``scales``.
        layers: blocks in which all but scales are preserved; all when None.
        norms: LayerNorms whose scale is preserved, ``ln_final`` or for example ``blocks.0.ln2``; the last when None.
        detach: whether gradient stops at what is preserved.
        members: members it acts in; all when None.
        schedule: strength at every step, in [0, 1]; 1 throughout by default.
        order: rank among writers that touch the same entries; the later wins. Beside an ablation of
            values give the ablation the higher order.

    Raises:
        ConfigError: something else to preserve, or layers or norms of nothing; when the run is built, a layer or a
            LayerNorm that does not exist.
    """

    def __init__(
        self,
        what: list[Literal["patterns", "values", "queries", "keys", "scales"]],
        layers: list[int] | None = None,
        norms: list[str] | None = None,
        detach: bool = False,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        super().__init__(members, schedule, order)
        known = (*PRESERVED, "scales")
        unknown = [name for name in what if name not in known]
        if unknown or not what:
            raise ConfigError("Preserve.what", unknown[0] if unknown else [], f"any of {', '.join(known)}")
        if norms is not None and "scales" not in what:
            raise ConfigError("Preserve.norms", norms, "nothing: without scales they have no effect")
        if layers is not None and set(what) == {"scales"}:
            raise ConfigError("Preserve.layers", layers, "nothing: scales are named by norms")
        self.what, self.layers, self.norms, self.detach = what, layers, norms, detach

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it holds on a model with these sites."""
        layers = range(sites.layers) if self.layers is None else self.layers
        for layer in layers:
            check_layer("Preserve.layers", layer, sites)
        block_sites = [PRESERVED[name] for name in self.what if name != "scales"]
        names = [f"blocks.{layer}.{site}" for layer in layers for site in block_sites]
        names += self._scales(sites) if "scales" in self.what else []
        return [self.intervention_at(name, FromPass(Source(name, detach=self.detach))) for name in names]

    def _scales(self, sites: SiteTable) -> list[str]:
        known = [site.name.removesuffix(SCALE_SUFFIX) for site in sites if site.name.endswith(SCALE_SUFFIX)]
        if not known:
            raise ConfigError("Preserve.what", "scales", "nothing of them: this model has no LayerNorm")
        norms = ["ln_final"] if self.norms is None else self.norms
        unknown = [name for name in norms if name not in known]
        if unknown or not norms:
            raise ConfigError("Preserve.norms", unknown[0] if unknown else [], f"any of {', '.join(known)}")
        return [name + SCALE_SUFFIX for name in norms]
