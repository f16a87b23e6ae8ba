"""Claims about every value there is: frozen, told apart by all of its fields, and with the gradient that it states."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections import defaultdict
from typing import Any

import pytest
import torch

from opsin.interventions import values as wing
from opsin.interventions.check_gradient import TinyCase, find_gradient
from opsin.interventions.identity import identity
from opsin.interventions.intervention import Value
from tests.contracts.writers import MODEL, made, save_donor, task, writer_rows
from tests.helpers.toys import batch_of, plan_of, run, weights

RULED_OUT = -1e8
"""Scores and logits below this are ruled out, whatever they come from."""


def identity_of(value: Value) -> str:
    """What tells a value from another in a plan's digest."""
    return identity(value)


def values() -> dict[str, type[Value]]:
    """Every value that can be made, by its name."""
    for found in pkgutil.iter_modules(wing.__path__):
        importlib.import_module(f"{wing.__name__}.{found.name}")
    kinds, todo = {}, [Value]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        if kind.__module__.startswith(f"{wing.__name__}.") and not kind.__abstractmethods__:
            kinds[kind.__name__] = kind
    return dict(sorted(kinds.items()))


VALUES = values()


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, list[Value]]:
    """The values of every row of the documents, by their class."""
    found = defaultdict(list)
    for row in writer_rows(save_donor(tmp_path_factory.mktemp("donor") / "donor.pt")):
        for planned in plan_of(MODEL, task(), *made(row)).interventions:
            value = planned.intervention.value
            found[type(value).__name__].append(value)
    return found


@pytest.fixture(scope="module")
def flows(tmp_path_factory) -> dict[str, list[tuple[Value, bool]]]:
    """Of every value that acts in a row of the documents, whether gradient reached a trained weight through it."""
    found = defaultdict(list)
    donor = save_donor(tmp_path_factory.mktemp("donor") / "donor.pt")
    batch = batch_of(task(), dtype=torch.float64)
    leaves = {name: value.requires_grad_() for name, value in weights(MODEL, task()).items()}

    def watched(kind):
        original = kind.__call__

        def calling(value, x, batch, *needed):
            chosen = original(value, x, batch, *needed)
            found[kind.__name__].append((value, reaches(chosen.value, chosen.where, list(leaves.values()))))
            return chosen

        return calling

    with pytest.MonkeyPatch.context() as patch:
        for kind in VALUES.values():
            patch.setattr(kind, "__call__", watched(kind))
        for row in writer_rows(donor):
            run(MODEL, leaves, batch, tap_with(leaves, batch, made(row)))
    return found


def tap_with(leaves, batch, writers):
    """The tap of these writers on these weights, all at full strength."""
    from opsin.interventions.apply import run_passes
    from tests.helpers.toys import inputs_of

    plan = plan_of(MODEL, task(), *writers)
    return run_passes(plan, inputs_of(plan, MODEL, leaves, batch))


def reaches(value, where, leaves) -> bool:
    """Whether the entries of a value that count depend, for autograd, on any of these tensors."""
    if not value.requires_grad:
        return False
    kept = value.detach() > RULED_OUT
    kept = kept if where is None else kept & where.bool()
    along = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
    total = (value * along).masked_select(kept).sum()
    if not total.requires_grad:
        return False
    found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return any(gradient is not None and bool((gradient != 0).any()) for gradient in found)


def changed(x: Any) -> Any:
    """Something of the same kind that is not equal."""
    if isinstance(x, bool):
        return not x
    if isinstance(x, int | float):
        return x + 1
    if x is None:
        return 1
    if isinstance(x, str):
        return f"{x}x"
    if isinstance(x, tuple):
        return (changed(x[0]), *x[1:]) if x else (1,)
    if isinstance(x, torch.Tensor):
        return x + 1
    if dataclasses.is_dataclass(x):
        compared = next(field for field in dataclasses.fields(x) if field.compare)
        return with_field(x, compared.name, changed(getattr(x, compared.name)))
    raise TypeError(f"no other {type(x).__name__} is known: {x!r}")


def with_field(x: Any, name: str, value: Any) -> Any:
    """A copy in which one field is another, whatever its class would say to that."""
    copied = object.__new__(type(x))
    for field in dataclasses.fields(x):
        object.__setattr__(copied, field.name, value if field.name == name else getattr(x, field.name))
    return copied


@pytest.mark.parametrize("name", VALUES)
def test_a_row_of_the_documents_uses_it(name, shown, flows):
    assert shown.get(name) or flows.get(name), f"no row of a document uses {name}"


@pytest.mark.parametrize("name", VALUES)
def test_it_is_frozen_and_hashed_by_its_fields(name):
    kind = VALUES[name]
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen and kind.__dataclass_params__.eq and kind.__hash__ is not None


@pytest.mark.parametrize("name", VALUES)
def test_it_equals_another_if_and_only_if_their_fields_are_equal(name, flows):
    for value in dict.fromkeys(value for value, _ in flows[name]):
        fields = dataclasses.fields(value)
        alike = with_field(value, "", None)
        assert alike == value and hash(alike) == hash(value)
        for field in fields:
            assert with_field(value, field.name, changed(getattr(value, field.name))) != value, field.name


@pytest.mark.parametrize("name", VALUES)
def test_values_that_differ_in_a_field_have_another_identity(name, flows):
    for value in dict.fromkeys(value for value, _ in flows[name]):
        assert identity_of(with_field(value, "", None)) == identity_of(value)
        unlike = {
            field.name: with_field(value, field.name, changed(getattr(value, field.name)))
            for field in dataclasses.fields(value)
            # what follows from the site or from other fields
            if not field.metadata.get("derived")
        }
        hidden = [field for field, other in unlike.items() if identity_of(other) == identity_of(value)]
        assert not hidden, f"{name}: fields that its identity leaves out: {hidden}"


@pytest.mark.parametrize("name", VALUES)
def test_what_it_says_about_gradient_is_what_autograd_finds(name, flows):
    assert flows[name], f"no row of a document lets {name} act"
    for value, reached in flows[name]:
        assert value.gradient in ("stops", "flows")
        assert reached == (value.gradient == "flows"), f"{value}: says {value.gradient}"


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> dict[str, list]:
    """Every intervention of the rows of the documents with the donor whose weights its pass runs, by its value."""
    found = defaultdict(list)
    for row in writer_rows(save_donor(tmp_path_factory.mktemp("donor") / "donor.pt")):
        plan = plan_of(MODEL, task(), *made(row))
        for each in plan.passes:
            donor = None if each.donor is None else plan.donors[each.donor]
            for item in (row.intervention for row in each.rows):
                found[type(item.value).__name__].append((item, donor))
    return found


@pytest.mark.parametrize("name", VALUES)
def test_what_it_says_about_gradient_is_what_the_check_of_the_build_finds(name, planned):
    case = TinyCase(MODEL.sites(task()), weights(MODEL, task()), task().batch(0, 0, batch_size=2))
    assert planned[name], f"no row of a document plans {name}"
    for item, donor in planned[name]:
        assert find_gradient(item, donor, case).gradient == item.value.gradient, item
