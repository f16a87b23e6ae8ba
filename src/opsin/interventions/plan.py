"""The plan: every intervention of a run, checked and ordered once, before training.

Legend: M members, I interventions, S steps.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, combinations
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions.donors import Donor
from opsin.interventions.feedback import HeadFeedback, by_head
from opsin.interventions.intervention import Clock, Intervention, Need, Pass, Relative, Source, Supply, Value, Weight
from opsin.interventions.schedules import Schedule
from opsin.interventions.weights import WeightChange, WeightTable, WeightWriter, plan_changes
from opsin.model.sites import SiteTable
from opsin.records.history import History


def covered_members(plan: Plan, members: int) -> Bool[np.ndarray, "I M"]:
    """Which members each intervention selects."""
    rows = [mask.flatten(1).amax(1).expand(members).numpy() > 0 for mask in plan.masks]
    return np.stack(rows) if rows else np.zeros((0, members), dtype=bool)


@runtime_checkable
class Writer(Protocol):
    """A callback that may overwrite activations."""

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it wants overwritten on a model with these sites."""


@dataclass(frozen=True)
class PlannedPass:
    """One forward pass of every step.

    Args:
        items: its interventions, as places in the plan, in order of application.
        together: the same, those that put one value into different entries of a site side by side: they
            act at once.
        keeps: sites that other passes or its own later values take from it.
        donor: place of the donor whose weights it runs; None for those that are trained.
        inner: whether it runs inside each pass that takes from it, once that one comes to need it.
    """

    items: tuple[int, ...]
    together: tuple[tuple[int, ...], ...]
    keeps: tuple[str, ...] = ()
    donor: int | None = None
    inner: bool = False


@dataclass(frozen=True)
class Taken:
    """Where one need of a value is found while the plan acts.

    Args:
        kind: an earlier pass, a pass inside this one, this pass, the asking pass, a weight, a supply or
            the clock.
        index: of the pass or the supply.
        name: of the site or the weight.
        detach: whether gradient stops there.
    """

    kind: Literal["pass", "inner", "this", "asking", "weight", "supply", "clock"]
    index: int = 0
    name: str = ""
    detach: bool = False


