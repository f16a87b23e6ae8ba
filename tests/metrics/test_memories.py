"""Claims about associative memories on matrices that are built by hand of orthonormal vectors."""

from dataclasses import replace

import pytest
import torch

from opsin.metrics.memories import (
    BirthWeights,
    above_chance,
    bigram_kl,
    copying_scores,
    finds_answer,
    finds_successor,
    looks_back,
    lookup_scores,
    previous_token_scores,
    recall,
)
from opsin.tasks import TriggerBigrams

V, P, D = 6, 7, 32


def orthonormal(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D, rows, dtype=torch.float64, generator=generator)).Q.T[None]


def rotation(seed):
    return orthonormal(D, seed)


def stored(x, y):
    """The memory sum_i x_i^T y_i, inputs x outputs."""
    return x.mT @ y


@pytest.fixture
def weights():
    """All three memories as they are once the circuit has formed."""
    e, p, u = orthonormal(V, 0), orthonormal(P, 1), orthonormal(V, 2)
    v0, o0, v1 = rotation(3), rotation(4), rotation(5)
    return BirthWeights(
        embed=e,
        position=p,
        key_0=stored(p[:, :-1], p[:, 1:]),  # what position t writes is looked for by t + 1
        value_0=v0,
        output_0=o0,
        key_1=stored(e @ v0 @ o0, e),
        value_1=v1,
        output_1=stored(e @ v1, u),
        unembed=u.mT,
    )


def recalled(weights):
    return {
        "key_0": recall(previous_token_scores(weights, P), torch.arange(P - 1)).item(),
        "key_1": recall(lookup_scores(weights, torch.arange(V)), torch.arange(V)).item(),
        "output_1": recall(copying_scores(weights), torch.arange(V)).item(),
    }


CHANCE = {"key_0": 1 / P, "key_1": 1 / V, "output_1": 1 / V}


def test_sums_of_outer_products_recall_all(weights):
    assert recalled(weights) == {"key_0": 1, "key_1": 1, "output_1": 1}


@pytest.mark.parametrize("name", CHANCE)
def test_a_memory_of_zeros_recalls_as_chance_does_and_the_others_stay(weights, name):
    found = recalled(replace(weights, **{name: torch.zeros_like(getattr(weights, name))}))
    assert found == pytest.approx({**dict.fromkeys(CHANCE, 1), name: CHANCE[name]})
    chance = torch.tensor([found[name]])
    assert above_chance(chance, round(1 / CHANCE[name])).item() == pytest.approx(0, abs=1e-6)
    assert above_chance(torch.ones(1), 5).item() == 1


def test_one_wrong_association_of_n_leaves_n_less_one(weights):
    e, p, u = weights.embed, weights.position, weights.unembed.mT
    read, seen = e @ weights.value_1, e @ weights.value_0 @ weights.output_0
    wrong = {
        "key_0": 3 * stored(p[:, 5:6], p[:, 3:4]),  # position 3 looks for 5, not for 2
        "key_1": 3 * stored(seen[:, :1], e[:, 4:5]),
        "output_1": 3 * stored(read[:, 2:3], u[:, 1:2]),
    }
    changed = replace(weights, **{name: getattr(weights, name) + more for name, more in wrong.items()})
    assert recalled(changed) == pytest.approx({"key_0": 1 - 1 / (P - 1), "key_1": 1 - 1 / V, "output_1": 1 - 1 / V})


def test_recall_over_chosen_tokens_asks_these_alone(weights):
    triggers = torch.tensor([1, 4])
    zeros = replace(weights, key_1=torch.zeros_like(weights.key_1))
    assert recall(lookup_scores(zeros, triggers), torch.arange(2)).item() == 0.5
    assert recall(previous_token_scores(zeros, 3), torch.arange(2)).item() == 1


def test_members_are_recalled_one_by_one_and_one_without_numbers_has_none():
    scores = torch.stack([torch.eye(4), -torch.eye(4), torch.full((4, 4), torch.nan)])
    found = recall(scores, torch.arange(4))
    assert found[:2].tolist() == [1, 0] and found[2].isnan()


def test_the_feed_forward_divergence_is_nought_of_the_bigrams_and_their_deficit_of_entropy_of_even_logits():
    bigrams = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]], dtype=torch.float64)
    logits = bigrams.clamp(min=1e-300).log()[None]
    assert bigram_kl(logits + 3.0, bigrams).item() == pytest.approx(0, abs=1e-12)
    entropy = (torch.tensor(2.0).log() + 1.5 * torch.tensor(2.0).log()).item() / 2
    assert bigram_kl(torch.zeros_like(logits), bigrams).item() == pytest.approx(
        torch.tensor(3.0).log().item() - entropy
    )


def one_sequence():
    """Trigger 0 is always followed by 3: rows 2 and 5 repeat it, positions 1, 3 and 6 hold its successor."""
    task = TriggerBigrams(vocabulary=4, triggers=1, positions=6)
    draw = {"tokens": torch.tensor([[[0, 3, 0, 3, 1, 0, 3]]]), "looked_up": torch.tensor([[[1, 0, 1, 0, 0, 1]]])}
    return task.assemble({}, draw)


def attending(keys):
    return torch.nn.functional.one_hot(torch.tensor(keys), 6)[None, None].double()


def test_attention_is_scored_at_successors_and_at_repeated_triggers_alone():
    batch = one_sequence()
    # successors that a later row should find stand at 1 and 3
    assert looks_back(attending([0, 0, 0, 1, 0, 0]), batch).item() == 0.5
    assert looks_back(attending([0, 0, 0, 2, 0, 0]), batch).item() == 1
    # queries are rows 2 and 5, whose right keys are 1, and 1 or 3
    for keys, answer, successor in (
        ([0, 0, 1, 0, 0, 3], 1, 1),
        ([0, 0, 0, 0, 0, 1], 0.5, 0.5),
        ([0, 0, 2, 0, 0, 4], 0, 0),
    ):
        assert finds_answer(attending(keys), batch).item() == answer
        assert finds_successor(attending(keys), batch).item() == successor
