"""Claims about sequences with copied segments."""

import itertools
import math
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from opsin.errors import ConfigError
from opsin.interventions.values.patterns import match_pattern
from opsin.tasks import Repeats
from opsin.tasks.shared.segment_posterior import Segments, predict_next
from opsin.tasks.shared.streams import stream_key, uniforms
from tests.helpers.token_tasks import (
    agrees,
    check_exact_is_finite_and_normal,
    check_other_draws,
    check_second_half_repeats,
    check_streams,
    loss,
    near,
    rows,
    run_three_steps,
    searched_truth,
)


def task(**options):
    return Repeats(**{"vocabulary": 12, "positions": 30, "batch_size": 8, "longest": 9} | options)


# --- a function of (seed, step, split) ---------------------------------------------------------


@settings(max_examples=15)
@given(seed=st.integers(0, 2**64 - 1), first=st.integers(0, 2**40), noise=st.sampled_from([0.0, 0.3]))
def test_a_step_and_a_member_are_the_same_alone_and_among_others(seed, first, noise):
    check_streams(task(noise=noise), first, 3, [seed, 7, seed])


def test_another_seed_step_or_split_gives_other_data():
    check_other_draws(task())


def test_noise_replaces_some_copies_and_leaves_every_other_choice_as_it_was():
    plain, noisy = rows(task(noise=0.0)), rows(task(noise=0.25))
    copied = plain["source"] >= 0
    lost = copied & (noisy["source"] < 0)
    assert near(np.bincount(lost[copied], minlength=2), [0.75, 0.25])
    assert (noisy["source"][~lost] == plain["source"][~lost]).all()
    never = ~lost.any(1)
    assert never.any() and (noisy["tokens"][never] == plain["tokens"][never]).all()


# --- what is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize("zipf", [0.0, 1.0])
def test_fresh_tokens_follow_the_stated_distribution(zipf):
    drawn = rows(task(zipf=zipf))
    shares = np.arange(1, 13) ** -zipf
    fresh = drawn["tokens"][drawn["source"] < 0]
    assert near(np.bincount(fresh, minlength=12), shares / shares.sum())


def test_the_unigram_is_the_share_of_every_token_at_every_position():
    repeats = task(segments=2, segment_probability=1.0, noise=0.2)
    tokens = rows(repeats, count=20_000)["tokens"]
    for position in range(31):
        assert near(np.bincount(tokens[:, position], minlength=12), repeats.unigram().numpy())


def test_a_copy_is_the_token_it_is_a_copy_of():
    drawn = rows(task(segments=4, segment_probability=1.0))
    row, position = np.nonzero(drawn["source"] >= 0)
    source = drawn["source"][row, position]
    assert (source < position).all() and len(row) > 10_000
    assert (drawn["tokens"][row, position] == drawn["tokens"][row, source]).all()


def test_a_lone_segment_has_the_stated_place_length_and_original():
    drawn = rows(task(segments=1, segment_probability=0.7, noise=0.0), count=20_000)
    copied = drawn["source"] >= 0
    present = copied.any(1)
    assert near(np.bincount(present.astype(int)), [0.3, 0.7])
    begin, length = copied[present].argmax(1), copied[present].sum(1)
    assert near(np.bincount(begin - 9), np.full(22, 1 / 22))  # 31 tokens, the first 9 never begin a copy
    whole = begin <= 31 - 9
    assert near(np.bincount(length[whole] - 4), np.full(6, 1 / 6))
    original = drawn["source"][present][np.arange(present.sum()), begin]
    chosen = (begin == 15) & (length == 6)  # originals 0 .. 9
    assert near(np.bincount(original[chosen]), np.full(10, 0.1))


def test_segments_are_written_in_the_order_they_begin():
    """The slow version, from the same numbers: a later segment goes on where an earlier one would."""
    repeats = task(segments=4, segment_probability=0.8, noise=0.0)
    found = rows(repeats, count=300)["source"]
    names = ("presence", "start", "length", "original")
    u = uniforms([stream_key(3, "train", 300)], 1, 0, 1, 300, dict.fromkeys(names, 4))
    cut = 0
    for r in range(300):
        presence, start, length, origin = (u[name][:, r] for name in names)
        segments = [(9 + int(start[i] * 22), 4 + int(length[i] * 6), origin[i]) for i in range(4) if presence[i] < 0.8]
        expected = [-1] * 31
        for begin, size, share in sorted(segments, key=lambda segment: segment[0]):
            first = int(share * (begin - size + 1))
            cut += begin < 31 and expected[begin] >= 0
            for p in range(begin, 31):
                expected[p] = first + p - begin if p < begin + size else -1
        assert found[r].tolist() == expected
    assert cut > 50


# --- truth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "eval/train", "eval/repeated"])
def test_truth_is_what_a_slow_search_finds(split):
    repeats = task(vocabulary=5)
    batch = repeats.batch(0, 0, split, 20)
    source = repeats.draw([0], 0, 1, split, 20)["source"][0, 0]
    copied = [[line[i] >= 0 and line[i + 1] == line[i] + 1 for i in range(30)] for line in source.tolist()]
    assert agrees(batch.truth, searched_truth(batch, copied))
    assert np.array_equal(batch.truth.query[0].numpy(), copied)  # the original is always found


