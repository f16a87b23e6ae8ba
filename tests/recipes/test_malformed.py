"""Every recipe of the corpus of malformed ones is refused in one line, at once, and leaves nothing."""

import re
import time

import pytest

from tests.helpers.malformed import FOLDER, Malformed, corpus

CASES = corpus()
LONGEST = 3.0
"""Seconds of processor time that a refusal may take."""


def test_the_corpus_has_two_hundred_recipes_of_every_kind():
    kinds = {each.name.partition("-")[0] for each in CASES}
    assert len(CASES) >= 200
    assert kinds == {"type", "range", "null", "unknown", "duplicate", "structure", "encoding", "size"}


def test_the_files_of_the_corpus_are_those_that_its_generator_makes():
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    made = {each.name: each.content for each in CASES}
    # which files differ, and not their contents
    assert files.keys() ^ made.keys() == set()
    assert [name for name in files if files[name] != made[name]] == []


def trains(*_):
    raise AssertionError("it is not refused")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.removesuffix(".yaml"))
def test_a_malformed_recipe_is_one_line_at_once_and_leaves_nothing(opsin, tmp_path, monkeypatch, case: Malformed):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    # one that is not refused would train for minutes
    monkeypatch.setattr("opsin.training.module.OpsinModule.on_fit_start", trains)
    monkeypatch.setattr("opsin.launch.population.train_population", trains)
    began = time.process_time()
    ended = opsin("fit", "--config", FOLDER / case.name, "--run_folder", "run")
    seconds = time.process_time() - began
    assert ended.code == 2, ended
    assert re.fullmatch(r"opsin: [^\n]+\n", ended.err), ended.err
    assert case.named in ended.err, ended.err
    # no line of eight hundred characters
    assert len(ended.err) < 700, ended.err
    assert list(tmp_path.iterdir()) == []
    assert seconds < LONGEST
