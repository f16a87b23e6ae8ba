"""From writers to a plan: collect what every callback wants, check it, order it, and find where its inputs come from.

Legend: M members.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import combinations
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions.feedback import by_head
from opsin.interventions.intervention import Clock, Intervention, Need, Pass, Relative, Supply, Value, Weight
from opsin.interventions.plan import InputAddress, Plan, PlannedChange, PlannedIntervention, PlannedPass
from opsin.interventions.schedules import Schedule
from opsin.interventions.weights import NumberedChange, WeightWriter, order_changes
from opsin.model.sites import SiteTable


@runtime_checkable
class Writer(Protocol):
    """A callback that may overwrite activations."""

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it wants overwritten on a model with these sites."""


@dataclass(frozen=True)
class RunLength:
    """How long a run is and how wide.

    Args:
        members: M, models of the run.
        steps: optimizer steps of the run, to refuse a schedule that never acts.
        batch_size: sequences a training step sees.
    """

    members: int
    steps: int
    batch_size: int

    def refuse_never(self, writer: str, schedule: Schedule) -> None:
        """Refuse a schedule that never acts within the run.

        Args:
            writer: name of the callback, for messages.
            schedule: when it would act.

        Raises:
            ConfigError: it never acts.
        """
        if not schedule.strength(np.arange(self.steps), self.batch_size).any():
            raise ConfigError(f"{writer}.schedule", str(schedule), f"to act within the run's {self.steps} steps")


def build_plan(
    writers: Iterable[Writer | WeightWriter],
    sites: SiteTable,
    members: int,
    steps: int,
    batch_size: int,
) -> Plan:
    """Collect, check and order what all writers want.

    Args:
        writers: callbacks, in the order in which the recipe names them.
        sites: activations and weights of the model that is trained.
        members: M, models of the run.
        steps: optimizer steps of the run, to refuse a schedule that never acts.
        batch_size: sequences a training step sees.

    Raises:
        ConfigError: an unknown site, weight or selection, a schedule that never acts within the run, or two
            interventions that touch the same entries without an order.
    """
    writers, run = list(writers), RunLength(members, steps, batch_size)
    names = _collect([writer for writer in writers if isinstance(writer, Writer)], sites)
    changes = order_changes([writer for writer in writers if isinstance(writer, WeightWriter)], sites.weights, members)
    for numbered in changes:
        run.refuse_never(numbered.change.writer, numbered.change.schedule)
    main = Pass(tuple(names))
    passes = [*_passes_before(main), main]
    tables = [sites if before.donor is None else before.donor.sites(sites.size("L")) for before in passes]
    masked = [_ordered(before, table, run) for before, table in zip(passes, tables, strict=True)]
    return _Assembly(passes, masked, _kept_sites(passes, masked, tables), tables, names).plan(changes)


Masked = tuple[Intervention, Tensor]
"""An intervention and the mask of its entries."""


@dataclass(frozen=True)
class _Assembly:
    """The parts of a plan, before they are joined into rows.

    Args:
        passes: forward passes of a step, the run's own last.
        masked: interventions of every pass in order of application, with their masks.
        keeps: names of the sites that every pass keeps.
        tables: sites and weights of the model that every pass runs.
        names: numbered name of the writer of each intervention of the run's own pass.
    """

    passes: Sequence[Pass]
    masked: Sequence[Sequence[Masked]]
    keeps: Sequence[Iterable[str]]
    tables: Sequence[SiteTable]
    names: Mapping[Intervention, str]

    def plan(self, changes: Sequence[NumberedChange]) -> Plan:
        """All rows, those of weights last."""
        donors = tuple(dict.fromkeys(before.donor for before in self.passes if before.donor is not None))
        items = [item for pairs in self.masked for item, _ in pairs]
        supplies = tuple(dict.fromkeys(need for item in items for need in item.value.needs if isinstance(need, Supply)))
        planned, gate = [], 0
        for number, (before, keeps) in enumerate(zip(self.passes, self.keeps, strict=True)):
            rows = self._rows(number, gate, supplies)
            gate += len(rows)
            donor = None if before.donor is None else donors.index(before.donor)
            groups = _grouped(rows, may_share=before is self.passes[-1])
            planned.append(PlannedPass(groups, tuple(sorted(keeps)), donor, before.asks))
        last = [PlannedChange(gate + n, row.name, row.change, row.mask) for n, row in enumerate(changes)]
        return Plan(tuple(planned), donors, supplies, tuple(last))

    def _rows(self, number: int, gate: int, supplies: Sequence[Supply]) -> list[PlannedIntervention]:
        """The rows of one pass, the first of which has the given gate."""
        main = number == len(self.passes) - 1
        return [
            PlannedIntervention(
                gate + offset,
                self.names.get(item, item.writer),
                item,
                mask,
                tuple(self._address(need, supplies, number, item.writer) for need in item.value.needs),
                always=not main and item.schedule == Schedule(),
            )
            for offset, (item, mask) in enumerate(self.masked[number])
        ]

    def _address(self, need: Need, supplies: Sequence[Supply], number: int, writer: str) -> InputAddress:
        """Where a need of a value is found that acts in the pass of this number."""
        if isinstance(need, Supply):
            return InputAddress("supply", index=supplies.index(need))
        if isinstance(need, Weight):
            weight = self.tables[number].weights.one(need.name, writer)
            return InputAddress("weight", name=need.name, detach=need.detach, weight=weight)
        if isinstance(need, Clock):
            return InputAddress("clock")
        if isinstance(need.of, Relative):
            return InputAddress(
                "this" if need.of is Relative.SAME_PASS else "asking", name=need.site, detach=need.detach
            )
        kind: Literal["nested", "pass"] = "nested" if need.of.asks else "pass"
        # the run's own pass is not one that values are taken from, even where a pass like it is
        return InputAddress(kind, self.passes[:-1].index(need.of), need.site, need.detach)