def test_every_position_predicts_the_next_token_and_all_but_the_first_are_labels():
    repeats = task()
    batch = repeats.batch(0, 0)
    assert torch.equal(batch.tokens[..., 1:], batch.targets[..., :-1])
    assert repeats.layout.scored == repeats.layout.tokens == tuple(range(30))
    assert batch.truth.labels.tolist() == [False] + [True] * 29 and repeats.layout.labels == tuple(range(1, 30))
    assert batch.truth.previous.tolist() == [0, *range(29)]
    assert batch.features is None and batch.plausible is None


def test_a_perfect_match_head_looks_where_the_truth_says():
    batch = task().batch(0, 0)
    candidates = (batch.truth.match | batch.truth.other).float()
    assert torch.equal(match_pattern(batch, 0.0), candidates) and candidates.any()
    shared = candidates / candidates.sum(-1, keepdim=True).clamp(min=1)
    assert torch.allclose(match_pattern(batch, 0.5), shared)


def test_the_repeated_set_repeats_its_first_half():
    check_second_half_repeats(task(positions=30))
    check_second_half_repeats(task(positions=31))


def test_assembling_is_one_graph_for_all_steps(monkeypatch):
    repeats = task()
    drawn = repeats.draw([0, 1], 0, 3)
    steps = [{name: tensor[s] for name, tensor in drawn.items()} for s in range(3)]

    def assembled(draw):
        batch = repeats.assemble({}, draw)
        return batch.tokens, batch.targets, batch.truth.query, batch.truth.match, batch.truth.other

    # a compiler cannot see through run-time shape checks, if the tests run with them
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    traced = make_fx(assembled)(steps[0])
    compiled = torch.compile(assembled, fullgraph=True, backend="eager")
    for step in steps:
        for result in (traced(step), compiled(step)):
            assert all(torch.equal(a, b) for a, b in zip(assembled(step), result, strict=True))


# --- the best prediction ---------------------------------------------------------------------------


def enumerated(tokens, fresh, unigram, process):
    """P(next token) after each position, summed over every choice of segments, of which later ones go on.

    ``fresh`` [L, V]: of the token after each position, were it fresh.
    """
    length, vocabulary = len(tokens), len(unigram)
    starts = range(process.longest, length + 1)
    lengths = range(process.shortest, process.longest + 1)
    segments = [(None, 1 - process.probability)]
    for start, size in itertools.product(starts, lengths):
        room = start - size + 1
        weight = process.probability / len(starts) / len(lengths) / room
        segments += [((start, size, source), weight) for source in range(room)]
    found = np.zeros((length, vocabulary))
    for choice in itertools.product(segments, repeat=process.count):
        weight = math.prod(w for _, w in choice)
        source = [None] * (length + 1)
        for start, size, origin in sorted((c for c, _ in choice if c), key=lambda c: c[0]):
            for p in range(start, length + 1):
                source[p] = origin + p - start if p < start + size else None
        for row in range(length):
            j = source[row + 1]
            given = (
                fresh[row]
                if j is None
                else process.noise * unigram + (1 - process.noise) * np.eye(vocabulary)[tokens[j]]
            )
            found[row] += weight * given
            if row + 1 < length:
                weight *= given[tokens[row + 1]]
    return found / found.sum(1, keepdims=True)


@pytest.mark.parametrize(
    "process",
    [
        Segments(2, 0.6, 2, 3, 0.1),
        Segments(2, 1.0, 2, 2, 0.0),
        Segments(1, 0.5, 2, 4, 0.3),
        Segments(3, 0.7, 3, 4, 0.2),
    ],
    ids=str,
)
def test_the_best_prediction_is_the_sum_over_every_choice_of_segments(process):
    rng = np.random.default_rng(0)
    length = 6 if process.count == 3 else 7
    tokens = np.concatenate([rng.integers(0, 3, (3, length)), [[0, 1, 2, 0, 1, 2, 0][:length]]])
    unigram = np.array([0.5, 0.3, 0.2])
    fresh = np.stack([np.broadcast_to(unigram, (length, 3)), *rng.dirichlet(np.ones(3), (3, length))])
    found = predict_next(*map(torch.from_numpy, (tokens, fresh, unigram)), process)
    for b in range(4):
        assert np.allclose(found[b], enumerated(tokens[b].tolist(), fresh[b], unigram, process), atol=1e-12)


def test_long_segments_of_rare_tokens_neither_overflow_nor_underflow():
    repeats = task(vocabulary=400, zipf=2.0, positions=200, longest=90, shortest=60, segments=2, noise=0.0)
    draw = repeats.draw([0], 0, 1, batch_size=2)
    draw["tokens"][..., :100] = torch.arange(300, 400)
    draw["tokens"][..., 100:] = draw["tokens"][..., :101]
    batch = repeats.assemble({}, {name: tensor[0] for name, tensor in draw.items()})
    found = repeats.exact(batch)
    assert found.isfinite().all() and loss(found, batch)[..., 120:150].max() < 0.1


