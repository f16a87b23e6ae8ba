"""Ablate: silence heads, neurons or whole sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from opsin.callbacks.writers.base import ActivationWriter, heads_by_layer, neuron_site, neurons_by_layer
from opsin.errors import ConfigError
from opsin.interventions.intervention import Intervention, Value
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.noise import salt_of
from opsin.interventions.values.plain import BatchMean, Constant, Noise, OverallMean, Resample
from opsin.model.sites import SiteTable

ABLATIONS: dict[str, Callable[[str], Value]] = {
    "zero": lambda site: Constant(0.0),
    "mean": lambda site: BatchMean(),
    "overall_mean": lambda site: OverallMean(),
    "resample": lambda site: Resample(),
    "noise": lambda site: Noise(salt_of(site)),
}
"""What replaces an activation, by the name of the ablation and the site."""


class Ablate(ActivationWriter):
    """Silence heads, neurons or whole sites: by zero, their mean, another example or noise.

    Gradient: stopped at what is silenced, and nothing flows through what replaces it.

    Args:
        heads: heads that are silenced, ``"layer:head"``. Zero clears the head's values (``hook_v``), as the
            reference system does; the others replace what it read (``hook_z``), which is all that a head hands on.
            In its values they would still be mixed by the head's own attention.
        neurons: neurons of the MLPs that are silenced, ``"layer:neuron"``.
        sites: whole sites, for example ``blocks.0.hook_attn_out`` or ``hook_embed``.
        value: ``zero``; ``mean`` (over the batch, at each position and member, so that what the position tells stays);
            ``overall_mean`` (over the batch and all positions, one number a neuron or entry); ``resample`` (the
            activation of another example of the batch, at each step another, the same for all that is
            resampled in it); ``noise`` (normal, with mean and standard deviation over the batch). A batch of
            one is its own mean, example and noise, which change nothing and end the run as an idle writer does.
        at: neurons ``pre`` (``mlp.hook_pre``) or ``post`` (``mlp.hook_post``) their nonlinearity; post when None.
        positions: positions it is silenced at; all when None.
        members: members it is silenced in; all when None.
        schedule: strength at every step, in [0, 1]; 1 throughout by default.
        order: rank among writers that touch the same entries; the later wins.

    Raises:
        ConfigError: nothing to silence, an unknown value, or ``at`` without neurons; when the run is built, something
            that the model does not have, or a value that the site cannot have.
    """

    def __init__(
        self,
        heads: list[str] | None = None,
        neurons: list[str] | None = None,
        sites: list[str] | None = None,
        value: Literal["zero", "mean", "overall_mean", "resample", "noise"] = "zero",
        at: Literal["pre", "post"] | None = None,
        positions: list[int] | None = None,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        super().__init__(members, schedule, order, positions)
        if not (heads or neurons or sites):
            raise ConfigError("Ablate", None, "heads, neurons or sites")
        if value not in ABLATIONS:
            raise ConfigError("Ablate.value", value, f"one of {', '.join(ABLATIONS)}")
        if at is not None and not neurons:
            raise ConfigError("Ablate.at", at, "nothing: without neurons it has no effect")
        self.heads, self.neurons, self.sites, self.value = heads, neurons, sites, value
        self.neuron_site = neuron_site("Ablate.at", at)

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it silences on a model with these sites."""
        silenced = []
        if self.heads:
            head_site = "attn.hook_v" if self.value == "zero" else "attn.hook_z"
            layers = heads_by_layer("Ablate.heads", self.heads, sites)
            silenced += [self._silence(f"blocks.{layer}.{head_site}", heads=heads) for layer, heads in layers.items()]
        if self.neurons:
            layers = neurons_by_layer("Ablate.neurons", self.neurons, sites)
            silenced += [self._silence(f"blocks.{layer}.{self.neuron_site}", neurons=n) for layer, n in layers.items()]
        return silenced + [self._silence(self._whole_site(sites, name)) for name in self.sites or ()]

    def _whole_site(self, sites: SiteTable, name: str) -> str:
        site = sites.find(name, "Ablate.sites")
        if self.value != "zero" and "B" not in site.axes:
            raise ConfigError("Ablate.value", self.value, f"zero: {name} is the same for the whole batch")
        if self.value == "overall_mean" and not site.axes.startswith("MBL"):
            raise ConfigError("Ablate.value", self.value, f"another: {name} has not one vector for each position")
        return site.name

    def _silence(self, site: str, **selected: tuple[int, ...]) -> Intervention:
        return self.intervention_at(site, ABLATIONS[self.value](site), **selected)
