"""Claims about kinds of neurons: planted ones are found, loops agree."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opsin.metrics.activity import always_on, by_position, by_tokens, dead, explained_by

GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(6, (2, 40, 10), generator=GENERATOR)
PREVIOUS = TOKENS.roll(1, -1)
POSITION = torch.arange(10).expand(2, 40, -1)
PLANTED = {
    "dead": torch.zeros(2, 40, 10, dtype=torch.bool),
    "always on": torch.ones(2, 40, 10, dtype=torch.bool),
    "position": (POSITION == 3) | (POSITION == 7),
    "token": TOKENS == 2,
    "previous": PREVIOUS == 2,
    # neither token alone says anything
    "pair": (TOKENS + PREVIOUS) % 2 == 0,
}
ACTIVE = torch.stack(list(PLANTED.values()), -1)


def of(scores):
    return {name: scores[:, index] for index, name in enumerate(PLANTED)}


def test_every_planted_neuron_is_told_by_what_it_was_planted_for_alone():
    for found, explained in (
        (by_position(ACTIVE), {"position"}),
        (by_tokens(ACTIVE, TOKENS, 0), {"token"}),
        (by_tokens(ACTIVE[:, :, 1:], TOKENS[..., :-1], 0), {"previous"}),
        (by_tokens(ACTIVE, TOKENS, 1), {"token", "previous", "pair"}),
    ):
        for name, share in of(found).items():
            assert ((share - 1).abs() < 1e-12).all() if name in explained else (share < 0.2).all(), name


def test_dead_and_always_active_neurons_are_just_those():
    assert {name for name, is_so in of(dead(ACTIVE)).items() if is_so.all()} == {"dead"}
    assert {name for name, is_so in of(always_on(ACTIVE)).items() if is_so.all()} == {"always on"}
    once = ACTIVE.clone()
    once[1, 0, 0, 0] = True
    assert dead(once)[:, 0].tolist() == [True, False]


def test_a_neuron_that_does_not_care_has_nothing_explained_on_average_however_many_groups_there_are():
    noise = torch.rand(1, 20, 10, 600, generator=GENERATOR) < 0.4
    many = torch.randint(120, (1, 20, 10), generator=GENERATOR)
    shares = explained_by(noise, many)
    assert abs(shares.mean()) < 0.02 and shares.std() > 0.02


@given(st.integers(0, 2**16), st.integers(1, 12))
def test_explained_variance_is_that_of_loops(seed, kinds):
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(2, 3, 4, 2, generator=generator) < 0.5
    groups = torch.randint(kinds, (2, 3, 4), generator=generator)
    found = explained_by(active, groups)
    for member in range(2):
        for neuron in range(2):
            cases = [float(x) for x in active[member, :, :, neuron].flatten()]
            labels = groups[member].flatten().tolist()
            assert float(found[member, neuron]) == pytest.approx(explained_by_loops(cases, labels), abs=1e-12)


def explained_by_loops(cases, labels):
    mean = sum(cases) / len(cases)
    total = sum((x - mean) ** 2 for x in cases) / (len(cases) - 1)
    if total < 1e-12 or len(set(labels)) == len(cases):
        return 0.0
    within = 0.0
    for label in set(labels):
        group = [x for x, name in zip(cases, labels, strict=True) if name == label]
        within += sum((x - sum(group) / len(group)) ** 2 for x in group)
    return 1 - within / (len(cases) - len(set(labels))) / total
