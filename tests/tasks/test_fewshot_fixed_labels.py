"""Claims about few-shot sequences with fixed labels: the statistics of every kind, by class and by label."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from opsin.errors import ConfigError
from opsin.tasks import ArrayFile, FewShot, GaussianClusters, Kind
from opsin.tasks.shared.streams import of_different_groups
from tests.helpers.token_tasks import near

SMALL = GaussianClusters(classes=20, exemplars=5, features=6)
KINDS = ("icl", "flip", "ciwl", "iwl", "new")


def task(**options):
    given = {"exemplars": SMALL, "train_classes": 12, "n_labels": 12, "labels": "fixed", "batch_size": 8}
    return FewShot(**given | options)


def many(fewshot, split="train", rows=20_000, seed=3):
    drawn = fewshot.draw([seed], 0, 1, split, batch_size=rows)
    return {name: tensor[0, 0].numpy() for name, tensor in drawn.items()}


def parts(drawn):
    """Classes and labels of the context ``[R, C]``, and the query's class, target and answer ``[R]``."""
    classes, labels = drawn["classes"], drawn["labels"]
    return classes[:, :-1], labels[:, :-1], classes[:, -1], labels[:, -1], drawn["answers"]


# --- training ---------------------------------------------------------------------------------------


def test_a_class_carries_one_label_for_ever():
    classes, labels, query, target, answer = parts(many(task(n_labels=5)))
    assert (labels == classes % 5).all() and (target == query % 5).all() and (answer == target).all()
    assert (classes == query[:, None]).sum(1).tolist() == [1] * len(query)


def test_a_seed_deals_the_same_labels_in_another_order():
    fixed = task(n_labels=5, label_seed=1)
    classes, labels, query, target, _ = parts(many(fixed))
    dealt = {int(c): int(label) for c, label in zip(classes.ravel(), labels.ravel(), strict=True)}
    assert all(dealt[int(c)] == label for c, label in zip(query, target, strict=True))
    assert [dealt[c] for c in range(12)] != [c % 5 for c in range(12)]
    # over all 20 classes of the source every label is carried equally often
    assert np.bincount(fixed._fixed).tolist() == [4] * 5
    assert not np.array_equal(fixed._fixed, task(n_labels=5, label_seed=2)._fixed)


