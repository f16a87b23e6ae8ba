"""Claims about the few-shot task: its data are a function of (seed, step), and follow the stated rules."""

import math
from itertools import combinations

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from opsin.errors import ConfigError
from opsin.tasks import FewShot, GaussianClusters, Kind
from tests.helpers.paths import REFERENCE

SMALL = GaussianClusters(classes=20, exemplars=5, features=6)
SEEDS = st.integers(0, 2**64 - 1)
PINNED_CLASSES = [[4, 1, 4], [40, 9, 40], [49, 14, 14]]
PINNED_LABELS = [[2, 1, 2], [4, 2, 4], [0, 1, 1]]


def task(**options):
    return FewShot(**{"exemplars": SMALL, "train_classes": 12, "batch_size": 8} | options)


def many(fewshot, split="train", rows=20_000, seed=3):
    """``rows`` sequences of one member as numpy arrays [rows, ...]."""
    drawn = fewshot.draw([seed], 0, 1, split, batch_size=rows)
    return {name: tensor[0, 0].numpy() for name, tensor in drawn.items()}


def near(counts, shares, sigmas=5):
    """Whether counts are those of draws with these probabilities."""
    n, shares = counts.sum(), np.asarray(shares)
    return (np.abs(counts - n * shares) <= sigmas * np.sqrt(n * shares * (1 - shares)) + 1e-9).all()


def batch_of(fewshot, drawn):
    return fewshot.assemble(fewshot.bank(), {name: tensor[0] for name, tensor in drawn.items()})


# --- a function of (seed, step, split) ---------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, first=st.integers(0, 2**40), count=st.integers(1, 6), noise=st.sampled_from([0.0, 0.5]))
def test_a_step_is_the_same_alone_and_in_a_chunk(seed, first, count, noise):
    fewshot = task(noise=noise, kinds=[Kind(), Kind(label_flip=0.5)])
    chunk = fewshot.draw([seed], first, count)
    for s in range(count):
        alone = fewshot.draw([seed], first + s, 1)
        assert all(torch.equal(chunk[name][s], alone[name][0]) for name in chunk)


@settings(max_examples=15, deadline=None)
@given(seeds=st.lists(st.integers(0, 5) | SEEDS, min_size=1, max_size=5))
def test_a_member_sees_what_its_seed_sees_alone(seeds):
    fewshot = task(noise=0.1)
    together = fewshot.draw(seeds, 7, 2)
    for m, seed in enumerate(seeds):
        alone = fewshot.draw([seed], 7, 2)
        assert all(torch.equal(together[name][:, m], alone[name][:, 0]) for name in together)


def test_another_seed_step_or_split_gives_other_data():
    fewshot = task()
    base = fewshot.draw([1], 5, 1)["classes"]
    different = [([2], 5, 1), ([1], 6, 1), ([1], 5, 1, "eval/train"), ([2**64 - 1], 5, 1)]
    assert all(not torch.equal(base, fewshot.draw(*arguments)["classes"]) for arguments in different)


