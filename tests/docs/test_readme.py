"""Every command and every piece of code in the README is executed, for a few steps."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.paths import ROOT
from tests.helpers.processes import opsin
from tests.helpers.toys import script

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.strip().splitlines()]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder that looks like the repository's root, so that what runs leave behind is left there."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path


def run(command: str, *further: str) -> None:
    """A process of its own for each command, as for a user."""
    program, *arguments = shlex.split(command)
    assert program == "opsin"
    opsin(*arguments, *further, folder=Path.cwd())


def test_the_first_command_runs_the_main_job():
    (command,) = [line for line in commands() if line == "./scripts/run"]
    made = subprocess.run(
        [ROOT / command, "--trainer.max_steps", "4"], check=True, capture_output=True, text=True, cwd="/"
    )
    (folder,) = re.findall(r"^files +(\S+)$", made.stdout, flags=re.MULTILINE)
    assert (ROOT / folder / "summary.json").exists()
    shutil.rmtree(ROOT / folder)


def test_the_tour_runs_in_order(here):
    tour = [line for line in commands() if line.startswith("opsin") and "omniglot" not in line]
    assert len(tour) == 5
    short = ["--trainer.max_steps", "4", "--model.steps_per_batch", "2", "--model.log_every", "2"]
    for command in tour:
        run(command.replace("--at 3000", "--at 2"), *(short if " fit " in command else []))
    assert (here / "runs" / "mean" / "summary.json").exists()
    assert (here / "runs" / "induction-at-2" / "summary.json").exists()


def test_the_omniglot_command_reads_the_archives_it_names(here):
    from tests.tasks.shared.test_exemplars import archive

    (command,) = [line for line in commands() if "omniglot" in line]
    names = re.findall(r"(\w+\.zip)", command)
    for offset, name in enumerate(names):
        characters = [f"Alphabet/character{number:02}" for number in range(30 * offset, 30 * offset + 30)]
        archive(here / name, characters, drawings=5)
    run(command, "--trainer.max_steps", "4")


def test_the_two_lines_are_those_of_the_clamped_recipe():
    (clamp,) = [block for block in blocks("yaml") if "previous_token" in block]
    assert len(clamp.strip().splitlines()) == 2
    callbacks = yaml.safe_load((ROOT / "recipes" / "induction_clamped.yaml").read_text())["trainer"]["callbacks"]
    assert yaml.safe_load(clamp)[0] in callbacks


def test_every_piece_of_yaml_is_a_callback_that_trains(here):
    recipe = yaml.safe_load((here / "recipes" / "induction.yaml").read_text())
    for number, block in enumerate(blocks("yaml")):
        callbacks = yaml.safe_load(block)
        # a window in the far future is moved to where a run of four steps can see it
        for callback in callbacks:
            callback["init_args"].get("schedule", {}).update(start=0)
        recipe["trainer"] |= {"callbacks": callbacks, "max_steps": 4}
        (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        run(f"opsin fit --config recipe.yaml --run_folder {number}")


def test_the_python_example_has_at_most_ten_lines_and_runs(here):
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line]) <= 10
    short = example.replace("max_steps=12_000", "max_steps=4")
    assert short != example
    subprocess.run([sys.executable, "-c", short], check=True, capture_output=True)
    assert (here / "runs" / "from-python" / "metrics.csv").exists()


def bench_command() -> Path:
    (command,) = [line for line in commands() if "bench.py" in line]
    return ROOT / command.removeprefix("python ")


def assert_all_loops_were_measured(figures: Path) -> None:
    measured = json.loads(figures.read_text())
    assert measured["ratio_bare_to_eager"] > 0 and measured["ratio_clamps_and_trackers_to_bare"] > 0


@pytest.mark.slow
def test_the_bench_command_measures_all_loops(tmp_path, monkeypatch):
    bench = script(bench_command().stem)
    # what is compiled, without the compiler
    monkeypatch.setattr("opsin.training.compiling.compile_step", lambda step: step)
    monkeypatch.setattr(bench, "STEPS_PER_TURN", {"eager": 20, "opsin": 100})
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "1", "--json", str(tmp_path / "bench.json")])
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    bench.main()
    assert_all_loops_were_measured(tmp_path / "bench.json")


@pytest.mark.slow
def test_the_bench_command_measures_all_loops_compiled(tmp_path):
    command = [sys.executable, bench_command(), "--rounds", "1", "--json", tmp_path / "bench.json"]
    subprocess.run(command, check=True, capture_output=True)
    assert_all_loops_were_measured(tmp_path / "bench.json")


def test_the_check_command_reads_a_folder(tmp_path):
    (command,) = [line for line in commands() if "check_reference.py" in line]
    program, folder = command.removeprefix("python ").split()
    assert folder == "DIR"
    ended = opsin(tmp_path, script=ROOT / program, folder=tmp_path, check=False)
    assert ended.code == 1 and "no .npz files" in ended.out


def test_every_command_in_the_readme_is_one_that_a_test_here_executes():
    verbs = tuple(f"opsin {verb}" for verb in ("fit", "resume", "fork", "sites"))
    known = ("./scripts/run", *verbs, "python scripts/check_reference.py")
    assert all(command.startswith((*known, "python scripts/bench.py")) for command in commands())
    assert "`./scripts/test`" in README and (ROOT / "docs" / "summary.png").exists()
