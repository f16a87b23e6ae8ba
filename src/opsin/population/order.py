"""What came first: onset and half way of every metric that a population compares, over the seeds of each condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsin.metrics.compare import mean_interval
from opsin.metrics.halfway import halfway
from opsin.population.folder import Curve, TrainedMember, TrainedPopulation
from opsin.population.tables import Row


def order_rows(population: TrainedPopulation, curves: Mapping[str, Curve]) -> list[Row]:
    """A row for every condition and metric, in training sequences, means with Student's intervals over seeds.

    ``onset`` is that of ``PhaseChange`` where it watches the metric, over the ``formed`` members that left a plateau;
    ``halfway`` where the curve had gone half of its way, over the ``changed`` members in which it changed.

    Args:
        population: population at its end.
        curves: values of every compared metric over training, by name.
    """
    return [
        _row(condition, metric, curve, [member for member in population.under(condition) if member.counts])
        for condition in population.conditions
        for metric, curve in curves.items()
    ]


def _row(condition: str, metric: str, curve: Curve, members: list[TrainedMember]) -> Row:
    sequences, values = curve
    half = mean_interval((halfway(sequences, values[:, member.member]) for member in members), floor=0.0)
    onset = mean_interval((_onset(member.record, metric) for member in members), floor=0.0)
    return {
        "condition": condition,
        "metric": metric,
        "members": len(members),
        "changed": half.count,
        "halfway": half.value,
        "halfway_low": half.low,
        "halfway_high": half.high,
        "formed": onset.count,
        "onset": onset.value,
        "onset_low": onset.low,
        "onset_high": onset.high,
    }


def _onset(record: Mapping[str, Any], metric: str) -> float | None:
    change = ((record.get("changes") or {}).get(metric) or {}).get("change") or {}
    onset = change.get("onset")
    return None if onset is None else onset["value"]
