"""Claims about random numbers made in the graph: normal, unrelated, and a function of seed, step and place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opsin.interventions.values.noise import UINT32_MAX, another_example, box_muller, hashed_normals, keys, mixed

WORDS = st.integers(0, UINT32_MAX)
LIKE = torch.zeros(1, 32, 5, 64, dtype=torch.float64)


def clock(*pairs):
    return torch.tensor(pairs, dtype=torch.int64)


def drawn(pairs, like=LIKE, salt=1):
    return hashed_normals(clock(*pairs), like.expand(len(pairs), *like.shape[1:]), salt)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@given(WORDS)
def test_a_hash_is_that_of_unbounded_integers(x):
    y = (x + 0x1E3779B9) % 2**32
    for shift, factor in ((16, 0x604BAA5D), (15, 0x43D6CE97)):
        y = (y ^ y >> shift) * factor % 2**32
    assert mixed(torch.tensor([x])).tolist() == [y ^ y >> 15]


def test_a_hash_is_a_permutation():
    assert mixed(torch.arange(2**20)).unique().numel() == 2**20


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_of_a_hash_turns_on_every_bit_of_its_input(bit):
    x = torch.arange(20_000)
    turned = mixed(x) ^ mixed(x ^ (1 << bit))
    share = torch.stack([(turned >> out & 1).double().mean() for out in range(32)])
    assert (share - 0.5).abs().max() < 0.05


def test_normals_are_normal():
    x = drawn([(seed, step) for seed in (0, 1) for step in range(50)]).flatten()
    n = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean().item() - moment) < 4 * (variance / n) ** 0.5
    # Kolmogorov and Smirnov: 1.95 / sqrt(n) is passed by one sample in a thousand
    expected = torch.special.ndtr(x.sort().values)
    rank = torch.arange(n, dtype=torch.float64) / n
    assert max((expected - rank).max(), (rank + 1 / n - expected).max()) < 1.95 / n**0.5


def test_the_noise_of_one_entry_over_the_steps_is_normal_too():
    x = drawn([(7, step) for step in range(20_000)], LIKE[:, :1, :1, :3])
    expected = torch.special.ndtr(x.sort(0).values)
    rank = (torch.arange(20_000, dtype=torch.float64) / 20_000).view(-1, 1, 1, 1)
    assert (expected - rank).abs().max() < 2.2 / 20_000**0.5  # the largest of three


@pytest.mark.parametrize("of", [lambda x: x, torch.square, torch.abs], ids=["value", "square", "size"])
def test_neighbouring_entries_steps_seeds_and_sites_are_uncorrelated(of):
    noise = of(drawn([(seed, step) for seed in range(10) for step in range(10)]))
    bound = 4 / noise.numel() ** 0.5
    for axis in (1, 2, 3):
        length = noise.shape[axis]
        assert abs(correlation(noise.narrow(axis, 0, length - 1), noise.narrow(axis, 1, length - 1))) < 1.2 * bound
    later = of(drawn([(seed, step + 10) for seed in range(10) for step in range(10)]))
    next_step = of(drawn([(seed, step + 1) for seed in range(10) for step in range(10)]))
    next_seed = of(drawn([(seed + 1, step) for seed in range(10) for step in range(10)]))
    elsewhere = of(drawn([(seed, step) for seed in range(10) for step in range(10)], salt=2))
    for shifted in (later, next_step, next_seed, elsewhere):
        assert abs(correlation(noise, shifted)) < bound


def test_no_two_steps_hold_the_same_numbers_in_another_order():
    seen = drawn([(0, step) for step in range(500)], LIKE[:, :4, :4]).flatten(1)
    assert seen.unique().numel() == seen.numel()


def test_normals_are_a_function_of_seed_step_salt_and_index():
    pairs = [(3, 5), (2**40 + 3, 5), (3, 6), (4, 5)]
    noise = drawn(pairs)
    assert torch.equal(noise, drawn(pairs)), "the same call gives the same"
    assert torch.equal(noise[[2, 0, 3, 1]], drawn([pairs[i] for i in (2, 0, 3, 1)])), "a slot does not matter"
    assert torch.equal(noise[1:2], drawn(pairs[1:2])), "neighbours do not matter"
    everything = torch.cat([noise.flatten(), drawn(pairs, salt=2).flatten()])
    assert everything.unique().numel() == everything.numel(), "no number occurs twice"


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    drawn([(0, 0)])
    assert torch.equal(before, torch.get_rng_state())


def test_normals_in_single_precision_are_those_in_double_precision_rounded():
    single = drawn([(0, 0), (1, 9)], LIKE.float())
    assert single.dtype == torch.float32
    # near 0 the radius is the root of a rounding
    assert (single.double() - drawn([(0, 0), (1, 9)])).abs().max() < 5e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_extreme_bits_give_finite_numbers(dtype):
    ends = torch.tensor([0, 1, UINT32_MAX - 1, UINT32_MAX])
    x = box_muller(ends[:, None].expand(4, 4), ends.expand(4, 4), dtype)
    assert x.isfinite().all() and 6.7 < x.abs().max() < 6.8


def test_keys_of_many_seeds_and_steps_are_spread_evenly():
    at = torch.cartesian_prod(torch.arange(100), torch.arange(500))
    found = keys(at, 1)
    assert found.min() >= 0 and found.max() <= UINT32_MAX
    counts = torch.bincount(found >> 24, minlength=256).double()
    expected = len(at) / 256
    # chi-squared of 255 degrees of freedom
    assert ((counts - expected).square() / expected).sum() < 255 + 4 * (2 * 255) ** 0.5


@given(st.integers(2, 40), st.integers(0, 2**62), st.integers(0, 10**9))
def test_another_example_is_another_one_and_each_stands_in_once(examples, seed, step):
    (sources,) = another_example(clock((seed, step)), examples).tolist()
    assert sorted(sources) == list(range(examples))
    assert all(index != found for index, found in enumerate(sources))


def test_every_other_example_has_its_turn():
    firsts = another_example(torch.stack([torch.full((4000,), 3), torch.arange(4000)], 1), 5)[:, 0]
    counts = firsts.bincount(minlength=5)
    assert counts[0] == 0 and (counts[1:] - 1000).abs().max() < 4 * (4000 * 0.25 * 0.75) ** 0.5


def test_the_only_example_of_a_batch_gets_itself():
    assert another_example(clock((0, 0), (1, 0)), 1).tolist() == [[0], [0]]
