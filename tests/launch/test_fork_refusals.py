"""Claims about forks that cannot be: one line for each, and nothing left behind."""

import re

import pytest
import yaml

from tests.launch.test_fork import recipe, writer

ABLATE = {"callbacks": [writer("Ablate", heads=["1:1"])]}
WRONG = {
    "no run": (["none", "--at", 20], None, ["opsin fork", "'none'", "config.yaml"]),
    "no step": (["run"], None, ["opsin fork", "--at", "RUN --at STEP"]),
    "a step in words": (["run", "--at", "early"], None, ["opsin fork", "early", "RUN --at STEP"]),
    "a setting nobody knows": (["run", "--at", 20, "--onto", "x"], None, ["opsin fork", "--onto"]),
    "a step between batches": (["run", "--at", 21], None, ["--at", "21", "model.steps_per_batch = 5"]),
    "the last step": (["run", "--at", 40], None, ["--at", "40", "below trainer.max_steps = 40"]),
    "no steps": (["run", "--at", 0], None, ["--at", "0", "from 5 on"]),
    "a member that is not there": (["run", "--at", 20, "--member", 1], None, ["--member", "1", "0 to 0"]),
    "a folder that exists": (["run", "--at", 20, "--run_folder", "run"], None, ["run_folder", "'run'", "a new folder"]),
    "no file": (["run", "--at", 20, "--config", "none.yaml"], None, ["--config", "none.yaml"]),
    "a file of another form": (["run", "--at", 20], [1], ["--config", "conditions"]),
    "no conditions": (["run", "--at", 20], {"conditions": {}}, ["--config", "conditions"]),
    "an unknown setting": (["run", "--at", 20], {"conditions": {"a": {"seed": 1}}}, ["conditions.a.seed", "callbacks"]),
    "a bad name": (["run", "--at", 20], {"conditions": {"a/b": {}}}, ["conditions", "a/b", "slash"]),
    "an unknown head": (
        ["run", "--at", 20],
        {"conditions": {"a": {"callbacks": [writer("Ablate", heads=["1:9"])]}}},
        ["conditions.a: Ablate.heads", "1:9"],
    ),
    "a contest": (["run", "--at", 20], {"conditions": {"a": {"callbacks": 2 * ABLATE["callbacks"]}}}, ["order"]),
    "an unknown callback": (
        ["run", "--at", 20],
        {"conditions": {"a": {"callbacks": [writer("Ablote")]}}},
        ["opsin.callbacks.Ablote"],
    ),
    "too late": (
        ["run", "--at", 20],
        {"conditions": {"a": {"callbacks": [writer("Ablate", heads=["1:1"], schedule={"stop": 20})]}}},
        ["conditions.a: Ablate.schedule", "steps 0 to 20", "20 to 40"],
    ),
    "too short": (["run", "--at", 20], {"conditions": {"a": {"max_steps": 20}}}, ["conditions.a: max_steps", "20"]),
    "a task that is a number": (
        ["run", "--at", 20],
        {"conditions": {"a": {"task": 5}}},
        ["conditions.a.task", "got 5"],
    ),
    "other batches": (
        ["run", "--at", 20],
        {"conditions": {"a": {"task": {"batch_size": 8}}}},
        ["conditions.a: task.batch_size: got 8, expected 4"],
    ),
    "other shapes": (["run", "--at", 20], {"conditions": {"a": {"task": {"n_labels": 4}}}}, ["task", "embed.W_E"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_fork_is_one_line_and_leaves_nothing(opsin, tmp_path, what):
    arguments, branching, named = WRONG[what]
    (tmp_path / "run").mkdir()
    settings = recipe(writer("InductionHeads", every=5), seed=0)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    if branching is not None:
        (tmp_path / "branches.yaml").write_text(yaml.safe_dump(branching))
        arguments = [*arguments, "--config", "branches.yaml"]
    before = sorted(tmp_path.rglob("*"))
    ended = opsin("fork", *arguments)
    assert ended.code == 2 and re.fullmatch(r"opsin: [^\n]+\n", ended.err), ended.err
    assert all(part in ended.err for part in named), ended.err
    assert sorted(tmp_path.rglob("*")) == before
