"""Claims about the command line: what a run leaves behind, and one line for everything that cannot work."""

import json
import re
import signal

import pandas as pd
import pytest
import torch
import yaml

from opsin.model.transformer import Transformer
from opsin.records.schema import METRICS_COLUMNS
from tests.helpers.killers import EndAt, Killed, kill
from tests.helpers.toys import few_shot

STEPS, BATCH = 40, 4
RECIPE = f"""
task:
  class_path: opsin.tasks.FewShot
  init_args:
    batch_size: {BATCH}
    train_classes: 8
    exemplars: {{class_path: opsin.tasks.GaussianClusters, init_args: {{classes: 12, exemplars: 2, features: 8}}}}
model:
  transformer: {{width: 8, heads: 2}}
  learning_rate: 0.01
  steps_per_batch: 5
  log_every: 5
  probe_size: 8
  evaluation_size: 8
trainer:
  max_steps: {STEPS}
  val_check_interval: 2
  enable_progress_bar: false
  callbacks:
    - class_path: opsin.callbacks.InductionHeads
      init_args: {{every: 5}}
    - class_path: opsin.callbacks.PhaseChange
    - class_path: tests.helpers.killers.EndAt
"""
FILES = ["checkpoints/last.ckpt", "config.yaml", "metrics.csv", "summary.json", "summary.png"]
CLAMP = ["--trainer.callbacks+=opsin.callbacks.Clamp"]
PREVIOUS = [*CLAMP, '--trainer.callbacks.heads=["0:1"]', "--trainer.callbacks.pattern=previous_token"]


