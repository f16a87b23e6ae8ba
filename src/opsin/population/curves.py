"""The metrics that a population compares, over training, from its ``metrics.csv``.

Legend: M members, n records of a metric.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from opsin.population.folder import TrainedPopulation
from opsin.records.schema import METRICS_FILE

Curve = tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n M"]]
"""Training sequences at which some member has a record, ascending, and the values of every member, nan without one."""


def compared_curves(population: TrainedPopulation) -> Mapping[str, Curve]:
    """Every metric that is compared, by name, over training.

    Args:
        population: population whose tables have been merged.
    """
    found: dict[str, dict[int, dict[int, float]]] = {metric: defaultdict(dict) for metric in population.compare}
    if found:
        with (population.path / METRICS_FILE).open(newline="") as table:
            for row in csv.DictReader(table):
                if row["metric"] in found:
                    found[row["metric"]][int(row["sequences"])][int(row["member"])] = float(row["value"])
    return {metric: _as_curve(records, len(population.members)) for metric, records in found.items()}


def _as_curve(records: Mapping[int, Mapping[int, float]], members: int) -> Curve:
    sequences = np.array(sorted(records), dtype=np.int64)
    values = np.full((len(sequences), members), np.nan)
    for row, count in enumerate(sequences.tolist()):
        for member, value in records[count].items():
            values[row, member] = value
    return sequences, values
