"""Ablate: silence heads, neurons or whole sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lightning.pytorch import Callback

from opsin.callbacks.writers.base import _neuron_site, _neurons
from opsin.errors import ConfigError
from opsin.interventions.intervention import Intervention, Value
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection, entries, parse_pairs
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
"""What takes an activation's place, by its name and the site."""


class Ablate(Callback):
    """Silence heads, neurons or whole sites: by zero, their mean, another example or noise.

    Gradient: stopped at what is silenced, and nothing flows through what takes its place.

    Args:
        heads: ``"layer:head"``. Zero clears the head's values (``hook_v``), as the reference system does;
            the others replace what it read (``hook_z``), which is all that a head hands on. In its values
            they would still be mixed by the head's own attention.
        neurons: ``"layer:neuron"``.
        sites: whole sites, for example ``blocks.0.hook_attn_out`` or ``hook_embed``.
        value: ``zero``; ``mean`` (over the batch, at each position and member, so that what the position tells stays);
            ``overall_mean`` (over the batch and all positions, one number a neuron or entry); ``resample`` (the
            activation of another example of the batch, at each step another, the same for all that is
            resampled in it); ``noise`` (normal, with mean and standard deviation over the batch). A batch of
            one is its own mean, example and noise, which change nothing and end the run as an idle writer does.
        at: neurons ``pre`` (``mlp.hook_pre``) or ``post`` (``mlp.hook_post``) their nonlinearity; post when None.
        positions: positions it is silenced at; all when None.
        members: members it is silenced in; all when None.
        schedule: when, and how strongly.
        order: rank among writers that touch the same entries; the later wins.
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
        if not (heads or neurons or sites):
            raise ConfigError("Ablate", None, "heads, neurons or sites")
        if value not in ABLATIONS:
            raise ConfigError("Ablate.value", value, f"one of {', '.join(ABLATIONS)}")
        if at is not None and not neurons:
            raise ConfigError("Ablate.at", at, "nothing: without neurons it has no effect")
        self.heads, self.neurons, self.sites, self.value = heads, neurons, sites, value
        self.neuron_site = _neuron_site("Ablate.at", at)
        self.positions, self.members = entries(positions), entries(members)
        self.schedule, self.order = schedule, order

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it silences on a model with these sites."""
        at_head = "attn.hook_v" if self.value == "zero" else "attn.hook_z"
        found = []
        if self.heads:
            pairs = parse_pairs("Ablate.heads", self.heads, sites.layers, sites.size("H"), "head")
            found += [self._at(f"blocks.{layer}.{at_head}", heads=tuple(h)) for layer, h in pairs.items()]
        if self.neurons:
            pairs = _neurons("Ablate.neurons", self.neurons, sites)
            found += [self._at(f"blocks.{layer}.{self.neuron_site}", neurons=tuple(n)) for layer, n in pairs.items()]
        return found + [self._at(self._whole(sites, name)) for name in self.sites or ()]

    def _whole(self, sites: SiteTable, name: str) -> str:
        site = sites.find(name, "Ablate.sites")
        if self.value != "zero" and "B" not in site.axes:
            raise ConfigError("Ablate.value", self.value, f"zero: {name} is the same for the whole batch")
        if self.value == "overall_mean" and not site.axes.startswith("MBL"):
            raise ConfigError("Ablate.value", self.value, f"another: {name} has not one vector for each position")
        return site.name

    def _at(self, site: str, **selected: tuple[int, ...]) -> Intervention:
        selection = Selection(positions=self.positions, members=self.members, **selected)
        return Intervention("Ablate", site, selection, ABLATIONS[self.value](site), self.schedule, self.order)