def _grouped(rows: Sequence[PlannedIntervention], may_share: bool) -> tuple[tuple[PlannedIntervention, ...], ...]:
    """Rows of one pass, neighbours with one value and no common entry in one group."""
    groups: list[list[PlannedIntervention]] = []
    for row in rows:
        group = groups[-1] if groups else []
        # a value may look along the last axis, so neurons of one value are not taken apart
        fits = may_share and row.intervention.selection.neurons is None
        if fits and group and all(_disjoint(row, member) for member in group):
            group.append(row)
        else:
            groups.append([row])
    return tuple(tuple(group) for group in groups)


def _disjoint(a: PlannedIntervention, b: PlannedIntervention) -> bool:
    """Whether two rows put one value into different entries of one site."""
    first, second = a.intervention, b.intervention
    same = (first.site, first.value) == (second.site, second.value) and second.selection.neurons is None
    return same and not bool((a.mask * b.mask).any())


def _collect(writers: Iterable[Writer], sites: SiteTable) -> dict[Intervention, str]:
    """What every writer wants, with the name of the writer, numbered where there are several of its kind."""
    found: list[tuple[Intervention, str, int]] = []
    writers_seen: Counter[str] = Counter()
    for writer in writers:
        wanted = writer.interventions(sites)
        for item in wanted:
            _refuse_unstated(item)
        items = by_head(wanted, lambda item: sites.find(item.site, item.writer).layer)
        writers_seen.update({item.writer for item in items})
        found += [(item, item.writer, writers_seen[item.writer]) for item in items]
    for (a, *_), (b, *_) in combinations(found, 2):
        # equal ones would become one here, and a writer that is nothing new would pass unseen
        if a == b:
            _refuse_contest(a, b, overlap=True)
    return {item: name if writers_seen[name] == 1 else f"{name} {number}" for item, name, number in found}


def _refuse_unstated(item: Intervention) -> None:
    """Refuse a value whose fields do not say what it is, by which passes are shared and checkpoints know a plan."""
    kind, value = type(item.value).__name__, item.value
    if not (isinstance(value, Value) and is_dataclass(value) and value.__dataclass_params__.frozen):
        raise ConfigError(item.writer, kind, "a Value that is a frozen dataclass, so that its fields say what it is")
    try:
        hash(value)
    except TypeError as error:
        raise ConfigError(item.writer, kind, f"a value whose fields can be hashed ({error})") from error


def _passes_before(later: Pass) -> list[Pass]:
    """The passes that values of one pass are taken from, each once, after those it takes from itself."""
    found: dict[Pass, None] = {}
    for item in later.interventions:
        for source in item.value.sources:
            if isinstance(source.of, Pass):
                found |= dict.fromkeys([*_passes_before(source.of), source.of])
    return list(found)


def _kept_sites(
    passes: Sequence[Pass], masked: Sequence[Sequence[Masked]], tables: Sequence[SiteTable]
) -> list[set[str]]:
    """Names of the sites of every pass that are taken from it."""
    keeps: list[set[str]] = [set() for _ in passes]
    for number, pairs in enumerate(masked):
        for item, _ in pairs:
            _keep_sources(item, number, passes, tables, keeps)
    return keeps


def _keep_sources(
    item: Intervention, number: int, passes: Sequence[Pass], tables: Sequence[SiteTable], keeps: list[set[str]]
) -> None:
    """Note what an intervention of one pass takes from which pass."""
    for source in item.value.sources:
        if source.of is Relative.ASKING_PASS:
            continue  # noted where it is asked
        if source.of is Relative.SAME_PASS:
            _keep_earlier(source.site, item, tables[number], keeps[number])
            continue
        assert isinstance(source.of, Pass)
        origin = passes[:-1].index(source.of)
        keeps[origin].add(tables[origin].find(source.site, item.writer).name)
        for inside in source.of.interventions:
            for wanted in inside.value.sources:
                if wanted.of is Relative.ASKING_PASS:
                    _keep_earlier(wanted.site, item, tables[number], keeps[number])


def _keep_earlier(site: str, item: Intervention, table: SiteTable, keeps: set[str]) -> None:
    """Note a site of the same pass, which must have been computed when the intervention acts."""
    names = [known.name for known in table]
    if names.index(table.find(site, item.writer).name) >= names.index(item.site):
        raise ConfigError(item.writer, site, f"a site that is computed before {item.site}")
    keeps.add(site)


def _ordered(unordered: Pass, sites: SiteTable, run: RunLength) -> list[Masked]:
    """The interventions of one pass with their masks, in order of application, or the reason why they cannot be."""
    rank = {site.name: index for index, site in enumerate(sites)}
    items = sorted(
        unordered.interventions, key=lambda item: (rank[sites.find(item.site, item.writer).name], item.order or 0)
    )
    masked = [(item, item.selection.mask(sites[item.site], run.members, item.writer)) for item in items]
    for item in items:
        run.refuse_never(item.writer, item.schedule)
    for (a, mask_a), (b, mask_b) in combinations(masked, 2):
        _refuse_contest(a, b, bool((mask_a * mask_b).any()) if a.site == b.site else False)
    return masked


def _refuse_contest(a: Intervention, b: Intervention, overlap: bool) -> None:
    if overlap and (a.order is None or b.order is None or a.order == b.order):
        expected = f"two different orders, since {a.writer} and {b.writer} both overwrite {a.site}"
        raise ConfigError(f"{b.writer}.order", [a.order, b.order], expected)