def test_a_draw_leaves_no_trace_on_global_random_numbers():
    fewshot = task(noise=0.1)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    fewshot.draw([0], 0, 3)
    assert torch.equal(torch_before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()


def test_noise_and_flips_leave_all_other_choices_as_they_were():
    plain, noisy = task().draw([0], 0, 5), task(noise=1.0, kinds=[Kind(label_flip=0.3)]).draw([0], 0, 5)
    for name in ("classes", "exemplars", "answers"):
        assert torch.equal(plain[name], noisy[name])


def test_the_stream_of_the_default_task_is_pinned():
    drawn = FewShot().draw([0], 1000, 1, batch_size=3)
    assert drawn["classes"][0, 0].tolist() == PINNED_CLASSES
    assert drawn["labels"][0, 0].tolist() == PINNED_LABELS


# --- the reference's main run --------------------------------------------------------------------


def check_main_run(classes, exemplars, labels, heldout, n_classes=50):
    """The definitions of the reference's main sampler, on ``[rows, 3]`` arrays."""
    query_at = np.where(classes[:, 0] == classes[:, 2], 0, 1)
    rows = np.arange(len(classes))
    other = classes[rows, 1 - query_at]
    assert (classes[rows, query_at] == classes[:, 2]).all() and (other != classes[:, 2]).all()
    assert (labels[rows, query_at] == labels[:, 2]).all()
    assert (exemplars == 0).all()
    assert near(np.bincount(query_at), [0.5, 0.5])
    assert near(np.bincount(classes[:, 2], minlength=n_classes), np.full(n_classes, 1 / n_classes))
    assert near(np.bincount(other, minlength=n_classes), np.full(n_classes, 1 / n_classes))
    gap = (other - classes[:, 2]) % n_classes
    assert near(np.bincount(gap, minlength=n_classes), [0, *np.full(n_classes - 1, 1 / (n_classes - 1))])
    ordered = np.bincount(labels[rows, query_at] * 5 + labels[rows, 1 - query_at], minlength=25).reshape(5, 5)
    allowed = np.array([[a != b and {a, b} not in heldout for b in range(5)] for a in range(5)])
    assert near(ordered.ravel(), allowed.ravel() / 16)
    assert near(np.bincount(labels[:, 2]), [0.1875, 0.1875, 0.1875, 0.1875, 0.25])


def test_the_default_task_is_the_references_main_run():
    drawn = many(FewShot())
    check_main_run(drawn["classes"], drawn["exemplars"], drawn["labels"], [{0, 2}, {1, 3}])
    assert (drawn["answers"] == drawn["labels"][:, -1]).all()


def test_the_references_own_draws_pass_the_same_check_with_the_same_label_split():
    path = REFERENCE / "sampler.npz"
    if not path.exists():
        pytest.skip(f"no {path} (set OPSIN_REFERENCE to the folder of the reference vectors)")
    drawn = np.load(path)
    heldout = [set(pair) for pair in drawn["relabel_pairs_val"].tolist()]
    check_main_run(drawn["class_idx"], drawn["exemplar_idx"], drawn["labels"], heldout)
    found = many(FewShot(), "eval/relabellings", 500)["labels"][:, :2]
    assert {frozenset(pair) for pair in found.tolist()} == {frozenset(pair) for pair in heldout}
    test_classes = many(FewShot(GaussianClusters(1623, 1, 2), heldout_classes=100), "eval/classes")["classes"]
    assert (test_classes.min(), test_classes.max()) == (1523, 1622)
    assert drawn["test_class_idx"].min() >= 1523 and drawn["val_exemplar_idx"].min() == 1


# --- evaluation sets -----------------------------------------------------------------------------


def test_evaluation_sets_show_what_training_never_shows():
    fewshot = task(train_exemplars=2, heldout_exemplars=2, heldout_classes=5)
    assert fewshot.evaluations == ("train", "relabellings", "exemplars", "classes")
    seen = many(fewshot, rows=4000)
    pairs = {frozenset(pair) for pair in seen["labels"][:, :2].tolist()}
    assert set(seen["classes"].ravel()) == set(range(12)) and set(seen["exemplars"].ravel()) == {0, 1}

    exemplars = many(fewshot, "eval/exemplars", 4000)
    assert set(exemplars["exemplars"].ravel()) == {2, 3} and set(exemplars["classes"].ravel()) == set(range(12))
    classes = many(fewshot, "eval/classes", 4000)
    assert set(classes["classes"].ravel()) == set(range(15, 20)) and set(classes["exemplars"].ravel()) == {0, 1}
    relabelled = {frozenset(pair) for pair in many(fewshot, "eval/relabellings", 4000)["labels"][:, :2].tolist()}
    assert not relabelled & pairs and relabelled | pairs == {frozenset(p) for p in combinations(range(5), 2)}


def test_sets_that_the_splits_leave_no_room_for_do_not_exist():
    fewshot = task(train_classes=20, train_exemplars=5, heldout_relabellings=0.0)
    assert fewshot.evaluations == ("train",)
    with pytest.raises(ConfigError, match=r"FewShot.split: got 'eval/classes', expected one of train, eval/train$"):
        fewshot.draw([0], 0, 1, "eval/classes")


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 7), data=st.data(), share=st.floats(0, 0.9), seed=SEEDS)
def test_relabellings_are_split_into_two_parts_that_make_up_all(n, data, share, seed):
    k = data.draw(st.integers(1, n))
    fewshot = task(n_labels=n, context=k, heldout_relabellings=share, relabelling_seed=seed)
    pools = fewshot._pools
    seen = pools["train"].relabellings[k].tolist()
    heldout = pools["eval/relabellings"].relabellings[k].tolist() if "relabellings" in fewshot.evaluations else []
    assert sorted(map(tuple, seen + heldout)) == list(combinations(range(n), k))
    assert len(heldout) == min(round(share * math.comb(n, k)), math.comb(n, k) - 1)


