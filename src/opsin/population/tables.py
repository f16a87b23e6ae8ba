"""What a population found, as tables: a row a member, a row a condition, a row a comparison.

**Quantities.** ``onset`` (sequences) is that of ``PhaseChange``. ``below_half`` (sequences) is where the training loss
first falls lastingly below half of the plateau, counted from the lowest loss there can be: it exists also where the
loss fell at once and left no plateau whose end could be an onset. ``final_loss`` and ``mean_loss`` (in the unit of the
loss; the latter the area under the training loss over the length of the run, where a member that finished early is
held at its final loss) exist for every member that trained as far as it should, and ``strongest_strength`` (at most 1,
of the head with the strongest final induction) where heads were tracked.
Metrics that the recipe compares are quantities by their own names: the last value of each member that trained as far
as it should.

**Outcomes.** An onset that is missing is counted, never skipped: ``formed`` has an onset, ``no plateau`` ended more
than a quarter below its plateau without an onset that could be located, or changed without a plateau that was held, or
came without any plateau to within ``NEAR_LOWEST`` of the way from its first loss to the lowest there is,
``not formed`` did not leave its plateau by the end of the run (its onset is censored). A diverged or unfinished member
has no outcome and enters no mean.

Legend: M members, n records of the loss.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from opsin.metrics.compare import mean_interval, mean_over_run, paired_difference
from opsin.metrics.cusum import first_lasting_fall
from opsin.objective import LossScale
from opsin.population.folder import Losses, TrainedMember, TrainedPopulation
from opsin.population.grid import GridValues
from opsin.records.schema import COMPLETE, DIVERGED, FINISHED_EARLY, UNFINISHED

Row = dict[str, Any]

FORMED, NO_PLATEAU, NOT_FORMED = "formed", "no plateau", "not formed"
NEAR_LOWEST = 0.05  # share of the way from the first loss to the lowest that is left where all was learned
FALLEN = 0.25  # share below the plateau from which a loss without an onset counts as fallen, as in PhaseChange
QUANTITIES = ("onset", "below_half", "final_loss", "mean_loss", "strongest_strength")
TIMES, LOSSES = ("onset", "below_half"), ("final_loss", "mean_loss")
ALL_PAIRS_UP_TO = 6  # conditions; of more, every one is compared with the first alone


def summarise(population: TrainedPopulation, losses: Losses) -> dict[str, list[Row]]:
    """The three tables: ``members``, ``conditions`` and ``differences``, each a list of rows with the same keys.

    Args:
        population: the population, whose members need not all have finished.
        losses: training losses of its members, and last values of the metrics that are compared.
    """
    members = [member_row(member, losses) for member in population.members]
    under = {name: [row for row in members if row["condition"] == name] for name in population.conditions}
    quantities = (*QUANTITIES, *population.compare)
    conditions = [condition_row(name, rows, quantities, losses.scale) for name, rows in under.items()]
    return {
        "members": [_with_values(row, population.crossed) for row in members],
        "conditions": [_with_values(row, population.crossed) for row in conditions],
        "differences": [
            row
            for condition, against in _comparisons(population.conditions)
            for row in difference_rows(condition, against, under[condition], under[against], quantities)
        ],
    }


def _with_values(row: Row, crossed: GridValues) -> Row:
    """A row with a column for each key of the grid after its condition; None in those that the grid has not made."""
    values = crossed.get(row["condition"], {})
    columns = {key: _cell(values.get(key)) for key in next(iter(crossed.values()), {})}
    until = [*row].index("condition") + 1
    cells = [*row.items()]
    return dict([*cells[:until], *columns.items(), *cells[until:]])


def _cell(value: Any) -> Any:
    """A setting as a cell has it: a number or text, and anything of several parts as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def as_csv(rows: Sequence[Row]) -> str:
    """A table as text; None is an empty cell, a number is written exactly."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---- members --------------------------------------------------------------------------------------


def member_row(member: TrainedMember, losses: Losses) -> Row:
    """What one member did; None for what it lacks."""
    record = member.record
    onset = record.get("onset") or {}
    plateau = _number(record.get("plateau"))
    final = _number(record.get("final_loss")) if member.counts else None
    strengths = {name: head["strength"] for name, head in (record.get("heads") or {}).items()}
    strongest = max(strengths, key=strengths.__getitem__) if strengths and member.counts else None
    x, y = losses.sequences, losses.values[:, member.member]
    half = _way_down(plateau, 0.5, losses.scale)
    start = next(iter(y[np.isfinite(y)].tolist()), None)
    return {
        "member": member.member,
        "condition": member.condition,
        "seed": member.seed,
        "status": member.status,
        "stopped_at": record.get("stopped_at"),
        "outcome": _outcome(member, plateau, final, start, losses.scale),
        "onset": onset.get("value"),
        "onset_low": onset.get("low"),
        "onset_high": onset.get("high"),
        "midpoint": (record.get("midpoint") or {}).get("value"),
        "end": (record.get("end") or {}).get("value"),
        "below_half": None if half is None else first_lasting_fall(x, y, half),
        "plateau": plateau,
        "final_loss": final,
        "mean_loss": _mean_loss(member, final, losses),
        "strongest_head": strongest,
        "strongest_strength": None if strongest is None else _number(strengths[strongest]),
        **{name: _number(values[member.member]) if member.counts else None for name, values in losses.last.items()},
    }


def _way_down(plateau: float | None, share: float, scale: LossScale) -> float | None:
    """The loss after that share of the way from the plateau to the lowest; None where one of the two is unknown."""
    if plateau is None or scale.lowest is None:
        return None
    return scale.lowest + (1 - share) * (plateau - scale.lowest)


def _outcome(
    member: TrainedMember, plateau: float | None, final: float | None, start: float | None, scale: LossScale
) -> str | None:
    reading = next(iter((member.record.get("changes") or {}).values()), None)
    if final is None or (plateau is None and reading is None):
        return None
    if member.record.get("onset"):
        return FORMED
    fallen = _way_down(plateau, FALLEN, scale)
    smooth = reading is not None and reading["verdict"] == "smooth"
    if plateau is None and scale.lowest is not None and start is not None:
        fallen = scale.lowest + NEAR_LOWEST * (start - scale.lowest)
    return NO_PLATEAU if smooth or (fallen is not None and final < fallen) else NOT_FORMED


def _mean_loss(member: TrainedMember, final: float | None, losses: Losses) -> float | None:
    if not member.counts:
        return None
    # members of other batches have records at other numbers of sequences
    recorded = np.isfinite(losses.values[:, member.member])
    x, y = losses.sequences[recorded], losses.values[recorded, member.member]
    if member.status == FINISHED_EARLY and final is not None:
        after = losses.sequences[losses.sequences > x[-1]] if len(x) else losses.sequences
        x, y = np.append(x, after), np.append(y, np.full(len(after), final))
    return mean_over_run(x, y)


def _number(value: float | None) -> float | None:
    """The number, or None where there is none; JSON has no nan."""
    return None if value is None or not math.isfinite(value) else float(value)


# ---- conditions -----------------------------------------------------------------------------------


def condition_row(condition: str, members: Sequence[Row], quantities: Sequence[str], scale: LossScale) -> Row:
    """Counts of members and the mean of every quantity with its 95 % interval over the seeds.

    Args:
        condition: name of the condition, as in the recipe.
        members: rows of the members of this condition, from the table ``members``.
        quantities: columns of these rows whose mean is taken.
        scale: where losses end, which no interval of one goes beyond.
    """
    status, outcome = [row["status"] for row in members], [row["outcome"] for row in members]
    row: Row = {
        "condition": condition,
        "members": len(members),
        "formed": outcome.count(FORMED),
        "no_plateau": outcome.count(NO_PLATEAU),
        "not_formed": outcome.count(NOT_FORMED),
        "diverged": status.count(DIVERGED),
        "unfinished": status.count(UNFINISHED),
    }
    for name in quantities:
        floor = 0.0 if name in TIMES else scale.floor if name in LOSSES else -math.inf
        mean = mean_interval(_by_seed(members, name).values(), floor)
        row |= {name: mean.value, f"{name}_low": mean.low, f"{name}_high": mean.high}
    return row


def with_intervals(row: Row) -> list[str]:
    """Names of the quantities of which the row of a condition has a mean."""
    return [name for name in row if f"{name}_low" in row]


def compared_metrics(conditions: Sequence[Row]) -> list[str]:
    """Names of the metrics that the recipe compares.

    Args:
        conditions: rows of the table of conditions, at least one.
    """
    return [name for name in with_intervals(conditions[0]) if name not in QUANTITIES]


def _by_seed(members: Sequence[Row], quantity: str) -> dict[int, float | None]:
    """The quantity of every member that trained as far as it should."""
    return {row["seed"]: row[quantity] for row in members if row["status"] in (COMPLETE, FINISHED_EARLY)}


# ---- comparisons ----------------------------------------------------------------------------------


def _comparisons(conditions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each condition against the first; of up to ``ALL_PAIRS_UP_TO``, each against every one before it."""
    for earlier, later in combinations(conditions, 2):
        if len(conditions) <= ALL_PAIRS_UP_TO or earlier == conditions[0]:
            yield later, earlier


