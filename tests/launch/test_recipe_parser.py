"""What is wrong with a setting is said in one line: the setting, its value, what would do, and names that are near."""

import re

import pytest
import yaml

from opsin.records.recipe_text import dump_recipe
from tests.launch.test_fork import recipe, writer

LINE = {
    "a setting of the task": (["--task.init_args.batchsize", "4"], ["FewShot", "batchsize", "nearest: batch_size"]),
    "a setting of the model": (
        ["--model.learning_rat", "1"],
        ["--model.learning_rat", "nearest: --model.learning_rate"],
    ),
    "a setting of a callback": (
        ["--trainer.callbacks+=opsin.callbacks.Ablate", "--trainer.callbacks.head=[0:1]"],
        ["Ablate", "head", "nearest: heads"],
    ),
    "a class": (["--trainer.callbacks+=opsin.callbacks.Ablat"], ["trainer.callbacks", "Ablat", "nearest: Ablate"]),
    "a class of another package": (
        ["--trainer.callbacks+=opsin.calbacks.Ablate"],
        ["trainer.callbacks", "opsin.calbacks.Ablate", "nearest: opsin.callbacks"],
    ),
    "a number in words": (["--trainer.max_steps", "many"], ["trainer.max_steps", "'many'", "whole number"]),
    "a time for a number": (["--trainer.max_steps", "1:40"], ["trainer.max_steps", "1:40", "whole number"]),
    "null for a number": (["--model.learning_rate", "null"], ["model.learning_rate", "None", "number"]),
    "no number": (["--model.learning_rate", ".nan"], ["model.learning_rate", "nan", "finite"]),
    "a number without end": (["--model.weight_decay", ".inf"], ["model.weight_decay", "inf", "finite"]),
    "one of several in a list": (["--model.betas", "[0.9, .nan]"], ["model.betas", "finite"]),
    "a seed of more than 64 bits": (["--model.seed", str(2**70)], ["model.seed", "2**64"]),
    "a number for a head": (
        ["--trainer.callbacks+=opsin.callbacks.Ablate", "--trainer.callbacks.heads=[1]"],
        ["Ablate.heads", "[1]", "text", "quotes"],
    ),
}


@pytest.mark.parametrize("what", LINE)
def test_what_is_wrong_on_the_line_is_one_line(opsin, tmp_path, what):
    arguments, named = LINE[what]
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(writer("InductionHeads", every=5))))
    ended = opsin("fit", "--config", "recipe.yaml", *arguments, "--run_folder", "run")
    assert ended.code == 2 and re.fullmatch(r"opsin: [^\n]+\n", ended.err), ended.err
    assert all(part in ended.err for part in named), ended.err
    assert len(ended.err) < 400 and not (tmp_path / "run").exists()


def test_a_head_needs_no_quotes(opsin, tmp_path):
    text = dump_recipe(recipe(writer("Ablate", heads=["0:0", "1:1"]))).replace("'", "")
    (tmp_path / "recipe.yaml").write_text(text)
    assert opsin("fit", "--config", "recipe.yaml", "--run_folder", "run").code == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["trainer"]["callbacks"][0]["init_args"]["heads"] == ["0:0", "1:1"]


@pytest.mark.parametrize("callback", ["PhaseChange", "InductionHeads", "Snapshots", "Calibration"])
def test_a_reader_that_stands_twice_is_refused_by_its_name(opsin, tmp_path, callback):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(writer(callback), writer(callback))))
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "run")
    assert ended.code == 2 and re.fullmatch(rf"opsin: trainer.callbacks: [^\n]*{callback} twice[^\n]*\n", ended.err)
    assert not (tmp_path / "run").exists()


def test_two_writers_of_one_class_are_two_writers(opsin, tmp_path):
    both = [writer("Ablate", heads=["0:0"]), writer("Ablate", heads=["1:1"])]
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(*both)))
    assert opsin("fit", "--config", "recipe.yaml", "--run_folder", "run").code == 0


def test_the_help_shows_no_type_of_more_than_a_few_lines(opsin, tmp_path):
    ended = opsin("fit", "--help")
    assert ended.code == 0
    types = re.findall(r"\(type: [^()]*\)", " ".join(ended.out.split()))
    assert len(types) > 50 and max(map(len, types)) <= 300, max(types, key=len)
    assert "known subclasses" not in ended.out
