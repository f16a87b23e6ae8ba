"""What docs/tasks.md says: its tasks, each one file outside of the project, are trained, clamped, watched, resumed."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch
import yaml

from opsin.callbacks import PhaseChange
from opsin.tasks.shared import references
from opsin.training.module import OpsinModule
from tests.helpers.killers import StopAfter
from tests.helpers.paths import ROOT
from tests.helpers.toys import train
from tests.helpers.wandb_files import history, offline_runs, read

PAGE = (ROOT / "docs" / "tasks.md").read_text()
SHORT = ["--model.steps_per_batch", "20", "--model.log_every", "10", "--model.probe_size", "32"]
SHORT += [
    "--trainer.val_check_interval",
    "2",
    "--model.evaluation_size",
    "32",
    "--trainer.enable_progress_bar",
    "false",
]
STEPS = 200


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the page's modules and recipe, and nothing else."""
    for code in blocks("python"):
        (tmp_path / re.match(r"# (\w+\.py)\n", code)[1]).write_text(code)
    (recipe,) = [content for block in blocks("yaml") if isinstance(content := yaml.safe_load(block), dict)]
    for callback in recipe["trainer"]["callbacks"]:
        if "schedule" in callback.get("init_args", {}):
            callback["init_args"]["schedule"]["stop"] = 60
        if callback["class_path"].endswith(("ReferenceDistance", "ProgressMeasures")):
            callback.setdefault("init_args", {})["every"] = 50
    recipe["trainer"]["callbacks"].append({"class_path": "opsin.callbacks.WeightsAndBiases"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path


def numbers(run, metric: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["metric"] == metric]


def test_the_task_of_the_page_is_trained_clamped_watched_and_drawn(opsin, folder):
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", "--trainer.max_steps", STEPS, *SHORT)
    assert ended.code == 0, ended.err
    run = folder / "run"
    losses = numbers(run, "train/loss")
    assert len(losses) == STEPS // 10 and losses[-1] < 0.7 * losses[0]
    names = {row["metric"] for row in csv.DictReader((run / "metrics.csv").open())}
    assert not [name for name in names if "accuracy" in name]
    assert {"val/train/loss", "val/train/r_squared", "progress/none/loss", "train/grad_norm"} <= names
    # the model nears what it could have learned, and meets none exactly
    nearing = {name: numbers(run, f"reference/{name}/squared_distance") for name in ("gradient_step", "exact")}
    assert all(len(values) == 1 + STEPS // 50 and 0 < values[-1] < values[0] for values in nearing.values())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["plateau"] == pytest.approx(2.01) and summary["objective"]["name"] == "SquaredError"
    assert summary["interventions"][0]["changed_steps"] == [60] and summary["references"]["exact"]["loss"] < 1
    assert (run / "summary.png").stat().st_size > 10_000
    assert "nats" not in ended.out and re.search(r"final loss +[\d.]+ +training", ended.out)
    (sent,) = offline_runs(run)
    assert any("val/train/r_squared" in row for row in history(read(sent)))


def test_a_run_that_is_cut_short_is_resumed_to_the_same_bits(opsin, folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["trainer"]["callbacks"].append({"class_path": "tests.helpers.killers.StopAfter"})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    line = ["fit", "--config", "recipe.yaml", *SHORT, "--trainer.max_steps", STEPS, "--run_folder"]
    assert opsin(*line, "whole").code == 0
    StopAfter.planned.add(STEPS // 2)
    assert "unfinished" in opsin(*line, "cut").out
    assert opsin("resume", "cut").code == 0
    whole, cut = (
        torch.load(f"{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "cut")
    )
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert (folder / "whole" / "metrics.csv").read_bytes() == (folder / "cut" / "metrics.csv").read_bytes()


def test_an_objective_of_its_own_is_trained_on_what_counts(opsin, folder):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["task"] = {"class_path": "robust_regression.RobustRegression", "init_args": {"entries": 2, "pairs": 5}}
    recipe["trainer"]["callbacks"] = recipe["trainer"]["callbacks"][:1]
    (folder / "robust.yaml").write_text(yaml.safe_dump(recipe))
    ended = opsin("fit", "--config", "robust.yaml", "--run_folder", "run", "--trainer.max_steps", STEPS, *SHORT)
    assert ended.code == 0, ended.err
    losses, near = numbers(folder / "run", "train/loss"), numbers(folder / "run", "train/within_a_tenth")
    assert losses[-1] < 0.8 * losses[0] and near[-1] > near[0]
    assert numbers(folder / "run", "reference/exact/absolute_distance")[-1] > 0


def test_a_plateau_that_no_task_names_is_left_to_the_curve_but_a_reader_of_classes_is_refused(opsin, folder):
    from linear_regression import LinearRegression
    from robust_regression import RobustRegression

    module = train(OpsinModule(RobustRegression(), compile=False), 1, PhaseChange())
    assert module.summary["plateau"] is None and module.summary["onset"] is None
    assert LinearRegression().plateau == pytest.approx(3.01)
    attached = ["--trainer.callbacks+=opsin.callbacks.Calibration"]
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", *attached)
    assert ended.code == 2 and not (folder / "run").exists()
    expected = "Calibration: got 'LinearRegression with SquaredError', expected a task that predicts classes"
    assert ended.err.splitlines()[-1] == f"opsin: {expected}"


def test_a_writer_of_labels_is_refused_where_there_are_no_classes(opsin, folder):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["trainer"]["callbacks"] = [{"class_path": "opsin.callbacks.CopyFromPattern", "init_args": {"head": "1:0"}}]
    (folder / "copy.yaml").write_text(yaml.safe_dump(recipe))
    ended = opsin("fit", "--config", "copy.yaml", "--run_folder", "run")
    assert ended.code == 2 and not (folder / "run").exists()
    assert "CopyFromPattern" in ended.err.splitlines()[-1] and "predicts classes" in ended.err.splitlines()[-1]


def test_a_comparison_of_what_the_objective_does_not_measure_names_the_nearest(opsin, folder):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["population"] = {"seeds": 1, "compare": ["val/train/accuracy"]}
    (folder / "population.yaml").write_text(yaml.safe_dump(recipe))
    ended = opsin("fit", "--config", "population.yaml", "--run_folder", "run")
    assert ended.code == 2 and not (folder / "run").exists()
    line = ended.err.splitlines()[-1]
    assert line.startswith(
        "opsin: population.compare: got 'val/train/accuracy', expected a metric that this run records"
    )
    assert "the nearest is 'val/train/" in line


def test_every_reference_of_the_page_exists():
    rows = re.findall(r"^\| (`[\w`, ]+) \|", PAGE.split("## References")[1].split("\n## ")[0], flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(named) == 11 and all(hasattr(references, name) for name in named)
