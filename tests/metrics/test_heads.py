"""Claims about head measures, on patterns with known answers."""

import pytest
import torch

from opsin.metrics.heads import (
    answer_attention,
    attention_sink,
    induction_strength,
    previous_token_strength,
    with_attention_sunk,
)
from tests.helpers.toys import SMALL, ToyTokens, batch_of, hand_batch, run, weights

TWO = hand_batch(classes=[[0, 1, 0], [0, 1, 1]], labels=[[2, 3]] * 2, answers=[2, 3])
SECOND_ABSENT = hand_batch(classes=[[0, 1, 0], [0, 1, 5]], labels=[[2, 3]] * 2, answers=[2, -1])
NONE = hand_batch(classes=[[0, 1, 5]], labels=[[2, 3]], answers=[-1])


def at_query(batch, rows):
    """A pattern (one head) with these rows at the query and nonsense elsewhere."""
    pattern = torch.full((1, len(rows), 1, 5, 5), 9.0)
    pattern[0, :, 0, 4] = torch.tensor(rows)
    return pattern


@pytest.mark.parametrize(
    ("rows", "strength"),
    [
        ([[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]], 1.0),
        ([[0, 0, 0, 1, 0], [0, 1, 0, 0, 0]], -1.0),
        ([[0, 0.5, 0, 0.5, 0]] * 2, 0.0),
        ([[0.5, 0, 0.25, 0, 0.25]] * 2, 0.0),
        ([[0, 0.75, 0, 0.25, 0], [0, 1, 0, 0, 0]], -0.25),
    ],
)
def test_induction_strength_is_right_minus_wrong_labels_at_the_query(rows, strength):
    assert induction_strength(at_query(TWO, rows), TWO.truth).tolist() == [[strength]]


def test_a_query_without_an_answer_in_its_context_does_not_count():
    pattern = at_query(SECOND_ABSENT, [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]])
    assert induction_strength(pattern, SECOND_ABSENT.truth).tolist() == [[1.0]]


def test_without_any_answerable_query_the_strength_is_zero():
    assert induction_strength(at_query(NONE, [[0, 1, 0, 0, 0]]), NONE.truth).tolist() == [[0.0]]


def test_every_query_of_a_sequence_counts():
    batch = batch_of(ToyTokens(), [0])
    pattern = batch.truth.match[:, :, None].float()
    assert induction_strength(pattern, batch.truth).tolist() == [[1.0]]
    pattern[:, :, :, 4] = 0
    assert induction_strength(pattern, batch.truth).tolist() == [[0.5]]


def test_answer_attention_is_the_attention_to_right_labels_whatever_else_is_seen():
    rows = [[0, 0.25, 0, 0.5, 0.25], [0, 0.125, 0, 0.75, 0.125]]
    assert answer_attention(at_query(TWO, rows), TWO.truth).tolist() == [[0.5]]
    assert answer_attention(at_query(SECOND_ABSENT, rows), SECOND_ABSENT.truth).tolist() == [[0.25]]
    assert answer_attention(at_query(NONE, rows[:1]), NONE.truth).tolist() == [[0.0]]


def test_previous_token_strength_is_the_attention_from_labels_to_what_precedes_them():
    pattern = torch.full((1, 2, 1, 5, 5), 9.0)
    pattern[0, :, 0, 1, 0] = torch.tensor([1.0, 0.5])
    pattern[0, :, 0, 3, 2] = torch.tensor([0.25, 0.25])
    assert previous_token_strength(pattern, TWO.truth).tolist() == [[0.5]]


def test_a_label_at_the_first_position_has_nothing_before_it():
    task = ToyTokens()
    truth = batch_of(task, [0]).truth
    truth.labels[0] = True
    pattern = torch.zeros(1, 4, 1, 6, 6)
    pattern[..., [1, 2, 3], [0, 1, 2]] = 1.0
    assert previous_token_strength(pattern, truth).tolist() == [[1.0]]


def test_each_head_of_each_member_is_measured_alone(tiny_task):
    batch = batch_of(tiny_task, dtype=torch.float64)
    pattern = run(SMALL, weights(SMALL, tiny_task), batch)[1]["blocks.1.attn.hook_pattern"]
    for measure in (induction_strength, previous_token_strength):
        found = measure(pattern, batch.truth)
        assert found.shape == (2, 2) and len(found.unique()) == 4
        muted = pattern.clone()
        muted[1, :, 0] = 0
        changed = measure(muted, batch.truth) != found
        assert changed.tolist() == [[False, False], [True, False]]


def test_the_attention_sink_is_what_later_rows_pay_to_the_first_position():
    pattern = torch.rand(2, 3, 2, 5, 5, generator=torch.Generator().manual_seed(0)).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    for member in range(2):
        for head in range(2):
            paid = [float(pattern[member, b, head, row, 0]) for b in range(3) for row in range(1, 5)]
            assert float(attention_sink(pattern)[member, head]) == pytest.approx(sum(paid) / 12, abs=1e-6)
    forced = with_attention_sunk(pattern, 1)
    assert torch.equal(attention_sink(forced)[:, 1], torch.ones(2)) and torch.equal(forced[:, :, 0], pattern[:, :, 0])
    assert torch.equal(forced.sum(-1)[:, :, 1], torch.ones(2, 3, 5))
