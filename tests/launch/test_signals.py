"""Claims about runs that a signal or the Trainer ends before they are trained: saved, one line, resumed to the bit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opsin.launch.signals import ENDING_SIGNALS
from tests.helpers.killers import (
    SignalAfter,
    StopAfter,
    assert_equal_optimizers,
    assert_equal_weights,
    checkpoint,
)
from tests.helpers.processes import Started, all_have_ended

STEPS, PER_BATCH = 60, 10
# nothing here has a cadence that divides another's, so that any step that is cut wrongly shows
RECIPE = f"""
task:
  class_path: opsin.tasks.FewShot
  init_args:
    batch_size: 8
    exemplars: {{class_path: opsin.tasks.GaussianClusters, init_args: {{classes: 60, features: 16}}}}
model:
  transformer: {{width: 16, heads: 2}}
  seed: [3, 4]
  learning_rate: 0.01
  steps_per_batch: {PER_BATCH}
  log_every: 5
  probe_size: 32
  evaluation_size: 32
  idle: warn
trainer:
  max_steps: {STEPS}
  val_check_interval: 2
  enable_progress_bar: false
  callbacks:
    - class_path: opsin.callbacks.Ablate
      init_args:
        heads: ["0:0", "0:1", "1:0"]
        schedule: {{feedback: {{metric: induction_strength, head: strongest, above: 0.2}}}}
    - class_path: opsin.callbacks.Clamp
      init_args:
        heads: ["0:1"]
        pattern: previous_token
        schedule:
          {{period: 7, duty: 0.4, feedback: {{metric: train/loss, above: 0.2, mode: scale, full: 1.5}}}}
    - class_path: opsin.callbacks.StopWhen
      init_args: {{below: 99.0, in_a_row: 7, members: [1]}}
    - class_path: opsin.callbacks.InductionHeads
      init_args: {{every: 7}}
    - class_path: opsin.callbacks.PhaseChange
    - class_path: opsin.callbacks.Snapshots
    - class_path: tests.helpers.killers.SignalAfter
    - class_path: tests.helpers.killers.StopAfter
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody ended."""
    from opsin.cli import main

    folder = tmp_path_factory.mktemp("signals")
    (folder / "recipe.yaml").write_text(RECIPE)
    handlers = [signal.getsignal(number) for number in ENDING_SIGNALS]
    assert main(["fit", "--config", str(folder / "recipe.yaml"), "--run_folder", str(folder / "whole")]) == 0
    # a command leaves the handlers as they were
    assert [signal.getsignal(number) for number in ENDING_SIGNALS] == handlers
    return folder / "whole"


@pytest.fixture
def fit(opsin, tmp_path, monkeypatch):
    monkeypatch.setattr(SignalAfter, "planned", {})
    monkeypatch.setattr(StopAfter, "planned", set())
    monkeypatch.setattr("opsin.callbacks.readers.run_folder.summary_figure", lambda *_: None)
    monkeypatch.setattr("opsin.callbacks.readers.run_folder.save_figure", lambda *_: None)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return lambda *arguments: opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", *arguments)


def assert_same_end(run, whole):
    assert_equal_weights((whole, run))
    assert_equal_optimizers((whole, run), STEPS)
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert sorted(path.name for path in (run / "snapshots").iterdir()) == sorted(
        path.name for path in (whole / "snapshots").iterdir()
    )


@pytest.mark.parametrize("step", [0, 13, 20, 59, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 10, 34))])
def test_a_signal_after_any_step_is_answered_before_the_next_and_the_run_resumes_to_the_bit(
    fit, opsin, tmp_path, whole, step
):
    number = ENDING_SIGNALS[step % 5]
    SignalAfter.planned[step] = number
    ended = fit()
    how = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert ended.code == 128 + number
    assert ended.err == f"opsin: {how} at step {step}; `opsin resume run` continues\n" and ended.out == ""
    assert step == 0 or checkpoint(tmp_path / "run")["global_step"] == step
    assert not (tmp_path / "run" / "summary.json").exists()
    ended = opsin("resume", "run")
    assert ended.code == 0 and ended.err == ""
    assert_same_end(tmp_path / "run", whole)


def test_a_run_that_signals_end_again_and_again_comes_to_the_same_end(fit, tmp_path, whole):
    SignalAfter.planned |= {step: ENDING_SIGNALS[step % 5] for step in range(2, STEPS, 17)}
    codes = [fit("--continue").code for _ in range(len(SignalAfter.planned) + 1)]
    assert all(code > 128 for code in codes[:-1]) and codes[-1] == 0
    assert_same_end(tmp_path / "run", whole)


def test_a_run_that_has_made_its_last_step_is_finished_first(fit, tmp_path, whole):
    SignalAfter.planned[STEPS] = signal.SIGTERM
    assert fit().code == 0
    assert_same_end(tmp_path / "run", whole)


def test_a_signal_before_training_leaves_nothing(fit, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("opsin.launch.fit.check_free", lambda *_: signal.raise_signal(signal.SIGUSR1))
    ended = fit()
    assert ended == (138, "", "opsin: ended by SIGUSR1 before training began\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_hang_up_that_nohup_ignores_is_ignored(fit, tmp_path):
    SignalAfter.planned[13] = signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert fit().code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_ends_a_step_that_takes_long(fit, tmp_path, monkeypatch, whole, opsin):
    monkeypatch.setattr("opsin.launch.signals.IMPATIENT_AFTER_SECONDS", 0.0)

    def twice(self, seen):
        if seen.step == 13:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SignalAfter, "_raise", twice)
    ended = fit("--checkpoint_every", 10)
    assert ended.code == 130 and ended.err == "opsin: interrupted at step 13; `opsin resume run` continues\n"
    assert checkpoint(tmp_path / "run")["global_step"] == 10
    monkeypatch.setattr(SignalAfter, "_raise", lambda *_: None)
    assert opsin("resume", "run").code == 0
    assert_same_end(tmp_path / "run", whole)


# ---- the Trainer's own ends -------------------------------------------------------------------------


@pytest.mark.parametrize("step", [10, 20, 30])
def test_an_end_by_the_trainer_is_unfinished_and_resumes_to_the_bit(fit, opsin, tmp_path, whole, step):
    StopAfter.planned.add(step)
    ended = fit()
    assert ended.code == 0 and f"after step {step} of {STEPS}; `opsin resume run` continues\n" in ended.out
    assert not (tmp_path / "run" / "summary.json").exists()
    assert opsin("resume", "run").code == 0
    assert_same_end(tmp_path / "run", whole)


def test_max_time_is_a_limit_of_one_process(fit, opsin, tmp_path, whole, monkeypatch):
    limit = ["--trainer.max_time", "00:00:00:01"]
    monkeypatch.setattr(SignalAfter, "_raise", lambda *_: time.sleep(0.05))
    ended = fit(*limit)
    assert ended.code == 0 and ended.out.startswith("unfinished"), ended
    first = checkpoint(tmp_path / "run")["global_step"]
    for _ in range(9):
        ended = opsin("resume", "run")
        if not ended.out.startswith("unfinished"):
            break
        assert checkpoint(tmp_path / "run")["global_step"] > first
    assert_same_end(tmp_path / "run", whole)


def test_the_end_of_the_epochs_is_unfinished_too(fit, tmp_path):
    ended = fit("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 3)
    assert ended.code == 0 and f"after step 30 of {STEPS}" in ended.out
    assert not (tmp_path / "run" / "summary.json").exists()


def test_an_early_stopping_is_a_decision_and_finishes_the_run(fit, opsin, tmp_path):
    ended = fit(
        "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
        *("--trainer.callbacks.monitor=train/loss", "--trainer.callbacks.stopping_threshold=99.0"),
        "--trainer.callbacks.check_on_train_epoch_end=false",
    )
    assert ended.code == 0 and "unfinished" not in ended.out
    assert (tmp_path / "run" / "summary.json").exists()
    assert "is finished" in opsin("resume", "run").out


# ---- the verb of job scripts ------------------------------------------------------------------------


def test_continue_starts_goes_on_and_ends_with_0_where_there_is_nothing_to_do(fit, tmp_path, whole):
    SignalAfter.planned[13] = signal.SIGTERM
    assert [fit("--continue").code for _ in range(3)] == [143, 0, 0]
    assert_same_end(tmp_path / "run", whole)
    assert "is finished" in fit("--continue").out


def test_continue_begins_a_run_again_that_was_killed_before_its_first_checkpoint(fit, tmp_path, whole):
    SignalAfter.planned[13] = signal.SIGTERM
    fit()
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()
    assert fit("--continue").code == 0
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.seed", "[3, 5]"], ["model.seed", "[3, 4]"]),
        (["--task.init_args.batch_size", 4], ["task.init_args.batch_size: got 4", "8"]),
        (["--trainer.callbacks+=opsin.callbacks.AttentionSinks"], ["trainer.callbacks"]),
        (["--ckpt_path", "x.ckpt"], ["ckpt_path", "--continue"]),
    ],
)
def test_continue_refuses_another_recipe_by_the_name_of_its_setting(fit, tmp_path, arguments, named):
    SignalAfter.planned[13] = signal.SIGTERM
    fit()
    before = checkpoint(tmp_path / "run")["global_step"]
    ended = fit("--continue", *arguments)
    assert ended.code == 2 and re.fullmatch(r"opsin: [^\n]+\n", ended.err), ended.err
    assert all(part in ended.err for part in named), ended.err
    assert checkpoint(tmp_path / "run")["global_step"] == before


def test_continue_goes_on_with_another_rate_where_it_is_allowed_and_records_it(fit, tmp_path):
    SignalAfter.planned[23] = 15
    assert fit("--continue").code == 143
    rate = ["--model.learning_rate", "0.02"]
    refused = fit("--continue", *rate)
    assert refused.code == 2 and "model.learning_rate" in refused.err
    assert fit("--continue", *rate, "--allow", "model.learning_rate").code == 0
    (change,) = json.loads((tmp_path / "run" / "summary.json").read_text())["allowed"]
    assert change["setting"] == "model.learning_rate" and change["step"] == 23


def test_continue_may_have_another_limit_of_time_and_other_checkpoints(fit, tmp_path, whole):
    SignalAfter.planned[13] = signal.SIGTERM
    fit()
    assert fit("--continue", "--trainer.max_time", "00:01:00:00", "--checkpoint_every", 20).code == 0
    assert_same_end(tmp_path / "run", whole)


def test_continue_needs_a_run_folder(opsin, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    ended = opsin("fit", "--config", "recipe.yaml", "--continue")
    assert ended.code == 2 and re.fullmatch(r"opsin: --continue: [^\n]*run_folder[^\n]*\n", ended.err)


# ---- processes --------------------------------------------------------------------------------------

POPULATION = (
    RECIPE.replace("seed: [3, 4]", "seed: 3").replace(", members: [1]", "").replace("below: 99.0", "below: 0.0")
    + """
