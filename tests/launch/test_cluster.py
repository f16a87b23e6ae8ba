"""Claims about launchers and schedulers: what they say of other processes changes nothing in a run."""

import re

import pytest

from tests.helpers.killers import SignalAfter
from tests.launch.test_signals import RECIPE

JOB = {
    **{"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "sweep", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "2"},
    **{"SLURM_NODEID": "1", "SLURM_NODELIST": "node[1-2]", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"},
}
TASK = "a task of an allocation"
LAUNCHERS = {
    TASK: JOB,
    "a task of many on one machine": {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_JOB_NAME": "bash"},
    "torchrun": {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x"},
    "mpirun": {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "PMI_RANK": "2", "PMI_SIZE": "4"},
    "a pod of Kubeflow": {
        "KUBERNETES_PORT": "x",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
        "WORLD_SIZE": "2",
        "RANK": "1",
    },
    "jsrun": {"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2", "LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "x"},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder of a run that nothing started but this process."""
    from opsin.cli import main

    folder = tmp_path_factory.mktemp("cluster")
    (folder / "recipe.yaml").write_text(RECIPE)
    assert main(["fit", "--config", str(folder / "recipe.yaml"), "--run_folder", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def whole(alone):
    """metrics.csv of that run."""
    return (alone / "metrics.csv").read_bytes()


@pytest.fixture
def fit(opsin, tmp_path, monkeypatch):
    monkeypatch.setattr(SignalAfter, "planned", {})
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return lambda *arguments: opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", *arguments)


def files_of_lightning(folder):
    return [path for path in folder.rglob("*") if "hpc_ckpt" in path.name or path.name == "lightning_logs"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_under_a_launcher_is_the_run_without_one(fit, tmp_path, monkeypatch, whole, launcher):
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    ended = fit()
    assert ended.code == 0 and ended.err == "" and "run" in ended.out
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == whole
    assert (tmp_path / "run" / "summary.json").exists() and (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert files_of_lightning(tmp_path) == []


def test_loggers_of_a_task_that_is_not_the_first_are_not_silenced(fit, tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 2)
    fit("--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "logs")
    assert len(next((tmp_path / "logs").rglob("metrics.csv")).read_text().splitlines()) > 10


@pytest.mark.parametrize("beside", ["hpc_ckpt_1.ckpt", "run/hpc_ckpt_1.ckpt"])
def test_a_checkpoint_of_lightnings_requeue_is_never_begun_from(fit, opsin, tmp_path, monkeypatch, whole, beside):
    opsin("fit", "--config", "recipe.yaml", "--run_folder", "other", "--model.seed", "[7, 8]")
    (tmp_path / beside).parent.mkdir(exist_ok=True)
    (tmp_path / "other" / "checkpoints" / "last.ckpt").rename(tmp_path / beside)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    assert fit().code == 0
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == whole


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=() if name in (TASK, "torchrun") else pytest.mark.slow) for name in LAUNCHERS]
)
def test_a_saved_configuration_trains_the_same_run_in_a_job_elsewhere_beside_a_foreign_checkpoint(
    opsin, tmp_path, monkeypatch, alone, whole, launcher
):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert opsin("fit", "--config", "recipe.yaml", "--run_folder", "other", "--model.seed", "[7, 8]").code == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "other/checkpoints/last.ckpt").rename(elsewhere / "hpc_ckpt_1.ckpt")
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(elsewhere)
    ended = opsin("fit", "--config", str(alone / "config.yaml"), "--run_folder", "run")
    assert ended.code == 0 and ended.err == ""
    assert (elsewhere / "run/metrics.csv").read_bytes() == whole
    assert [path.name for path in files_of_lightning(tmp_path)] == ["hpc_ckpt_1.ckpt"]


def test_a_signal_of_a_scheduler_saves_no_file_of_lightning_and_requeues_nothing(
    fit, opsin, tmp_path, monkeypatch, whole
):
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("subprocess.call", lambda *_: pytest.fail("scontrol was called"))
    SignalAfter.planned[23] = 10
    assert fit().code == 138
    assert files_of_lightning(tmp_path) == []
    assert opsin("resume", "run").code == 0
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == whole


def test_advice_about_srun_is_not_shown(fit, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    ended = fit()
    assert ended.code == 0 and ended.err == ""


def test_a_cluster_environment_in_the_recipe_is_refused(fit, tmp_path):
    ended = fit("--trainer.plugins+=lightning.pytorch.plugins.environments.LightningEnvironment")
    assert ended.code == 2 and re.fullmatch(r"opsin: trainer.plugins: [^\n]*one process[^\n]*\n", ended.err), ended.err
    assert not (tmp_path / "run").exists()


def test_lightnings_own_parts_write_into_the_run_folder_and_not_over_the_checkpoint_that_resumes(fit, tmp_path):
    ended = fit(
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        *("--trainer.callbacks.save_last=true", "--trainer.callbacks.every_n_train_steps=20"),
    )
    assert ended.code == 0
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {"last.ckpt", "last_of_lightning.ckpt"} <= names
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]
