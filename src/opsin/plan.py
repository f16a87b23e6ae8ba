"""The plan: every intervention of a run, checked and ordered once, before training.

Legend: M members, I interventions, S steps.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, combinations
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions import overwrite
from opsin.model import Tap
from opsin.passes import Intervention, Pass, Source, Value
from opsin.sites import SiteTable
from opsin.task import Batch


@runtime_checkable
class Writer(Protocol):
    """A callback that may overwrite activations."""

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it wants overwritten on a model with these sites."""


@dataclass(frozen=True)
class PlannedPass:
    """One forward pass of every step.

    Args:
        run: what it is; None for the run's own pass, which comes last and whose logits count.
        items: its interventions, as places in the plan, in order of application.
        keeps: sites that later passes take from it.
    """

    run: Pass | None
    items: tuple[int, ...]
    keeps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All interventions of a run, with their masks, pass by pass in order of application.

    Build with ``build_plan``. The plan never changes while training; gates do.
    """

    interventions: tuple[Intervention, ...]
    masks: tuple[Tensor, ...]
    passes: tuple[PlannedPass, ...]

    def gates(self, first: int, count: int, members: int, batch_size: int) -> Float[np.ndarray, "S I M"]:
        """Strength of every intervention at steps ``first .. first + count - 1``."""
        steps = np.arange(first, first + count)
        rows = [item.schedule.strength(steps, batch_size) for item in self.interventions]
        gates = np.stack(rows, axis=1) if rows else np.zeros((count, 0))
        return np.repeat(gates[:, :, None], members, axis=2)

    def tap(
        self,
        gates: Float[Tensor, "I M"],
        masks: Sequence[Tensor],
        batch: Batch,
        forward: Callable[[Tap], object] | None = None,
    ) -> Tap:
        """The tap that applies the interventions to one batch, at these strengths.

        Args:
            forward: runs the model on the batch with a tap; called here for every pass that a value
                is taken from. Not needed where there is none.
        """
        kept: dict[tuple[Pass | None, str], Tensor] = {}
        for planned in self.passes[:-1]:
            assert forward is not None, "values of this plan are taken from another pass"
            forward(self._pass_tap(planned, gates, masks, batch, kept))
        return self._pass_tap(self.passes[-1], gates, masks, batch, kept)

    def _pass_tap(
        self,
        planned: PlannedPass,
        gates: Float[Tensor, "I M"],
        masks: Sequence[Tensor],
        batch: Batch,
        kept: dict[tuple[Pass | None, str], Tensor],
    ) -> Tap:
        at_site: dict[str, list[int]] = defaultdict(list)
        for index in planned.items:
            at_site[self.interventions[index].site].append(index)

        def tap(name: str, activation: Tensor) -> Tensor:
            for index in at_site.get(name, ()):
                sources = self.interventions[index].value.sources
                taken = [kept[s.of, s.site].detach() if s.detach else kept[s.of, s.site] for s in sources]
                activation = self._apply(index, activation, gates[index], masks[index], batch, taken)
            if name in planned.keeps:
                kept[planned.run, name] = activation
            return activation

        return tap

    def _apply(
        self, index: int, x: Tensor, gate: Float[Tensor, " M"], mask: Tensor, batch: Batch, taken: Sequence[Tensor]
    ) -> Tensor:
        chosen = self.interventions[index].value(x, batch, *taken)
        weight = gate.view(-1, *[1] * (x.dim() - 1)) * mask
        if chosen.where is not None:
            weight = weight * chosen.where.to(weight.dtype)
        return overwrite(x, chosen.value, weight)

    def describe(self) -> list[dict[str, str]]:
        """One row per intervention, in order of application: what ``opsin sites`` prints."""
        names = {planned.run: f"pass {number}" for number, planned in enumerate(self.passes, 1)}
        rows = []
        for planned in self.passes:
            for item in (self.interventions[index] for index in planned.items):
                taken = ", ".join(f"{names[source.of]} {source.site}" for source in item.value.sources)
                row = {
                    "pass": names[planned.run].removeprefix("pass "),
                    "writer": item.writer,
                    "site": item.site,
                    "selection": str(item.selection),
                    "value": _shown(item.value) + (f" from {taken}" if taken else ""),
                    "gradient": item.value.gradient,
                    "schedule": str(item.schedule),
                }
                rows.append(row)
        return rows

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
    own = Pass(tuple(item for writer in writers for item in writer.interventions(sites)))
    runs = [*_passes_before(own), own]
    checked = [_checked(run, sites, members, steps, batch_size) for run in runs]
    items = [item for found in checked for item, _ in found]
    taken: dict[Pass, set[str]] = defaultdict(set)
    for item in items:
        for source in item.value.sources:
            taken[source.of].add(sites.find(source.site, item.writer).name)
    ends = list(accumulate(len(found) for found in checked))
    places = [tuple(range(end - len(found), end)) for end, found in zip(ends, checked, strict=True)]
    # the run's own pass is not one that values are taken from, even where a pass like it is
    passes = [PlannedPass(run, at, tuple(sorted(taken[run]))) for run, at in zip(runs[:-1], places[:-1], strict=True)]
    masks = tuple(mask for found in checked for _, mask in found)
    return Plan(tuple(items), masks, (*passes, PlannedPass(None, places[-1])))


def _passes_before(run: Pass) -> list[Pass]:
    """The passes that values of ``run`` are taken from, each once, after those it takes from itself."""
    found: dict[Pass, None] = {}
    for item in run.interventions:
        for source in item.value.sources:
            found |= dict.fromkeys([*_passes_before(source.of), source.of])
    return list(found)


def _checked(
    run: Pass, sites: SiteTable, members: int, steps: int, batch_size: int
) -> list[tuple[Intervention, Tensor]]:
    """The interventions of one pass with their masks, in order of application, or the reason why they cannot be."""
    rank = {site.name: index for index, site in enumerate(sites)}
    wanted = sorted(
        run.interventions, key=lambda item: (rank[sites.find(item.site, item.writer).name], item.order or 0)
    )
    masked = [(item, item.selection.mask(sites[item.site], members, item.writer)) for item in wanted]
    for item in wanted:
        if not item.schedule.strength(np.arange(steps), batch_size).any():
            raise ConfigError(f"{item.writer}.schedule", str(item.schedule), f"to act within the run's {steps} steps")
    for (a, mask_a), (b, mask_b) in combinations(masked, 2):
        _refuse_contest(a, b, bool((mask_a * mask_b).any()) if a.site == b.site else False)
    return masked


def _shown(value: Value) -> str:
    """A value without the passes it is taken from, which have rows of their own."""
    settings = {f.name: getattr(value, f.name) for f in fields(value) if not isinstance(getattr(value, f.name), Source)}  # type: ignore[arg-type]
    inside = ", ".join(f"{name}={setting!r}" for name, setting in settings.items())
    return f"{type(value).__name__}({inside})" if inside else type(value).__name__


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
