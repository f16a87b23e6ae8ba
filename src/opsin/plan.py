"""The plan: every intervention of a run, checked and ordered once, before training.

Legend: M members, I interventions, S steps.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions import Value, overwrite
from opsin.model import Tap
from opsin.schedules import Schedule
from opsin.sites import Site, SiteTable
from opsin.task import Batch

SELECTED_AXES = {"heads": "H", "neurons": "N", "positions": "L", "members": "M"}


@dataclass(frozen=True)
class Selection:
    """Which entries of a site; None selects all along that axis."""

    heads: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    members: tuple[int, ...] | None = None

    def mask(self, site: Site, members: int, field_name: str) -> Float[Tensor, "..."]:
        """1 at selected entries and 0 elsewhere, broadcastable to the site.

        Raises:
            ConfigError: the site has no such axis, or the axis no such entry.
        """
        mask = torch.ones([1] * len(site.axes))
        for name, axis in SELECTED_AXES.items():
            chosen = getattr(self, name)
            if chosen is None:
                continue
            size = members if axis == "M" else site.sizes.get(axis)
            if size is None:
                raise ConfigError(f"{field_name}.{name}", list(chosen), f"nothing: {site.name} has no {name}")
            wrong = [index for index in chosen if not 0 <= index < size]
            if wrong or not chosen:
                expected = f"{name} from 0 to {size - 1} of {site.name}"
                raise ConfigError(f"{field_name}.{name}", wrong[0] if wrong else [], expected)
            along = torch.zeros(size).index_fill(0, torch.tensor(chosen), 1.0)
            mask = mask * along.view([size if a == axis else 1 for a in site.axes])
        return mask

    def __str__(self) -> str:
        parts = [f"{name} {list(chosen)}" for name in SELECTED_AXES if (chosen := getattr(self, name)) is not None]
        return ", ".join(parts) or "all"


@dataclass(frozen=True)
class Intervention:
    """One overwriting: where, what, by which value, when.

    Args:
        writer: the callback that asks for it, for messages.
        site: name of the site.
        selection: which entries of it.
        value: what they are overwritten by.
        schedule: how strongly at which step.
        order: rank among interventions that touch the same entries; the later wins.
    """

    writer: str
    site: str
    selection: Selection
    value: Value
    schedule: Schedule = field(default_factory=Schedule)
    order: int | None = None


@runtime_checkable
class Writer(Protocol):
    """A callback that may overwrite activations."""

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it wants overwritten on a model with these sites."""


@dataclass(frozen=True)
class Plan:
    """All interventions of a run in order of application, with their masks.

    Build with ``build_plan``. The plan never changes while training; gates do.
    """

    interventions: tuple[Intervention, ...]
    masks: tuple[Tensor, ...]

    def gates(self, first: int, count: int, members: int, batch_size: int) -> Float[np.ndarray, "S I M"]:
        """Strength of every intervention at steps ``first .. first + count - 1``."""
        steps = np.arange(first, first + count)
        rows = [item.schedule.strength(steps, batch_size) for item in self.interventions]
        gates = np.stack(rows, axis=1) if rows else np.zeros((count, 0))
        return np.repeat(gates[:, :, None], members, axis=2)

    def tap(self, gates: Float[Tensor, "I M"], masks: Sequence[Tensor], batch: Batch) -> Tap:
        """The tap that applies the interventions to one batch, at these strengths."""
        at_site: dict[str, list[int]] = defaultdict(list)
        for index, item in enumerate(self.interventions):
            at_site[item.site].append(index)

        def tap(name: str, activation: Tensor) -> Tensor:
            for index in at_site.get(name, ()):
                activation = self._apply(index, activation, gates[index], masks[index], batch)
            return activation

        return tap

    def _apply(self, index: int, x: Tensor, gate: Float[Tensor, " M"], mask: Tensor, batch: Batch) -> Tensor:
        chosen = self.interventions[index].value(x, batch)
        weight = gate.view(-1, *[1] * (x.dim() - 1)) * mask
        if chosen.where is not None:
            weight = weight * chosen.where.to(weight.dtype)
        return overwrite(x, chosen.value, weight)

    def describe(self) -> list[dict[str, str]]:
        """One row per intervention, in order of application: what ``opsin sites`` prints."""
        return [
            {
                "writer": item.writer,
                "site": item.site,
                "selection": str(item.selection),
                "value": str(item.value),
                "gradient": item.value.gradient,
                "schedule": str(item.schedule),
            }
            for item in self.interventions
        ]

    def digest(self) -> str:
        """A short hash of everything the plan says; equal plans have equal digests."""
        return hashlib.sha256(repr(self.interventions).encode()).hexdigest()[:16]


def build_plan(writers: Iterable[Writer], sites: SiteTable, members: int, steps: int, batch_size: int) -> Plan:
    """Collect, check and order what all writers want.

    Args:
        steps: optimizer steps of the run, to refuse a schedule that never acts.

    Raises:
        ConfigError: an unknown site or selection, a schedule that never acts within the run, or two
            interventions that touch the same entries without an order.
    """
    wanted = [item for writer in writers for item in writer.interventions(sites)]
    rank = {site.name: index for index, site in enumerate(sites)}
    wanted.sort(key=lambda item: (rank[sites.find(item.site, item.writer).name], item.order or 0))
    masks = tuple(item.selection.mask(sites[item.site], members, item.writer) for item in wanted)
    for item in wanted:
        if not item.schedule.strength(np.arange(steps), batch_size).any():
            raise ConfigError(f"{item.writer}.schedule", str(item.schedule), f"to act within the run's {steps} steps")
    for (a, mask_a), (b, mask_b) in combinations(zip(wanted, masks, strict=True), 2):
        _refuse_contest(a, b, bool((mask_a * mask_b).any()) if a.site == b.site else False)
    return Plan(tuple(wanted), masks)


def _refuse_contest(a: Intervention, b: Intervention, overlap: bool) -> None:
    if overlap and (a.order is None or b.order is None or a.order == b.order):
        expected = f"two different orders, since {a.writer} and {b.writer} both overwrite {a.site}"
        raise ConfigError(f"{b.writer}.order", [a.order, b.order], expected)


def parse_pairs(name: str, items: Sequence[str], first_size: int, second_size: int, what: str) -> dict[int, list[int]]:
    """``["1:3", "1:7"]`` as ``{1: [3, 7]}``: layer, then head or neuron.

    Raises:
        ConfigError: not of the form layer:index, or out of range.
    """
    parsed: dict[int, list[int]] = defaultdict(list)
    expected = f"layer:{what} with layer 0 to {first_size - 1} and {what} 0 to {second_size - 1}"
    for item in items:
        try:
            layer, index = (int(part) for part in str(item).split(":"))
        except ValueError:
            raise ConfigError(name, item, expected) from None
        if not (0 <= layer < first_size and 0 <= index < second_size):
            raise ConfigError(name, item, expected)
        parsed[layer].append(index)
    if not parsed:
        raise ConfigError(name, list(items), f"at least one {expected}")
    return dict(parsed)
