"""The axes of a recorded number: their names, their columns in metrics.csv, and what names one number of many.

A metric has one number for each member and for each index of its further axes, such as layer and head, or neuron and
position. A reader declares them by name, with their sizes in the order of its values. The header of ``metrics.csv``
has a column for each name: ``member, layer, head`` always, others where something that the run records has them.

Legend: M members.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from opsin.errors import ConfigError
from opsin.records.schema import FURTHER_AXES, METRICS_COLUMNS, ROW_AXES, number_name

Axes = Mapping[str, int]
"""Name to size of every axis of one member's values, in the order of the values; empty for one number a member."""

AXIS_NAME = re.compile(r"[a-z][a-z0-9_]*")
LEADING_COLUMNS = METRICS_COLUMNS[: -len(ROW_AXES) - 1]
OTHER_COLUMNS = (*LEADING_COLUMNS, ROW_AXES[0], METRICS_COLUMNS[-1])
"""Columns of ``metrics.csv`` that no axis beside that of the members may be called."""

MOST_KEYS = 64
"""Numbers of one member of which loggers receive every one; heads, however many, are sent one by one."""

INDEX = re.compile(r"\d+(:\d+)*")


# ---- names and columns ------------------------------------------------------------------------------


def check_axes(metric: str, axes: Axes) -> dict[str, int]:
    """The axes of a metric as a dictionary of its own.

    Args:
        metric: name of the metric, for the message.
        axes: name to size of every axis of one member's values.

    Raises:
        ConfigError: no such mapping, a malformed name, one that is another column, or a size below 1.
    """
    if not isinstance(axes, Mapping):
        raise ConfigError(f"axes of metric {metric}", axes, "sizes by name, as in {'layer': 2, 'head': 8}, {} for none")
    for name, size in axes.items():
        if not (isinstance(name, str) and AXIS_NAME.fullmatch(name)) or name in OTHER_COLUMNS:
            expected = f"lower-case letters, digits and underscores, and none of {', '.join(OTHER_COLUMNS)}"
            raise ConfigError(f"metric {metric}, name of an axis", name, expected)
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"metric {metric}, size of axis {name}", size, "a whole number from 1 on")
    return dict(axes)


def table_axes(names: Iterable[str]) -> tuple[str, ...]:
    """Columns of a table that say which of a metric's values a row holds, in the order of its header.

    Args:
        names: names of all axes of all metrics in the table; the first mention of one that is not known decides where
            it comes.
    """
    found = dict.fromkeys(names)
    known = (*ROW_AXES, *(name for name in FURTHER_AXES if name in found))
    return (*known, *(name for name in found if name not in known))


def table_header(axes: Sequence[str]) -> str:
    """The first line of a table, without its end.

    Args:
        axes: names of the columns that ``table_axes`` gives.
    """
    return ",".join((*LEADING_COLUMNS, *axes, METRICS_COLUMNS[-1]))


def axes_of_header(header: str) -> tuple[str, ...] | None:
    """Names of the axes in the first line of a table; None where it is no table of numbers."""
    axes = tuple(header.rstrip("\n").split(",")[len(LEADING_COLUMNS) : -1])
    whole = header.rstrip("\n") == table_header(axes) and axes[: len(ROW_AXES)] == ROW_AXES
    return axes if whole and len({*axes}) == len(axes) else None


def sizes_in_words(axes: Axes) -> str:
    """Axes with their sizes, for messages: ``layer (2), head (8)``; ``none`` without any."""
    return ", ".join(f"{name} ({size})" for name, size in axes.items()) or "none"


# ---- one number of many -----------------------------------------------------------------------------


def split_number(name: str) -> tuple[str, tuple[int, ...]]:
    """Metric and index of a number that is written ``METRIC/I:J``; no index for any other name.

    Args:
        name: name of a number or of a metric.
    """
    metric, _, index = name.rpartition("/")
    if not (metric and INDEX.fullmatch(index)):
        return name, ()
    return metric, tuple(map(int, index.split(":")))


def find_number(name: str, recorded: Mapping[str, Axes]) -> tuple[str, tuple[int, ...]] | None:
    """Metric and index of one number of a run; None where nothing recorded is called so.

    Args:
        name: ``METRIC``, or ``METRIC/I:J`` of a metric with further axes.
        recorded: axes of every metric that the run records, by name.
    """
    if name in recorded:
        return None if recorded[name] else (name, ())
    metric, index = split_number(name)
    sizes = tuple(recorded.get(metric, {}).values())
    inside = len(index) == len(sizes) > 0 and all(i < size for i, size in zip(index, sizes, strict=True))
    return (metric, index) if inside else None


def number_names(recorded: Mapping[str, Axes]) -> list[str]:
    """Names of the numbers of a run, for messages; of a metric with many the first alone.

    Args:
        recorded: axes of every metric that the run records, by name.
    """
    return [
        number_name(metric, index)
        for metric, axes in recorded.items()
        for index in (np.ndindex(*axes.values()) if not is_wide(axes) else [(0,) * len(axes)])
    ]


def is_wide(axes: Axes) -> bool:
    """Whether a metric has more numbers a member than loggers receive one by one."""
    return math.prod(axes.values()) > MOST_KEYS and not {*axes} <= {*ROW_AXES}


def logged_numbers(metric: str, axes: Axes, values: Float[np.ndarray, "..."] | np.floating) -> dict[str, float]:
    """What loggers receive of one member's values: one number per key, or ``METRIC/max`` and ``METRIC/mean`` of many.

    Args:
        metric: name of the metric.
        axes: further axes of the metric.
        values: values of one member, with these axes; those that are no numbers enter neither maximum nor mean.
    """
    array = np.asarray(values)
    if not is_wide(axes):
        return {number_name(metric, index): float(array[index]) for index in np.ndindex(array.shape)}
    known = array[~np.isnan(array)]
    numbers = {"max": known.max(), "mean": known.mean()} if len(known) else {}
    return {f"{metric}/{name}": float(value) for name, value in numbers.items()}
