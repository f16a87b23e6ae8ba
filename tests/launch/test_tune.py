"""How many members one process trains: what fits, and what was fastest."""

from __future__ import annotations

import json

import pytest
import yaml

from opsin.callbacks import Ablate
from opsin.errors import PopulationError
from opsin.interventions.feedback import Feedback
from opsin.interventions.schedules import Schedule
from opsin.launch import tune as tune
from opsin.model.transformer import Transformer
from opsin.optimizers import SGD, AdamW
from opsin.training.module import OpsinModule
from tests.helpers.processes import opsin
from tests.helpers.toys import few_shot
from tests.launch.test_population import RECIPE
from tests.training.test_module import fit, module


def test_the_fastest_number_of_members_comes_first(monkeypatch):
    rates = {1: 100.0, 2: 50.0, 4: 300.0, 6: 250.0}
    tried = []
    monkeypatch.setattr(tune, "_rate", lambda recipe, size, processes: tried.append((recipe, processes)) or rates[size])
    assert list(tune.fastest(lambda size: {"members": size}, 2, 6)) == [4, 6, 1, 2]
    assert tried == [({"members": size}, 2) for size in (1, 2, 4, 6)]


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (3, [1, 2, 3]), (16, [1, 2, 4, 8, 16]), (100, [1, 2, 4, 8, 16, 32])]
)
def test_no_more_members_are_tried_than_there_are(most, sizes, monkeypatch):
    monkeypatch.setattr(tune, "_rate", lambda recipe, size, processes: -size)
    assert list(tune.fastest(lambda size: {}, 2, most)) == sizes


def test_a_wider_longer_or_deeper_model_takes_more_memory():
    small = tune.member_bytes(Transformer(width=16, heads=2), few_shot(), AdamW())
    assert small < tune.member_bytes(Transformer(width=32, heads=2), few_shot(), AdamW())
    assert small < tune.member_bytes(Transformer(width=16, heads=2, layers=3), few_shot(), AdamW())
    assert small < tune.member_bytes(Transformer(width=16, heads=2), few_shot(batch_size=8), AdamW())
    assert small > tune.member_bytes(Transformer(width=16, heads=2), few_shot(), SGD())


def test_members_that_do_not_fit_are_left_to_another_process(monkeypatch):
    model = OpsinModule(few_shot(), Transformer(width=16, heads=2))
    one = tune.member_bytes(model.network, model.task, model.optimizer)
    monkeypatch.setattr(tune, "available_bytes", lambda: 2 * 3 * 5 * one)
    assert tune.members_that_fit(model, 3) == 5
    assert tune.default_chunking({}, 5).members_per_process == 5
    assert tune.default_chunking({}, 10**6).members_per_process == tune.LARGEST_CHUNK
    assert tune.default_chunking({"members_per_process": 40}, 5).members_per_process == 40
    monkeypatch.setattr(tune, "available_bytes", lambda: 0)
    assert tune.members_that_fit(model, 3) == 1


def test_a_trial_that_fails_ends_the_tuning_in_one_line(monkeypatch):
    monkeypatch.setattr(tune.sys, "executable", "false")
    with pytest.raises(PopulationError, match="--tune: a trial of 1 members ended with code 1"):
        tune.fastest(lambda size: {}, 1, 4)


def test_a_schedule_may_follow_in_a_trial_what_only_the_run_measures():
    loop = Ablate(["0:1"], schedule=Schedule(feedback=Feedback("induction_strength", head="1:1", above=0.5)))
    timer = tune.StepTimer({"induction_strength": {"layer": 2, "head": 2}})
    model = module(idle="warn")
    fit(model, 20, [loop, timer])
    assert timer.seconds > 0 and model.steps_done == 20


def test_a_trial_ends_after_some_batches_whatever_the_length_of_its_run():
    late, timer = Ablate(["0:1"], schedule=Schedule(start=900)), tune.StepTimer({})
    model = module()
    fit(model, 1000, [late, timer])
    assert timer.seconds > 0 and model.steps_done == tune.BATCHES * model.steps_per_batch


def test_a_trial_finds_what_the_recipe_finds_and_hides_what_a_run_hides(tmp_path, monkeypatch, srun, capfd):
    """Paths beside the recipe, writers that act later than a trial lasts, and a machine with SLURM."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 9)
    task = {"class_path": "opsin.tasks.Characters", "init_args": {"path": "text.txt", "positions": 8, "batch_size": 4}}
    late = {"class_path": "opsin.callbacks.Ablate", "init_args": {"heads": ["0:1"], "schedule": {"start": 900}}}
    trainer = {**RECIPE["trainer"], "max_steps": 1000, "callbacks": [late]}
    monkeypatch.chdir(tmp_path)
    recipe = {"task": task, "model": RECIPE["model"], "trainer": trainer}
    assert list(tune.fastest(lambda size: recipe, 1, 1)) == [1]
    assert srun not in (printed := capfd.readouterr().err) and "Warning" not in printed


@pytest.mark.slow
def test_a_tuned_population_says_what_was_tried_and_a_resume_keeps_it(tmp_path):
    """A process for every number of members and core: about a minute."""
    population = {"seeds": 4, "processes": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "population": population}))
    opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", "--tune", folder=tmp_path)
    arrangement = json.loads((tmp_path / "run" / "population.json").read_text())["arrangement"]
    assert arrangement["chosen_by"] == "timing" and {*arrangement["tried"]} == {"1", "2"}
    assert arrangement["members_per_process"] == int(max(arrangement["tried"], key=arrangement["tried"].get))
    before = (tmp_path / "run" / "population.json").read_text()
    opsin("resume", "run", folder=tmp_path)
    assert (tmp_path / "run" / "population.json").read_text() == before


def test_tuning_without_a_population_is_refused(tmp_path):
    recipe = {name: value for name, value in RECIPE.items() if name != "population"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", "--tune", folder=tmp_path, check=False)
    assert ended.code == 2 and "--tune: got True, expected a recipe with a population" in ended.err