# --- kinds of sequences ----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    matches=st.integers(1, 3),
    distractors=st.integers(0, 3),
    copies=st.integers(1, 3),
    no_support=st.sampled_from([0.0, 0.4, 1.0]),
    flip=st.sampled_from([0.0, 0.3]),
    zipf=st.sampled_from([0.0, 1.0, 8.0]),
    split=st.sampled_from(["train", "eval/classes", "eval/exemplars"]),
)
def test_every_context_holds_the_stated_classes(matches, distractors, copies, no_support, flip, zipf, split):
    kind = Kind(
        matches=matches, distractor_copies=copies, no_support=no_support, label_flip=flip if distractors else 0.0
    )
    fewshot = task(context=matches + distractors * copies, kinds=[kind], zipf=zipf)
    drawn = many(fewshot, split, rows=60)
    for classes, labels, answer in zip(drawn["classes"], drawn["labels"], drawn["answers"], strict=True):
        *context, query = classes.tolist()
        counts = sorted(context.count(c) for c in set(context))
        assert counts == sorted([matches] + [copies] * distractors)
        assert (answer >= 0) == (query in context)
        if answer >= 0:
            assert context.count(query) == matches and labels[-1] == answer
        if not flip:  # a class carries one label, and different classes different ones
            assert len(set(zip(context, labels.tolist(), strict=False))) == len(set(context)) == len(set(labels[:-1]))


def test_no_copies_stated_means_one_distractor_class_fills_the_rest():
    context = many(task(context=5, kinds=[Kind(matches=2, distractor_copies=None)]), rows=500)["classes"]
    assert all(sorted(np.unique(row[:-1], return_counts=True)[1]) == [2, 3] for row in context)


def test_an_unsupported_query_is_as_frequent_as_stated_and_its_target_is_any_label():
    drawn = many(task(kinds=[Kind(no_support=0.25)]))
    absent = drawn["answers"] < 0
    assert near(np.bincount(absent), [0.75, 0.25])
    assert near(np.bincount(drawn["labels"][absent, -1]), np.full(5, 0.2))
    assert near(np.bincount(drawn["classes"][:, -1]), np.full(12, 1 / 12))


def test_a_random_query_label_hits_the_right_one_by_chance_only():
    drawn = many(task(kinds=[Kind(random_query=0.5)]))
    assert near(np.bincount(drawn["labels"][:, -1] == drawn["answers"]), [0.4, 0.6])


def test_a_flipped_label_is_that_of_another_class_in_the_context():
    straight = many(task(context=3))
    flipped = many(task(context=3, kinds=[Kind(label_flip=0.2)]))
    changed = straight["labels"][:, :-1] != flipped["labels"][:, :-1]
    assert near(np.bincount(changed.ravel()), [0.8, 0.2])
    assert all(set(f) <= set(s) for s, f in zip(straight["labels"][:, :3], flipped["labels"][:, :3], strict=True))
    assert (straight["labels"][:, -1] == flipped["labels"][:, -1]).all()


def copies_agree(drawn, of_query):
    """For 2 + 2 contexts: how often both copies of the query's class (or the distractor) show one exemplar."""
    is_query = drawn["classes"][:, :-1] == drawn["classes"][:, -1:]
    shown = drawn["exemplars"][:, :-1][is_query == of_query].reshape(-1, 2)
    return (shown[:, 0] == shown[:, 1]).mean(), shown


