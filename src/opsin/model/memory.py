"""Whether sizes fit into memory, from shapes alone, before anything is made.

Every number is less than what a run takes: what is refused could not have been trained on this machine.

Legend: M members, B batch, L positions, D width, H heads, N neurons, V outputs, F features.
"""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path

from opsin.errors import ConfigError
from opsin.model.protocol import Model, TaskSizes
from opsin.optimizers.base import Optimizer
from opsin.task import Task

SINGLE = 4
"""Bytes of a number in single precision."""

COPIES_OF_WEIGHTS = 2
"""Weights and their gradient; what the optimizer keeps of them comes on top."""

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files in which a container says how much memory it gives."""


def available_bytes() -> int:
    """Memory that this process may have: the machine's, its container's, or what its shell allows."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CGROUP_LIMITS:
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):
            # no such file, or the word max in it
            continue
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min(limits + ([] if allowed == resource.RLIM_INFINITY else [allowed]))


def check_memory(field: str, value: object, needed: float) -> None:
    """Refuse sizes that do not fit into memory.

    Args:
        field: setting that decides on the size, for the message.
        value: what the user gave.
        needed: bytes that are needed at least.

    Raises:
        ConfigError: there are fewer; says how many are needed.
    """
    if needed > (available := available_bytes()):
        expected = f"sizes that fit into memory: it needs {in_words(needed)} at least, of {in_words(available)}"
        raise ConfigError(field, value, expected)


def in_words(size: float) -> str:
    """A number of bytes for people."""
    units = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")
    power = 0
    while size >= 1000 and power < len(units) - 1:
        size, power = size / 1000, power + 1
    return f"{size:,.3g} {units[power]}" if size < 1e6 else f"{size:,.0f} {units[power]}"


def parameter_count(model: Model, task: TaskSizes) -> int:
    """Weights of one member.

    Args:
        model: settings of the model.
        task: task that gives the sizes of input and output.
    """
    return sum(math.prod(parameter.shape) for parameter in model.parameters(task))


def kept_numbers(model: Model, task: TaskSizes, optimizer: Optimizer) -> int:
    """Numbers that the optimizer keeps of the weights of one member.

    Args:
        model: settings of the model.
        task: task that gives the sizes of input and output.
        optimizer: the optimizer, which says what it keeps of every weight.
    """
    table = model.parameters(task)
    return optimizer.state_numbers({name: shape for name, shape in table.shapes.items() if name not in table.untrained})


def sequence_numbers(model: Model, task: TaskSizes) -> int:
    """Numbers that one sequence of one member leaves for the backward pass, at least.

    Args:
        model: settings of the model.
        task: task that gives the length of a sequence and the number of outputs.
    """
    kept = sum(math.prod(site.shape(1, 1)) for site in model.sites(task) if site.kept)
    features = task.layout.positions * (task.n_features or 0) // 2
    return kept + len(task.layout.scored) * task.n_outputs + features


def check_run_sizes(model: Model, task: Task, members: int, sets: dict[str, int], optimizer: Optimizer) -> None:
    """Refuse a run that cannot fit into memory.

    Args:
        model: settings of the model.
        task: task that the model learns.
        members: M, models that are trained at once.
        sets: sequences of the probe and of an evaluation set, by the name of the setting.
        optimizer: the optimizer, which says what it keeps of every weight.

    Raises:
        ConfigError: names the setting and what it would need.
    """
    weights = (
        SINGLE * members * (COPIES_OF_WEIGHTS * parameter_count(model, task) + kept_numbers(model, task, optimizer))
    )
    check_memory(model.setting, f"{model.in_words()}, {members} members", weights)
    batch = SINGLE * members * task.batch_size * sequence_numbers(model, task)
    check_memory(f"{type(task).__name__}.batch_size", task.batch_size, batch)
    length = task.layout.positions
    for name, count in sets.items():
        # all members see the same sequences; a site after the other is computed
        widest = max(math.prod(site.shape(1, 1)) for site in model.sites(task))
        data = length * (task.n_features or 2) // 2
        check_memory(f"model.{name}", count, SINGLE * count * (members * widest + data))
