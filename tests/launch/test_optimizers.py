"""Claims about optimizers of recipes: one of a user's own file, values by condition, forks, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from opsin.cli import main
from opsin.errors import ConfigError
from opsin.launch.population import build_population
from opsin.population.chunks import chunk_recipe, recipe_of_member
from opsin.records.recipe_text import read_recipe
from tests.helpers.killers import EndAt, Killed, checkpoint, kill
from tests.launch.test_fork import TASK, writer

OWN = '''"""Momentum whose sign is followed."""
import torch

from opsin import Optimizer


class Sign(Optimizer):
    hyper_names = ("learning_rate", "momentum")

    def __init__(self, learning_rate: float | list[float] = 0.01, momentum: float | list[float] = 0.9, soft=False):
        self.learning_rate, self.momentum, self.soft = learning_rate, momentum, soft

    def start(self, name, parameter):
        return {"mean": torch.zeros_like(parameter)}

    def update(self, parameter, gradient, state, hyper, clock):
        mean = hyper["momentum"] * state["mean"] + (1 - hyper["momentum"]) * gradient
        move = torch.tanh(100 * mean) if self.soft else mean.sign()
        return parameter - hyper["learning_rate"] * move, {"mean": mean}
'''
SIGN = {"class_path": "own_sign.Sign", "init_args": {"learning_rate": 0.01}}
SGD = {"class_path": "opsin.optimizers.SGD", "init_args": {"learning_rate": 0.1, "momentum": 0.9}}
END = {"class_path": "tests.helpers.killers.EndAt"}
STEPS = 40


def recipe(optimizer, *callbacks, **changes):
    small = {"steps_per_batch": 5, "log_every": 5, "probe_size": 16, "evaluation_size": 8, "compile": False}
    model = {"transformer": {"width": 8, "heads": 2}, **small, **changes}
    if optimizer is not None:
        model["optimizer"] = optimizer
    trainer = {"max_steps": STEPS, "val_check_interval": 2, "enable_progress_bar": False, "callbacks": [*callbacks]}
    return {"task": TASK, "model": model, "trainer": trainer, "checkpoint_every": 10}


@pytest.fixture
def fit(opsin, tmp_path, monkeypatch):
    """Train a recipe in a folder of this name; processes of populations run in this one, one after the other."""

    def one_by_one(jobs, processes, on_end, on_poll):
        codes = [main(list(job.arguments)) for job in jobs]
        return [job for job, code in zip(jobs, codes, strict=True) if code]

    monkeypatch.setattr("opsin.launch.population.run_jobs", one_by_one)
    monkeypatch.setattr("opsin.callbacks.readers.run_folder.save_figure", lambda *_: None)
    (tmp_path / "own_sign.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)

    def run(settings, name, *further):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        return opsin("fit", "--config", f"{name}.yaml", "--run_folder", name, *further)

    return run


def weights(folder):
    return torch.cat([value.flatten() for value in checkpoint(folder)["state_dict"].values()])


def test_an_optimizer_of_ones_own_trains_from_yaml_is_frozen_resumed_and_forked(fit, opsin, tmp_path, monkeypatch):
    writers = [writer("Freeze", heads=["0:0"], schedule={"start": 5, "stop": 12}), END]
    assert fit(recipe(SIGN, *writers), "whole").code == 0
    monkeypatch.setattr(EndAt, "planned", ("on_train_batch_start", 30, kill))
    with pytest.raises(Killed):
        fit(recipe(SIGN, *writers), "killed")
    monkeypatch.setattr(EndAt, "planned", None)
    assert opsin("resume", "killed").code == 0
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    branches = {"same": {}, "slow": {"optimizer": {"init_args": {"momentum": 0.5}}}, "half": {"learning_rate": 0.005}}
    (tmp_path / "branches.yaml").write_text(yaml.safe_dump({"conditions": branches}, sort_keys=False))
    assert opsin("fork", "whole", "--at", 20, "--config", "branches.yaml", "--run_folder", "fork").code == 0
    same, slow, half = (tmp_path / "fork" / "chunks" / f"{n:02}" for n in range(3))
    assert torch.equal(weights(tmp_path / "whole"), weights(same))
    groups = [checkpoint(folder)["optimizer_states"][0]["param_groups"][0] for folder in (same, slow, half)]
    assert [group["momentum"] for group in groups] == [0.9, 0.5, 0.9]
    assert [group["lr"] for group in groups] == [0.01, 0.01, 0.005]
    assert not torch.equal(weights(same), weights(slow)) and not torch.equal(weights(same), weights(half))


def test_members_with_different_hyper_parameters_are_forked_with_those_of_their_own(fit, opsin, tmp_path):
    lists = {"class_path": SGD["class_path"], "init_args": {"learning_rate": [0.1, 0.05], "momentum": [0.9, 0.5]}}
    assert fit(recipe(lists, seed=[3, 4]), "run").code == 0
    assert opsin("fork", "run", "--at", 20, "--member", 1, "--run_folder", "fork").code == 0
    (branch,) = (tmp_path / "fork" / "chunks").iterdir()
    group = checkpoint(branch)["optimizer_states"][0]["param_groups"][0]
    assert (group["lr"], group["momentum"]) == (0.05, 0.5)
    for name, value in checkpoint(branch)["state_dict"].items():
        torch.testing.assert_close(value[0], checkpoint(tmp_path / "run")["state_dict"][name][1], rtol=1e-3, atol=1e-4)


def test_a_branch_whose_optimizer_keeps_something_else_is_refused(fit, opsin, tmp_path):
    assert fit(recipe(SGD), "run").code == 0
    adam = {"adam": {"optimizer": {"class_path": "opsin.optimizers.Adam"}}}
    (tmp_path / "branches.yaml").write_text(yaml.safe_dump({"conditions": adam}))
    ended = opsin("fork", "run", "--at", 20, "--config", "branches.yaml", "--run_folder", "fork")
    assert ended.code == 2
    assert (
        "conditions.adam: optimizer: got 'Adam', expected one with the state of SGD, which is taken over" in ended.err
    )


@pytest.mark.parametrize("given", [["--model.learning_rate", "0.001"], ["--model.eps=1e-8"]])
def test_an_optimizer_beside_settings_of_the_short_form_is_refused_even_where_they_are_the_defaults(
    fit, tmp_path, given
):
    ended = fit(recipe(SGD), "run", *given)
    name = given[0].partition("=")[0].removeprefix("--")
    assert ended.code == 2 and ended.err.strip().splitlines()[-1].startswith(f"opsin: {name}: got ")
    assert "expected none beside model.optimizer" in ended.err and not (tmp_path / "run").exists()
    assert fit(recipe(SGD, weight_decay=0.0), "run").code == 2


def test_the_saved_configuration_has_one_form_and_gives_the_run_again(fit, opsin, tmp_path):
    assert fit(recipe(SGD), "run").code == 0
    saved = read_recipe(tmp_path / "run" / "config.yaml")["model"]
    assert saved["optimizer"]["init_args"]["nesterov"] is False and not {"learning_rate", "betas", "eps"} & {*saved}
    assert opsin("fit", "--config", "run/config.yaml", "--run_folder", "again").code == 0
    assert torch.equal(weights(tmp_path / "run"), weights(tmp_path / "again"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class_path": "opsin.optimizers.Muom"}, "model.optimizer: got 'opsin.optimizers.Muom'"),
        ({**SGD, "init_args": {"momentum": 1.5}}, "SGD.momentum: got 1.5, expected 0 or more and less than 1"),
        ({**SGD, "init_args": {"momentum": [0.1, 0.2]}}, "SGD.momentum: got [0.1, 0.2], expected one value, or one"),
        ({**SGD, "init_args": {"momentun": 0.5}}, "nearest: momentum"),
    ],
)
def test_a_bad_optimizer_gets_one_line_before_the_folder_is_made(fit, tmp_path, spec, message):
    ended = fit(recipe(spec), "run")
    lines = [line for line in ended.err.splitlines() if line.startswith("opsin: ")]
    assert ended.code == 2 and len(lines) == 1 and message in lines[0] and not (tmp_path / "run").exists()


# ---- populations ----------------------------------------------------------------------------------------


def population(model, conditions):
    return {"task": TASK, "model": {"seed": 3, **model}, "trainer": {}, "population": {"conditions": conditions}}


CONDITIONS = {
    "none": {},
    "heavy": {"optimizer": {"init_args": {"momentum": 0.99}}},
    "slow": {"learning_rate": 0.02},
    "ahead": {"optimizer": {"init_args": {"nesterov": True}}},
    "adam": {"optimizer": {"class_path": "opsin.optimizers.Adam", "init_args": {"betas": [0.0, 0.0]}}},
}


class Chosen:
    """A member of a condition."""

    def __init__(self, condition, seed=3):
        self.condition, self.seed, self.seed_index = condition, seed, 0


def test_a_chunk_has_a_list_where_its_conditions_differ_and_a_member_has_its_own_value_again():
    recipe = population({"optimizer": SGD}, CONDITIONS)
    chunk = chunk_recipe(recipe, CONDITIONS, [Chosen("none"), Chosen("heavy"), Chosen("slow")])
    assert chunk["model"]["optimizer"]["class_path"] == SGD["class_path"]
    init_args = chunk["model"]["optimizer"]["init_args"]
    assert init_args["learning_rate"] == [0.1, 0.1, 0.02] and init_args["momentum"] == [0.9, 0.99, 0.9]
    alone = recipe_of_member(chunk, 2)["model"]["optimizer"]["init_args"]
    assert (alone["learning_rate"], alone["momentum"], alone["nesterov"]) == (0.02, 0.9, False)
    adam = chunk_recipe(recipe, CONDITIONS, [Chosen("adam")])["model"]["optimizer"]
    assert adam["class_path"].endswith("Adam") and adam["init_args"]["betas"] == [0.0, 0.0]
    assert "momentum" not in adam["init_args"] and recipe["model"]["optimizer"] == SGD


def test_pairs_of_several_numbers_are_told_from_values_of_members():
    conditions = {"none": {}, "sign": {"optimizer": {"init_args": {"betas": [0.0, 0.0]}}}}
    short = {"learning_rate": 0.1, "weight_decay": 0.0, "betas": [0.9, 0.99], "eps": 1e-8}
    alone = chunk_recipe(population(short, conditions), conditions, [Chosen("none"), Chosen("none", 4)])["model"]
    assert alone["learning_rate"] == 0.1 and alone["betas"] == [0.9, 0.99] and "optimizer" not in alone
    adamw = {"class_path": "opsin.optimizers.AdamW", "init_args": short}
    both = chunk_recipe(population({"optimizer": adamw}, conditions), conditions, [Chosen("none"), Chosen("sign")])
    assert both["model"]["optimizer"]["init_args"]["betas"] == [[0.9, 0.99], [0.0, 0.0]]
    assert recipe_of_member(both, 1)["model"]["optimizer"]["init_args"]["betas"] == [0.0, 0.0]
    changed = chunk_recipe(population(short, conditions), conditions, [Chosen("sign")])["model"]
    assert changed["optimizer"]["init_args"] == {**short, "betas": [0.0, 0.0]} and "learning_rate" not in changed


def test_lists_of_members_are_refused_beside_and_inside_a_population(tmp_path):
    lists = {"class_path": SGD["class_path"], "init_args": {"momentum": [0.1, 0.2]}}
    with pytest.raises(ConfigError, match=r"^model.optimizer.init_args.momentum: got \[0.1, 0.2\], expected one value"):
        build_population(population({"optimizer": lists}, {}), tmp_path)
    conditions = {"two": {"optimizer": {"init_args": {"momentum": [0.1, 0.2]}}}}
    with pytest.raises(ConfigError, match=r"^optimizer.init_args.momentum: got \[0.1, 0.2\], expected one value: a"):
        chunk_recipe(population({"optimizer": SGD}, conditions), conditions, [Chosen("two")])


def test_conditions_train_with_settings_of_their_own_those_of_one_graph_together(fit, tmp_path):
    section = {"seeds": 1, "processes": 1, "conditions": CONDITIONS}
    assert fit({**recipe(SGD), "population": section}, "many").code == 0
    members = json.loads((tmp_path / "many" / "population.json").read_text())["members"]
    chunks = {row["condition"]: row["chunk"] for row in members}
    assert len({chunks[name] for name in ("none", "heavy", "slow")}) == 1 and len({*chunks.values()}) == 3
    assert fit(recipe({**SGD, "init_args": {"learning_rate": 0.1, "momentum": 0.99}}), "heavy").code == 0
    slot = next(row["slot"] for row in members if row["condition"] == "heavy")
    together = checkpoint(tmp_path / "many" / "chunks" / f"{chunks['heavy']:02}")["state_dict"]
    for name, value in checkpoint(tmp_path / "heavy")["state_dict"].items():
        torch.testing.assert_close(together[name][slot], value[0], rtol=1e-3, atol=1e-4)