@dataclass(frozen=True)
class Plan:
    """All interventions of a run, with their masks, pass by pass in order of application.

    Build with ``build_plan``; ``opsin.interventions.apply`` runs it. The plan never changes while training; gates and
    supplied tensors do.

    Args:
        interventions: of all passes, in order.
        names: the writer of each, and of each change of weights; numbered where the run has several of its kind.
        masks: which entries each selects, and each change of weights.
        taken: where the needs of each one's value are found.
        always: whether each is in force at every step, outside the run's own pass.
        passes: the run's own pass, whose logits count, comes last.
        donors: models other than the trained one.
        supplies: tensors that writers hand over.
        changes: of weights, in order of application; their gates, names, masks and counts follow those of the
            interventions.
    """

    interventions: tuple[Intervention, ...]
    names: tuple[str, ...]
    masks: tuple[Tensor, ...]
    taken: tuple[tuple[Taken, ...], ...]
    always: tuple[bool, ...]
    passes: tuple[PlannedPass, ...]
    donors: tuple[Donor, ...]
    supplies: tuple[Supply, ...]
    changes: tuple[WeightChange, ...] = ()

    @property
    def schedules(self) -> list[Schedule]:
        """Of every intervention, then of every change of weights: one per row of the gates."""
        return [item.schedule for item in self.interventions] + [change.schedule for change in self.changes]

    @property
    def places(self) -> list[str]:
        """The site of every intervention, then the weight of every change."""
        return [item.site for item in self.interventions] + [change.weight for change in self.changes]

    def gates(self, first: int, count: int, members: int, history: History) -> Float[np.ndarray, "S I M"]:
        """Strength of every intervention and change of weights at steps ``first .. first + count - 1``.

        Args:
            history: of the run so far, with its batch size.
        """
        rows = [schedule.gates(first, count, members, history) for schedule in self.schedules]
        return np.stack(rows, axis=1) if rows else np.zeros((count, 0, members))

    @property
    def feedback(self) -> bool:
        """Whether the strength of some intervention depends on what the run has measured."""
        return any(schedule.feedback is not None for schedule in self.schedules)

    @property
    def loops(self) -> dict[str, int]:
        """Every feedback by the name under which the run records what it does: the first row that follows it."""
        found: dict[str, int] = {}
        for row, (name, schedule) in enumerate(zip(self.names, self.schedules, strict=True)):
            feedback = schedule.feedback
            if feedback is None:
                continue
            label = f"{name}/{feedback.head}" if isinstance(feedback, HeadFeedback) else name
            if label in found and self.schedules[found[label]].feedback != feedback:
                label = f"{label}/{self.places[row]}"
            found.setdefault(label, row)
        return found

    def check_feedback(self, recorded: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse feedback from what the run does not measure.

        Args:
            recorded: metrics of the run, and the shape of one member's values.

        Raises:
            ConfigError: names the setting.
        """
        items: tuple[Intervention | WeightChange, ...] = (*self.interventions, *self.changes)
        for item in items:
            if item.schedule.feedback is not None:
                item.schedule.feedback.check(item.writer, recorded)

    def extra_passes(self) -> list[str]:
        """What the passes beside the run's own are; runs with equal ones may be one run's members."""
        return [
            repr((planned.donor, self.donors, [self.interventions[index] for index in planned.items]))
            for planned in self.passes[:-1]
        ]

    def describe(self) -> list[dict[str, str]]:
        """One row per intervention and change of weights, in order of application: what ``opsin sites`` prints."""
        rows = []
        for number, planned in enumerate(self.passes, 1):
            of = f" (of {self.donors[planned.donor].name})" if planned.donor is not None else ""
            for index in planned.items:
                item = self.interventions[index]
                taken = ", ".join(filter(None, (_named(need, self.supplies) for need in self.taken[index])))
                row = {
                    "pass": f"{number}{of}",
                    "writer": self.names[index],
                    "site": item.site,
                    "selection": str(item.selection),
                    "value": _shown(item.value) + (f" from {taken}" if taken else ""),
                    "gradient": item.value.gradient,
                    "schedule": str(item.schedule),
                }
                rows.append(row)
        names = self.names[len(self.interventions) :]
        return rows + [change.describe(name) for change, name in zip(self.changes, names, strict=True)]

    def digest(self) -> str:
        """A short hash of everything the plan says; equal plans have equal digests."""
        return hashlib.sha256(repr((*self.interventions, *self.changes)).encode()).hexdigest()[:16]


def build_plan(
    writers: Iterable[Writer | WeightWriter],
    sites: SiteTable,
    members: int,
    steps: int,
    batch_size: int,
    weights: WeightTable = WeightTable({}),  # noqa: B008 - frozen
) -> Plan:
    """Collect, check and order what all writers want.

    Args:
        steps: optimizer steps of the run, to refuse a schedule that never acts.
        weights: of the model that is trained.

    Raises:
        ConfigError: an unknown site, weight or selection, a schedule that never acts within the run, or two
            interventions that touch the same entries without an order.
    """
    writers = list(writers)
    wanted = _wanted([writer for writer in writers if isinstance(writer, Writer)], sites)
    changes = plan_changes([writer for writer in writers if isinstance(writer, WeightWriter)], weights, members)
    for change, *_ in changes:
        _refuse_never(change.writer, change.schedule, steps, batch_size)
    own = Pass(tuple(wanted))
    runs = [*_passes_before(own), own]
    donors = tuple(dict.fromkeys(run.donor for run in runs if run.donor is not None))
    tables = [sites if run.donor is None else run.donor.sites(sites.size("L")) for run in runs]
    checked = [_checked(run, table, members, steps, batch_size) for run, table in zip(runs, tables, strict=True)]
    # the run's own pass is not one that values are taken from, even where a pass like it is
    number = {run: place for place, run in enumerate(runs[:-1])}
    keeps: list[set[str]] = [set() for _ in runs]
    for place, found in enumerate(checked):
        for item, _ in found:
            _keep(item, place, number, tables, keeps)
    items = [item for found in checked for item, _ in found]
    supplies = tuple(dict.fromkeys(need for item in items for need in item.value.needs if isinstance(need, Supply)))
    ends = list(accumulate(len(found) for found in checked))
    passes = tuple(
        PlannedPass(
            tuple(range(end - len(found), end)),
            _together(found, end - len(found), own=run is own),
            tuple(sorted(kept)),
            None if run.donor is None else donors.index(run.donor),
            run.asks,
        )
        for run, end, found, kept in zip(runs, ends, checked, keeps, strict=True)
    )
    return Plan(
        tuple(items),
        (*(wanted.get(item, item.writer) for item in items), *(name for _, name, _ in changes)),
        (*(mask for found in checked for _, mask in found), *(mask for *_, mask in changes)),
        tuple(tuple(_taken(need, number, supplies) for need in item.value.needs) for item in items),
        tuple(item.schedule == Schedule() for item in items[: ends[-1] - len(checked[-1])])
        + (False,) * len(checked[-1]),
        passes,
        donors,
        supplies,
        tuple(change for change, *_ in changes),
    )


def _together(found: Sequence[tuple[Intervention, Tensor]], first: int, own: bool) -> tuple[tuple[int, ...], ...]:
    """Places of interventions, neighbours with one value and no common entry in one group."""
    groups: list[list[int]] = []
    for place, (item, mask) in enumerate(found):
        group = groups[-1] if groups else []
        # a value may look along the last axis, so neurons of one value are not taken apart
        fits = own and item.selection.neurons is None
        if fits and all(_apart(item, mask, *found[other]) for other in group) and group:
            group.append(place)
        else:
            groups.append([place])
    return tuple(tuple(first + place for place in group) for group in groups)


def _apart(a: Intervention, mask_a: Tensor, b: Intervention, mask_b: Tensor) -> bool:
    same = (a.site, a.value) == (b.site, b.value) and b.selection.neurons is None
    return same and not bool((mask_a * mask_b).any())


def _wanted(writers: Iterable[Writer], sites: SiteTable) -> dict[Intervention, str]:
    """What every writer wants, with the name of the writer, numbered where there are several of its kind."""
    found: list[tuple[Intervention, str, int]] = []
    seen: Counter[str] = Counter()
    for writer in writers:
        items = by_head(writer.interventions(sites), lambda item: sites.find(item.site, item.writer).layer)
        seen.update({item.writer for item in items})
        found += [(item, item.writer, seen[item.writer]) for item in items]
    for (a, *_), (b, *_) in combinations(found, 2):
        # equal ones would become one here, and a writer that is nothing new would pass unseen
        if a == b:
            _refuse_contest(a, b, overlap=True)
    return {item: name if seen[name] == 1 else f"{name} {number}" for item, name, number in found}


def _passes_before(run: Pass) -> list[Pass]:
    """The passes that values of ``run`` are taken from, each once, after those it takes from itself."""
    found: dict[Pass, None] = {}
    for item in run.interventions:
        for source in item.value.sources:
            if isinstance(source.of, Pass):
                found |= dict.fromkeys([*_passes_before(source.of), source.of])
    return list(found)


def _keep(
    item: Intervention, place: int, number: Mapping[Pass, int], tables: Sequence[SiteTable], keeps: list[set[str]]
) -> None:
    """Note what an intervention of the pass at ``place`` takes from which pass."""
    for source in item.value.sources:
        if source.of is Relative.ASKING:
            continue  # noted where it is asked
        if source.of is Relative.THIS:
            _keep_earlier(source.site, item, tables[place], keeps[place])
            continue
        assert isinstance(source.of, Pass)
        at = number[source.of]
        keeps[at].add(tables[at].find(source.site, item.writer).name)
        for inside in source.of.interventions:
            for asked in inside.value.sources:
                if asked.of is Relative.ASKING:
                    _keep_earlier(asked.site, item, tables[place], keeps[place])


def _keep_earlier(site: str, item: Intervention, table: SiteTable, keeps: set[str]) -> None:
    """Note a site of the same pass, which must have been computed when the intervention acts."""
    names = [known.name for known in table]
    if names.index(table.find(site, item.writer).name) >= names.index(item.site):
        raise ConfigError(item.writer, site, f"a site that is computed before {item.site}")
    keeps.add(site)


def _taken(need: Need, number: Mapping[Pass, int], supplies: Sequence[Supply]) -> Taken:
    if isinstance(need, Supply):
        return Taken("supply", index=supplies.index(need))
    if isinstance(need, Weight):
        return Taken("weight", name=need.name, detach=need.detach)
    if isinstance(need, Clock):
        return Taken("clock")
    if isinstance(need.of, Relative):
        return Taken("this" if need.of is Relative.THIS else "asking", name=need.site, detach=need.detach)
    kind: Literal["inner", "pass"] = "inner" if need.of.asks else "pass"
    return Taken(kind, number[need.of], need.site, need.detach)


def _named(need: Taken, supplies: Sequence[Supply]) -> str:
    """A need as ``opsin sites`` names it; nothing for weights and the clock, which the value implies."""
    names = {
        "pass": f"pass {need.index + 1} {need.name}",
        "inner": f"pass {need.index + 1} {need.name}",
        "this": f"this pass {need.name}",
        "asking": f"the asking pass {need.name}",
    }
    return str(supplies[need.index]) if need.kind == "supply" else names.get(need.kind, "")


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
        _refuse_never(item.writer, item.schedule, steps, batch_size)
    for (a, mask_a), (b, mask_b) in combinations(masked, 2):
        _refuse_contest(a, b, bool((mask_a * mask_b).any()) if a.site == b.site else False)
    return masked


def _refuse_never(writer: str, schedule: Schedule, steps: int, batch_size: int) -> None:
    if not schedule.strength(np.arange(steps), batch_size).any():
        raise ConfigError(f"{writer}.schedule", str(schedule), f"to act within the run's {steps} steps")


def _shown(value: Value) -> str:
    """A value without what its row says already, and without the passes it is taken from, which have their own."""
    settings = {f.name: getattr(value, f.name) for f in fields(value) if f.repr}  # type: ignore[arg-type]
    settings = {name: setting for name, setting in settings.items() if not isinstance(setting, (Source, Supply))}
    inside = ", ".join(f"{name}={setting!r}" for name, setting in settings.items())
    name = getattr(value, "identity_name", type(value).__name__)
    return f"{name}({inside})" if inside else name


def _refuse_contest(a: Intervention, b: Intervention, overlap: bool) -> None:
    if overlap and (a.order is None or b.order is None or a.order == b.order):
        expected = f"two different orders, since {a.writer} and {b.writer} both overwrite {a.site}"
        raise ConfigError(f"{b.writer}.order", [a.order, b.order], expected)
