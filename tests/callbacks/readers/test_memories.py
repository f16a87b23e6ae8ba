"""Claims about MemoryRecall: what it records is what the weights recall, at the steps and of the tokens it says."""

from __future__ import annotations

import pytest
import torch

from opsin.callbacks import Freeze, MemoryRecall
from opsin.errors import ConfigError
from opsin.metrics.memories import looks_back
from opsin.model.birth import BirthTransformer
from opsin.model.transformer import Transformer
from opsin.optimizers import SGD
from opsin.tasks import Repeats, TriggerBigrams
from opsin.training.module import OpsinModule
from tests.helpers.toys import train

MATRICES = ["blocks.0.attn.W_K", "blocks.1.attn.W_K", "blocks.1.attn.W_O"]


def module(task=None, network=None):
    task = task or TriggerBigrams(vocabulary=9, positions=8, batch_size=4)
    network = network or BirthTransformer(width=16, max_positions=8, linear_mlp=True)
    small = {"steps_per_batch": 5, "log_every": 5, "probe_size": 12, "compile": False}
    return OpsinModule(task, network, [1, 2], optimizer=SGD(learning_rate=0.5), **small)


def last(model, metric):
    return torch.from_numpy(model.history[metric].values[-1])


def searched_recall(score, inputs, candidates):
    """The share of inputs of which no other candidate has a larger score, one pair after another."""
    return sum(max(candidates, key=lambda c: score(i, c)) == i for i in inputs) / len(inputs)


def test_recall_is_what_a_search_over_all_pairs_of_vectors_finds():
    model = module()
    train(model, 5, MemoryRecall(every=5))
    for member in range(2):
        found, kl = searched(model, member)
        for name, (share, chance) in found.items():
            assert last(model, f"recall/{name}")[member].item() == pytest.approx(share)
            above = last(model, f"recall_above_chance/{name}")[member].item()
            assert above == pytest.approx((share - chance) / (1 - chance), abs=1e-6)
        assert last(model, "feed_forward_kl")[member].item() == pytest.approx(kl, rel=1e-4)


def searched(model, member):
    """Recall of every memory of one member beside chance, and the divergence of its linear map from the bigrams."""
    w = {name: value.detach()[member].double() for name, value in model.parameters_by_name().items()}
    e, p, u = w["embed.W_E"], w["pos_embed.W_pos"], w["unembed.W_U"].T
    k1, v1, o1 = (w[f"blocks.0.attn.{end}"][0] for end in ("W_K", "W_V", "W_O"))
    k2, v2, o2 = (w[f"blocks.1.attn.{end}"][0] for end in ("W_K", "W_V", "W_O"))
    found = {
        "W_K1": (searched_recall(lambda t, s: p[t + 1] @ (p[s] @ k1), range(7), range(8)), 1 / 8),
        "W_K2": (searched_recall(lambda v, c: e[v] @ (e[c] @ v1 @ o1 @ k2), range(3), range(3)), 1 / 3),
        "W_O2": (searched_recall(lambda v, c: u[c] @ (e[v] @ v2 @ o2), range(9), range(9)), 1 / 9),
    }
    log_p = (e[3:] @ w["blocks.1.mlp.W"] @ w["unembed.W_U"]).log_softmax(-1)
    bigrams = torch.from_numpy(model.task.bigrams)[3:]
    return found, (bigrams * (bigrams.log() - log_p)).sum(-1).mean().item()


def test_attention_is_that_on_the_probe():
    model = module()
    train(model, 5, MemoryRecall(every=5))
    pattern = model.observe(model.probe, ["blocks.0.attn.hook_pattern"])["blocks.0.attn.hook_pattern"][:, :, 0]
    torch.testing.assert_close(last(model, "attention/looks_back"), looks_back(pattern, model.probe))


def test_a_frozen_memory_recalls_what_it_did_and_the_others_learn():
    model = module()
    train(model, 20, MemoryRecall(every=20), Freeze(weights=MATRICES[2:]))
    first, end = (model.history["recall/W_O2"].values[index] for index in (0, -1))
    assert (first == end).all()
    drawn = model.network.parameters(model.task).draw(model.seeds)
    assert torch.equal(model.parameters_by_name()[MATRICES[2]], drawn[MATRICES[2]])
    assert not torch.equal(model.parameters_by_name()[MATRICES[0]], drawn[MATRICES[0]])


def test_triggers_of_each_sequence_ask_for_all_tokens_and_no_linear_map_says_nothing_of_facts():
    task = TriggerBigrams(vocabulary=9, positions=8, batch_size=4, fixed=False)
    model, reader = module(task, BirthTransformer(width=16, max_positions=8)), MemoryRecall(every=5, positions=4)
    train(model, 5, reader)
    assert set(reader.records(model.sites)) <= set(model.history.names()) and "feed_forward_kl" not in model.history
    assert (last(model, "recall/W_K2") * 9 == (last(model, "recall/W_K2") * 9).round()).all()
    assert (last(model, "recall/W_K1") * 3 == (last(model, "recall/W_K1") * 3).round()).all()


def test_the_figure_is_drawn_of_all_members_and_a_picture_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, reader = module(), MemoryRecall(every=5)
    train(model, 5, reader)
    assert (tmp_path / "memories.png").exists() and reader.picture(1).size == reader.picture(0).size


@pytest.mark.parametrize(
    ("make", "task", "network", "line"),
    [
        (lambda: MemoryRecall(0), None, None, "MemoryRecall.every: got 0, expected at least 1"),
        (lambda: MemoryRecall(positions=1), None, None, "MemoryRecall.positions: got 1, expected at least 2"),
        (
            lambda: MemoryRecall(positions=9),
            None,
            None,
            "MemoryRecall.positions: got 9, expected at most the seq",
        ),
        (
            MemoryRecall,
            None,
            Transformer(layers=2, heads=1),
            "MemoryRecall: got 'Transformer', expected Birth",
        ),
        (
            MemoryRecall,
            Repeats(vocabulary=9, positions=8, batch_size=4, segments=1, shortest=2, longest=3),
            None,
            "MemoryRecall: got 'Repeats', expected a task of bigrams with triggers",
        ),
    ],
)
def test_what_has_no_such_memories_is_refused_before_training(make, task, network, line):
    with pytest.raises(ConfigError, match=line):
        train(module(task, network), 5, make())
