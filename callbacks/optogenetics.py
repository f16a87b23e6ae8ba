"""The only writers: callbacks that overwrite activations while the model learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from lightning.pytorch import Callback

from opsin import interventions
from opsin.errors import ConfigError
from opsin.interventions import (
    BatchMean,
    Clipped,
    Constant,
    Induction,
    Match,
    Noise,
    OverallMean,
    PreviousToken,
    Resample,
    check_share,
)
from opsin.noise import salt_of
from opsin.passes import Intervention, Selection, Value, entries
from opsin.plan import parse_pairs
from opsin.schedules import Schedule
from opsin.sites import SiteTable

# beyond it the way from an activation to the value overflows
LARGEST = 1e38

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


class Clip(Callback):
    """Keep neurons, where the sequence repeats, from passing the mean they have where it does not.

    Acts at queries, the rows whose answer stands in the context; the mean is over the batch and all other rows, per
    member and neuron. Entries beyond it are set to it, all others stay. Stolfo et al. 2024 ("Confidence regulation
    neurons in language models"), the case study of induction: whether a neuron's change on the repeated part matters.
    Gradient: stopped at the entries that are set, and at the mean.

    Args:
        neurons: ``"layer:neuron"``.
        side: the entries that are set: those ``above`` the mean, or ``below`` it.
        at: neurons ``pre`` (``mlp.hook_pre``) or ``post`` (``mlp.hook_post``) their nonlinearity; post when None.
        members: members it acts in; all when None.
        schedule: when, and how strongly.
        order: rank among writers that touch the same entries; the later wins.

    Raises:
        ConfigError: a side or a place that is none; when the run is built, a neuron that does not exist.
    """

    def __init__(
        self,
        neurons: list[str],
        side: Literal["above", "below"] = "above",
        at: Literal["pre", "post"] | None = None,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        if side not in ("above", "below"):
            raise ConfigError("Clip.side", side, "'above' or 'below'")
        self.neurons, self.value, self.members = neurons, Clipped(side), entries(members)
        self.neuron_site = _neuron_site("Clip.at", at)
        self.schedule, self.order = schedule, order

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it clips on a model with these sites."""
        pairs = _neurons("Clip.neurons", self.neurons, sites)
        return [
            Intervention(
                "Clip",
                f"blocks.{layer}.{self.neuron_site}",
                Selection(neurons=tuple(chosen), members=self.members),
                self.value,
                self.schedule,
                self.order,
            )
            for layer, chosen in pairs.items()
        ]


class Disallow(Callback):
    """Keep heads from attending to the previous token, or to anything but labels.

    Acts on the scores, ahead of the softmax: what the head would have paid goes to the other keys.
    Gradient: stopped at the scores that are overwritten.

    Args:
        heads: ``"layer:head"``.
        attention: ``previous_token`` (in every row but the first) or ``non_labels`` (in rows whose
            prediction is scored: every key that holds no label, the row's own included).
        labels_only: previous_token: only in rows that hold a label.
        members: members it acts in; all when None.
        schedule: when, and how strongly.
        order: rank among writers that touch the same entries; the later wins.
    """

    def __init__(
        self,
        heads: list[str],
        attention: Literal["previous_token", "non_labels"],
        labels_only: bool = False,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        if attention not in ("previous_token", "non_labels"):
            raise ConfigError("Disallow.attention", attention, "'previous_token' or 'non_labels'")
        if labels_only and attention == "non_labels":
            raise ConfigError("Disallow.labels_only", True, "false: no label is scored")
        self.heads, self.members = heads, entries(members)
        self.value = interventions.Disallow(attention, labels_only)
        self.schedule, self.order = schedule, order

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it overwrites on a model with these sites."""
        pairs = parse_pairs("Disallow.heads", self.heads, sites.layers, sites.size("H"), "head")
        return [
            Intervention(
                "Disallow",
                f"blocks.{layer}.attn.hook_attn_scores",
                Selection(heads=tuple(heads), members=self.members),
                self.value,
                self.schedule,
                self.order,
            )
            for layer, heads in pairs.items()
        ]


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


def _neuron_site(field: str, at: str | None) -> str:
    if at not in (None, "pre", "post"):
        raise ConfigError(field, at, "'pre' or 'post'")
    return f"mlp.hook_{at or 'post'}"


def _neurons(field: str, items: list[str], sites: SiteTable) -> dict[int, list[int]]:
    if not sites.size("N"):
        raise ConfigError(field, items, "nothing: this model has no MLP")
    return parse_pairs(field, items, sites.layers, sites.size("N"), "neuron")


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
