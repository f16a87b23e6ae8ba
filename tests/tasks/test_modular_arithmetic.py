"""Claims about tables of operations: their answers by hand and in other words, what is shown, and what is known."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from opsin.errors import ConfigError
from opsin.model.mlp import MLP
from opsin.model.transformer import Transformer
from opsin.objective import CrossEntropy, LogCrossEntropy, least_margin
from opsin.optimizers import SGD
from opsin.tasks import ModularArithmetic, PermutationTable
from opsin.training.module import OpsinModule
from tests.helpers.toys import train

FORMULAS = {
    "a + b": lambda a, b, p: a + b,
    "a - b": lambda a, b, p: a - b,
    "a * b": lambda a, b, p: a * b,
    "a**2 + b**2": lambda a, b, p: a * a + b * b,
    "a**2 + a*b + b**2 + a": lambda a, b, p: a * a + a * b + b * b + a,
    "a**3 + a*b": lambda a, b, p: a * a * a + a * b,
    "-(2*a - 3) + 5*b": lambda a, b, p: 3 - 2 * a + 5 * b,
}


def answers(task):
    return {(a, b): c for a, b, c in task.pairs.tolist()}


@pytest.mark.parametrize("modulus", [2, 7, 12])
@pytest.mark.parametrize("operation", FORMULAS)
def test_the_table_is_that_of_the_formula(operation, modulus):
    pairs = [(a, b) for a in range(modulus) for b in range(modulus)]
    found = answers(ModularArithmetic(modulus, operation))
    assert found == {(a, b): FORMULAS[operation](a, b, modulus) % modulus for a, b in pairs}
    assert list(found) == pairs


def test_a_quotient_times_its_divisor_is_the_dividend_and_what_cannot_divide_is_left_out():
    found = answers(ModularArithmetic(7, "a / b"))
    assert set(found) == {(a, b) for a in range(7) for b in range(1, 7)}
    assert all(c * b % 7 == a for (a, b), c in found.items())
    assert {b for _, b in answers(ModularArithmetic(12, "a / b"))} == {1, 5, 7, 11}


@pytest.mark.parametrize(
    "operation",
    ["", "a +", "a @ b", "a**b", "a**-1", "0.5 * a", "c", "f(a)", "a if b else a", "True", "(" * 199, "a" + "+a" * 200],
)
def test_what_is_no_operation_is_refused_in_one_line(operation):
    with pytest.raises(
        ConfigError, match=r"^ModularArithmetic.operation: got .* expected an expression of a and b"
    ) as e:
        ModularArithmetic(7, operation)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operation": "a / 0"}, "ModularArithmetic.operation: got 'a / 0', expected one that is defined"),
        ({"modulus": 1}, "ModularArithmetic.modulus: got 1, expected 2 .. 1,000"),
        ({"loss": "square"}, "ModularArithmetic.loss: got 'square', expected cross_entropy or log_cross_entropy"),
        ({"train_share": 1.0}, "ModularArithmetic.train_share: got 1.0"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_one_line(options, message):
    with pytest.raises(ConfigError, match=message):
        ModularArithmetic(**options)


@pytest.mark.parametrize("options", [{"permuted": 1}, {"permuted": 7}, {"operation": "ba"}], ids=str)
def test_a_group_that_cannot_be_is_refused(options):
    with pytest.raises(ConfigError, match=f"PermutationTable.{next(iter(options))}: got"):
        PermutationTable(**options)


@pytest.mark.parametrize("operation", ["ab", "aba^-1", "aba"])
def test_products_of_permutations_are_those_of_functions(operation):
    elements = list(permutations(range(3)))

    def product(a, b):
        after = dict(zip(a, range(3), strict=True)) if operation == "aba^-1" else a
        inner = range(3) if operation == "ab" else [after[i] for i in range(3)]
        return elements.index(tuple(a[b[i]] for i in inner))

    found = answers(PermutationTable(3, operation))
    assert found == {(i, j): product(a, b) for i, a in enumerate(elements) for j, b in enumerate(elements)}


def test_a_group_has_each_answer_equally_often_and_its_identity_first():
    found = PermutationTable(4)
    assert (np.bincount(found.pairs[:, 2]) == 24).all() and len(found.pairs) == 24**2
    assert all(answers(found)[0, b] == b for b in range(24))


def test_a_sequence_is_two_operands_and_the_sign_at_which_the_answer_is_predicted():
    task = ModularArithmetic(5, "a - b", 0.4)
    batch = task.batch(0, 0)
    assert batch.tokens.shape == (1, 10, 3) and (batch.tokens[..., 2] == 5).all()
    assert task.layout.scored == (2,) and (task.n_tokens, task.n_outputs) == (6, 5)
    a, b = batch.tokens[..., 0], batch.tokens[..., 1]
    assert torch.equal(batch.targets[..., 0], (a - b) % 5)


def test_without_the_sign_the_answer_is_predicted_at_the_second_operand():
    task = ModularArithmetic(5, equals=False)
    batch = task.batch(0, 0)
    assert batch.tokens.shape == (1, 12, 2) and task.layout.scored == (1,) and task.n_tokens == 5


def test_the_whole_table_is_in_the_order_of_a_then_b():
    task = ModularArithmetic(5)
    batch = task.table(task.bank())
    assert batch.tokens[0, :, :2].tolist() == [[a, b] for a in range(5) for b in range(5)]
    assert batch.targets[0, :, 0].tolist() == [(a + b) % 5 for a in range(5) for b in range(5)]


def test_the_exact_reference_has_no_loss_and_chance_that_of_equal_odds():
    task = ModularArithmetic(5, "a * b")
    batch, known = task.batch(0, 0, "eval/test"), task.references()
    losses = {name: task.objective.member_loss(known[name](batch), batch).item() for name in known}
    assert losses["exact"] == pytest.approx(0, abs=1e-9) and losses["chance"] == pytest.approx(math.log(5))
    assert task.baselines() == {"uniform": math.log(5)}


def test_the_unigram_counts_the_answers_that_are_trained_on():
    task = ModularArithmetic(5, "a * b", 0.6)
    trained = [c for a, b, c in task.pairs[task.examples_of("train")].tolist()]
    np.testing.assert_allclose(task.unigram(), [trained.count(c) / 15 for c in range(5)])


def test_the_margin_is_that_of_the_worst_pair():
    batch = ModularArithmetic(3, train_share=0.3).batch(0, 0)
    outputs = torch.zeros(1, 3, 1, 3)
    outputs.scatter_(-1, batch.targets[..., None], torch.tensor([4.0, 2.0, -1.0]).view(1, 3, 1, 1))
    assert least_margin(outputs, batch).tolist() == [-1.0]
    outputs[0, 2] = torch.tensor([0.5, 0.0, 0.0]).roll(int(batch.targets[0, 2]))
    assert least_margin(outputs, batch).tolist() == [0.5]


@pytest.mark.parametrize(("loss", "kind"), [("cross_entropy", CrossEntropy), ("log_cross_entropy", LogCrossEntropy)])
@pytest.mark.parametrize("in_float64", [True, False])
def test_the_loss_is_the_chosen_one_in_the_chosen_precision(loss, kind, in_float64):
    task = ModularArithmetic(5, loss=loss, in_float64=in_float64)
    batch = task.batch(0, 0)
    found = task.objective.member_loss(torch.zeros(1, 12, 1, 5), batch)
    assert isinstance(task.objective, kind) and found.dtype == (torch.float64 if in_float64 else torch.float32)
    expected = math.log(5) if loss == "cross_entropy" else math.log(math.log(5))
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert [measure.name for measure in task.objective.measures_of(batch)] == ["accuracy", "margin"]


def test_a_network_of_one_hot_inputs_learns_the_training_pairs_by_the_logarithm_of_the_loss():
    task = ModularArithmetic(5, equals=False, loss="log_cross_entropy")
    model = OpsinModule(task, network=MLP(width=32), optimizer=SGD(learning_rate=0.1), compile=False)
    assert model.sites.weights["blocks.0.mlp.W_in"].shape == (10, 32)
    train(model, 150)
    assert model.history["train/accuracy"].values[-1][0] == 1
    assert model.history["train/loss"].values[-1][0] < -3


def test_a_minibatch_trains_too():
    model = train(OpsinModule(PermutationTable(3, batch_size=6), Transformer(1, 8, 2), compile=False), 50)
    losses = model.history["train/loss"].values.block
    assert losses[-1] < losses[0] and model.task.time_axis.sequences == 18
