"""Claims about characters of a text."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from opsin.errors import ConfigError
from opsin.task import Task
from opsin.tasks import Characters
from opsin.tasks.shared.ngrams import NGrams
from opsin.tasks.shared.text import read_text, windows
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


def written(tmp_path, content, name="text.txt"):
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8"))
    return str(path)


@pytest.fixture
def path(tmp_path):
    words = np.random.default_rng(0).choice(["so", "be", "it", "tobe", "sit", "obese"], 600)
    return written(tmp_path, " ".join(words.tolist()))


def task(path, **options):
    return Characters(path, **{"positions": 20, "batch_size": 8} | options)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**64 - 1), first=st.integers(0, 2**40))
def test_a_step_and_a_member_are_the_same_alone_and_among_others(tmp_path_factory, seed, first):
    path = written(tmp_path_factory.getbasetemp(), "to be or not to be that is the question " * 20)
    check_streams(task(path), first, 3, [seed, 7, seed])


def test_another_seed_step_or_split_gives_other_data(path):
    check_other_draws(task(path))


def test_a_text_is_read_to_the_last_character_whatever_its_alphabet(tmp_path):
    content = "añb€\n😀ß" * 30
    text = read_text(written(tmp_path, content), "field", None, 0.2, 2)
    whole = np.concatenate([text.train, text.heldout])
    assert "".join(text.characters[t] for t in whole) == content and len(text.train) == 168


def test_the_commonest_characters_of_the_training_part_are_the_vocabulary(tmp_path):
    content = "aaaabbbccd" * 9 + "aeaeaeaeae"
    text = read_text(written(tmp_path, content), "field", 3, 0.1, 2)
    assert text.characters == "abc"
    assert "".join(text.characters[t] for t in text.train) == content[:90].replace("d", "")
    assert "".join(text.characters[t] for t in text.heldout) == "aaaaa"


def test_windows_come_from_their_part_of_the_ring(path):
    characters = task(path)
    content = Path(path).read_text(encoding="utf-8")
    seen = len(content) - round(0.1 * len(content))
    for split, part in (("train", content[:seen]), ("eval/train", content[:seen]), ("eval/heldout", content[seen:])):
        for tokens in rows(characters, split, 100)["tokens"]:
            assert "".join(characters.text.characters[t] for t in tokens) in part + part[:20]


def test_a_window_may_begin_anywhere():
    found = windows(np.arange(7), np.arange(7) / 7 + 0.01, 9)
    assert (found == (np.arange(7) + np.arange(9)[:, None]) % 7).all()


def test_the_unigram_is_the_share_of_every_character_at_every_position(path):
    characters = task(path)
    tokens = rows(characters, count=5000)["tokens"]
    for position in (0, 7, 20):
        assert near(np.bincount(tokens[:, position], minlength=characters.n_tokens), characters.unigram().numpy())
    assert (characters.unigram() > 0).all()


@pytest.mark.parametrize("split", ["train", "eval/heldout", "eval/repeated"])
def test_truth_is_what_a_slow_search_for_three_characters_finds(path, split):
    batch = task(path).batch(0, 0, split, 40)
    found = searched_truth(batch, np.ones((40, 20), bool), context=3)
    assert agrees(batch.truth, found) and all(part.any() for part in found)


def test_the_repeated_set_repeats_its_first_half(path):
    check_second_half_repeats(task(path))
    check_second_half_repeats(task(path, heldout=0.0, positions=21))


def slow_ngram(text, given, order):
    """The smoothed distribution after ``given`` by counting stretches of the ring, shortest context first."""
    ring = text + text[:order]
    found = {x: text.count(x) / len(text) for x in set(text)}
    for length in range(1, min(order - 1, len(given)) + 1):
        context = given[-length:]
        after = Counter(ring[i + length] for i in range(len(text)) if ring[i : i + length] == context)
        if not after:
            break
        total = sum(after.values())
        found = {x: (after[x] + len(after) * p) / (total + len(after)) for x, p in found.items()}
    return found


def test_the_ngram_model_is_what_slow_counting_gives(path):
    characters = task(path)
    names = characters.text.characters
    text = "".join(names[t] for t in characters.text.train)
    batch = characters.batch(0, 0, "eval/heldout", 3)
    found = characters.exact(batch)[0].exp()
    for b, line in enumerate(batch.tokens[0].tolist()):
        given = "".join(names[t] for t in line)
        for row in range(20):
            expected = slow_ngram(text, given[: row + 1], 4)
            assert np.allclose(found[b, row], [expected[x] for x in names], atol=1e-12)


@given(tokens=st.lists(st.integers(0, 2), min_size=4, max_size=30).filter(lambda t: len(set(t)) == 3))
def test_an_ngram_model_is_a_positive_distribution_after_anything(tokens):
    found = NGrams(np.array(tokens), 3, 4).predict(torch.tensor([[0, 1, 2, 2, 1, 0, 0, 0]]))
    assert (found > 0).all() and torch.allclose(found.sum(-1), torch.ones(()).double())


def test_baselines_are_losses_over_the_training_part(path):
    characters = task(path)
    found, text = characters.baselines(), characters.text.train
    single, pairs = Counter(text.tolist()), Counter(zip(np.roll(text, 1).tolist(), text.tolist(), strict=True))
    bigram = -sum(n * math.log(n / single[a]) for (a, _), n in pairs.items()) / len(text)
    unigram = -sum(n * math.log(n / len(text)) for n in single.values()) / len(text)
    expected = {"uniform": math.log(characters.n_outputs), "unigram": unigram, "bigram": bigram}
    assert found == pytest.approx(expected) and list(found) == list(expected)
    batch = characters.batch(0, 0, "train", 500)
    assert loss(characters.exact(batch), batch).mean() < bigram < unigram


def test_exact_is_finite_and_sums_to_one_on_every_split(path):
    check_exact_is_finite_and_normal(task(path))


def test_nothing_is_held_out_where_none_is_asked_for(path):
    characters = task(path, heldout=0.0)
    assert characters.evaluations == ("train", "repeated") and not len(characters.text.heldout)


@pytest.mark.parametrize("vocabulary", [5, None])
def test_a_model_trains_on_a_text(path, vocabulary):
    run_three_steps(task(path, vocabulary=vocabulary))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # instantiate_classes has another name in jsonargparse 5
def test_a_task_is_built_from_the_command_line(path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "task")
    options = ["--task=opsin.tasks.Characters", f"--task.path={path}", "--task.vocabulary=6"]
    assert parser.instantiate_classes(parser.parse_args(options)).task.n_tokens == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 1}, "Characters.vocabulary: got 1, expected at least 2, or null"),
        ({"vocabulary": 99}, "Characters.vocabulary: got 99, expected at most 7, the characters of "),
        ({"heldout": 1.0}, "Characters.heldout: got 1.0, expected a share"),
        ({"positions": 2500}, "Characters.path: got '"),
        ({"positions": 1000}, "Characters.path: got '"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_text_are_named_in_one_line(path, options, message):
    with pytest.raises(ConfigError) as caught:
        task(path, **options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xfa", b"", b"too short", b"a" * 900], ids=str)
def test_a_file_that_is_missing_no_text_or_too_short_is_named(tmp_path, content):
    path = tmp_path / "odd.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"Characters.path: got '.*odd\.txt.*', expected ") as caught:
        task(str(path))
    assert "\n" not in str(caught.value)


def test_a_path_that_no_system_has_is_named():
    with pytest.raises(
        ConfigError, match=r"^Characters.path: got 'a\\x00b', expected a readable text file in UTF-8 \("
    ):
        task("a\0b")
