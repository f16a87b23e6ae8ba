"""Claims about bigrams with triggers."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.errors import ConfigError
from opsin.tasks import TriggerBigrams
from tests.helpers.token_tasks import (
    agrees,
    check_exact_is_finite_and_normal,
    check_other_draws,
    check_second_half_repeats,
    check_streams,
    loss,
    near,
    rows,
    run_three_steps,
    searched_truth,
)


def task(**options):
    return TriggerBigrams(**{"vocabulary": 10, "positions": 24, "batch_size": 8, "triggers": 2} | options)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**64 - 1), first=st.integers(0, 2**40), fixed=st.booleans())
def test_a_step_and_a_member_are_the_same_alone_and_among_others(seed, first, fixed):
    check_streams(task(fixed=fixed), first, 3, [seed, 7, seed])


def test_another_seed_step_or_split_gives_other_data():
    check_other_draws(task())


def test_the_table_is_a_function_of_its_seed_and_without_spread_the_unigram():
    assert (task().bigrams == task(batch_size=2).bigrams).all() and (task().bigrams != task(table_seed=1).bigrams).any()
    assert np.allclose(task().bigrams.sum(1), 1) and (task(spread=30.0).bigrams > 0).all()
    unigram = 1 / np.arange(1, 11)
    assert np.allclose(task(spread=0.0).bigrams, unigram / unigram.sum(), atol=1e-9)


def test_tokens_that_are_no_trigger_follow_the_bigrams():
    bigrams = task()
    tokens = rows(bigrams, count=5000)["tokens"]
    unigram = 1 / np.arange(1, 11)
    assert near(np.bincount(tokens[:, 0], minlength=10), unigram / unigram.sum())
    for v in range(2, 10):
        following = tokens[:, 1:][tokens[:, :-1] == v]
        assert near(np.bincount(following, minlength=10), bigrams.bigrams[v])


def test_a_fixed_trigger_has_one_successor_in_a_sequence_and_any_over_sequences():
    tokens = rows(task(), count=5000)["tokens"]
    first = []
    for line in tokens.tolist():
        for trigger in (0, 1):
            following = {b for a, b in itertools.pairwise(line) if a == trigger}
            assert len(following) <= 1
            first += following
    assert near(np.bincount(first, minlength=10), np.full(10, 0.1))


def test_random_triggers_are_any_tokens_of_which_a_sequence_has_so_many():
    bigrams = task(fixed=False, triggers=3, spread=0.0, zipf=0.0, positions=60)
    drawn = rows(bigrams, count=3000)
    counts = np.zeros(10)
    for tokens, looked_up in zip(drawn["tokens"].tolist(), drawn["looked_up"], strict=True):
        triggers = {tokens[i] for i in np.flatnonzero(looked_up)}
        assert len(triggers) <= 3
        assert all(len({b for a, b in itertools.pairwise(tokens) if a == trigger}) == 1 for trigger in triggers)
        counts[list(triggers)] += 1
    assert near(counts, np.full(10, 0.1))


def test_triggers_drawn_by_the_unigram_are_drawn_one_after_another_in_proportion_to_it():
    bigrams = task(vocabulary=4, fixed=False, drawn_by="unigram")
    p = 1 / np.arange(1, 5) / (1 / np.arange(1, 5)).sum()
    second = [sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    shares = p + second
    assert np.allclose(bigrams.trigger_shares, shares, atol=0.01) and math.isclose(bigrams.trigger_shares.sum(), 2)
    drawn = rows(bigrams, count=20_000)
    for v in range(4):
        # the first token knows nothing of the triggers
        is_trigger = drawn["looked_up"][:, 0][drawn["tokens"][:, 0] == v]
        assert near(np.bincount(is_trigger, minlength=2), [1 - shares[v], shares[v]])
    assert task().trigger_shares.tolist() == [1, 1, *[0] * 8] and task(fixed=False).trigger_shares.sum() == 2


def test_repeated_triggers_alone_count_where_they_alone_are_scored():
    bigrams = task(scored_rows="repeated_triggers")
    batch = bigrams.batch(0, 0, "train", 30)
    for b, line in enumerate(batch.tokens[0].tolist()):
        counter = [line[: row + 1].count(token) if token < 2 else 0 for row, token in enumerate(line)]
        assert (batch.weights[0, b] == torch.tensor([float(count >= 2) for count in counter])).all()
    assert bigrams.baselines() == {"uniform": math.log(10)}
    assert task().batch(0, 0, "train", 30).weights is None


@pytest.mark.parametrize("scored_rows", ["all", "repeated_triggers"])
def test_losses_of_triggers_and_of_other_rows_are_told_apart(scored_rows):
    bigrams = task(scored_rows=scored_rows)
    batch = bigrams.batch(0, 0, "train", 30).shared_by(2)
    outputs = torch.from_numpy(bigrams.bigrams).log()[batch.tokens]
    found = bigrams.objective.measured(outputs, batch)
    losses = loss(outputs, batch)[0]
    is_trigger, repeated = batch.tokens[0] < 2, batch.truth.query[0]
    torch.testing.assert_close(found["other_loss"], losses[~is_trigger].mean().expand(2))
    torch.testing.assert_close(found["trigger_loss"], losses[repeated].mean().expand(2))
    copied = torch.nn.functional.one_hot(batch.targets, 10) * 100.0
    found = bigrams.objective.measured(torch.where(batch.truth.query[..., None], copied.double(), outputs), batch)
    assert found["trigger_accuracy"].tolist() == [1, 1] and found["trigger_loss"].max() < 1e-9


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("split", ["train", "eval/repeated"])
def test_truth_is_what_a_slow_search_finds(fixed, split):
    bigrams = task(fixed=fixed)
    batch = bigrams.batch(0, 0, split, 30)
    looked_up = bigrams.draw([0], 0, 1, split, 30)["looked_up"][0, 0].numpy()
    assert agrees(batch.truth, searched_truth(batch, looked_up))
    assert split != "train" or (batch.truth.query.any() and not batch.truth.other.any())


def test_the_repeated_set_repeats_its_first_half():
    check_second_half_repeats(task())
    check_second_half_repeats(task(fixed=False, positions=25))


def test_the_unigram_is_how_often_each_token_is_the_next_one():
    for bigrams in (task(), task(fixed=False)):
        targets = rows(bigrams, count=20_000)["tokens"][:, 1:]
        found = np.bincount(targets.ravel(), minlength=10) / targets.size
        assert np.allclose(bigrams.unigram(), found, rtol=0.06) and math.isclose(bigrams.unigram().sum(), 1)


def enumerated(bigrams, tokens):
    """P(next token) after each position, summed over every choice of triggers and of their successors."""
    table, vocabulary = bigrams.bigrams, bigrams.n_tokens
    fixed = [tuple(range(bigrams.triggers))]
    choices = fixed if bigrams.fixed else list(itertools.combinations(range(vocabulary), bigrams.triggers))
    found = np.zeros((len(tokens), vocabulary))
    for triggers in choices:
        for successors in itertools.product(range(vocabulary), repeat=len(triggers)):
            successor_of, weight = (
                dict(zip(triggers, successors, strict=True)),
                bigrams._trigger_masses[[*triggers]].prod(dtype=float),
            )
            for row, v in enumerate(tokens):
                given = np.eye(vocabulary)[successor_of[v]] if v in successor_of else table[v]
                found[row] += weight * given
                if row + 1 < len(tokens):
                    weight *= given[tokens[row + 1]]
    return found / found.sum(1, keepdims=True)


@pytest.mark.parametrize(("fixed", "triggers"), [(True, 2), (False, 1), (False, 2), (False, 3)])
@pytest.mark.parametrize("drawn_by", ["uniform", "unigram"])
def test_the_best_prediction_is_the_sum_over_every_choice_of_triggers(fixed, triggers, drawn_by):
    drawn_by = "uniform" if fixed else drawn_by
    bigrams = task(vocabulary=4, triggers=triggers, fixed=fixed, positions=12, drawn_by=drawn_by)
    batch = bigrams.batch(0, 0, "train", 25)
    found = bigrams.exact(batch)[0].exp()
    for b, tokens in enumerate(batch.tokens[0].tolist()):
        assert np.allclose(found[b], enumerated(bigrams, tokens), atol=2e-6)


@pytest.mark.parametrize("fixed", [True, False])
def test_no_prediction_is_better_on_average_than_the_exact_one(fixed):
    bigrams = task(fixed=fixed)
    batch = bigrams.batch(0, 0, "train", 2000)
    exact = bigrams.exact(batch)
    best = loss(exact, batch)
    expected = -(exact.exp() * exact).sum(-1)
    difference = (best - expected).mean(-1)[0]
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(2000)
    guess = torch.from_numpy(bigrams._bigram_guess()).log()[batch.tokens]
    unigram = bigrams.unigram().log().expand_as(exact)
    for other in (unigram, guess, (1.2 * exact).log_softmax(-1), (0.8 * exact).log_softmax(-1)):
        worse = (loss(other, batch) - best).mean(-1)[0]
        assert worse.mean() > 2 * worse.std() / math.sqrt(2000)


@pytest.mark.parametrize("fixed", [True, False])
def test_baselines_are_losses_highest_first(fixed):
    bigrams = task(fixed=fixed)
    batch = bigrams.batch(1, 0, "train", 4000)
    guess = torch.from_numpy(bigrams._bigram_guess()).log()[batch.tokens]
    unigram = bigrams.unigram().log().expand_as(guess)
    losses = {"uniform": math.log(10), "unigram": loss(unigram, batch).mean(), "bigram": loss(guess, batch).mean()}
    assert bigrams.baselines() == pytest.approx({name: float(value) for name, value in losses.items()}, abs=0.02)
    assert list(losses.values()) == sorted(losses.values(), reverse=True)


@pytest.mark.parametrize("fixed", [True, False])
def test_exact_is_finite_and_sums_to_one_on_every_split(fixed):
    check_exact_is_finite_and_normal(task(fixed=fixed))
    check_exact_is_finite_and_normal(task(vocabulary=4, triggers=3, fixed=fixed, positions=40))


@pytest.mark.parametrize(("vocabulary", "fixed"), [(10, True), (40, False)])
def test_a_model_below_and_above_the_vocabulary_trains(vocabulary, fixed):
    run_three_steps(task(vocabulary=vocabulary, fixed=fixed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"triggers": 0}, "TriggerBigrams.triggers: got 0, expected 1 .. 9"),
        ({"triggers": 10}, "TriggerBigrams.triggers: got 10, expected 1 .. 9"),
        ({"zipf": math.inf}, "TriggerBigrams.zipf: got inf"),
        ({"spread": -0.5}, "TriggerBigrams.spread: got -0.5"),
        ({"table_seed": -1}, "TriggerBigrams.table_seed: got -1"),
        ({"drawn_by": "zipf", "fixed": False}, "TriggerBigrams.drawn_by: got 'zipf', expected one of uniform, unigram"),
        ({"drawn_by": "unigram"}, "TriggerBigrams.drawn_by: got 'unigram', expected uniform where triggers are fixed"),
        ({"scored_rows": "some"}, "TriggerBigrams.scored_rows: got 'some', expected one of all, repeated_triggers"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_named_in_one_line(options, message):
    with pytest.raises(ConfigError) as caught:
        task(**options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
