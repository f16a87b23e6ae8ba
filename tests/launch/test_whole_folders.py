"""Claims about forks and populations that were ended before they were whole, and about folders that have a run."""

import os
import re

import pytest

from tests.helpers.killers import Killed
from tests.launch.test_signals import POPULATION, RECIPE, STEPS

LINES = {
    "run": ["fit", "--config", "run.yaml"],
    "population": ["fit", "--config", "population.yaml"],
    "fork": ["fork", "trunk", "--at", 10],
}


def without_training(monkeypatch):
    """Let chunks and branches be written and not trained, and nothing be drawn."""
    monkeypatch.setattr("opsin.launch.population.run_jobs", lambda *_: [])
    monkeypatch.setattr("opsin.launch.population.finish_population", lambda *_: {})
    monkeypatch.setattr("opsin.launch.population.population_report", lambda *_: "")
    monkeypatch.setattr("opsin.callbacks.readers.run_folder.summary_figure", lambda *_: None)
    monkeypatch.setattr("opsin.callbacks.readers.run_folder.save_figure", lambda *_: None)


@pytest.fixture
def command(opsin, tmp_path, monkeypatch):
    """Commands in a folder with recipes and a run; chunks and branches are not trained."""
    without_training(monkeypatch)
    recipe = RECIPE.replace("seed: [3, 4]", "seed: 3").replace(", members: [1]", "")
    (tmp_path / "run.yaml").write_text(recipe.replace(f"max_steps: {STEPS}", "max_steps: 20"))
    (tmp_path / "population.yaml").write_text(POPULATION)
    return opsin


@pytest.fixture
def killed_at(monkeypatch):
    """Let a process end as by SIGKILL when it puts a file in its place."""

    def plan(name):
        replace = os.replace

        def replacing(source, target, *more, **settings):
            if str(target).endswith(name):
                raise Killed
            return replace(source, target, *more, **settings)

        # what a killed process does not do either
        monkeypatch.setattr("opsin.launch.fork._empty", lambda *_: None)
        monkeypatch.setattr(os, "replace", replacing)

    return plan


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("config.yaml", marks=pytest.mark.slow),
        "chunks/01/recipe.yaml",
        pytest.param("population.json", marks=pytest.mark.slow),
    ],
)
def test_a_population_killed_before_it_is_whole_is_finished_by_resume(command, tmp_path, monkeypatch, killed_at, name):
    command(*LINES["population"], "--run_folder", "whole")
    killed_at(name)
    with pytest.raises(Killed):
        command(*LINES["population"], "--run_folder", "killed")
    monkeypatch.undo(), monkeypatch.chdir(tmp_path)
    without_training(monkeypatch)
    if name == "config.yaml":
        assert command("resume", "killed").code == 2
        assert command(*LINES["population"], "--run_folder", "killed").code == 0
    else:
        ended = command(*LINES["population"], "--run_folder", "killed")
        assert ended.code == 2 and "`opsin resume killed` to finish it" in ended.err
        assert command("resume", "killed").code == 0
    for path in (tmp_path / "whole").rglob("*.json"):
        assert path.read_text() == (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_text()
    recipes = [sorted(p.name for p in (tmp_path / n / "chunks").rglob("*")) for n in ("whole", "killed")]
    assert recipes[0] == recipes[1]


@pytest.mark.parametrize("name", ["fork.ckpt", ".fork.part/config.yaml", "population.json"])
def test_a_fork_killed_before_it_is_whole_is_not_there_and_can_be_made_again(
    command, tmp_path, monkeypatch, killed_at, name
):
    assert command(*LINES["run"], "--run_folder", "trunk").code == 0
    killed_at(name)
    with pytest.raises(Killed):
        command(*LINES["fork"], "--run_folder", "fork")
    assert not (tmp_path / "fork").exists() and (tmp_path / ".fork.part").exists()
    monkeypatch.undo(), monkeypatch.chdir(tmp_path)
    without_training(monkeypatch)
    assert command("resume", "fork").code == 2
    assert command(*LINES["fork"], "--run_folder", "fork").code == 0
    assert (tmp_path / "fork" / "population.json").exists() and not (tmp_path / ".fork.part").exists()
    assert not list(tmp_path.rglob(".claim"))


def test_a_part_of_a_fork_of_an_earlier_version_is_refused_and_kept(command, tmp_path):
    assert command(*LINES["run"], "--run_folder", "trunk").code == 0
    assert command(*LINES["fork"], "--run_folder", "fork").code == 0
    (tmp_path / "fork" / "population.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    for line in (["resume", "fork"], [*LINES["run"], "--run_folder", "fork"], [*LINES["fork"], "--run_folder", "fork"]):
        ended = command(*line)
        assert ended.code == 2 and re.fullmatch(r"opsin: [^\n]*fork that was ended before [^\n]*\n", ended.err)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("existing", LINES)
@pytest.mark.parametrize("verb", LINES)
def test_no_verb_writes_over_the_folder_of_another(command, tmp_path, existing, verb):
    assert command(*LINES["run"], "--run_folder", "trunk").code == 0
    assert command(*LINES[existing], "--run_folder", "there").code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    ended = command(*LINES[verb], "--run_folder", "there")
    assert ended.code == 2 and re.fullmatch(r"opsin: run_folder: got 'there', expected a new folder[^\n]*\n", ended.err)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_run_does_not_make_its_folder_free(command, tmp_path):
    for name in ("one", "two"):
        assert command(*LINES["run"], "--run_folder", name).code == 0
    ended = command(*LINES["run"], "--run_folder", "one", "--ckpt_path", "two/checkpoints/last.ckpt")
    assert ended.code == 2 and "run_folder: got 'one'" in ended.err
