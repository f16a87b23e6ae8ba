"""A grid: values of some settings of a recipe, crossed into one condition for every combination.

    population:
      grid:
        model.learning_rate: [0.0003, 0.001]
        task.init_args.burstiness: [1, 2, 4]

has six conditions, the first of which is named ``learning_rate=0.0003 burstiness=1``.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import PurePath
from typing import Any

from opsin.errors import ConfigError, check_number, shortened
from opsin.population.settings import MOST_MEMBERS, REFUSED_IN_NAMES

LONGEST_VALUE_NAME = 40
"""Characters of a value in the name of a condition."""

GridValues = Mapping[str, Mapping[str, Any]]
"""Value of each key of a grid, by key, for every condition that the grid has made, by its name."""


def crossed_conditions(grid: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Value of each key in every combination, by the name of its condition; the last key changes fastest.

    Args:
        grid: values of each setting, by its key.

    Raises:
        ConfigError: no key, a key without two values or more, or a value that stands twice.
    """
    _check_grid(grid)
    names = [[f"{key}={name}" for name in value_names(grid[full])] for full, key in key_names([*grid]).items()]
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return dict(zip((" ".join(parts) for parts in product(*names)), combinations, strict=True))


def _check_grid(grid: Mapping[str, Sequence[Any]]) -> None:
    if not grid:
        raise ConfigError("population.grid", dict(grid), "values of one setting or more, by its key")
    for key, values in grid.items():
        if not isinstance(values, list) or len(values) < 2:
            expected = "a list of two values or more; one alone is a setting of the recipe, or a condition"
            raise ConfigError(f"population.grid.{key}", values, expected)
        for index, value in enumerate(values):
            if any(_is_same(value, earlier) for earlier in values[:index]):
                raise ConfigError(f"population.grid.{key}", value, "every value once")
    combinations = math.prod(map(len, grid.values()))
    check_number("population.grid", combinations, f"at most {MOST_MEMBERS:,} combinations", high=MOST_MEMBERS)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal; 1 is 1.0 and not true."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


# ---- names ------------------------------------------------------------------------------------------


def key_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key by its last part, with as many parts before it as tell it from all others.

    Args:
        keys: keys of a grid.
    """
    found = {}
    for key in keys:
        parts = [part for part in key.split(".") if part != "init_args"]
        lengths = range(1, len(parts) + 1)
        ends = (".".join(parts[-length:]) for length in lengths)
        further = [other for other in keys if other != key]
        found[key] = next((end for end in ends if not any(_ends_with(other, end) for other in further)), key)
    return found


def _ends_with(key: str, end: str) -> bool:
    short = ".".join(part for part in key.split(".") if part != "init_args")
    return f".{short}".endswith(f".{end}")


def value_names(values: Sequence[Any]) -> list[str]:
    """A name for each value, all different: values that are written alike are numbered.

    Args:
        values: values of one key of a grid.
    """
    found = [_value_name(value) for value in values]
    count = Counter(found)
    names = [name if count[name] == 1 else f"{name}#{number}" for number, name in enumerate(found, 1)]
    return names if len({*names}) == len(names) else [f"{name}#{number}" for number, name in enumerate(names, 1)]


def _value_name(value: Any) -> str:
    if isinstance(value, str):
        text = PurePath(value).name or value
    elif isinstance(value, float):
        text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    elif isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        text = value["class_path"].rpartition(".")[2]
    elif isinstance(value, list) and not any(isinstance(entry, Mapping | list) for entry in value):
        text = "+".join(map(_value_name, value)) or "none"
    elif isinstance(value, Mapping | list):
        text = "settings"
    else:
        text = json.dumps(value)
    for sign in REFUSED_IN_NAMES:
        text = text.replace(sign, "_")
    return shortened(text, LONGEST_VALUE_NAME)