@pytest.fixture
def fit(opsin, tmp_path):
    """Train the recipe; further arguments follow."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return lambda *arguments: opsin("fit", "--config", "recipe.yaml", *arguments)


def in_folder(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def checkpoint(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def same_end(run, other):
    one, two = checkpoint(run)["state_dict"], checkpoint(other)["state_dict"]
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def plan(monkeypatch, hook, step, what):
    monkeypatch.setattr(EndAt, "planned", (hook, step, what))


# ---- a run ------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files_and_prints_where_they_are(fit, tmp_path):
    ended = fit("--run_folder", "run")
    assert ended.code == 0 and ended.err == ""
    assert in_folder(tmp_path / "run") == FILES
    assert re.search(r"^files +run$", ended.out, flags=re.MULTILINE)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "onset" in summary and summary["wall_time_seconds"] >= 0 and summary["sequences"] == STEPS * BATCH
    assert set(summary["heads"]) == {"0:0", "0:1", "1:0", "1:1"}
    assert all(-1 <= head["strength"] <= 1 for head in summary["heads"].values())
    assert (tmp_path / "run" / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert checkpoint(tmp_path / "run")["global_step"] == STEPS


def test_where_slurm_is_installed_a_run_prints_what_opsin_says_and_no_more(fit, srun):
    ended = fit("--run_folder", "run")
    assert ended.code == 0 and ended.err == ""
    assert "phase change" in ended.out and srun not in ended.out


def test_one_line_of_pandas_reads_the_numbers(fit, tmp_path):
    fit("--run_folder", "run")
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert tuple(table.columns) == METRICS_COLUMNS and (table.sequences == table.step * BATCH).all()
    heads = table[table.metric == "induction_strength"]
    assert len(heads.groupby(["layer", "head"])) == 4 and heads.step.max() == STEPS and heads.value.between(-1, 1).all()
    assert table[table.metric == "train/loss"].layer.isna().all()


def test_the_saved_configuration_gives_the_same_weights_again(fit, opsin, tmp_path):
    fit("--run_folder", "run", "--model.seed", 7, *PREVIOUS)
    assert opsin("fit", "--config", "run/config.yaml", "--run_folder", "again").code == 0
    assert same_end(tmp_path / "run", tmp_path / "again")
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (tmp_path / "again" / "metrics.csv").read_bytes()


def test_a_clamp_attaches_from_the_shell(fit, tmp_path):
    assert fit("--run_folder", "with", *PREVIOUS).code == fit("--run_folder", "without").code == 0
    (acts,) = json.loads((tmp_path / "with" / "summary.json").read_text())["plan"]
    assert "Clamp" in acts.values() and "blocks.0.attn.hook_pattern" in acts.values()
    assert not same_end(tmp_path / "with", tmp_path / "without")


def test_runs_without_a_name_never_share_a_folder(fit, tmp_path, monkeypatch):
    monkeypatch.setattr("opsin.launch.recipe.time.strftime", lambda _: "now")
    assert fit().code == 0
    # a second one of this process would be the same; one of another process is not
    assert fit().code == 2
    monkeypatch.setattr("opsin.launch.recipe.os.getpid", lambda: 1)
    assert fit().code == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_without_a_terminal_progress_is_about_twenty_lines(fit):
    ended = fit("--run_folder", "run", "--trainer.enable_progress_bar", "true", "--model.steps_per_batch", "5")
    lines = [line for line in ended.out.splitlines() if re.match(r"step \d+/40  loss \d", line)]
    assert ended.code == 0 and len(lines) == STEPS // 5


# ---- sites ------------------------------------------------------------------------------------------


def test_sites_prints_every_site_with_its_shape_and_the_plan_and_leaves_nothing(fit, opsin, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    ended = opsin("sites", "--config", "recipe.yaml", *PREVIOUS)
    assert ended.code == 0 and ended.err == "" and in_folder(tmp_path) == ["recipe.yaml"]
    assert list(tmp_path.iterdir()) == [tmp_path / "recipe.yaml"]
    printed = {line.split()[0]: line for line in ended.out.splitlines() if "hook_" in line.split("  ")[0]}
    sites = Transformer(width=8, heads=2).sites(few_shot())
    assert set(printed) == {site.name for site in sites}
    for site in sites:
        shape = re.search(r"\[(.*?)\]", printed[site.name])[1]
        assert tuple(int(part.split()[0]) for part in shape.split(",")) == site.shape(1, BATCH)
    assert re.search(r"^plan \w+, in order of application:$", ended.out, flags=re.MULTILINE)
    assert "previous" in ended.out.partition("\nplan ")[2].lower()


# ---- what cannot work -------------------------------------------------------------------------------

BROKEN = {
    "broken.yaml": "task: [\n  a: b\n",
    "list.yaml": "- 1\n",
    "typo.yaml": RECIPE.replace("probe_size", "prob_size"),
    "bad.zip": "no archive",
    "bad.ckpt": "no checkpoint",
    "taken/metrics.csv": "step\n",
    "file": "",
}
OMNIGLOT = ["--task.init_args.exemplars=opsin.tasks.Omniglot"]
CALLBACK, ARCHIVES = "--trainer.callbacks.", "--task.init_args.exemplars.archives="
HELD = [*CLAMP, CALLBACK + "value=1"]
WRONG = {
    "an unknown site": ([*HELD, CALLBACK + "site=blocks.9.hook_z"], ["Clamp.site", "'blocks.9.hook_z'", "expected"]),
    "a head that is not there": ([*PREVIOUS, CALLBACK + 'heads=["0:7"]'], ["Clamp.heads", "'0:7'", "head 0 to 1"]),
    "a position that is not there": ([*PREVIOUS, CALLBACK + "positions=[9]"], ["Clamp.positions", "9", "0 to 4"]),
    "more classes than there are": (
        ["--task.init_args.train_classes=200"],
        ["FewShot.train_classes", "200", "at most 12"],
    ),
    "an archive that is missing": ([*OMNIGLOT, ARCHIVES + "[none.zip]"], ["Omniglot.archives", "'none.zip'"]),
    "an archive that is none": ([*OMNIGLOT, ARCHIVES + "[bad.zip]"], ["Omniglot.archives", "'bad.zip'"]),
    "a metric nobody measures": (
        ["--trainer.callbacks+=opsin.callbacks.PhaseChange", CALLBACK + "metric=val/none/loss"],
        ["PhaseChange.metric", "'val/none/loss'", "val/train/loss"],
    ),
    "a misspelled setting": (["--model.learning_rats", "1"], ["--model.learning_rats"]),
    "an abbreviated setting": (["--model.learning_rat", "1"], ["--model.learning_rat"]),
    "a misspelled callback": (["--trainer.callbacks+=opsin.callbacks.Clump"], ["opsin.callbacks.Clump"]),
    "a number in words": (["--model.learning_rate", "fast"], ["learning_rate", "fast", "float"]),
    "a rate below zero": (["--model.learning_rate=-1"], ["model.learning_rate", "-1", "more than 0"]),
    "no number of steps": (["--trainer.max_steps=-1"], ["trainer.max_steps", "-1"]),
    "a width that heads do not divide": (["--model.transformer.width", "9"], ["heads", "2", "9"]),
    "a cadence below one": (["--checkpoint_every", "0"], ["checkpoint_every", "0", "at least 1"]),
    "a setting Lightning refuses": (["--trainer.limit_val_batches", "7.5"], ["limit_val_batches", "7.5"]),
    "an accelerator nobody makes": (["--trainer.accelerator", "abacus"], ["accelerator", "abacus"]),
    "a run folder that holds a run": (["--run_folder", "taken"], ["run_folder", "'taken'", "opsin resume taken"]),
    "a run folder that is a file": (["--run_folder", "file"], ["run_folder", "'file'", "a folder"]),
    "a checkpoint that is missing": (["--ckpt_path", "none.ckpt"], ["ckpt_path", "'none.ckpt'", "a checkpoint"]),
    "a checkpoint that is none": (["--ckpt_path", "bad.ckpt"], ["ckpt_path", "'bad.ckpt'", "a checkpoint"]),
    "a configuration that is missing": (["--config", "none.yaml"], ["config", "none.yaml"]),
    "a configuration that is no YAML": (["--config", "broken.yaml"], ["config", "line 3"]),
    "a configuration that is a list": (["--config", "list.yaml"], ["config"]),
    "a misspelled setting in a file": (["--config", "typo.yaml"], ["model", "prob_size"]),
}


@pytest.fixture
def refused(tmp_path):
    """Check that a command ended with one line that names these, and left nothing."""
    for name, text in BROKEN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    before = sorted(tmp_path.rglob("*"))

    def check(ended, named):
        assert ended.code == 2 and ended.out == ""
        assert re.fullmatch(r"opsin: [^\n]+\n", ended.err), ended.err
        assert all(part in ended.err for part in named), ended.err
        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_setting_is_one_line_and_starts_nothing(fit, refused, what):
    arguments, named = WRONG[what]
    refused(fit(*arguments), named)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train"], ["verb", "'train'", "fit, resume, fork, sites"]),
        ([], ["verb", "fit, resume, fork, sites"]),
        (["fit"], ["required", "task"]),
        (["sites", "--config", "none.yaml"], ["none.yaml"]),
        (["sites", "--config", "recipe.yaml", *HELD, CALLBACK + "site=x"], ["Clamp.site", "'x'"]),
        (["resume"], ["opsin resume", "one run folder"]),
        (["resume", "none"], ["opsin resume", "'none'", "a run folder"]),
        (["resume", "taken"], ["opsin resume", "'taken'", "a run folder"]),
    ],
)
def test_a_wrong_command_is_one_line_and_starts_nothing(opsin, refused, arguments, named):
    refused(opsin(*arguments), named)


def test_the_checkpoint_of_another_model_is_refused_in_one_line(fit, tmp_path):
    fit("--run_folder", "run")
    ended = fit("--run_folder", "other", "--ckpt_path", "run/checkpoints/last.ckpt", "--model.seed", "[0, 1]")
    assert ended.code == 2 and re.fullmatch(r"opsin: ckpt_path: got 'run/.*members[^\n]*\n", ended.err)
    ended = fit("--run_folder", "other", "--ckpt_path", "run/checkpoints/last.ckpt", *PREVIOUS)
    assert ended.code == 2 and re.fullmatch(r"opsin: Clamp: got '1 intervention', expected 'none'[^\n]*\n", ended.err)
    assert not (tmp_path / "other").exists()


def test_help_is_no_error(opsin):
    for arguments in (["--help"], ["-h"], ["resume", "--help"], ["fork", "--help"], ["fit", "--help"]):
        ended = opsin(*arguments)
        assert ended.code == 0 and ended.err == "" and "usage" in ended.out


# ---- what ends a run --------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_it(fit, tmp_path):
    ended = fit("--run_folder", "run", "--model.learning_rate", "1e30")
    line = r"opsin: train/loss: got no finite number at step \d of member 0, [^\n]+\n"
    assert ended.code == 1 and re.fullmatch(line, ended.err)
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert "train/loss" in set(table.metric) and (tmp_path / "run" / "config.yaml").exists()


def test_an_interrupted_run_says_how_to_go_on_and_ends_as_if_it_had_not_been(fit, opsin, tmp_path, monkeypatch):
    fit("--run_folder", "whole")
    plan(monkeypatch, "on_train_batch_start", 25, lambda: signal.raise_signal(signal.SIGINT))
    ended = fit("--run_folder", "run", "--checkpoint_every", 10)
    assert ended.code == 130
    assert ended.err == "opsin: interrupted at step 25; `opsin resume run` continues\n"
    assert pd.read_csv(tmp_path / "run" / "metrics.csv").step.max() == 25
    monkeypatch.undo(), monkeypatch.chdir(tmp_path)
    assert opsin("resume", "run").code == 0
    assert same_end(tmp_path / "run", tmp_path / "whole")


def test_an_interrupt_before_training_is_one_line_too(opsin, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("opsin.cli.VERBS", {"fit": interrupted})
    assert opsin("fit") == (130, "", "opsin: interrupted before training began\n")


@pytest.mark.parametrize(
    ("hook", "step", "every"),
    [
        pytest.param("on_train_batch_start", 25, 1000, marks=pytest.mark.slow),
        ("on_train_batch_start", 25, 10),
        ("on_validation_start", 20, 10),
        pytest.param("on_train_batch_start", 20, 10, marks=pytest.mark.slow),
        ("on_validation_start", STEPS, 10),
        ("on_fit_end", STEPS, 10),
    ],
    ids=lambda part: str(part).removeprefix("on_"),
)
def test_a_run_killed_at_any_moment_resumes_to_the_same_folder(fit, opsin, tmp_path, monkeypatch, hook, step, every):
    fit("--run_folder", "whole", "--checkpoint_every", every)
    plan(monkeypatch, hook, step, kill)
    with pytest.raises(Killed):
        fit("--run_folder", "run", "--checkpoint_every", every)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() == (every < step)
    monkeypatch.setattr(EndAt, "planned", None)
    ended = opsin("resume", "run")
    assert ended.code == 0 and ended.err == ""
    before = ["checkpoints/previous.ckpt"] * (every < STEPS)
    assert in_folder(tmp_path / "run") == in_folder(tmp_path / "whole") == sorted(FILES + before)
    assert same_end(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "whole"))
    assert one | {"wall_time_seconds": 0} == two | {"wall_time_seconds": 0}


def killed(fit, opsin, tmp_path, monkeypatch):
    """A run of which a process was killed at step 25, its last checkpoint being of step 20."""
    plan(monkeypatch, "on_train_batch_start", 25, kill)
    with pytest.raises(Killed):
        fit("--run_folder", "run", "--checkpoint_every", 10)
    monkeypatch.setattr(EndAt, "planned", None)
    return tmp_path / "run"


EDITS = {"learning_rate: 0.01": "learning_rate: 0.02", "batch_size: 4": "batch_size: 8", "seed: 0\n  l": "seed: 1\n  l"}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("verb", [["resume", "run"], ["fork", "run", "--at", "10"], ["fork", "run", "--at", "20"]])
def test_an_edited_configuration_is_refused_by_its_setting(fit, opsin, refused, tmp_path, monkeypatch, edit, verb):
    folder = killed(fit, opsin, tmp_path, monkeypatch)
    config = (folder / "config.yaml").read_text()
    assert config.count(edit) == 1
    (folder / "config.yaml").write_text(config.replace(edit, EDITS[edit]))
    content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    ended = opsin(*verb)
    name = edit.split(":")[0].split()[-1]
    assert ended.code == 2 and re.fullmatch(
        rf"opsin: (\w+\.)+{name}: got [^\n]* as the run was begun with[^\n]*\n", ended.err
    )
    assert content == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_an_allowed_difference_goes_on_and_is_recorded(fit, opsin, tmp_path, monkeypatch, caplog):
    folder = killed(fit, opsin, tmp_path, monkeypatch)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("learning_rate: 0.01", "learning_rate: 0.02"))
    ended = opsin("resume", "run", "--allow", "model.learning_rate")
    assert ended.code == 0
    assert "opsin: from step 20 on with model.learning_rate 0.02 in place of 0.01" in caplog.messages
    (change,) = json.loads((folder / "summary.json").read_text())["allowed"]
    assert change == {"setting": "model.learning_rate", "from": 0.01, "to": 0.02, "step": 20}
    assert "allow" not in yaml.safe_load((folder / "config.yaml").read_text())


def test_a_permission_without_a_checkpoint_is_refused(fit, opsin, tmp_path, refused):
    refused(fit("--run_folder", "run", "--allow", "model.seed"), ["--allow", "model.seed", "--ckpt_path"])
    refused(opsin("resume", "run", "--allow"), ["--allow"])
    assert not (tmp_path / "run").exists()


def test_resuming_a_finished_run_says_so_and_touches_nothing(fit, opsin, tmp_path):
    fit("--run_folder", "run")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    ended = opsin("resume", "run")
    assert ended == (0, f"run is finished, after {STEPS} steps; there is nothing to resume\n", "")
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}
    assert in_folder(tmp_path / "run") == FILES


def test_a_finished_run_can_be_made_longer_under_another_name(fit, tmp_path):
    fit("--run_folder", "short", "--trainer.max_steps", 20)
    fit("--run_folder", "whole")
    assert fit("--run_folder", "longer", "--ckpt_path", "short/checkpoints/last.ckpt").code == 0
    assert same_end(tmp_path / "longer", tmp_path / "whole")


def test_a_run_made_longer_in_its_own_folder_says_so_in_its_configuration(fit, tmp_path):
    fit("--run_folder", "run", "--trainer.max_steps", 20)
    assert fit("--run_folder", "run", "--ckpt_path", "run/checkpoints/last.ckpt").code == 0
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["trainer"]["max_steps"] == STEPS and settings["ckpt_path"] is None


def test_a_full_disk_is_one_line(fit, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "run/metrics.csv")

    monkeypatch.setattr("opsin.records.folder.RunFolder.append_metrics", full)
    ended = fit("--run_folder", "run")
    assert ended.code == 1 and re.fullmatch(r"opsin: [^\n]*No space left on device[^\n]*\n", ended.err)


def test_a_defect_of_ours_is_not_dressed_up_as_a_wrong_setting(opsin, monkeypatch):
    def broken(*_):
        raise KeyError("defect")

    monkeypatch.setattr("opsin.cli.VERBS", {"fit": broken})
    with pytest.raises(KeyError):
        opsin("fit")