def test_matched_exemplars_are_identical_and_others_are_independent():
    two_copies = dict(context=4, train_exemplars=4)
    kind = dict(matches=2, distractor_copies=2)
    free = many(task(**two_copies, kinds=[Kind(**kind)]))
    matched = many(task(**two_copies, kinds=[Kind(**kind, matched_query=True, matched_distractors=True)]))
    assert abs(copies_agree(free, False)[0] - 0.25) < 0.02 and copies_agree(matched, False)[0] == 1
    for drawn, share in ((free, 7 / 16), (matched, 1)):  # the query repeats one of its two copies
        _, shown = copies_agree(drawn, True)
        assert abs((shown == drawn["exemplars"][:, -1:]).any(1).mean() - share) < 0.02
    assert abs(copies_agree(matched, True)[0] - 0.25) < 0.02


def test_held_out_exemplars_are_never_matched():
    kind = Kind(matched_query=True, matched_distractors=True)
    drawn = many(task(kinds=[kind]), "eval/exemplars")
    is_query = drawn["classes"][:, :-1] == drawn["classes"][:, -1:]
    assert abs((drawn["exemplars"][:, :-1][is_query] == drawn["exemplars"][:, -1]).mean() - 0.25) < 0.02


def test_kinds_are_mixed_by_their_weights():
    kinds = [Kind(weight=3.0, matches=1, distractor_copies=2), Kind(weight=1.0, matches=3)]
    drawn = many(task(context=3, kinds=kinds))
    assert near(np.bincount((drawn["classes"][:, :-1] == drawn["classes"][:, -1:]).sum(1))[[1, 3]], [0.75, 0.25])


def test_zipf_is_the_distribution_of_the_querys_class():
    drawn = many(task(zipf=1.5))
    shares = np.arange(1, 13) ** -1.5
    assert near(np.bincount(drawn["classes"][:, -1], minlength=12), shares / shares.sum())


# --- batches -----------------------------------------------------------------------------------------


def test_a_batch_shows_the_drawn_exemplars_and_labels():
    fewshot = task(context=3)
    drawn = fewshot.draw([1, 2], 0, 1)
    batch = batch_of(fewshot, drawn)
    array = SMALL.load()
    assert (batch.features.numpy() == array[drawn["classes"][0], drawn["exemplars"][0]]).all()
    assert batch.features.shape == (2, 8, 4, 6) and batch.tokens.shape == (2, 8, 3) and batch.targets.shape == (2, 8, 1)
    assert torch.equal(torch.cat([batch.tokens, batch.targets], -1), drawn["labels"][0])
    assert fewshot.layout.features == (0, 2, 4, 6) and fewshot.layout.scored == (6,)
    assert fewshot.layout.tokens == fewshot.layout.labels == (1, 3, 5)
    assert fewshot.layout.positions == 7 and fewshot.n_features == 6


def test_plausible_outputs_are_the_labels_of_the_context():
    batch = task(context=3, n_labels=6).batch(0, 0)
    for tokens, plausible in zip(batch.tokens[0], batch.plausible[0], strict=True):
        assert set(plausible.nonzero()[:, 0].tolist()) == set(tokens.tolist())


def test_truth_points_from_the_query_to_the_right_labels():
    kind = Kind(matches=2, distractor_copies=1, no_support=0.3)
    fewshot = task(context=4, batch_size=40, kinds=[kind])
    drawn = fewshot.draw([0], 0, 1)
    batch = batch_of(fewshot, drawn)
    truth = batch.truth
    assert truth.previous.tolist() == [0, *range(8)] and truth.labels.nonzero()[:, 0].tolist() == [1, 3, 5, 7]
    assert not truth.query[..., :-1].any() and not truth.match[..., :-1, :].any() and not truth.other[..., :-1, :].any()
    assert not (truth.match | truth.other)[..., ::2].any()
    for b, classes in enumerate(drawn["classes"][0, 0]):
        same = (classes[:-1] == classes[-1]).tolist()
        assert truth.query[0, b, -1] == any(same)
        assert truth.match[0, b, -1, 1::2].tolist() == same
        assert truth.other[0, b, -1, 1::2].tolist() == [any(same) and not s for s in same]


