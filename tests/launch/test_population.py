"""Claims about populations as a user starts them: chunks, kills, and members equal to runs of their own."""

import json
import random
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from tests.helpers.processes import Started, all_have_ended, kill_in_training, opsin

STEPS = 60
ABLATED = {"class_path": "opsin.callbacks.Ablate", "init_args": {"heads": ["1:3"]}}
RECIPE = {
    "task": {
        "class_path": "opsin.tasks.FewShot",
        "init_args": {
            "exemplars": {
                "class_path": "opsin.tasks.GaussianClusters",
                "init_args": {"classes": 60, "exemplars": 5, "features": 16},
            },
            "batch_size": 8,
        },
    },
    "model": {
        **{"transformer": {"layers": 2, "width": 16, "heads": 4}, "seed": 1, "learning_rate": 1e-3},
        **{"steps_per_batch": 10, "evaluation_size": 16, "probe_size": 16, "compile": False},
    },
    "trainer": {"max_steps": STEPS, "callbacks": [{"class_path": "opsin.callbacks.PhaseChange"}]},
    "population": {
        "seeds": 2,
        "processes": 2,
        "compare": ["train/accuracy"],
        "conditions": {
            "none": {},
            "previous": {
                "callbacks": [
                    {
                        "class_path": "opsin.callbacks.Clamp",
                        "init_args": {"heads": ["0:2"], "pattern": "previous_token"},
                    }
                ]
            },
            "fast": {"learning_rate": 1e-2},
            "copy": {
                "callbacks": [{"class_path": "opsin.callbacks.CopyFromPattern", "init_args": {"head": "1:3"}}],
            },
            "three_labels": {"task": {"n_labels": 3}},
            "diverging": {"learning_rate": 1e30},
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds a population left alone, ``whole``, and one whose processes were killed, ``killed``."""
    here = tmp_path_factory.mktemp("population")
    (here / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    start = ["fit", "--config", "recipe.yaml", "--checkpoint_every", "10", "--run_folder"]
    opsin(*start, "whole", folder=here)
    fit = Started(*start, "killed", folder=here)
    kill_in_training(fit, here, "killed")
    (here / "left").write_text(json.dumps([all_have_ended(here), finished_chunks(here / "killed")]))
    opsin("resume", "killed", folder=here)
    return here


def finished_chunks(folder: Path) -> list[str]:
    """Names of the chunks whose runs have come to their end."""
    return [path.parent.name for path in folder.glob("chunks/*/summary.json")]


def test_killing_a_population_ends_its_processes_before_they_are_done(folder):
    all_ended, finished = json.loads((folder / "left").read_text())
    chunks = list((folder / "killed").glob("chunks/*"))
    assert all_ended and len(finished) < len(chunks)


def weights_of(folder: Path, member: int) -> dict[str, torch.Tensor]:
    row = json.loads((folder / "population.json").read_text())["members"][member]
    saved = torch.load(folder / "chunks" / f"{row['chunk']:02d}" / "checkpoints" / "last.ckpt", weights_only=True)
    return {name: value[row["slot"]] for name, value in saved["state_dict"].items()}


def test_a_killed_population_ends_as_one_left_alone(folder):
    whole, killed = (pd.read_csv(folder / name / "metrics.csv") for name in ("whole", "killed"))
    pd.testing.assert_frame_equal(whole, killed)
    for member in range(12):
        a, b = weights_of(folder / "whole", member), weights_of(folder / "killed", member)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_members_that_share_no_graph_share_no_chunk(folder):
    rows = json.loads((folder / "whole" / "population.json").read_text())["members"]
    together = {frozenset(row["condition"] for row in rows if row["chunk"] == chunk) for chunk in range(9)}
    assert not any({"none", "copy"} <= names or {"none", "three_labels"} <= names for names in together)
    assert any({"none", "previous"} <= names for names in together)


@pytest.mark.parametrize("condition", ["none", "previous", "fast", "copy", "three_labels"])
def test_a_member_equals_the_run_of_its_seed_and_condition(folder, condition, tmp_path):
    settings = RECIPE["population"]["conditions"][condition]
    alone = {name: value for name, value in RECIPE.items() if name != "population"}
    alone["model"] = RECIPE["model"] | {"seed": 2, "learning_rate": settings.get("learning_rate", 1e-3)}
    task = RECIPE["task"]["init_args"] | settings.get("task", {})
    alone["task"] = RECIPE["task"] | {"init_args": task}
    callbacks = [*RECIPE["trainer"]["callbacks"], *settings.get("callbacks", [])]
    alone["trainer"] = RECIPE["trainer"] | {"callbacks": callbacks}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(alone))
    opsin("fit", "--config", "alone.yaml", "--run_folder", "alone", folder=tmp_path)
    place = 2 * list(RECIPE["population"]["conditions"]).index(condition) + 1
    member = weights_of(folder / "whole", place)
    single = torch.load(tmp_path / "alone" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in member.items():
        # between one member and several other kernels run, which round differently
        torch.testing.assert_close(value, single[name][0], rtol=1e-3, atol=1e-4)


def test_tables_name_conditions_and_a_diverged_member(folder):
    members = pd.read_csv(folder / "whole" / "members.csv")
    assert list(members["condition"].unique()) == list(RECIPE["population"]["conditions"])
    status = members.set_index(["condition", "seed"])["status"]
    assert set(status["diverging"]) == {"diverged"} and set(status["none"]) == {"complete"}
    metrics = pd.read_csv(folder / "whole" / "metrics.csv").query("metric == 'train/accuracy'")
    last = metrics.groupby("member")["value"].last()
    complete = members["status"] == "complete"
    assert (members["train/accuracy"] == last)[complete].all() and members["train/accuracy"][~complete].isna().all()
    for name in ("conditions.csv", "differences.csv", "summary.json", "population.png", "config.yaml"):
        assert (folder / "whole" / name).exists()


def test_a_finished_population_has_nothing_to_resume(folder):
    before = {path: path.stat().st_mtime_ns for path in (folder / "whole").glob("chunks/*/metrics.csv")}
    opsin("resume", "whole", folder=folder)
    assert before == {path: path.stat().st_mtime_ns for path in before} and before


def test_a_wrong_condition_is_refused_before_anything_starts(tmp_path):
    wrong = yaml.safe_load(yaml.safe_dump(RECIPE, sort_keys=False))
    wrong["population"]["conditions"]["previous"]["callbacks"][0]["init_args"]["heads"] = ["0:9"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(wrong))
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", folder=tmp_path, check=False)
    assert ended.code == 2 and not (tmp_path / "run").exists()
    assert "population.conditions.previous: Clamp.heads: got '0:9'" in ended.err.splitlines()[-1]


@pytest.mark.parametrize("metric", ["calibration/ece", "induction_strength"])
def test_a_metric_without_one_recorded_number_a_member_cannot_be_compared(metric, tmp_path):
    wrong = yaml.safe_load(yaml.safe_dump(RECIPE))
    wrong["population"]["compare"] = [metric]
    wrong["trainer"]["callbacks"].append({"class_path": "opsin.callbacks.InductionHeads"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(wrong))
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", folder=tmp_path, check=False)
    assert ended.code == 2 and not (tmp_path / "run").exists()
    (line,) = ended.err.splitlines()
    assert line.startswith(f"opsin: population.compare: got '{metric}', expected a metric that this run records")
    assert "; the nearest is 'train/" in line or "; the nearest is 'val/" in line


def test_a_condition_whose_task_lacks_the_compared_metric_is_refused_by_its_name(tmp_path):
    wrong = yaml.safe_load(yaml.safe_dump(RECIPE))
    wrong["trainer"] |= {"limit_val_batches": 1.0}
    wrong["population"] |= {"compare": ["val/classes/loss"], "conditions": {"none": {}}}
    wrong["population"]["conditions"]["all"] = {"task": {"heldout_classes": 0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(wrong))
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", folder=tmp_path, check=False)
    assert ended.code == 2 and not (tmp_path / "run").exists()
    expected = "opsin: population.conditions.all: population.compare: got 'val/classes/loss', expected a metric that"
    assert ended.err.splitlines()[-1].startswith(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"conditions": {"watched": {"callbacks": [{"class_path": "opsin.callbacks.InductionHeads"}]}}},
            "population.conditions: callbacks: got 'InductionHeads', expected one that acts in chosen members",
        ),
        ({"model": {"learning_rate": [0.01]}}, "model.learning_rate: got [0.01], expected one number beside"),
        ({"windows": {"starts": [0, 60]}}, "population.windows.starts: got 60, expected 0 to below 60, the steps of"),
        (
            {"windows": {"callbacks": [{**ABLATED, "init_args": {**ABLATED["init_args"], "schedule": {"ramp": 5}}}]}},
            "population.windows.callbacks: Ablate.schedule: got ",
        ),
    ],
    ids=str,
)
def test_what_a_population_would_pass_over_in_silence_is_refused(change, message, tmp_path):
    windows = {"callbacks": [ABLATED], "starts": [0], "lengths": [10], "unit": "steps", **change.get("windows", {})}
    wrong = {**RECIPE, "model": {**RECIPE["model"], **change.get("model", {})}}
    wrong["population"] = {"seeds": 1, "windows": windows, "conditions": change.get("conditions", {})}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(wrong))
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", folder=tmp_path, check=False)
    assert ended.code == 2 and not (tmp_path / "run").exists()
    assert message in ended.err.splitlines()[-1]


def test_a_chunk_of_which_every_member_has_diverged_is_whole(tmp_path):
    population = {"seeds": 2, "members_per_process": 1, "conditions": {"fast": {"learning_rate": 1e30}, "none": {}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"population": population}))
    opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", folder=tmp_path)
    members = pd.read_csv(tmp_path / "run" / "members.csv")
    assert members["status"].tolist() == ["diverged", "diverged", "complete", "complete"]


OVERFLOWING = {"class_path": "opsin.callbacks.Clamp", "init_args": {"site": "hook_embed", "value": 1e38}}


@pytest.mark.slow
def test_forty_eight_members_one_of_them_diverging_and_killed_twice_end_as_those_left_alone(tmp_path):
    """Three populations of 48 in chunks: about two minutes."""
    names = ("none", "previous", "fast", "copy", "three_labels")
    conditions = {name: RECIPE["population"]["conditions"][name] for name in names}
    conditions["one_diverges"] = {"by_seed": {3: [OVERFLOWING]}}
    population = {"seeds": 8, "conditions": conditions}
    recipe = RECIPE | {"population": population, "trainer": RECIPE["trainer"] | {"max_steps": 300}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    start = ["fit", "--config", "recipe.yaml", "--checkpoint_every", "10", "--run_folder"]
    opsin(*start, "whole", folder=tmp_path)
    chance = random.Random(0)
    for arguments in ([*start, "killed"], ["resume", "killed"]):
        fit = Started(*arguments, folder=tmp_path)
        before = {path: path.stat().st_mtime for path in tmp_path.glob("killed/chunks/*/checkpoints/last.ckpt")}
        while not _advanced(tmp_path, before):
            assert fit.poll() is None
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 2))
        fit.send_signal(signal.SIGKILL)
        fit.wait()
    opsin("resume", "killed", folder=tmp_path)
    members = pd.read_csv(tmp_path / "killed" / "members.csv")
    diverged = members[members["status"] == "diverged"]
    assert diverged[["condition", "seed"]].values.tolist() == [["one_diverges", 3]]
    for member in {*range(48)} - {*diverged["member"]}:
        a, b = weights_of(tmp_path / "whole", member), weights_of(tmp_path / "killed", member)
        assert all(torch.equal(a[name], b[name]) for name in a)


def _advanced(folder: Path, before: dict[Path, float]) -> bool:
    """Whether a chunk has saved a checkpoint since."""
    now = folder.glob("killed/chunks/*/checkpoints/last.ckpt")
    return any(path not in before or path.stat().st_mtime > before[path] for path in now)


def test_what_one_seed_has_in_a_condition_the_others_have_not(tmp_path):
    population = {"seeds": 2, "processes": 1, "conditions": {"one": {"by_seed": {2: [ABLATED]}}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"population": population}))
    opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", folder=tmp_path)
    (row,) = json.loads((tmp_path / "run" / "chunks" / "00" / "summary.json").read_text())["interventions"]
    assert (row["writer"], row["active_steps"]) == ("Ablate", [0, STEPS])


def test_a_seed_that_a_condition_does_not_have_is_refused(tmp_path):
    population = {"seeds": 2, "conditions": {"one": {"by_seed": {5: [ABLATED]}}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"population": population}))
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", folder=tmp_path, check=False)
    assert ended.code == 2
    assert "population.conditions.one.by_seed: got 5, expected a seed of it: 1, 2" in ended.err
