"""Claims about W&B's environment variables: nonsense in them ends no run, and an agent's run receives the trial."""

import json

import pytest
import wandb

from opsin.callbacks.wandb.callback import WeightsAndBiases
from opsin.callbacks.wandb.start import LONGEST_LINE, default_mode, one_line, wanted_ids
from tests.callbacks.wandb.test_callback import fit
from tests.helpers.processes import opsin as run_opsin
from tests.helpers.wandb_files import NAMES, offline_runs, run_id
from tests.test_cli import RECIPE

NONSENSE = [
    *({"WANDB_MODE": ""}, {"WANDB_MODE": "banana"}, {"WANDB_SILENT": "perhaps"}, {"WANDB_DIR": "/proc/nope"}),
    *({"WANDB_BASE_URL": "nonsense"}, {"WANDB_DISABLED": "true"}, {"WANDB_SERVICE": "nonsense"}),
    *({"WANDB_RUN_ID": "a/b:c"}, {"WANDB_SWEEP_ID": "///"}, {"WANDB_SWEEP_ID": "x", "WANDB_SWEEP_PARAM_PATH": "none"}),
    *({"WANDB_INIT_TIMEOUT": "soon"}, {"WANDB_CONSOLE": "loud"}, {"WANDB_RESUME": "perhaps"}, {"WANDB_TAGS": ","}),
]


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.mark.slow
@pytest.mark.parametrize("variables", NONSENSE, ids=str)
def test_nonsense_in_the_environment_ends_no_run(tmp_path, variables):
    text = RECIPE.replace("tests.helpers.killers.EndAt", "opsin.callbacks.WeightsAndBiases")
    (tmp_path / "recipe.yaml").write_text(text)
    ended = run_opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", folder=tmp_path, **variables)
    assert (tmp_path / "run" / "summary.json").exists()
    assert "Traceback" not in ended.err and len(ended.err.splitlines()) < 5


@pytest.mark.parametrize("broken", ["default_mode", "open_ledgers", "start"])
def test_a_failure_at_the_start_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, caplog, broken):
    def failing(*_, **__):
        raise ValueError("1 validation error\nfor Settings: " + "x" * 1000)

    monkeypatch.setattr(f"opsin.callbacks.wandb.callback.{broken}", failing)
    with caplog.at_level("INFO"):
        model = fit(tmp_path, WeightsAndBiases(mode=None if broken == "default_mode" else "offline"), steps=20)
    assert model.summary["steps"] == 20
    (line,) = [record.message for record in caplog.records if "W&B failed" in record.message]
    assert line.endswith("the run goes on without it") and "\n" not in line and len(line) < LONGEST_LINE + 80


def test_a_run_that_the_environment_names_has_that_name(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    fit(tmp_path, WeightsAndBiases(mode="offline", pictures=0), steps=20)
    (path,) = offline_runs(tmp_path)
    assert run_id(path) == "mine" == json.loads((tmp_path / "wandb_run.json").read_text())["id"]
    assert wanted_ids(2) == ["mine-0", "mine-1"]


def test_the_trial_of_an_agent_logs_to_the_agents_run_and_remembers_its_name(tmp_path, monkeypatch):
    wandb.teardown()
    for name, value in {"WANDB_RUN_ID": "trial001", "WANDB_SWEEP_ID": "abcd1234"}.items():
        monkeypatch.setenv(name, value)
    fit(tmp_path, WeightsAndBiases(mode="offline", pictures=0), steps=20)
    (path,) = offline_runs(tmp_path)
    assert run_id(path) == "trial001" == json.loads((tmp_path / "wandb_run.json").read_text())["id"]
    # it remembers the sweep
    wandb.teardown()


def test_a_disabled_wandb_is_disabled(monkeypatch):
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert default_mode() == "disabled"


def test_a_line_of_wandb_has_an_end():
    assert one_line(ValueError("a\n b")) == "a b" and len(one_line(ValueError("x" * 999))) <= LONGEST_LINE + 4
