"""Claims about every writer there is: what it does not select stays, and what does not exist stops the build."""

from __future__ import annotations

import inspect

import pytest
import torch

from opsin.errors import ConfigError
from tests.contracts.writers import MODEL, WRITERS, made, name_of, rows_of, save_donor, task
from tests.helpers.toys import Training, plan_of, weights

UNKNOWN = {
    "heads": ["1:99"],
    "head": "1:99",
    "neurons": ["1:99999"],
    "site": "blocks.9.hook_nothing",
    "sites": ["blocks.9.hook_nothing"],
    "positions": [99],
    "members": [99],
    "member": 99,
    "layers": [99],
    "layer": 99,
    "norms": ["blocks.9.ln1"],
    "weights": ["blocks.9.attn.W_Q"],
    "senders": ["9:9"],
    "receivers": ["9:9.k"],
    "temperatures": {"9:9": 2.0},
}
"""What no model has, by the settings that name parts of one."""

ADDRESSES = [
    (name, setting)
    for name, kind in WRITERS.items()
    for setting in inspect.signature(kind).parameters
    if setting in UNKNOWN
]
UPDATES = 2


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    return save_donor(tmp_path_factory.mktemp("donor") / "donor.pt")


@pytest.fixture(scope="module")
def values():
    return weights(MODEL, task(), dtype=torch.float32)


@pytest.fixture(scope="module")
def untouched(values):
    """Parameters after a few updates with no writer."""
    return trained(values)


def trained(values, *writers, strength=None):
    """Parameters after a few updates; with ``strength``, every gate is held there."""
    training = Training(MODEL, task(), values, *writers)
    if strength is not None:
        training.gates = torch.full_like(training.gates, strength)
    for step in range(UPDATES):
        training.update(step)
    return {name: value.detach() for name, value in training.values.items()}


@pytest.mark.parametrize("name", WRITERS)
def test_the_documents_show_an_example(name, donor):
    assert rows_of(name, donor), f"no row of a document shows {name}"


@pytest.mark.parametrize("name", WRITERS)
def test_it_says_in_whom_when_and_in_which_order_it_acts(name, donor):
    kind = WRITERS[name]
    (writer, *_) = made(rows_of(name, donor)[0])
    assert hasattr(writer, "members") and hasattr(writer, "schedule")
    settings = inspect.signature(kind).parameters
    assert {"members", "schedule"} <= set(settings)
    # where several may act on the same entries, either the user ranks them or the docstring says what counts
    assert "order" in settings or "overlap" in inspect.getdoc(kind), f"{name} has no order and does not say why"


@pytest.mark.parametrize("name", WRITERS)
def test_at_strength_zero_it_changes_nothing_bitwise(name, donor, values, untouched):
    for row in rows_of(name, donor)[:1]:
        found = trained(values, *made(row), strength=0.0)
        assert {item for item in untouched if not torch.equal(found[item], untouched[item])} == set()


@pytest.mark.parametrize("name", WRITERS)
def test_members_that_it_does_not_select_are_bitwise_untouched(name, donor, values, untouched):
    for row in rows_of(name, donor)[:1]:
        writers = made(row, members=[1])
        found = trained(values, *writers, strength=1.0)
        assert {item for item in untouched if not torch.equal(found[item][0], untouched[item][0])} == set()
        changed = {item for item in untouched if not torch.equal(found[item][1], untouched[item][1])}
        # directions that are taken on the way are still empty where no run takes them
        assert changed or not all(supply.fixed for supply in plan_of(MODEL, task(), *writers).supplies)


@pytest.mark.parametrize(("name", "setting"), ADDRESSES)
def test_what_no_model_has_stops_the_build_with_one_line_that_names_the_setting(name, setting, donor):
    given = {setting: UNKNOWN[setting]}
    # what the setting may not go with is left out, too
    alone = [{**required(row[0]), **given} for row in rows_of(name, donor)[:1]]
    tried = [{**row[0]["init_args"], **given} for row in rows_of(name, donor)] + alone
    refused = [str(error) for settings in tried if (error := refusal(name, settings)) is not None]
    assert refused, f"{name} takes {setting}={UNKNOWN[setting]!r}"
    assert all(len(message.splitlines()) == 1 for message in refused)
    assert any(message.startswith(f"{name}.{setting}") for message in refused), refused


def required(settings):
    """Those of a writer's settings that it cannot do without."""
    parameters = inspect.signature(WRITERS[name_of(settings)]).parameters
    return {
        name: value
        for name, value in settings["init_args"].items()
        if parameters[name].default is inspect.Parameter.empty
    }


def refusal(name, settings) -> ConfigError | None:
    """What the build of a writer with these settings says to them."""
    try:
        plan_of(MODEL, task(), *made(({"class_path": f"opsin.callbacks.{name}", "init_args": settings},)))
    except ConfigError as error:
        return error
    return None
