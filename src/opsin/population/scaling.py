"""How what a population compares grows or falls along the keys of its grid: a power law along every key of numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from opsin.metrics.power_law import PowerLaw, fit_power_law
from opsin.population.grid import GridValues, key_names
from opsin.population.tables import Row


@dataclass(frozen=True)
class ScalingCurve:
    """A metric along one key of a grid, where the other keys stand still.

    Args:
        metric: name of the metric that is compared.
        key: name of the key, as in the names of conditions.
        fixed: names and values of the other keys, as in the names of conditions; empty without any.
        x: values of the key, ascending.
        y: the last value of the metric, one column a seed.
        law: line that was fitted to it.
    """

    metric: str
    key: str
    fixed: str
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, "n S"]
    law: PowerLaw

    def row(self) -> Row:
        """What a table says of it."""
        exponent = self.law.exponent
        interval = {"low": exponent.low, "high": exponent.high, "seeds": exponent.count, "points": self.law.points}
        return {
            "metric": self.metric,
            "key": self.key,
            "fixed": self.fixed,
            "exponent": exponent.value,
            **interval,
        }


def scaling_curves(crossed: GridValues, compare: Sequence[str], members: Sequence[Row]) -> list[ScalingCurve]:
    """A curve for every metric, key of positive numbers, and combination of the other keys with a fitted line.

    Args:
        crossed: value of each key of the grid, by name of the condition.
        compare: names of the metrics that are compared.
        members: rows of the members' table.
    """
    known = [row for row in members if row["condition"] in crossed]
    found = []
    for metric in compare:
        for key, name in key_names([*next(iter(crossed.values()))]).items():
            if all(_is_positive(settings[key]) for settings in crossed.values()):
                found += _along(crossed, metric, key, name, known)
    return found


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _along(crossed: GridValues, metric: str, key: str, name: str, members: Sequence[Row]) -> list[ScalingCurve]:
    groups: dict[str, list[Row]] = {}
    for row in members:
        groups.setdefault(_fixed_keys(crossed[row["condition"]], key), []).append(row)
    found = []
    for fixed, rows in groups.items():
        x = sorted({crossed[row["condition"]][key] for row in rows})
        seeds = sorted({row["seed"] for row in rows})
        y = np.full((len(x), len(seeds)), np.nan)
        for row in rows:
            value = row[metric]
            y[x.index(crossed[row["condition"]][key]), seeds.index(row["seed"])] = np.nan if value is None else value
        law = fit_power_law(np.array(x, dtype=float), y)
        if law is not None:
            found.append(ScalingCurve(metric, name, fixed, np.array(x, dtype=float), y, law))
    return found


def _fixed_keys(settings: Mapping[str, Any], key: str) -> str:
    names = key_names([*settings])
    return " ".join(f"{names[name]}={json.dumps(value)}" for name, value in settings.items() if name != key)
