"""Claims about numbers of recipes: none that is no number, infinite or out of its range is taken by any class."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

import opsin.callbacks
import opsin.optimizers
import opsin.tasks
from opsin.errors import ConfigError
from opsin.interventions.feedback import Feedback
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.directions import LearnedDirections, WeightDirections
from opsin.model.transformer import Transformer
from opsin.population.settings import Condition, Population
from opsin.task import Task
from opsin.tasks import Exemplars, Kind
from opsin.training.module import OpsinModule
from tests.contracts.examples import examples_of
from tests.helpers.toys import few_shot

GIVEN: dict[type, dict[str, Any]] = {
    Feedback: {"metric": "train/loss", "above": 1.0},
    WeightDirections: {"name": "unembed.W_U"},
    opsin.tasks.Characters: {"path": __file__},
    opsin.tasks.Omniglot: {"archives": ["archive.zip"]},
    opsin.callbacks.ProgressMeasures: {"measures": {"one": [opsin.callbacks.Ablate(heads=["0:0"])]}},
    opsin.callbacks.Reinitialise: {"schedule": Schedule(start=1, stop=2), "heads": ["0:0"]},
}
"""What a class needs that no plain settings say."""

PARTS = (Transformer, Kind, Schedule, Feedback, WeightDirections, LearnedDirections, Condition, Population, OpsinModule)

ANY_WHOLE_NUMBER = {"order"}
"""Whole numbers that may be below 0."""

COMPARED_WITH_THE_RUN = {"layer", "null_dimensions", "member", "heldout_classes", "heldout_exemplars"}
"""Whole numbers whose range is known when the run is built, where a test of their class has them."""


def classes() -> list[type]:
    named = [
        getattr(package, name)
        for package in (opsin.tasks, opsin.callbacks, opsin.optimizers)
        for name in package.__all__
    ]
    found = [each for each in named if inspect.isclass(each) and not inspect.isabstract(each)]
    return [*dict.fromkeys([*(each for each in found if each is not Kind), *PARTS])]


def settings_of(described: type) -> dict[str, Any]:
    """Settings with which a class can be made; none is needed where all have a default."""
    if described is OpsinModule:
        return {"task": few_shot()}
    if described in GIVEN:
        return GIVEN[described]
    package = "tasks" if issubclass(described, Task | Exemplars) else "callbacks"
    shown = examples_of(f"opsin.{package}.{described.__name__}")
    plain = (row["init_args"] for row in shown)
    return next((row for row in plain if not any(isinstance(value, dict | list) for value in row.values())), {})


def numeric(described: type, kind: type) -> Iterator[str]:
    """Settings of a class that are a number of this kind."""
    hints = get_type_hints(described.__init__)
    for name in inspect.signature(described).parameters:
        inside = get_args(hints.get(name)) if get_origin(hints.get(name)) in (Union, UnionType) else ()
        if kind in (hints.get(name), *inside):
            yield name


def cases(kind: type) -> list[Any]:
    return [
        pytest.param(each, name, id=f"{each.__name__}.{name}") for each in classes() for name in numeric(each, kind)
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("described", "name"), cases(float))
def test_no_class_takes_what_is_no_finite_number(described, name, value):
    with pytest.raises(ConfigError):
        described(**{**settings_of(described), name: value})


@pytest.mark.parametrize(("described", "name"), cases(int))
def test_no_class_takes_a_whole_number_below_zero(described, name):
    if name in ANY_WHOLE_NUMBER | COMPARED_WITH_THE_RUN:
        return
    with pytest.raises(ConfigError):
        described(**{**settings_of(described), name: -1})


@pytest.mark.parametrize("betas", [(-0.5, 0.9), (0.9, 1.0), (0.9, math.nan), (1.5, 0.9)])
def test_betas_lie_from_0_to_below_1(tiny_task, betas):
    with pytest.raises(ConfigError, match=r"model\.betas"):
        OpsinModule(tiny_task, betas=betas)


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan, math.inf])
def test_eps_is_more_than_zero(tiny_task, eps):
    with pytest.raises(ConfigError, match=r"model\.eps"):
        OpsinModule(tiny_task, eps=eps)
