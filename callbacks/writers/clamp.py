"""The only writers: callbacks that overwrite activations while the model learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from lightning.pytorch import Callback

from opsin.callbacks.writers.base import _neuron_site, _neurons
from opsin.errors import ConfigError
from opsin.interventions.intervention import Intervention, Value
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection, check_share, entries, parse_pairs
from opsin.interventions.values.patterns import Induction, Match, PreviousToken
from opsin.interventions.values.plain import Constant
from opsin.model.sites import SiteTable

# beyond it the way from an activation to the value overflows
LARGEST = 1e38


class Clamp(Callback):
    """Hold the attention pattern of heads to one the task knows, or neurons or any site to a number.

    Gradient: stopped; every value is a constant of the batch.

    Args:
        heads: ``"layer:head"``; with ``pattern`` their attention is clamped, with ``site`` it narrows
            that site down to heads of its layer.
        pattern: ``previous_token``, ``induction`` or ``match``.
        strength: previous-token and induction patterns: attention on the previous token (rest on
            oneself), or on the matching label (rest on each other label); 1 when None.
        temperature: match pattern: of the softmax; the hard maximum when None or 0.
        labels_only: previous-token pattern: only in rows that hold a label.
        site: a site to hold at ``value``.
        neurons: ``"layer:neuron"``, neurons to hold at ``value``.
        value: the number.
        at: neurons ``pre`` (``mlp.hook_pre``) or ``post`` (``mlp.hook_post``) their nonlinearity; post when None.
        positions: positions (rows of a pattern) it acts at; all when None.
        members: members it acts in; all when None.
        schedule: when, and how strongly.
        order: rank among writers that touch the same entries; the later wins.
    """

    def __init__(
        self,
        heads: list[str] | None = None,
        pattern: Literal["previous_token", "induction", "match"] | None = None,
        strength: float | None = None,
        temperature: float | None = None,
        labels_only: bool = False,
        site: str | None = None,
        neurons: list[str] | None = None,
        value: float | None = None,
        at: Literal["pre", "post"] | None = None,
        positions: list[int] | None = None,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        held = {"pattern": pattern, "site": site, "neurons": neurons}
        if sum(what is not None for what in held.values()) != 1:
            raise ConfigError("Clamp", held, "one of pattern, site and neurons, and no more")
        if pattern is not None and not heads:
            raise ConfigError("Clamp.heads", heads, "the heads whose attention is clamped, as layer:head")
        given: dict[str, object] = {"heads": heads, "strength": strength, "temperature": temperature}
        given |= {"labels_only": labels_only or None, "value": value, "at": at}
        _refuse_idle(pattern or ("site" if neurons is None else "neurons"), given)
        self.heads, self.site, self.neurons = heads, site, neurons
        self.neuron_site = _neuron_site("Clamp.at", at)
        self.positions, self.members = entries(positions), entries(members)
        self.schedule, self.order = schedule, order
        if pattern is None:
            self.value = _constant(site or "neurons", value)
        else:
            self.value = _pattern(pattern, strength, temperature, labels_only)

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it holds on a model with these sites."""
        if self.neurons is not None:
            pairs = _neurons("Clamp.neurons", self.neurons, sites)
            return [self._at(f"blocks.{layer}.{self.neuron_site}", neurons=tuple(n)) for layer, n in pairs.items()]
        if self.site is not None and self.heads is None:
            return [self._at(sites.find(self.site, "Clamp.site").name)]
        return self._at_heads(sites)

    def _at_heads(self, sites: SiteTable) -> list[Intervention]:
        pairs = parse_pairs("Clamp.heads", self.heads or [], sites.layers, sites.size("H"), "head")
        if self.site is None:
            return [self._at(f"blocks.{layer}.attn.hook_pattern", heads=tuple(h)) for layer, h in pairs.items()]
        site = sites.find(self.site, "Clamp.site")
        if list(pairs) != [site.layer]:
            raise ConfigError("Clamp.heads", self.heads, f"heads of the layer of {site.name}")
        return [self._at(site.name, heads=tuple(h)) for h in pairs.values()]

    def _at(self, site: str, **selected: tuple[int, ...]) -> Intervention:
        selection = Selection(positions=self.positions, members=self.members, **selected)
        return Intervention("Clamp", site, selection, self.value, self.schedule, self.order)


HAS = {
    "previous_token": ("heads", "strength", "labels_only"),
    "induction": ("heads", "strength"),
    "match": ("heads", "temperature"),
    "site": ("heads", "value"),
    "neurons": ("value", "at"),
}


def _refuse_idle(kind: str, given: Mapping[str, object]) -> None:
    if kind not in HAS:
        raise ConfigError("Clamp.pattern", kind, "'previous_token', 'induction' or 'match'")
    for name, value in given.items():
        if value is not None and name not in HAS[kind]:
            what = f"a clamp of {'a ' if kind == 'site' else ''}{kind}" if "value" in HAS[kind] else f"pattern {kind}"
            raise ConfigError(f"Clamp.{name}", value, f"nothing: {what} has {' and '.join(HAS[kind])} only")


def _constant(what: str, value: float | None) -> Value:
    if value is None or not abs(value) <= LARGEST:
        raise ConfigError("Clamp.value", value, f"the number to hold {what} at, finite in single precision")
    return Constant(float(value))


def _pattern(name: str, strength: float | None, temperature: float | None, labels_only: bool) -> Value:
    strength, temperature = 1.0 if strength is None else strength, temperature or 0.0
    check_share("Clamp.strength", strength)
    if temperature < 0:
        raise ConfigError("Clamp.temperature", temperature, "0 (hard maximum) or more")
    if name == "previous_token":
        return PreviousToken(strength, labels_only)
    return Induction(strength) if name == "induction" else Match(temperature)
