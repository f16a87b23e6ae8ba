"""Claims about overwriting: exact where it is whole, differentiable where it is partial, and the known patterns."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from opsin.callbacks.writers.clamp import Clamp
from opsin.errors import ConfigError
from opsin.interventions.apply import overwrite
from opsin.interventions.intervention import Overwrite
from opsin.interventions.selection import check_share
from opsin.interventions.values.patterns import Induction, Match, PreviousToken, match_pattern
from opsin.interventions.values.plain import BatchMean, Constant
from tests.helpers.toys import SMALL, ToyTokens, batch_of, few_shot, hand_batch, losses, run, tap_of, weights

ACTIVATIONS = arrays.arrays(
    np.float32,
    st.integers(1, 8),
    elements=st.floats(2**-60, 2**66, width=32) | st.floats(-(2**66), -(2**-60), width=32),
)

# context: class 0 with label 2, class 1 with label 3; the query shows class 0, then 1, then a class that is absent
THREE = hand_batch(classes=[[0, 1, 0], [0, 1, 1], [0, 1, 5]], labels=[[2, 3]] * 3, answers=[2, 3, -1])
TWICE = hand_batch(classes=[[0, 1, 0, 0]], labels=[[2, 3, 2]], answers=[2])


def clamped(value, batch, weight=1.0):
    """A pattern of sevens (M B H L K) after the value has been written where it applies."""
    n = batch.layout.positions
    sevens = torch.full((1, batch.tokens.shape[1], 2, n, n), 7.0)
    written = value(sevens, batch)
    where = torch.ones(()) if written.where is None else written.where.float()
    return overwrite(sevens, written.value, weight * where)


@given(ACTIVATIONS, st.floats(-100, 100, width=32).filter(bool))
def test_weight_zero_and_one_are_exact_to_the_bit(x, value):
    x, value = torch.from_numpy(x), torch.full(x.shape, value)
    for weight, expected in ((0.0, x), (1.0, value)):
        result = overwrite(x, value, torch.tensor(weight))
        assert torch.equal(result.view(torch.int32), expected.view(torch.int32))


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_no_gradient_passes_a_whole_overwriting(x, value):
    x = torch.tensor([x, x], requires_grad=True)
    overwrite(x, torch.tensor(value), torch.tensor([1.0, 0.0])).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0]


@given(st.floats(0.01, 0.99))
def test_the_gradient_of_a_partial_overwriting_is_the_finite_difference(weight):
    generator = torch.Generator().manual_seed(0)
    x, value = torch.randn(2, 5, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.tensor(weight, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, value: overwrite(x, value, weight).sin(), (x, value))


@pytest.mark.parametrize("gate", [0.3, 1.0])
def test_the_gradient_through_a_clamped_model_is_the_finite_difference(tiny_task, gate):
    batch, values = batch_of(tiny_task, dtype=torch.float64), weights(SMALL, tiny_task)
    writers = [Clamp(heads=["1:0"], pattern="induction"), Clamp(site="blocks.0.hook_attn_out", value=0.5)]
    tap = tap_of(SMALL, tiny_task, batch, *writers, gate=gate)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    losses(SMALL, leaves, batch, tap).sum().backward()
    generator = torch.Generator().manual_seed(1)
    for name, value in values.items():
        along = torch.randn(value.shape, dtype=torch.float64, generator=generator)
        up, down = (losses(SMALL, values | {name: value + h * along}, batch, tap).sum() for h in (1e-5, -1e-5))
        assert ((up - down) / 2e-5).item() == pytest.approx((leaves[name].grad * along).sum().item(), abs=1e-8)
    # what attention of block 0 writes is lost at gate 1
    assert leaves["blocks.0.attn.W_O"].grad.any().item() == (gate < 1)


def test_a_previous_token_row_looks_back_and_at_itself():
    rows = clamped(PreviousToken(0.75), THREE)[0, 0, 1]
    expected = [
        [1, 0, 0, 0, 0],
        [0.75, 0.25, 0, 0, 0],
        [0, 0.75, 0.25, 0, 0],
        [0, 0, 0.75, 0.25, 0],
        [0, 0, 0, 0.75, 0.25],
    ]
    assert rows.tolist() == expected


def test_a_previous_token_pattern_can_keep_to_the_rows_of_labels():
    rows = clamped(PreviousToken(labels_only=True), THREE)[0, 0, 0].tolist()
    free = [7.0] * 5
    assert rows == [free, [1, 0, 0, 0, 0], free, [0, 0, 1, 0, 0], free]


@given(st.floats(0, 1, width=32))
def test_previous_token_rows_sum_to_one(strength):
    assert torch.allclose(clamped(PreviousToken(strength), TWICE).sum(-1), torch.ones(()), atol=1e-6)


def test_induction_looks_at_the_right_label_and_by_the_rest_at_the_other():
    pattern = clamped(Induction(0.75), THREE)[0, :, 0]
    assert pattern[:2, 4].tolist() == [[0, 0.75, 0, 0.25, 0], [0, 0.25, 0, 0.75, 0]]
    assert (pattern[:, :4] == 7).all(), "rows that are no query stay"
    assert (pattern[2] == 7).all(), "a query without an answer in its context stays"


def test_two_matching_pairs_sum_to_two():
    assert clamped(Induction(), TWICE)[0, 0, 0, 6].tolist() == [0, 1, 0, 0, 0, 1, 0]
    assert clamped(Match(), TWICE)[0, 0, 0, 6].tolist() == [0, 1, 0, 0, 0, 1, 0]


def test_a_hard_match_ties_where_inputs_are_equally_similar():
    tied = hand_batch([[0, 1, 2]], [[2, 3]], [2], features=[[1.0, 0, 0], [0, 1.0, 0], [1.0, 1.0, 0]])
    assert clamped(Match(0.0), tied)[0, 0, 0, 4].tolist() == [0, 1, 0, 1, 0]


def test_a_hard_match_takes_the_more_similar_input_whatever_its_label():
    near = hand_batch([[0, 1, 2]], [[2, 3]], [2], features=[[1.0, 0], [0, 1.0], [1.0, 3.0]])
    assert clamped(Match(0.0), near)[0, 0, 0, 4].tolist() == [0, 0, 0, 1, 0]


def test_a_soft_match_is_a_softmax_of_cosines_over_the_labels():
    near = hand_batch([[0, 1, 2]], [[2, 3]], [2], features=[[2.0, 0], [0, 5.0], [3.0, 4.0]])
    expected = np.exp(np.array([0.6, 0.8]) / 0.5)
    row = clamped(Match(0.5), near)[0, 0, 0, 4]
    assert row[[1, 3]].numpy() == pytest.approx(expected / expected.sum(), rel=1e-6)
    assert row[[0, 2, 4]].tolist() == [0, 0, 0]


def test_tokens_match_where_they_are_equal():
    batch = batch_of(ToyTokens(), [0])
    assert torch.equal(match_pattern(batch, 0.0)[:, :, 3:5], batch.truth.match[:, :, 3:5].float())


@pytest.mark.parametrize("value", [Induction(0.5), Match(), Match(0.1), PreviousToken(0.5), Constant(2.0), BatchMean()])
def test_no_gradient_passes_a_value(value):
    x = torch.rand(1, 3, 2, 5, 5, requires_grad=True)
    assert value.gradient == "stops" and not value(x, THREE).value.requires_grad


def test_the_mean_is_over_the_batch_and_not_over_members():
    x = torch.arange(12.0).view(2, 3, 2)
    written = BatchMean()(x, THREE)
    assert isinstance(written, Overwrite) and written.where is None
    assert written.value.tolist() == [[[2, 3]] * 3, [[8, 9]] * 3]


@pytest.mark.parametrize("pattern", ["previous_token", "induction", "match"])
def test_a_clamp_changes_only_the_heads_and_rows_it_names(pattern):
    task = few_shot()
    batch, values = batch_of(task, dtype=torch.float64), weights(SMALL, task)
    tap = tap_of(SMALL, task, batch, Clamp(heads=["0:1"], pattern=pattern, positions=[2, 4], members=[1]))
    name = "blocks.0.attn.hook_pattern"
    before, after = run(SMALL, values, batch)[1][name], run(SMALL, values, batch, tap)[1][name]
    changed = (before != after).any(-1).any(1)  # M H L
    rows = [2, 4] if pattern == "previous_token" else [4]
    assert changed.nonzero().tolist() == [[1, 1, row] for row in rows]


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(value):
    with pytest.raises(ConfigError, match=r"Clamp\.strength"):
        check_share("Clamp.strength", value)
