"""Claims about objectives: losses, measures and distances on numbers that a hand can check, and means by weights."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from opsin.errors import ConfigError
from opsin.objective import (
    BinaryCrossEntropy,
    CrossEntropy,
    LogCrossEntropy,
    LossScale,
    Measure,
    Objective,
    SquaredError,
    entry_mean,
    measures_in,
)
from opsin.task import Batch, Layout, Truth
from opsin.training.objective import check_objective, step_metrics
from tests.helpers.regression import Pairs
from tests.helpers.toys import ToyTokens, batch_of

THIRDS = torch.tensor([[[1.0, 0.0], [2.0, 1.0], [0.0, 0.0]]]).view(1, 3, 1, 2)
"""Outputs of one member on three sequences with one scored position."""


def batch_with(targets, weights=None):
    """A batch of three sequences of one position with these targets, of one member."""
    layout = Layout(features=(0,), tokens=(), labels=(), scored=(0,))
    tokens = torch.zeros(1, 3, 0, dtype=torch.int64)
    truth = Truth.without_queries(layout, 1, 3)
    given = None if weights is None else torch.tensor(weights).view(1, 3, 1)
    return Batch(torch.zeros(1, 3, 1, 1), tokens, torch.as_tensor(targets), None, truth, layout, given)


def test_the_squared_error_of_an_entry_is_the_mean_or_the_sum_over_its_outputs():
    batch = batch_with([[[[0.0, 0.0]], [[2.0, 4.0]], [[1.0, 1.0]]]])
    assert SquaredError().loss(THIRDS, batch).flatten().tolist() == [0.5, 4.5, 1.0]
    assert SquaredError(over_outputs="sum").loss(THIRDS, batch).flatten().tolist() == [1.0, 9.0, 2.0]
    assert SquaredError().member_loss(THIRDS, batch).tolist() == [2.0]


def test_means_go_by_the_weights_and_an_entry_of_weight_zero_counts_for_nothing():
    batch = batch_with([[[[0.0, 0.0]], [[2.0, 4.0]], [[1.0, 1.0]]]], weights=[2.0, 0.0, 1.0])
    outputs = THIRDS.clone().requires_grad_()
    loss = SquaredError().member_loss(outputs, batch)
    assert loss.tolist() == pytest.approx([2 / 3])
    assert entry_mean(torch.tensor([[[0.5], [torch.inf], [1.0]]]), batch).tolist() == pytest.approx([2 / 3])
    loss.sum().backward()
    assert outputs.grad[0, 1].tolist() == [[0.0, 0.0]] and outputs.grad[0, 0].tolist() == [[pytest.approx(2 / 3), 0.0]]


def test_a_member_whose_weights_are_all_zero_has_a_loss_of_zero_and_no_gradient():
    batch = batch_with([[[[0.0, 0.0]], [[2.0, 4.0]], [[1.0, 1.0]]]], weights=[0.0, 0.0, 0.0])
    outputs = THIRDS.clone().requires_grad_()
    loss = SquaredError().member_loss(outputs, batch)
    loss.sum().backward()
    assert loss.tolist() == [0.0] and not outputs.grad.any()


def test_equal_weights_are_none_at_all():
    targets = [[[[0.0, 0.0]], [[2.0, 4.0]], [[1.0, 1.0]]]]
    some, alike = (SquaredError().measured(THIRDS, batch_with(targets, given)) for given in (None, [0.5, 0.5, 0.5]))
    assert {name: x.tolist() for name, x in alike.items()} == {
        name: [pytest.approx(x.item())] for name, x in some.items()
    }


def test_r_squared_is_the_share_of_the_variance_that_is_explained():
    batch = batch_with([[[[1.0, 0.0]], [[2.0, 1.0]], [[0.0, -1.0]]]])
    # the deviations of the targets: 0, 1, 1 in each output; the only error: 1 in the last
    assert SquaredError().measured(THIRDS, batch)["r_squared"].tolist() == [pytest.approx(1 - 1 / 4)]
    assert SquaredError().measured(batch.targets, batch)["r_squared"].tolist() == [1.0]
    weighted = replace(batch, weights=torch.tensor([1.0, 1.0, 0.0]).view(1, 3, 1))
    assert SquaredError().measured(THIRDS, weighted)["r_squared"].tolist() == [1.0]


def test_independent_bits_are_scored_by_the_likelihood_of_all():
    batch = batch_with([[[[1, 0]], [[1, 1]], [[0, 1]]]])
    expected = [math.log1p(math.exp(-1)) + math.log(2), math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))]
    losses = BinaryCrossEntropy().loss(THIRDS, batch).flatten().tolist()
    assert losses == pytest.approx([*expected, 2 * math.log(2)])
    halves = BinaryCrossEntropy(over_outputs="mean").loss(THIRDS, batch).flatten().tolist()
    assert halves == pytest.approx([loss / 2 for loss in losses])
    measured = BinaryCrossEntropy().measured(THIRDS, batch)
    # log-odds of 0 say 0: right are both, both, and the first of the last
    assert measured["accuracy"].tolist() == [pytest.approx(5 / 6)]
    assert measured["all_right"].tolist() == [pytest.approx(2 / 3)]


def test_bits_are_exact_where_odds_are_extreme():
    outputs = torch.tensor([[[[200.0, -200.0]], [[-200.0, 200.0]], [[50.0, -50.0]]]])
    loss = BinaryCrossEntropy().loss(outputs, batch_with([[[[1, 0]], [[1, 0]], [[1, 0]]]])).flatten()
    assert loss.tolist() == [0.0, 400.0, pytest.approx(2 * math.exp(-50))]


@pytest.mark.parametrize(
    ("objective", "outputs", "reference", "distance"),
    [
        (CrossEntropy(), [0.0, 0.0], [math.log(0.75), math.log(0.25)], math.log(2) - 0.5623351446188083),
        # a reference that is sure, and rules an output out
        (CrossEntropy(), [0.0, 0.0], [0.0, -math.inf], math.log(2)),
        (SquaredError(), [1.0, 2.0], [3.0, 2.0], 2.0),
        (SquaredError(over_outputs="sum"), [1.0, 2.0], [3.0, 2.0], 4.0),
        (BinaryCrossEntropy(), [0.0, 0.0], [0.0, math.log(3)], math.log(2) - 0.5623351446188083),
    ],
)
def test_a_distance_is_zero_from_itself_and_what_a_hand_finds_else(objective, outputs, reference, distance):
    outputs, reference = (torch.tensor(values).double().view(1, 1, 1, 2) for values in (outputs, reference))
    assert objective.distance(outputs, reference).item() == pytest.approx(distance)
    assert objective.distance(outputs, outputs).item() == pytest.approx(0, abs=1e-15)


def test_the_logarithm_of_a_tiny_cross_entropy_goes_on_in_double_precision():
    outputs = torch.tensor([[[[30.0, 0.0]], [[30.0, 0.0]], [[30.0, 0.0]]]], requires_grad=True)
    batch = batch_with([[[0], [0], [0]]])
    assert CrossEntropy().member_loss(outputs, batch).item() == 0
    loss = LogCrossEntropy().member_loss(outputs, batch)
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(-30, abs=1e-2)
    loss.sum().backward()
    # d log L = dL / L: as steep as ever
    assert outputs.grad[0, :, 0, 0].tolist() == pytest.approx([-1 / 3] * 3, rel=1e-2)


def test_a_measure_that_needs_a_field_exists_where_the_batch_has_it(tiny_task):
    with_context, without = batch_of(tiny_task), batch_of(ToyTokens())
    names = [[measure.name for measure in CrossEntropy().measures_of(batch)] for batch in (with_context, without)]
    assert names == [["accuracy", "accuracy_in_context", "probability_in_context"], ["accuracy"]]
    assert step_metrics(tiny_task) == ("train/loss", "train/accuracy", "train/grad_norm")
    assert step_metrics(Pairs()) == ("train/loss", "train/grad_norm")


def test_a_summary_says_how_its_losses_are_to_be_read():
    described = {"objective": SquaredError(unit="m^2").describe()}
    assert LossScale.of(described) == LossScale("m^2", 0.0) and LossScale("m^2", 0.0).titled("Loss") == "Loss (m^2)"
    assert measures_in(described)["r_squared"] == {"unit": "", "better": "up", "while_training": False}
    # a run of an earlier version does not say
    assert LossScale.of({}) == CrossEntropy().scale and LossScale("", None).titled("Loss") == "Loss"


def test_entry_mean_takes_means_over_sequences_and_positions():
    values = torch.arange(6.0).view(1, 3, 2)
    assert entry_mean(values, batch_with([[[0], [0], [0]]])).tolist() == [2.5]


# ---- what is refused --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Odd(Objective):
    """An objective with something wrong."""

    wrong: str = "nothing"

    def loss(self, outputs, batch):
        squares = (outputs - batch.targets).square()
        if self.wrong == "shape":
            return squares
        if self.wrong == "constant":
            return torch.ones_like(squares[..., 0])
        if self.wrong == "targets":
            return squares.gather(-1, batch.targets)[..., 0]
        return squares.mean(-1)

    @property
    def measures(self):
        bad = {"name": Measure("loss", "up", lambda outputs, batch: outputs[..., 0])}
        bad["measure"] = Measure("odd", "up", lambda outputs, batch: outputs.mean())
        return (bad[self.wrong],) if self.wrong in bad else ()


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("shape", r"Odd.loss: got 'losses of shape \[1, 2, 3, 2\]', expected \[1, 2, 3\], one loss for every"),
        ("constant", "Odd.loss: got 'losses without gradient', expected a loss that depends on the outputs"),
        ("targets", r"Odd.loss: got 'targets \[1, 2, 3, 2\] and outputs \[1, 2, 3, 2\]', expected shapes and types"),
        ("name", "Odd.measures: got 'loss', expected names of letters"),
        ("measure", "Odd.measures.odd: got 'shape .*', expected one number for every member, or one for every scored"),
    ],
)
def test_an_objective_that_could_not_be_trained_is_refused_in_one_line(wrong, line):
    task = Pairs()
    check_objective(task)
    task.objective = Odd(wrong)
    with pytest.raises(ConfigError, match=line) as refused:
        check_objective(task)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("weights", "line"),
    [
        (lambda w: w[..., 0], r"Pairs.weights: got 'shape \[1, 2\]', expected \[1, 2, 3\], one for every member"),
        (lambda w: w - 1, "Pairs.weights: got -1.0, expected finite weights of 0 or more"),
    ],
)
def test_weights_that_cannot_be_are_refused_in_one_line(weights, line):
    class Wrong(Pairs):
        def assemble(self, bank, draw):
            batch = super().assemble(bank, draw)
            object.__setattr__(batch, "weights", weights(batch.weights))
            return batch

    Wrong.__name__ = "Pairs"
    with pytest.raises(ConfigError, match=line):
        check_objective(Wrong(weighted=True))
