"""Claims about Reddy's task: the statistics of its sequences against the paper's, and the size of its items."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opsin import OpsinModule, ReddyNetwork
from opsin.errors import ConfigError
from opsin.tasks import ContextOrWeights, FewShot, GaussianClusters
from tests.helpers.token_tasks import near


def many(task, split="train", rows=20_000):
    drawn = task.draw([3], 0, 1, split, batch_size=rows)
    return {name: tensor[0, 0].numpy() for name, tensor in drawn.items()}


def parts(drawn):
    """Classes and labels of the context ``[R, N]``, and the query's class and target ``[R]``."""
    classes, labels = drawn["classes"], drawn["labels"]
    return classes[:, :-1], labels[:, :-1], classes[:, -1], labels[:, -1]


@pytest.mark.parametrize("burstiness", [1, 2, 4])
def test_a_bursty_context_has_n_over_b_classes_b_times_each_and_the_querys_among_them(burstiness):
    task = ContextOrWeights(classes=64, burstiness=burstiness)
    classes, labels, query, target = parts(many(task, rows=4000))
    assert (labels == classes % 32).all() and (target == query % 32).all()
    copies = (classes[:, :, None] == classes[:, None]).sum(2)
    assert (copies == burstiness).all() and ((classes == query[:, None]).sum(1) == burstiness).all()
    assert near(np.bincount(query // 8, minlength=8), np.full(8, 1 / 8))


def test_the_rest_is_drawn_one_by_one_from_the_zipf_distribution():
    task = ContextOrWeights(classes=40, bursty_share=0.0, zipf=1.0)
    classes, _, query, _ = parts(many(task))
    masses = np.arange(1, 41) ** -1.0
    masses /= masses.sum()
    for column in (classes[:, 0], query):
        assert near(np.bincount(column, minlength=40), masses)
    present = (masses * (1 - (1 - masses) ** 8)).sum()
    assert near(np.bincount((classes == query[:, None]).any(1)), [1 - present, present])


def test_shares_of_bursty_and_new_sequences_are_as_stated():
    task = ContextOrWeights(classes=4096, bursty_share=0.75, new_share=0.2)
    classes, _, query, _ = parts(many(task))
    new, bursty = query < 0, (classes == query[:, None]).sum(1) == 2
    assert near(np.bincount(new), [0.8, 0.2]) and bursty[new].all()
    assert near(np.bincount(bursty[~new]), [0.25, 0.75])


def test_items_have_unit_length_and_two_of_a_class_the_stated_cosine():
    task = ContextOrWeights(classes=64, features=400, eps=0.5)
    batch, drawn = task.batch(3, 0, "train", 2000), many(task, rows=2000)
    item = batch.features[0].double()
    assert abs(item.square().sum(-1).mean() - 1) < 0.01
    cosine = torch.nn.functional.cosine_similarity(item[:, :-1], item[:, -1:], dim=-1).numpy()
    same = drawn["classes"][:, :-1] == drawn["classes"][:, -1:]
    # (mu + eps eta) . (mu + eps eta') / (1 + eps ** 2)
    assert abs(cosine[same].mean() - 1 / 1.25) < 0.005 and abs(cosine[~same].mean()) < 0.01
    new = task.batch(3, 0, "eval/ic", 2000).features[0].double()
    assert abs(new.square().sum(-1).mean() - 1) < 0.01


def test_items_of_one_class_never_repeat():
    task = ContextOrWeights(classes=32, features=8)
    assert task.batch(3, 0, "train", 500).features[0].flatten(0, 1).unique(dim=0).shape[0] == 500 * 9


def test_new_classes_are_known_from_the_context_alone():
    classes, labels, query, target = parts(many(ContextOrWeights(classes=64), "eval/ic"))
    assert (classes < 0).all() and ((classes == query[:, None]).sum(1) == 2).all()
    assert ((classes == query[:, None]) == (labels == target[:, None])).all()
    assert near(np.bincount(target, minlength=32), np.full(32, 1 / 32))


def test_labels_of_the_second_set_are_shifted_by_one():
    classes, labels, query, target = parts(many(ContextOrWeights(classes=64), "eval/ic2", 2000))
    assert (labels == (classes + 1) % 32).all() and (target == (query + 1) % 32).all()
    assert ((classes == query[:, None]).sum(1) == 2).all()


def test_the_weights_alone_know_the_label_of_an_absent_class():
    classes, labels, query, target = parts(many(ContextOrWeights(classes=64), "eval/iw"))
    assert (target == query % 32).all() and not (labels == target[:, None]).any()
    assert not (classes == query[:, None]).any() and (labels == classes % 32).all()
    assert near(np.bincount(query // 8, minlength=8), np.full(8, 1 / 8))


def test_the_unigram_of_shifted_labels_is_shifted():
    kinds = ContextOrWeights(classes=40, zipf=1.0)._pools["eval/ic2"].kinds
    source = GaussianClusters(40, 1, 4)
    task = FewShot(source, n_labels=8, train_classes=40, labels="fixed", zipf=1.0, kinds=kinds, context=8)
    assert near(np.bincount(many(task)["labels"][:, -1], minlength=8), task.unigram().numpy())


def test_sequences_begin_anywhere_in_the_position_code():
    task = ContextOrWeights(classes=64, offsets=49)
    assert near(np.bincount(many(task)["offset"], minlength=49), np.full(49, 1 / 49))
    whole, alone = task.draw([1, 3], 0, 6)["offset"], task.draw([3], 4, 1)["offset"]
    assert torch.equal(whole[4, 1], alone[0, 0])
    assert torch.equal(task.batch(3, 4).offset[0], alone[0, 0]) and ContextOrWeights().batch(3, 4).offset is None


def test_an_offset_that_a_model_cannot_code_is_refused():
    task = ContextOrWeights(offsets=49)
    OpsinModule(task, network=ReddyNetwork())
    with pytest.raises(
        ConfigError, match=r"ContextOrWeights\.offsets: got 49, expected at most 1: Transformer codes 17"
    ):
        OpsinModule(task)
    with pytest.raises(ConfigError, match=r"got 49, expected at most 14: ReddyNetwork codes 30 positions"):
        OpsinModule(task, network=ReddyNetwork(position_width=30))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"burstiness": 3}, "ContextOrWeights.burstiness: got 3, expected a divisor of context 8"),
        ({"burstiness": 0}, "ContextOrWeights.burstiness: got 0"),
        ({"n_labels": 8}, "ContextOrWeights.n_labels: got 8, expected more than context 8"),
        ({"classes": 31}, "ContextOrWeights.classes: got 31, expected at least n_labels 32"),
        ({"bursty_share": 1.5}, "ContextOrWeights.bursty_share: got 1.5"),
        ({"new_share": -0.1}, "ContextOrWeights.new_share: got -0.1"),
        ({"eps": -1.0}, "ContextOrWeights.eps: got -1.0"),
        ({"features": 0}, "ContextOrWeights.features: got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_do_not_fit_are_named_in_one_line(options, message):
    with pytest.raises(ConfigError) as caught:
        ContextOrWeights(**options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