population:
  seeds: 2
  processes: 2
  members_per_process: 1
  conditions: {a: {}, b: {learning_rate: 0.02}}
"""
)


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    """A population left alone, and one whose process was sent SIGTERM while two chunks trained."""
    folder = tmp_path_factory.mktemp("population")
    (folder / "recipe.yaml").write_text(POPULATION)
    line = ["fit", "--config", "recipe.yaml", "--continue", "--checkpoint_every", 10, "--run_folder"]
    whole = Started(*line, "whole", folder=folder).wait()
    assert whole.code == 0, whole
    fit = Started(*line, "ended", folder=folder)
    while len(list(folder.glob("ended/chunks/*/checkpoints/last.ckpt"))) < 2:
        assert fit.poll() is None
        time.sleep(0.01)
    fit.send_signal(signal.SIGTERM)
    ended = fit.wait()
    left = all_have_ended(folder)
    logs = [path.read_text() for path in folder.glob("ended/chunks/*/log.txt")]
    again = [Started(*line, "ended", folder=folder).wait() for _ in range(2)]
    return folder, ended, left, logs, again


def test_a_signal_to_a_population_saves_all_its_chunks_and_ends_all_its_processes(population):
    _, ended, all_ended, logs, _ = population
    assert ended.code == 143 and ended.err.splitlines()[-1] == (
        "opsin: ended by SIGTERM; `opsin resume ended` continues"
    )
    assert all_ended and sum("ended by SIGTERM at step" in text for text in logs) >= 1
    assert not any("Traceback" in text for text in logs)


def test_a_population_that_was_ended_continues_to_the_same_end(population):
    folder, *_, again = population
    assert [ended.code for ended in again] == [0, 0]
    assert (folder / "whole" / "metrics.csv").read_bytes() == (folder / "ended" / "metrics.csv").read_bytes()
    for chunk in range(4):
        runs = tuple(folder / name / "chunks" / f"{chunk:02d}" for name in ("whole", "ended"))
        assert_equal_weights(runs)


def _handles(pid, number):
    """Whether a process has a handler for a signal; Python has one for Ctrl-C before any line is run."""
    (caught,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return all(int(caught, 16) >> other - 1 & 1 for other in (number, signal.SIGTERM))


@pytest.mark.parametrize("moment", ["run_jobs", "finish_population", "send_population"])
def test_a_signal_to_a_population_at_any_moment_says_how_to_go_on(opsin, tmp_path, monkeypatch, moment):
    for name in ("run_jobs", "finish_population", "send_population"):
        monkeypatch.setattr(f"opsin.launch.population.{name}", lambda *_: [])
    monkeypatch.setattr(f"opsin.launch.population.{moment}", lambda *_: signal.raise_signal(signal.SIGHUP))
    (tmp_path / "recipe.yaml").write_text(POPULATION)
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "ended")
    assert ended.code == 129 and ended.err.endswith("opsin: ended by SIGHUP; `opsin resume ended` continues\n")
    assert not list(tmp_path.rglob(".claim"))


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGUSR1))],
)
def test_a_signal_while_libraries_are_imported_is_one_line_and_a_code(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "opsin", "fit", "--config", "none.yaml"],
        **{"cwd": tmp_path, "stderr": subprocess.PIPE, "text": True, "env": {**os.environ, "PYTHONUNBUFFERED": "1"}},
    )
    while not _handles(process.pid, number):
        assert process.poll() is None
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 128 + number and re.fullmatch(r"opsin: \w[^\n]+ before training began\n", said), said