def difference_rows(
    condition: str, against: str, members: Sequence[Row], compared: Sequence[Row], quantities: Sequence[str]
) -> list[Row]:
    """Every quantity of one condition minus that of the other, paired by seed.

    ``pairs`` are the seeds that trained as far as they should under both; ``formed_pairs`` of them have the quantity
    under both, ``only_condition`` and ``only_against`` under one alone, ``neither`` under none. ``no_plateau`` counts
    the pairs in which either member had none. ``low`` and ``high`` are a paired bootstrap interval of 95 %.

    Args:
        condition, against: names of the two conditions, the second of which is subtracted.
        members, compared: rows of the members of the first condition, and of the second.
        quantities: columns of these rows that are compared.
    """
    no_plateau = {row["seed"] for row in (*members, *compared) if row["outcome"] == NO_PLATEAU}
    rows: list[Row] = []
    for quantity in quantities:
        first, second = _by_seed(members, quantity), _by_seed(compared, quantity)
        found = paired_difference(first, second)
        rows.append(
            {
                "condition": condition,
                "against": against,
                "quantity": quantity,
                "pairs": found.pairs,
                "formed_pairs": found.known,
                "only_condition": found.only_first,
                "only_against": found.only_second,
                "neither": found.neither,
                "no_plateau": len(no_plateau & first.keys() & second.keys()),
                "difference": found.mean.value,
                "low": found.mean.low,
                "high": found.mean.high,
            }
        )
    return rows