def test_no_prediction_is_better_on_average_than_the_exact_one():
    repeats = task(vocabulary=8, segments=2, noise=0.1)
    batch = repeats.batch(0, 0, "train", 2000)
    exact = repeats.exact(batch)
    best = loss(exact, batch)
    # calibrated: the loss that it expects of itself is the loss that it has
    expected = -(exact.exp() * exact).sum(-1)
    difference = (best - expected).mean(-1)[0]
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(2000)
    unigram = repeats.unigram().log().expand_as(exact)
    wrong = predict_next(batch.tokens[0], unigram[0].exp(), repeats.unigram(), Segments(2, 0.5, 4, 9, 0.4)).log()[None]
    for other in (unigram, wrong, (1.1 * exact).log_softmax(-1), (0.9 * exact).log_softmax(-1)):
        worse = (loss(other, batch) - best).mean(-1)[0]
        assert worse.mean() > 2 * worse.std() / math.sqrt(2000)


def test_exact_is_finite_and_sums_to_one_on_every_split():
    check_exact_is_finite_and_normal(task())
    check_exact_is_finite_and_normal(task(segment_probability=1.0, noise=0.0))


def test_baselines_are_losses_and_the_last_is_that_of_the_unigram():
    repeats = task()
    found = repeats.baselines()
    assert list(found) == ["uniform", "unigram"] and found["uniform"] == pytest.approx(math.log(12))
    batch = repeats.batch(0, 0, "train", 2000)
    expected = loss(repeats.unigram().log().expand(*batch.tokens.shape, -1), batch).mean()
    assert found["unigram"] == pytest.approx(float(expected), abs=0.02)


# --- from a text, in a run, refused --------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    words = np.random.default_rng(0).choice(["ab", "cde", "fa", "bee"], 400)
    path.write_text(" ".join(words.tolist()), encoding="utf-8")
    return str(path)


def test_windows_of_a_text_are_what_is_copied_into(text):
    content = Path(text).read_text(encoding="utf-8")
    repeats = task(vocabulary=7, text=text, noise=0.0)
    characters = sorted(set(content), key=lambda c: (-content.count(c), c))
    ring = content + content[:31]
    drawn = rows(repeats, count=200)
    for tokens, source in zip(drawn["tokens"], drawn["source"], strict=True):
        if (source < 0).all():
            assert "".join(characters[t] for t in tokens) in ring
    assert (drawn["source"] < 0).all(1).sum() > 10
    row, position = np.nonzero(drawn["source"] >= 0)
    assert (drawn["tokens"][row, position] == drawn["tokens"][row, drawn["source"][row, position]]).all()
    counted = [content.count(c) / len(content) for c in characters]
    assert np.allclose(repeats.unigram(), counted)
    assert list(repeats.baselines()) == ["uniform", "unigram", "bigram"]
    batch = repeats.batch(0, 0, "train", 300)
    assert loss(repeats.exact(batch), batch).mean() < repeats.baselines()["bigram"]
    check_exact_is_finite_and_normal(repeats)


def test_characters_beyond_the_vocabulary_are_left_out(text):
    assert task(vocabulary=3, text=text).n_tokens == 3
    with pytest.raises(ConfigError, match=r"Repeats.vocabulary: got 8, expected at most 7, the characters of "):
        task(vocabulary=8, text=text)


@pytest.mark.parametrize("vocabulary", [8, 40])
def test_a_model_below_and_above_the_vocabulary_trains(vocabulary):
    run_three_steps(task(vocabulary=vocabulary, positions=16, longest=5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 1}, "Repeats.vocabulary: got 1, expected at least 2"),
        ({"positions": 3}, "Repeats.positions: got 3, expected at least 4"),
        ({"batch_size": 0}, "Repeats.batch_size: got 0"),
        ({"zipf": -1.0}, "Repeats.zipf: got -1.0"),
        ({"zipf": math.nan}, "Repeats.zipf: got nan"),
        ({"segments": 0}, "Repeats.segments: got 0"),
        ({"segment_probability": 1.5}, "Repeats.segment_probability: got 1.5, expected a probability"),
        ({"noise": math.nan}, "Repeats.noise: got nan, expected a probability"),
        ({"shortest": 1}, "Repeats.shortest: got 1, expected at least 2"),
        ({"longest": 3}, "Repeats.longest: got 3, expected 4 .. 29"),
        ({"longest": 30}, "Repeats.longest: got 30, expected 4 .. 29"),
        ({"text": "nowhere.txt"}, "Repeats.text: got 'nowhere.txt', expected a readable text file in UTF-8"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_named_in_one_line(options, message):
    with pytest.raises(ConfigError) as caught:
        task(**options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "call", [([-1], 0, 1), ([0], -1, 1), ([0], 0, 1, "eval/none"), ([0], 0, 1, "train", 0)], ids=str
)
def test_a_draw_that_cannot_be_made_is_refused(call):
    with pytest.raises(ConfigError):
        task().draw(*call)
