"""Sizes that cannot fit are refused from shapes alone; sizes that run are not."""

import pytest

from opsin.errors import ConfigError
from opsin.model import memory
from opsin.model.memory import available_bytes, check_memory, check_run_sizes, in_words, kept_numbers, parameter_count
from opsin.model.protocol import init_parameters
from opsin.model.transformer import Transformer
from opsin.optimizers import SGD, Adam, AdamW, Muon
from tests.helpers.toys import few_shot


def test_what_is_needed_and_what_there_is_are_in_the_line():
    with pytest.raises(ConfigError, match=r"task.batch_size: got 7, .* needs 1e\+0?3 EB|1,000 EB") as found:
        check_memory("task.batch_size", 7, 1e21)
    assert in_words(available_bytes()) in str(found.value)


def test_what_fits_is_not_refused():
    check_memory("task.batch_size", 7, available_bytes())


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_weights_are_never_counted_as_more_than_they_are(positions):
    model, task = Transformer(width=8, heads=2, mlp_ratio=4, positions=positions), few_shot()
    weights = sum(tensor.numel() for tensor in init_parameters(model, task, [0]).values())
    assert 0.5 * weights < parameter_count(model, task) <= weights


@pytest.mark.parametrize("name", ["probe_size", "evaluation_size"])
def test_a_set_of_sequences_that_does_not_fit_is_named(name):
    with pytest.raises(ConfigError, match=f"model.{name}"):
        check_run_sizes(Transformer(width=8, heads=2), few_shot(), 1, {name: 10**13}, AdamW())


def test_members_count():
    model = Transformer(width=8, heads=2)
    check_run_sizes(model, few_shot(), 1, {}, AdamW())
    with pytest.raises(ConfigError, match="members"):
        check_run_sizes(model, few_shot(), 10**12, {}, AdamW())


@pytest.mark.parametrize(
    ("optimizer", "least", "most"), [(SGD(), 1, 1), (AdamW(), 2, 2), (Adam(), 2, 2), (Muon(), 1, 2)]
)
def test_what_an_optimizer_keeps_of_the_weights_counts(optimizer, least, most, monkeypatch):
    model, task = Transformer(width=8, heads=2, mlp_ratio=4), few_shot()
    parameters = init_parameters(model, task, [0])
    weights = sum(tensor.numel() for tensor in parameters.values())
    kept = sum(x.numel() for name, tensor in parameters.items() for x in optimizer.start(name, tensor).values())
    assert kept_numbers(model, task, optimizer) == kept and least * weights <= kept <= most * weights
    assert (least < most) == (least * weights < kept < most * weights)
    seen = []
    monkeypatch.setattr(memory, "check_memory", lambda field, value, needed: seen.append(needed))
    check_run_sizes(model, task, 3, {}, optimizer)
    assert seen[0] == 4 * 3 * (2 * parameter_count(model, task) + kept)