def test_labels_may_be_as_many_as_classes():
    big = FewShot(GaussianClusters(1000, 1, 2), n_labels=1000, train_classes=1000, labels="fixed")
    classes, labels, *_ = parts(many(big, rows=500))
    assert (labels == classes).all()
    # the sets of labels are too many to list, and are drawn one by one
    big = FewShot(GaussianClusters(2000, 1, 2), n_labels=2000, train_classes=2000, labels="fixed")
    _, shown, _, target, answer = parts(many(big, "eval/icl", 4000))
    assert (shown[:, 0] != shown[:, 1]).all() and (target == answer).all()
    assert near(np.bincount(target // 200, minlength=10), np.full(10, 0.1))


def test_bursty_sequences_are_as_frequent_as_their_weight_and_the_rest_is_independent():
    kinds = [Kind(weight=0.75, matches=2, distractor_copies=2), Kind(weight=0.25, independent=True)]
    classes, labels, query, target, answer = parts(many(task(context=4, n_labels=5, kinds=kinds, zipf=1.0)))
    masses = np.arange(1, 13) ** -1.0
    masses /= masses.sum()
    assert near(np.bincount(query, minlength=12), masses)
    assert (labels == classes % 5).all() and (target == query % 5).all()
    copies = (classes == query[:, None]).sum(1)
    # of independent sequences, a class of mass p is absent from the context with (1 - p) ** 4
    absent = (masses * (1 - masses) ** 4).sum()
    assert near(np.bincount(copies == 0), [1 - 0.25 * absent, 0.25 * absent])
    assert ((answer >= 0) == (copies > 0)).all() and (answer[copies > 0] == target[copies > 0]).all()


def test_burstiness_is_the_short_form_of_the_kinds_that_it_stands_for():
    copies = Kind(matches=2, distractor_copies=2)
    assert task(context=4, labels="drawn", burstiness=2).kinds == (copies,)
    mixed = task(context=4, burstiness=2, bursty=0.75)
    assert mixed.kinds == (replace(copies, weight=0.75), Kind(weight=0.25, independent=True))
    assert task(context=4, burstiness=2, bursty=0.0).kinds == (Kind(weight=1.0, independent=True),)
    assert task(context=4).kinds == (Kind(),)
    drawn, long = mixed.draw([1], 0, 2), task(context=4, kinds=mixed.kinds).draw([1], 0, 2)
    assert all(torch.equal(drawn[name], long[name]) for name in long)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_with_fixed_labels_no_share_of_relabellings_is_held_out(share):
    assert "relabellings" not in task(heldout_relabellings=share).evaluations
    with pytest.raises(ConfigError, match=r"^FewShot.heldout_relabellings: got 0.4, expected none, as labels are fix"):
        task(heldout_relabellings=0.4)


def test_independent_classes_are_those_of_the_stated_distribution():
    classes, _, query, _, _ = parts(many(task(context=3, kinds=[Kind(independent=True)], zipf=1.0)))
    masses = np.arange(1, 13) ** -1.0
    masses /= masses.sum()
    for column in (*classes.T, query):
        assert near(np.bincount(column, minlength=12), masses)
    assert near(np.bincount(classes[:, 0] * 12 + query, minlength=144), np.outer(masses, masses).ravel())


# --- evaluation sets ---------------------------------------------------------------------------------


def test_fixed_labels_have_the_evaluation_sets_that_tell_strategies_apart():
    assert task().evaluations == ("train", "exemplars", "classes", *KINDS)
    assert FewShot(SMALL, train_classes=12).evaluations == ("train", "relabellings", "exemplars", "classes")
    assert task(evaluation_kinds={}).evaluations == ("train", "exemplars", "classes")


def test_icl_sequences_are_relabelled_evenly():
    classes, labels, query, target, answer = parts(many(task(), "eval/icl"))
    assert (labels[:, 0] != labels[:, 1]).all() and (target == answer).all()
    at_query = np.where(classes[:, 0] == query, labels[:, 0], labels[:, 1])
    assert (at_query == target).all()
    assert near(np.bincount(target, minlength=12), np.full(12, 1 / 12))
    # the class says nothing of its label
    assert near(np.bincount(query * 12 + target, minlength=144), np.full(144, 1 / 144))


def test_icl_sequences_may_be_relabelled_with_the_first_labels_alone():
    sets = {"icl": [Kind(labels="drawn", among=2)]}
    _, labels, _, target, _ = parts(many(task(evaluation_kinds=sets), "eval/icl"))
    assert (labels.sum(1) == 1).all() and near(np.bincount(target), [0.5, 0.5])


def test_flip_sequences_exchange_the_labels_of_the_two_classes():
    classes, labels, query, target, answer = parts(many(task(n_labels=5), "eval/flip"))
    fixed = classes % 5
    assert (fixed[:, 0] != fixed[:, 1]).all()
    assert (labels == fixed[:, ::-1]).all() and (target == answer).all()
    # the target is the flipped label, so what the weights know is always wrong, and stands in the context
    assert (target != query % 5).all() and (labels == query[:, None] % 5).any(1).all()


def test_exchanged_labels_of_more_classes_go_round():
    sets = {"flip": [Kind(labels="exchanged")]}
    classes, labels, query, target, _ = parts(many(task(context=4, evaluation_kinds=sets), "eval/flip", 2000))
    assert (labels != classes).all() and (target != query).all()
    assert (np.sort(labels, 1) == np.sort(classes, 1)).all()


def test_ciwl_sequences_lack_the_class_and_show_its_label_on_a_random_unique_item():
    classes, labels, query, target, answer = parts(many(task(n_labels=5), "eval/ciwl"))
    assert not (classes == query[:, None]).any() and (answer == -1).all() and (target == query % 5).all()
    assert (classes[:, 0] != classes[:, 1]).all()
    present = labels == target[:, None]
    assert (present.sum(1) == 1).all() and near(np.bincount(present.argmax(1)), [0.5, 0.5])
    # the other item carries its own label
    assert (labels[~present] == classes[~present] % 5).all() and (classes[present] % 5 != labels[present]).all()
    assert near(np.bincount(query, minlength=12), np.full(12, 1 / 12))


def test_iwl_sequences_lack_the_class_and_its_label():
    classes, labels, query, target, answer = parts(many(task(n_labels=5), "eval/iwl"))
    assert (target == query % 5).all() and (answer == -1).all()
    assert (labels == classes % 5).all() and not (labels == target[:, None]).any()
    assert near(np.bincount(query, minlength=12), np.full(12, 1 / 12))


def test_new_classes_are_drawn_for_the_sequence_with_their_labels():
    fewshot = task(exemplars=GaussianClusters(20, 2, 64, within=0.5, common=0.0), train_exemplars=1)
    drawn = many(fewshot, "eval/new", 4000)
    classes, _, query, target, answer = parts(drawn)
    assert (classes < 0).all() and (query == -1).all() and (target == answer).all()
    assert near(np.bincount(target, minlength=12), np.full(12, 1 / 12))
    batch = fewshot.batch(3, 0, "eval/new", 4000)
    shown = batch.features[0].double()
    # one exemplar a class: the query looks like its copy in the context, and like nothing else
    right = torch.from_numpy(classes == query[:, None]).double()
    alike = torch.nn.functional.cosine_similarity(shown[:, :2], shown[:, 2:], dim=-1)
    assert torch.allclose(alike[right == 1], torch.ones(()).double()) and alike[right == 0].mean().abs() < 0.02
    assert abs(shown.square().mean() - 1) < 0.02
    assert shown[:, 2].unique(dim=0).shape[0] == 4000
    known = fewshot.bank()["exemplars"].flatten(0, 1).double()
    assert (
        torch.nn.functional.normalize(shown[:, 2], dim=-1) @ torch.nn.functional.normalize(known, dim=-1).T
    ).max() < 0.8


def test_exemplars_of_a_new_class_scatter_like_those_of_the_source():
    fewshot = task(exemplars=GaussianClusters(20, 4, 256, within=0.5, common=1.0), train_exemplars=4)
    batch, drawn = fewshot.batch(3, 0, "eval/new", 2000), many(fewshot, "eval/new", 2000)
    same_class = drawn["classes"][:, :-1] == drawn["classes"][:, -1:]
    same = drawn["exemplars"][:, :-1] == drawn["exemplars"][:, -1:]
    alike = torch.nn.functional.cosine_similarity(batch.features[0][:, :2], batch.features[0][:, 2:], dim=-1).numpy()
    # (common ** 2 + 1) / total within a class, common ** 2 / total between two
    assert np.allclose(alike[same_class & same], 1, atol=1e-5)
    assert abs(alike[same_class & ~same].mean() - 2 / 2.25) < 0.01 and abs(alike[~same_class].mean() - 1 / 2.25) < 0.02


def test_new_classes_may_be_a_share_of_training():
    kinds = [Kind(weight=0.7), Kind(weight=0.3, new_classes=True)]
    fewshot = task(kinds=kinds)
    query = many(fewshot)["classes"][:, -1]
    assert near(np.bincount(query < 0), [0.7, 0.3])
    batch, drawn = fewshot.batch(1, 4), fewshot.draw([1], 4, 1)
    old = drawn["classes"][0, 0] >= 0
    known = fewshot.bank()["exemplars"][drawn["classes"][0, 0].clamp(min=0), drawn["exemplars"][0, 0]]
    assert torch.equal(batch.features[0][old], known[old]) and not torch.equal(batch.features[0][~old], known[~old])


def test_evaluation_sets_of_their_own_kinds_belong_to_drawn_labels_as_well():
    sets = {"bursty": [Kind(matches=2, distractor_copies=2)], "mixed": [Kind(weight=3.0), Kind(no_support=1.0)]}
    fewshot = FewShot(SMALL, train_classes=12, context=4, n_labels=6, evaluation_kinds=sets)
    assert fewshot.evaluations[-2:] == ("bursty", "mixed")
    classes, _, query, _, _ = parts(many(fewshot, "eval/bursty", 500))
    assert ((classes == query[:, None]).sum(1) == 2).all()
    assert near(np.bincount(many(fewshot, "eval/mixed")["answers"] < 0), [0.75, 0.25])
    assert near(np.bincount(many(fewshot)["answers"] < 0), [1.0])


def test_a_step_of_every_set_is_the_same_alone_and_among_others():
    fewshot = task()
    for name in KINDS:
        together = fewshot.draw([4, 9], 7, 3, f"eval/{name}")
        alone = fewshot.draw([9], 8, 1, f"eval/{name}")
        assert all(torch.equal(together[key][1, 1], alone[key][0, 0]) for key in alone)


# --- what is known of it ------------------------------------------------------------------------------


def test_the_unigram_is_the_distribution_of_targets():
    kinds = [Kind(weight=2.0), Kind(labels="drawn", random_query=0.5), Kind(independent=True, random_query=0.3)]
    fewshot = task(n_labels=5, zipf=1.0, kinds=kinds)
    assert near(np.bincount(many(fewshot)["labels"][:, -1], minlength=5), fewshot.unigram().numpy())
    assert FewShot(SMALL, train_classes=12).unigram() is None


def test_the_guessing_baseline_knows_where_the_target_of_a_kind_stands():
    two, all_labels = math.log(2), math.log(12)
    for kinds, loss in (
        ([Kind()], two),
        ([Kind(no_support=1.0, label_present=True)], two),
        ([Kind(no_support=1.0)], math.log(10)),
        ([Kind(labels="exchanged")], two),
        ([Kind(independent=True)], all_labels),
        ([Kind(no_support=0.25)], -0.75 * math.log(0.75 / 2) - 0.25 * math.log(0.25 / 10)),
    ):
        assert task(kinds=kinds).baselines()["labels of the context"] == pytest.approx(loss)


def test_classes_of_different_groups_are_drawn_in_proportion_to_their_masses():
    u = np.random.Generator(np.random.Philox(1)).random((2, 60_000))
    masses, groups = np.array([3, 1, 2, 2]), np.array([0, 1, 0, 1])
    first, second = of_different_groups(u, masses, groups)
    assert near(np.bincount(first), masses / 8) and (groups[first] != groups[second]).all()
    for group, shares in ((0, [0, 1 / 3, 0, 2 / 3]), (1, [3 / 5, 0, 2 / 5, 0])):
        assert near(np.bincount(second[groups[first] == group], minlength=4), shares)


# --- strategies ---------------------------------------------------------------------------------------


def in_context(fewshot, batch):
    """Copies the label of the most similar item, and knows no class."""
    return fewshot.references()["nearest_neighbour"](batch)[0, :, 0].argmax(-1)


def in_weights(fewshot, batch, allowed=None):
    """Looks the query's class up in a table of all exemplars, whatever the context; of the allowed labels alone."""
    bank = fewshot.bank()["exemplars"]
    alike = (
        torch.nn.functional.normalize(batch.features[0, :, -1], dim=-1)
        @ torch.nn.functional.normalize(bank, dim=-1).flatten(0, 1).T
    )
    found = torch.from_numpy(fewshot._fixed)[alike.argmax(-1) // bank.shape[1]]
    if allowed is None:
        return found
    known = allowed.gather(1, found[:, None])[:, 0]
    return torch.where(known, found, allowed.long().argmax(-1))


def constrained(fewshot, batch):
    """The same table, but answers with a label that the context shows: the first of them where its own is none."""
    return in_weights(fewshot, batch, batch.plausible[0])


def accuracies(strategy, rows=4000):
    fewshot = task(
        exemplars=GaussianClusters(12, 5, 32, within=0.1, common=0.0), heldout_exemplars=0, train_exemplars=5
    )
    found = {}
    for name in ("train", "icl", "flip", "ciwl", "iwl", "new"):
        batch = fewshot.batch(3, 0, f"eval/{name}", rows)
        found[name] = float((strategy(fewshot, batch) == batch.targets[0, :, 0]).double().mean())
    return found


def within(found, expected, rows=4000):
    """Exact where a strategy is always or never right; else within 4 standard deviations."""
    return all(abs(found[name] - p) <= 4 * (p * (1 - p) / rows) ** 0.5 for name, p in expected.items())


def test_a_perfect_in_context_learner_is_right_wherever_the_class_is_shown_and_never_without_its_label():
    expected = {"train": 1.0, "icl": 1.0, "flip": 1.0, "new": 1.0, "iwl": 0.0, "ciwl": 0.5}
    assert within(accuracies(in_context), expected)


def test_a_perfect_table_is_right_wherever_labels_are_the_fixed_ones():
    expected = {"train": 1.0, "flip": 0.0, "ciwl": 1.0, "iwl": 1.0, "icl": 1 / 12, "new": 1 / 12}
    assert within(accuracies(in_weights), expected)


def test_a_table_constrained_to_the_context_needs_the_label_but_not_the_class():
    # with 1 / 12 the drawn label is the fixed one, with 1 / 12 the other item shows that; else one of two is guessed
    expected = {"train": 1.0, "flip": 0.0, "ciwl": 1.0, "iwl": 0.0, "icl": 1 / 12 + 10 / 12 / 2}
    assert within(accuracies(constrained), expected)


# --- what cannot work ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "sticky"}, "FewShot.labels: got 'sticky', expected drawn or fixed"),
        ({"labels": "drawn", "label_seed": 1}, "FewShot.label_seed: got 1, expected null, as labels are drawn"),
        ({"label_seed": -1}, "FewShot.label_seed: got -1"),
        ({"labels": "drawn", "kinds": [Kind(labels="exchanged")]}, "FewShot.kinds[0].labels: got 'exchanged'"),
        ({"labels": "drawn", "kinds": [Kind(labels="shifted")]}, "FewShot.kinds[0].labels: got 'shifted'"),
        ({"kinds": [Kind(labels="shifted", no_support=1.0)]}, "FewShot.kinds[0].labels: got 'shifted'"),
        ({"labels": "drawn", "kinds": [Kind(independent=True)]}, "FewShot.kinds[0].independent: got True"),
        ({"kinds": [Kind(among=2)]}, "FewShot.kinds[0].among: got 2, expected 2 .. 12, with drawn labels, or null"),
        ({"kinds": [Kind(labels="drawn", among=1)]}, "FewShot.kinds[0].among: got 1"),
        (
            {"n_labels": 2, "kinds": [Kind(no_support=0.5)]},
            "FewShot.n_labels: got 2, expected at least 3 (classes of k",
        ),
        ({"evaluation_kinds": {"train": [Kind()]}}, "FewShot.evaluation_kinds: got 'train'"),
        ({"evaluation_kinds": {"a/b": [Kind()]}}, "FewShot.evaluation_kinds: got 'a/b'"),
        ({"evaluation_kinds": {"none": []}}, "FewShot.evaluation_kinds: got 'none'"),
        ({"evaluation_kinds": {"far": [Kind(matches=3)]}}, "FewShot.evaluation_kinds.far[0].matches: got 3"),
        (
            {"train_classes": 2, "evaluation_kinds": {"iwl": [Kind(no_support=1.0)]}},
            "FewShot.evaluation_kinds.iwl[0]: got '2 classes', expected at least 3 in one sequence",
        ),
        (
            {"exemplars": GaussianClusters(20, 1, 2), "train_classes": 4, "heldout_classes": 0, "label_seed": 8}
            | {"n_labels": 3, "evaluation_kinds": {"iwl": [Kind(no_support=1.0)]}},
            "FewShot.evaluation_kinds.iwl[0]: got '2 different labels', expected at least 3 in one sequence",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_do_not_fit_are_named_in_one_line(options, message):
    with pytest.raises(ConfigError) as caught:
        task(**options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"labels": "random"}, "labels"),
        ({"label_present": True}, "label_present"),
        ({"independent": True, "matches": 2}, "independent"),
    ],
)
def test_a_kind_refuses_what_contradicts_itself(options, field):
    with pytest.raises(ConfigError, match=f"Kind.{field}: got "):
        Kind(**options)


def test_a_source_that_makes_no_classes_has_no_set_of_new_ones(tmp_path):
    np.savez(tmp_path / "array.npz", features=np.arange(120, dtype=np.float32).reshape(20, 2, 3))
    source = ArrayFile(str(tmp_path / "array.npz"), "features")
    assert task(exemplars=source).evaluations[-4:] == ("icl", "flip", "ciwl", "iwl")
    with pytest.raises(ConfigError, match=r"kinds\[0\].new_classes: got True, expected false: ArrayFile makes no new"):
        task(exemplars=source, kinds=[Kind(new_classes=True)])
