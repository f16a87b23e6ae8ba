"""Claims about what surrounds a run: home, user, working folder, launcher, compiler; none decides how it ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import opsin as package
from opsin.__main__ import LAUNCHER_VARIABLES
from opsin.errors import ConfigError
from opsin.launch.workers import AGENT_VARIABLES, worker_environment
from opsin.records.version import UNKNOWN_VERSION, installed_version
from opsin.training import compiling
from opsin.training.compiling import CompiledStep, choose_step, compiler_problem, kernels_folder
from tests.helpers.processes import opsin as run_opsin
from tests.test_cli import RECIPE

SHADOWS = ("copy.py", "torch.py", "yaml.py", "random.py", "typing.py", "logging.py", "numpy.py", "opsin_callbacks.py")


# ---- the version --------------------------------------------------------------------------------------


def test_the_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert package.__version__ == installed_version() == version("opsin")


def test_it_is_printed_by_the_command_line(opsin):
    assert opsin("--version") == (0, f"opsin {installed_version()}\n", "")


def test_it_is_unknown_where_nothing_is_installed(monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert installed_version() == UNKNOWN_VERSION


# ---- the working folder -------------------------------------------------------------------------------


def test_nothing_is_imported_from_the_working_folder(tmp_path):
    for name in SHADOWS:
        (tmp_path / name).write_text("raise SystemExit(f'{__file__} was imported')\n")
    command = [sys.executable, "-m", "opsin", "--version"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"opsin {installed_version()}\n", "")


def test_a_worker_imports_nothing_from_it_and_has_no_run_of_an_agent(monkeypatch):
    for name in AGENT_VARIABLES:
        monkeypatch.setenv(name, "trial001")
    found = worker_environment()
    assert found["PYTHONSAFEPATH"] == "1" and not {*AGENT_VARIABLES} & found.keys()


# ---- the launcher -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", ["3", "nonsense"])
def test_what_a_launcher_says_of_other_processes_changes_nothing(tmp_path, rank):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("    - class_path: tests.helpers.killers.EndAt\n", ""))
    told = {**dict.fromkeys(LAUNCHER_VARIABLES, rank), "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "x"}
    more = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "logs"]
    line = ["fit", "--config", "recipe.yaml", "--run_folder"]
    run_opsin(*line, "alone", folder=tmp_path)
    run_opsin(*line, "launched", *more, folder=tmp_path, **told)
    assert (tmp_path / "alone" / "metrics.csv").read_bytes() == (tmp_path / "launched" / "metrics.csv").read_bytes()
    assert [*tmp_path.glob("logs/**/metrics.csv")], "the logger took the run for another process's"


# ---- home and user ------------------------------------------------------------------------------------

NOBODY = """
import os, pwd, sys
def nobody(*_): raise KeyError("uid not found")
pwd.getpwuid = pwd.getpwnam = nobody
for name in ("USER", "LOGNAME", "LNAME", "USERNAME"): os.environ.pop(name, None)
sys.argv = ["opsin", *sys.argv[1:]]
from opsin.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("home", [None, pytest.param("/proc/none", marks=pytest.mark.slow)])
def test_a_user_without_a_name_and_without_a_home_that_can_be_written_trains(tmp_path, home):
    text = RECIPE.replace("tests.helpers.killers.EndAt", "opsin.callbacks.WeightsAndBiases")
    (tmp_path / "recipe.yaml").write_text(text)
    command = [sys.executable, "-c", NOBODY, "fit", "--config", "recipe.yaml", "--run_folder", "run"]
    surroundings = {name: value for name, value in os.environ.items() if name != "HOME"}
    surroundings |= {} if home is None else {"HOME": home}
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=surroundings)
    assert ended.returncode == 0 and (tmp_path / "run" / "summary.json").exists(), ended.stderr
    assert all(line.startswith("opsin: ") for line in ended.stderr.splitlines()), ended.stderr


def test_kernels_are_kept_at_home_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernels_folder() == tmp_path / ".cache" / "opsin" / "kernels"
    # a file where the folder should be: nothing can be written there, not even by root
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".cache").write_text("")
    assert kernels_folder() is None

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert kernels_folder() is None


# ---- the compiler -------------------------------------------------------------------------------------

COMPILERS = {
    "none": None,
    "one that fails at once": 'echo "g++: fatal error: no input files" >&2; exit 1',
    "one without headers": '[ "$1" = --version ] && echo "g++ 12" && exit 0\n[ "$1" = -v ] && exit 0\n'
    'echo "trial.cpp:2:10: fatal error: omp.h: No such file or directory" >&2; exit 1',
}


@pytest.fixture(params=COMPILERS)
def broken_compiler(request, tmp_path, monkeypatch):
    """A path on which the only C++ compiler does not work."""
    folder = tmp_path / "bin"
    folder.mkdir()
    if COMPILERS[request.param] is not None:
        for name in ("g++", "clang++"):
            (folder / name).write_text(f"#!/bin/sh\n{COMPILERS[request.param]}\n")
            (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder) + (os.pathsep + "/nonexistent"))
    monkeypatch.delenv("CXX", raising=False)
    compiler_problem.cache_clear()
    yield request.param
    compiler_problem.cache_clear()


def test_a_compiler_that_does_not_work_is_noticed_in_one_line(broken_compiler):
    problem = compiler_problem()
    assert problem and "\n" not in problem and len(problem) <= compiling.LONGEST_FAILURE
    assert "omp.h" in problem or broken_compiler != "one without headers"


def test_auto_goes_on_eagerly_and_says_so(broken_compiler, caplog):
    step = object()
    with caplog.at_level("INFO"):
        assert choose_step(step, "auto", 10_000) is step
    assert "the step runs eagerly (the C++ compiler does not work: " in caplog.text


def test_compiling_that_is_asked_for_is_refused_before_training(broken_compiler, opsin, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", "--model.compile", "true")
    assert ended.code == 2 and ended.err.startswith("opsin: model.compile: got True, expected false, or a C++ compiler")
    assert len(ended.err.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [torch._dynamo.exc.TorchDynamoException("no\nluck"), OSError("full")])
def test_a_compiler_that_fails_later_leaves_the_step_to_run_eagerly(monkeypatch, caplog, error):
    def failing(step):
        def run(*arguments):
            raise error

        return run

    monkeypatch.setattr(compiling, "compile_step", failing)
    step = CompiledStep(lambda value: value + 1, or_eagerly=True)
    with caplog.at_level("INFO"):
        assert [step(1), step(2)] == [2, 3]
    (line,) = [record.message for record in caplog.records if "eagerly from here on" in record.message]
    assert "\n" not in line
    with pytest.raises(ConfigError, match=r"^model.compile: got True, expected false"):
        CompiledStep(lambda value: value + 1, or_eagerly=False)(1)
