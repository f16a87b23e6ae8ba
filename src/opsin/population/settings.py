"""The population section of a recipe: seeds, conditions, windows."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

from lightning.pytorch import Callback

from opsin.errors import ConfigError, check_number
from opsin.interventions.schedules import Schedule

MOST_MEMBERS = 100_000
"""Seeds of a population, processes, members of one, and conditions of a grid."""

REFUSED_IN_NAMES = ',"/\n'
"""Characters that no condition's name has, as it stands in tables."""


@dataclass
class Condition:
    """What some members have that others have not.

    Args:
        callbacks: writers that act in these members only.
        by_seed: writers that act in the member of one seed only, by seed: for what training has put elsewhere in each,
            as the numbers of neurons.
        learning_rate: learning rate of these members; the recipe's when None.
        weight_decay: weight decay of these members; the recipe's when None.
        optimizer: class path and settings of these members' optimizer, or settings alone that replace the recipe's, for
            example ``{init_args: {momentum: 0.9}}``.
        task: settings of the task that replace the recipe's, for example ``{train_classes: 20}``.
        initial: run folder, checkpoint or snapshot whose weights these members start from. Where it
            holds several members, the n-th seed takes the n-th.
        set: settings of the recipe that differ here, by their keys with dots, for example
            ``{model.transformer.heads: 4}``: any under ``task``, ``model`` or ``trainer.callbacks``.
    """

    callbacks: list[Callback] = field(default_factory=list)
    by_seed: dict[int, list[Callback]] = field(default_factory=dict)
    learning_rate: float | None = None
    weight_decay: float | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    initial: str | None = None
    set: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rates = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        for name, rate in rates.items():
            if rate is not None:
                above = name == "learning_rate"
                expected = "more than 0" if above else "0 or more"
                check_number(f"population.conditions: {name}", rate, expected, 0, open_low=above)
        for name in self.optimizer:
            if name not in ("class_path", "init_args"):
                raise ConfigError("population.conditions: optimizer", name, "class_path and init_args, or one of them")
        for callback in (*self.callbacks, *chain.from_iterable(self.by_seed.values())):
            if not hasattr(callback, "members"):
                expected = "one that acts in chosen members; trainer.callbacks are for all"
                raise ConfigError("population.conditions: callbacks", type(callback).__name__, expected)


@dataclass
class Windows:
    """Conditions that are one manipulation in windows of different start and length: a critical-period study.

    Args:
        callbacks: writers, without a schedule of their own.
        starts: first positions of the windows, each with every length.
        lengths: lengths of the windows, each with every start.
        unit: what starts and lengths count, optimizer steps or training sequences.
    """

    callbacks: list[Callback]
    starts: list[int]
    lengths: list[int]
    unit: Literal["steps", "sequences"] = "sequences"

    def __post_init__(self) -> None:
        for callback in self.callbacks:
            if (schedule := getattr(callback, "schedule", Schedule())) != Schedule():
                where = f"population.windows.callbacks: {type(callback).__name__}.schedule"
                raise ConfigError(where, str(schedule), "none: the windows say when it acts")


@dataclass
class Population:
    """The members of a recipe: every seed in every condition.

    Args:
        seeds: list of the seeds, or how many from ``model.seed`` on.
        conditions: settings of the conditions by name; all are compared with the first.
        windows: further conditions, one for every start and length.
        grid: further conditions, one for every combination of the values of some settings, which have the keys that
            ``set`` of a condition takes.
        paired: the n-th seed has the same initial weights and data in all conditions, so that differences
            are caused by the condition; else every member has a seed of its own, and no differences are reported.
        compare: recorded metrics of one number a member whose last value is compared between conditions, beside
            onset and loss.
        processes: number of processes that train at once, each on one thread; the machine's cores when None.
        members_per_process: largest number of members in one chunk; by a rule on the machine when None.
    """

    seeds: int | list[int] = 4
    conditions: dict[str, Condition] = field(default_factory=dict)
    windows: Windows | None = None
    grid: dict[str, list[Any]] | None = None
    paired: bool = True
    compare: list[str] = field(default_factory=list)
    processes: int | None = None
    members_per_process: int | None = None

    def __post_init__(self) -> None:
        for name in ("processes", "members_per_process"):
            if (value := getattr(self, name)) is not None:
                check_number(f"population.{name}", value, f"from 1 to {MOST_MEMBERS:,}", 1, MOST_MEMBERS)
        few = self.seeds < 1 if isinstance(self.seeds, int) else not self.seeds
        if few or (isinstance(self.seeds, list) and (min(self.seeds) < 0 or len({*self.seeds}) < len(self.seeds))):
            raise ConfigError("population.seeds", self.seeds, "how many, at least 1, or different seeds of 0 or more")
        largest = self.seeds if isinstance(self.seeds, int) else len(self.seeds)
        check_number("population.seeds", largest, f"at most {MOST_MEMBERS:,} seeds", high=MOST_MEMBERS)
        if len({*self.compare}) < len(self.compare):
            raise ConfigError("population.compare", self.compare, "each metric once")
        for name in self.conditions:
            if not name or any(sign in name for sign in REFUSED_IN_NAMES):
                raise ConfigError("population.conditions", name, "a name without comma, quote, slash or line break")
        if self.windows is not None and not (self.windows.starts and self.windows.lengths and self.windows.callbacks):
            raise ConfigError("population.windows", "nothing", "callbacks, starts and lengths")
        if self.windows is not None and self.grid is not None:
            expected = "none beside population.windows, whose conditions differ by their schedule alone"
            raise ConfigError("population.grid", [*self.grid], expected)