def test_truth_follows_the_label_drawn_for_the_class_whatever_the_target_says():
    fewshot = task(kinds=[Kind(random_query=1.0)], batch_size=50)
    drawn = fewshot.draw([0], 0, 1)
    same = drawn["classes"][0, ..., :-1] == drawn["classes"][0, ..., -1:]
    assert torch.equal(batch_of(fewshot, drawn).truth.match[..., -1, 1::2], same)


def test_noise_has_the_stated_size_and_differs_between_copies():
    fewshot = task(noise=0.3, batch_size=200)
    drawn = fewshot.draw([0], 0, 1)
    added = batch_of(fewshot, drawn).features - fewshot.bank()["exemplars"][drawn["classes"][0], drawn["exemplars"][0]]
    assert abs(added.std() - 0.3) < 0.02 and abs(added.mean()) < 0.02
    assert drawn["noise"].dtype == torch.float32 and "noise" not in task().draw([0], 0, 1)


def test_features_have_the_dtype_of_the_bank():
    fewshot = task(noise=0.1)
    assert fewshot.batch(0, 0).features.dtype == torch.float32
    bank = {"exemplars": fewshot.bank()["exemplars"].double()}
    drawn = {name: tensor[0] for name, tensor in fewshot.draw([0], 0, 1).items()}
    assert fewshot.assemble(bank, drawn).features.dtype == torch.float64


def test_the_bank_is_loaded_once():
    fewshot = task()
    assert fewshot.bank()["exemplars"] is fewshot.bank()["exemplars"]
    assert fewshot.bank()["exemplars"].shape == (20, 5, 6)


def flat(fewshot, bank, drawn):
    batch = fewshot.assemble(bank, drawn)
    truth = batch.truth
    tensors = (batch.features, batch.tokens, batch.targets, batch.plausible)
    return *tensors, truth.previous, truth.labels, truth.query, truth.match, truth.other


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_assembling_is_one_graph_for_all_steps(noise, monkeypatch):
    fewshot = task(noise=noise, kinds=[Kind(no_support=0.2)])
    drawn = fewshot.draw([0, 1], 0, 4)
    steps = [{name: tensor[s] for name, tensor in drawn.items()} for s in range(4)]

    def assembled(bank, draw):
        return flat(fewshot, bank, draw)

    # a compiler cannot see through run-time shape checks, if the tests run with them
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    traced = make_fx(assembled)(fewshot.bank(), steps[0])
    compiled = torch.compile(assembled, fullgraph=True, backend="eager")
    for step in steps:
        expected = assembled(fewshot.bank(), step)
        for result in (traced(fewshot.bank(), step), compiled(fewshot.bank(), step)):
            assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


# --- baselines ---------------------------------------------------------------------------------------


def test_baselines_of_the_default_task():
    assert task().baselines() == pytest.approx(
        {"uniform over labels": math.log(5), "labels of the context": math.log(2)}
    )


def test_baselines_of_a_mixture_are_averaged_by_weight():
    fewshot = task(context=4, kinds=[Kind(weight=3.0, distractor_copies=3), Kind(weight=1.0)])
    assert fewshot.baselines()["labels of the context"] == pytest.approx(0.75 * math.log(2) + 0.25 * math.log(4))


@pytest.mark.parametrize("kind", [Kind(no_support=0.3), Kind(random_query=0.3), Kind(no_support=0.2, random_query=0.5)])
def test_the_guessing_baseline_is_the_loss_of_the_best_guess_by_frequency(kind):
    drawn = many(task(kinds=[kind]))
    inside = (drawn["labels"][:, :-1] == drawn["labels"][:, -1:]).any(1).mean()
    best = -inside * math.log(inside / 2) - (1 - inside) * math.log((1 - inside) / 3)
    assert task(kinds=[kind]).baselines()["labels of the context"] == pytest.approx(best, abs=0.01)


def test_guessing_is_never_better_than_uniform_when_every_target_is_random():
    baselines = task(kinds=[Kind(random_query=1.0)]).baselines()
    assert baselines["labels of the context"] == pytest.approx(baselines["uniform over labels"])
