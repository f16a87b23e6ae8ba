"""Claims about sparse modular addition: its answers, its truth, and how its sequences are drawn."""

import itertools
import math

import numpy as np
import pytest
import torch

from opsin.errors import ConfigError
from opsin.tasks import SparseModularAddition


def task(**options):
    return SparseModularAddition(**{"train_sequences": 64, "test_sequences": 32, "batch_size": 8} | options)


@pytest.mark.parametrize(("modulus", "relevant"), [(2, 5), (3, 2), (5, 12)])
def test_the_answer_is_the_sum_of_the_first_tokens_modulo_p(modulus, relevant):
    made = task(modulus=modulus, relevant=relevant, vocabulary=6)
    batch = made.batch(1, 2)
    for tokens, (answer,) in zip(batch.tokens[0].tolist(), batch.targets[0].tolist(), strict=True):
        assert len(tokens) == 12 and max(tokens) < modulus
        assert answer == sum(tokens[:relevant]) % modulus
    assert batch.truth.relevant.tolist() == [True] * relevant + [False] * (12 - relevant)


def test_tokens_behind_the_relevant_ones_are_of_no_account():
    made = task(relevant=3, positions=4)
    every = torch.tensor(list(itertools.product(range(2), repeat=4)))
    batch = made.assemble({"sequences": every}, {"example": torch.arange(16)[None]})
    answers = batch.targets[0, :, 0].reshape(8, 2)
    assert (answers[:, 0] == answers[:, 1]).all() and answers[:, 0].tolist() == [0, 1, 1, 0, 1, 0, 0, 1]


def test_of_ones_and_noughts_the_clusters_are_the_numbers_of_ones():
    batch = (made := task(relevant=5)).batch(0, 0)
    counts = made.declared_features()["counts"](batch)
    assert torch.equal(counts, batch.tokens[..., :5].sum(-1))
    assert torch.equal(made.declared_features()["target"](batch), batch.targets[..., 0])


def test_of_more_tokens_the_clusters_are_the_tables_of_counts():
    made = task(modulus=3, relevant=2, positions=2, vocabulary=3)
    every = torch.tensor(list(itertools.product(range(3), repeat=2)))
    batch = made.assemble({"sequences": every}, {"example": torch.arange(9)[None]})
    counts = made.declared_features()["counts"](batch)[0].tolist()
    tables = [tuple(np.bincount(row, minlength=3)) for row in every.tolist()]
    # as many classes as tables, and the same class only for the same table
    assert len({*counts}) == len({*tables}) == 6
    assert len({*zip(counts, tables, strict=True)}) == 6


def test_clusterings_are_counts_of_shifted_tokens_and_each_decides_the_answer():
    made = task(relevant=3, positions=4)
    batch = made.batch(0, 0, "eval/train", 64)
    assert made.shifts()[:2] == [(0, 0, 0), (0, 0, 1)] and len(made.shifts()) == 4
    found = list(made.clusterings(batch))
    assert torch.equal(found[0], made.declared_features()["counts"](batch))
    assert torch.equal(found[3], batch.tokens[..., 0] + (1 - batch.tokens[..., 1:3]).sum(-1))
    for shift, clusters in zip(made.shifts(), found, strict=True):
        assert torch.equal((clusters - sum(shift)) % 2, batch.targets[..., 0])
    assert task(relevant=12).shifts() == [(0,) * 12]


def test_every_token_stands_everywhere_as_often():
    bank = SparseModularAddition(modulus=3, train_sequences=6000, test_sequences=6000, split_seed=4).bank()
    counts = torch.stack([(bank["sequences"] == token).sum(0) for token in range(3)])  # token position
    assert ((counts - 4000).abs() < 5 * math.sqrt(12000 * 2 / 9)).all()
    agreement = (bank["sequences"][:, 0] == bank["sequences"][:, 1]).double().mean()
    assert abs(agreement - 1 / 3) < 5 * math.sqrt(2 / 9 / 12000)


def test_the_sets_have_their_sizes_whatever_the_seed_of_a_member_and_follow_from_the_split_seed():
    made = task()
    assert (made.set_size("train"), made.set_size("eval/test")) == (64, 32)
    one, other = (made.batch(seed, 0, "eval/test", 32).tokens for seed in (1, 2))
    assert torch.equal(one, other)
    assert not torch.equal(one, task(split_seed=1).batch(1, 0, "eval/test", 32).tokens)
    whole = SparseModularAddition()
    assert (whole.set_size("train"), whole.set_size("eval/test"), whole.time_axis.sequences) == (2048, 2048, 2048)


def test_its_plateau_is_guessing():
    assert task(modulus=3, vocabulary=4).plateau == pytest.approx(math.log(3))


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"modulus": 1}, "SparseModularAddition.modulus"),
        ({"relevant": 13}, "SparseModularAddition.relevant"),
        ({"relevant": 0}, "SparseModularAddition.relevant"),
        ({"vocabulary": 1}, "SparseModularAddition.vocabulary"),
        ({"test_sequences": 0}, "SparseModularAddition.test_sequences"),
        ({"batch_size": 65}, "SparseModularAddition.batch_size"),
    ],
)
def test_a_wrong_setting_is_named(wrong, line):
    with pytest.raises(ConfigError, match=line):
        task(**wrong)
