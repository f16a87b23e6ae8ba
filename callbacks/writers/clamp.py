"""Clamp: hold attention patterns at what the task knows, and any activation at a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from opsin.callbacks.writers.base import (
    ActivationWriter,
    heads_by_layer,
    heads_of_site,
    neuron_site,
    neurons_by_layer,
)
from opsin.errors import ConfigError, check_number
from opsin.interventions.intervention import Intervention, Value
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import check_share
from opsin.interventions.values.patterns import Induction, Match, PreviousToken
from opsin.interventions.values.plain import Constant
from opsin.model.sites import SiteTable

# beyond it the way from an activation to the value overflows
LARGEST_NUMBER = 1e38

SETTINGS_OF = {
    "previous_token": ("heads", "strength", "labels_only"),
    "induction": ("heads", "strength"),
    "match": ("heads", "temperature"),
    "site": ("heads", "value"),
    "neurons": ("value", "at"),
}
"""The settings that have an effect beside each pattern, a site and neurons."""


class Clamp(ActivationWriter):
    """Hold the attention pattern of heads to one the task knows, or neurons or any site to a number.

    Gradient: stopped; every value is a constant of the batch.

    Args:
        heads: ``"layer:head"``; with ``pattern`` their attention is clamped, with ``site`` it narrows
            that site down to heads of its layer.
        pattern: attention that the task knows: ``previous_token``, ``induction`` or ``match``.
        strength: previous-token and induction patterns: attention on the previous token (rest on
            oneself), or on the matching label (rest on each other label); 1 when None.
        temperature: match pattern: temperature of the softmax over cosine similarities; the hard maximum when None
            or 0.
        labels_only: previous-token pattern: whether it is clamped only in rows that hold a label.
        site: name of a site to hold at ``value``.
        neurons: ``"layer:neuron"``, neurons to hold at ``value``.
        value: the number that a site or neurons are held at.
        at: neurons ``pre`` (``mlp.hook_pre``) or ``post`` (``mlp.hook_post``) their nonlinearity; post when None.
        positions: positions (rows of a pattern) it acts at; all when None.
        members: members it acts in; all when None.
        schedule: strength at every step, in [0, 1]; 1 throughout by default.
        order: rank among writers that touch the same entries; the later wins.

    Raises:
        ConfigError: nothing or several things to clamp, or a setting without effect; when the run is built, something
            that the model does not have.
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
        super().__init__(members, schedule, order, positions)
        clamped = {"pattern": pattern, "site": site, "neurons": neurons}
        if sum(setting is not None for setting in clamped.values()) != 1:
            raise ConfigError("Clamp", clamped, "one of pattern, site and neurons, and no more")
        if pattern is not None and not heads:
            raise ConfigError("Clamp.heads", heads, "the heads whose attention is clamped, as layer:head")
        settings: dict[str, object] = {"heads": heads, "strength": strength, "temperature": temperature}
        settings |= {"labels_only": labels_only or None, "value": value, "at": at}
        _refuse_idle(pattern or ("site" if neurons is None else "neurons"), settings)
        self.heads, self.site, self.neurons = heads, site, neurons
        self.neuron_site = neuron_site("Clamp.at", at)
        if pattern is None:
            self.value = _constant(site or "neurons", value)
        else:
            self.value = _pattern(pattern, strength, temperature, labels_only)

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it holds on a model with these sites."""
        if self.neurons is not None:
            layers = neurons_by_layer("Clamp.neurons", self.neurons, sites)
            return [
                self.intervention_at(f"blocks.{layer}.{self.neuron_site}", self.value, neurons=neurons)
                for layer, neurons in layers.items()
            ]
        if self.site is None:
            layers = heads_by_layer("Clamp.heads", self.heads or [], sites)
            return [
                self.intervention_at(f"blocks.{layer}.attn.hook_pattern", self.value, heads)
                for layer, heads in layers.items()
            ]
        site = sites.find(self.site, "Clamp.site")
        heads = None if self.heads is None else heads_of_site("Clamp.heads", self.heads, site, sites)
        return [self.intervention_at(site.name, self.value, heads)]


def _refuse_idle(clamped: str, settings: Mapping[str, object]) -> None:
    """A setting that has no effect beside what is clamped is an error."""
    if clamped not in SETTINGS_OF:
        raise ConfigError("Clamp.pattern", clamped, "'previous_token', 'induction' or 'match'")
    effective = SETTINGS_OF[clamped]
    for name, value in settings.items():
        if value is not None and name not in effective:
            article = "a " if clamped == "site" else ""
            subject = f"a clamp of {article}{clamped}" if "value" in effective else f"pattern {clamped}"
            raise ConfigError(f"Clamp.{name}", value, f"nothing: {subject} has {' and '.join(effective)} only")


def _constant(clamped: str, value: float | None) -> Value:
    if value is None or not abs(value) <= LARGEST_NUMBER:
        raise ConfigError("Clamp.value", value, f"the number to hold {clamped} at, finite in single precision")
    return Constant(float(value))


def _pattern(name: str, strength: float | None, temperature: float | None, labels_only: bool) -> Value:
    strength, temperature = 1.0 if strength is None else strength, temperature or 0.0
    check_share("Clamp.strength", strength)
    check_number("Clamp.temperature", temperature, "0 (hard maximum) or more", 0)
    if name == "previous_token":
        return PreviousToken(strength, labels_only)
    return Induction(strength) if name == "induction" else Match(temperature)
