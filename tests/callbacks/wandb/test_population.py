"""Claims about W&B where several members train: a run for each, and one for what they found together."""

import json
import os
from pathlib import Path

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
import yaml

from opsin.callbacks import Ablate, Clamp, InductionHeads, KeepRun, PhaseChange
from opsin.callbacks.wandb.callback import WeightsAndBiases
from opsin.callbacks.wandb.members import LONGEST_TAG, summary_of
from opsin.callbacks.wandb.population import send_population
from opsin.cli import main
from opsin.model.transformer import Transformer
from opsin.population.tables import QUANTITIES
from opsin.reports.population import finish_population
from opsin.tasks import FewShot, GaussianClusters
from opsin.training.module import OpsinModule
from opsin.training.observers import Event
from tests.helpers import killers
from tests.helpers.paths import ROOT
from tests.helpers.populations import record, write_population
from tests.helpers.wandb_files import NAMES, about, history, of_type, offline_runs, read, run_id, steps_of, summary

STEPS, BATCH_SIZE = 200, 8
CLUSTERS = {"classes": 20, "exemplars": 5, "features": 6}
CLAMP = {"class_path": "opsin.callbacks.Clamp", "init_args": {"heads": ["0:1"], "pattern": "previous_token"}}
WATCHERS = [
    {"class_path": "opsin.callbacks.PhaseChange"},
    {"class_path": "opsin.callbacks.InductionHeads", "init_args": {"every": 20}},
    {"class_path": "opsin.callbacks.WeightsAndBiases", "init_args": {"tags": ["tiny"], "pictures": 0}},
    {"class_path": "killers.KillAfter"},
]
RECIPE = {
    "task": {
        "class_path": "opsin.tasks.FewShot",
        "init_args": {
            "exemplars": {"class_path": "opsin.tasks.GaussianClusters", "init_args": CLUSTERS},
            "batch_size": BATCH_SIZE,
            "train_classes": 12,
        },
    },
    "model": {
        **{"transformer": {"layers": 2, "width": 16, "heads": 2}, "seed": 3, "learning_rate": 1e-3},
        **{"steps_per_batch": 10, "evaluation_size": 8, "probe_size": 16, "compile": False},
    },
    "trainer": {"max_steps": STEPS, "callbacks": WATCHERS},
    "population": {
        **{"seeds": 2, "processes": 1},
        "conditions": {
            "none": {},
            "clamped": {"callbacks": [CLAMP], "learning_rate": 1e-2},
            "diverging": {"learning_rate": 1e30},
        },
    },
}


def no_account(monkeypatch, folder):
    # with wandb's service of this process, a child would not be killed whole
    for name in (*NAMES, "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(folder / "no-netrc"))


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    no_account(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A population of one chunk, which was killed while it trained and resumed to its end."""
    here = tmp_path_factory.mktemp("population")
    (here / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    tests = str(Path(killers.__file__).parent)
    with pytest.MonkeyPatch.context() as patch:
        no_account(patch, here)
        patch.syspath_prepend(tests)
        # of the working folder a worker imports nothing
        patch.setenv("PYTHONPATH", os.pathsep.join([tests, str(ROOT)]))
        patch.setenv("OPSIN_TEST_KILL", "105:0")
        start = ["--config", str(here / "recipe.yaml"), "--run_folder", str(here / "few"), "--checkpoint_every", "40"]
        assert main(["fit", *start]) == 1
        patch.delenv("OPSIN_TEST_KILL")
        assert main(["resume", str(here / "few")]) == 0
    return here / "few"


def runs_of_members(folder):
    """Files of every member by (condition, seed), the killed process' first."""
    found = {}
    for path in offline_runs(folder / "chunks/00"):
        config = about(path)["config"]["update"]
        found.setdefault((config["condition"], config["seed"]), []).append(path)
    return found


# --- members of a population -------------------------------------------------------------------


def test_every_member_is_one_run_in_the_populations_group(killed):
    runs = runs_of_members(killed)
    assert set(runs) == {(condition, seed) for condition in ("none", "clamped", "diverging") for seed in (3, 4)}
    for (condition, seed), paths in runs.items():
        assert len(paths) == 2 and len({run_id(path) for path in paths}) == 1
        for run in map(about, paths):
            assert (run["display_name"], run["run_group"]) == (f"{condition} seed {seed}", "few")
            assert sorted(run["tags"]) == sorted(["tiny", condition, f"seed {seed}"])


def test_a_members_configuration_is_its_own(killed):
    runs = runs_of_members(killed)
    for condition, rate, writers in (("none", 1e-3, 0), ("clamped", 1e-2, 1)):
        config = about(runs[condition, 4][-1])["config"]["update"]
        assert config["model"]["seed"] == 4 and config["model"]["learning_rate"] == rate
        names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
        assert names.count("Clamp") == len(config["plan"]) == writers
        assert config["member"] == {"none": 1, "clamped": 3}[condition]


def test_nothing_of_a_member_is_lost_or_repeated_by_a_kill(killed):
    table = pd.read_csv(killed / "metrics.csv")
    members = json.loads((killed / "population.json").read_text())["members"]
    for row in members:
        paths = runs_of_members(killed)[row["condition"], row["seed"]]
        assert steps_of(paths) == list(range(0, STEPS + 1, 10))
        own = table[(table["member"] == row["member"]) & (table["metric"] == "train/loss")]
        sent = {item["_step"]: item for path in paths for item in history(read(path))}
        for step, loss in zip(own["step"], own["value"], strict=True):
            assert float(sent[step]["train/loss"]) == pytest.approx(loss, nan_ok=True)
        assert sent[100]["induction_strength/1:1"] is not None and not any("member" in key for key in sent[100])


def test_sequences_seen_are_every_members_x_axis(killed):
    for paths in runs_of_members(killed).values():
        axes = [metric["step_metric"] for metric in of_type(read(paths[-1]), "metric") if metric.get("glob_name")]
        assert axes == ["sequences"]
        assert all(row["sequences"] == BATCH_SIZE * row["_step"] for row in history(read(paths[-1])))


def test_a_members_summary_is_its_own_and_a_diverged_one_has_failed(killed):
    runs = runs_of_members(killed)
    whole = json.loads((killed / "chunks/00/summary.json").read_text())
    for place, (who, paths) in enumerate(sorted(runs.items(), key=lambda item: item[0][0] == "diverging")):
        found, code = summary(paths[-1]), of_type(read(paths[-1]), "exit")[0].get("exit_code", 0)
        assert (who[0] == "diverging") == (code == 1) == (found.get("status") == "diverged"), place
    slot = next(m["slot"] for m in _members(killed) if (m["condition"], m["seed"]) == ("clamped", 3))
    found = summary(runs["clamped", 3][-1])
    assert found["final_loss"] == whole["members"][slot]["final_loss"]
    assert found["interventions/0/active_steps"] == STEPS and found["steps"] == STEPS
    assert "interventions/0/active_steps" not in summary(runs["none", 3][-1])


def _members(folder):
    return json.loads((folder / "population.json").read_text())["members"]


def test_a_population_sends_its_summary_into_the_members_group(killed):
    early, path = offline_runs(killed)
    run = about(path)
    assert run_id(early) == run["run_id"] and steps_of([early, path]) == [0, 1]
    assert (run["display_name"], run["run_group"], run["job_type"]) == ("few summary", "few", "summary")
    assert sorted(run["tags"]) == ["summary", "tiny"] and len(run["config"]["update"]["population"]["conditions"]) == 3
    assert {"members.path", "conditions.path", "differences.path", "population.path"} <= history(read(path))[0].keys()


# --- the summary of a population -----------------------------------------------------------------

SEEDS, ONSETS = range(4), (4000.0, 4400.0, 4100.0, 5000.0)
GRID = {"none": None, "early": {"start": 0, "length": 10, "unit": "steps"}}


def population(folder, *callbacks, final=0.01):
    """A finished population of windows in which the window delays the onset by 2,000 to 2,300 sequences."""
    members = [(condition, seed) for condition in GRID for seed in SEEDS]
    onsets = [*ONSETS, *(onset + 2000 + 100 * place for place, onset in enumerate(ONSETS))]
    write_population(folder, members, [record(onset, final) for onset in onsets], grid=GRID)
    recipe = {"trainer": {"callbacks": list(callbacks)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    return finish_population(folder)


def table(path, name):
    content = json.loads((path.parent / "files" / history(read(path))[0][f"{name}.path"]).read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def test_a_summary_run_holds_the_tables_the_figures_and_the_intervals(tmp_path):
    found = population(tmp_path / "p", WATCHERS[2])
    send_population(tmp_path / "p", found)
    (path,) = offline_runs(tmp_path / "p")
    for name, rows in found.items():
        assert table(path, name) == rows
    assert [row["onset"] for row in table(path, "members")][:4] == list(ONSETS)
    (row,) = history(read(path))
    figures = path.parent / "files"
    assert all((figures / row[f"{name}.path"]).stat().st_size > 1_000 for name in ("population", "critical_period"))
    values = summary(path)
    assert values["none/onset"] == sum(ONSETS) / 4 and values["none/onset_low"] < values["none/onset"]
    assert values["early - none/onset"] == 2150
    (difference,) = [row for row in found["differences"] if row["quantity"] == "onset"]
    assert values["early - none/onset_low"] == difference["low"] < 2150 < values["early - none/onset_high"]
    assert {f"early/{name}" for name in QUANTITIES} <= values.keys()


def test_a_summary_sent_again_is_the_same_run_one_step_on_and_never_the_same_twice(tmp_path):
    folder = tmp_path / "p"
    for final in (0.01, 0.01, 0.02):
        send_population(folder, population(folder, WATCHERS[2], final=final))
    first, second = offline_runs(folder)
    assert run_id(first) == run_id(second) and steps_of([first, second]) == [0, 1]
    assert summary(second)["none/final_loss"] == pytest.approx(0.02)


def test_a_population_without_the_callback_or_with_a_disabled_one_sends_nothing(tmp_path):
    off = {"class_path": "opsin.callbacks.WeightsAndBiases", "init_args": {"mode": "disabled"}}
    for name, callbacks in (("without", WATCHERS[:1]), ("disabled", [off])):
        send_population(tmp_path / name, population(tmp_path / name, *callbacks))
        assert not list((tmp_path / name).glob("wandb*"))


def test_a_population_outlives_a_summary_that_cannot_be_sent(tmp_path, monkeypatch, caplog):
    def broken(*_, **__):
        raise ConnectionError("wandb-core is gone")

    found = population(tmp_path / "p", WATCHERS[2])
    monkeypatch.setattr("wandb.Run.log", broken)
    with caplog.at_level("INFO"):
        send_population(tmp_path / "p", found)
    assert "W&B failed (wandb-core is gone); the population is whole without it" in caplog.text


# --- several seeds without a population ------------------------------------------------------------


class Announcer(pl.Callback):
    """Announces a phase change of the second member."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 20:
            pl_module.announce(Event("phase change", 20, 1, "phase change in member 1: the loss fell"))


def fit(folder, *callbacks, seed=(3, 4), config=None):
    task = FewShot(GaussianClusters(**CLUSTERS), train_classes=12, batch_size=BATCH_SIZE)
    settings = {"steps_per_batch": 20, "evaluation_size": 8, "probe_size": 16, "compile": False}
    module = OpsinModule(task, Transformer(layers=2, width=16, heads=2), list(seed), [1e-3, 1e-2], **settings)
    trainer = pl.Trainer(
        max_steps=40,
        callbacks=[*callbacks, InductionHeads(every=20), PhaseChange(), KeepRun(folder, config)],
        check_val_every_n_epoch=None,
        val_check_interval=5,
        accelerator="cpu",
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(module)
    return module


def test_every_seed_is_a_run_and_the_weights_are_the_same_without_them(tmp_path):
    writers = [Clamp(heads=["0:1"], pattern="previous_token", members=[1]), Ablate(heads=["1:0"], members=[0])]
    watched = fit(tmp_path / "seeds", WeightsAndBiases(group="mine"), Announcer(), *writers)
    alone = fit(tmp_path / "alone", *writers)
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in watched.state_dict().items())
    runs = {about(path)["config"]["update"]["seed"]: path for path in offline_runs(tmp_path / "seeds")}
    assert set(runs) == {3, 4}
    for slot, (seed, writer) in enumerate(((3, "Ablate"), (4, "Clamp"))):
        run, rows = about(runs[seed]), {row["_step"]: row for row in history(read(runs[seed]))}
        assert (run["display_name"], run["run_group"], run["tags"]) == (f"seeds seed {seed}", "mine", [f"seed {seed}"])
        assert [row["writer"] for row in run["config"]["update"]["plan"]] == [writer]
        losses = watched.history["train/loss"]
        assert [rows[step]["train/loss"] for step in losses.steps] == [float(value[slot]) for value in losses.values]
        assert {step for step, row in rows.items() if "attention.path" in row} == {0, 20, 40}
        alerts = [(alert["title"], alert["text"]) for alert in of_type(read(runs[seed]), "alert")]
        assert alerts == [("phase change", "phase change: the loss fell")] * slot


def test_runs_that_share_a_folder_for_their_files_keep_ids_of_their_own(tmp_path):
    files = tmp_path / "files"
    for name in ("a", "b"):
        fit(tmp_path / name, WeightsAndBiases(folder=str(files), pictures=0))
    ids = [json.loads(path.read_text())["id"] for path in sorted(tmp_path.glob("[ab]/wandb_run_*.json"))]
    assert len(set(ids)) == 4 and sorted(ids) == sorted(run_id(path) for path in offline_runs(files))


def test_a_long_name_of_a_condition_is_cut_to_what_a_tag_may_be(tmp_path):
    condition = "x" * 100
    rows = [{"member": m, "condition": condition, "seed": 3 + m, "chunk": 0, "slot": m} for m in (0, 1)]
    (tmp_path / "population.json").write_text(json.dumps({"members": rows, "conditions": [condition]}))
    fit(tmp_path / "chunks/00", WeightsAndBiases(name="n", pictures=0))
    runs = [about(path) for path in offline_runs(tmp_path / "chunks/00")]
    assert {run["display_name"] for run in runs} == {f"n {condition} seed {seed}" for seed in (3, 4)}
    assert all("x" * LONGEST_TAG in run["tags"] and run["run_group"] == tmp_path.name for run in runs)


def test_what_a_reader_found_of_every_member_is_told_of_each_alone():
    model = OpsinModule(FewShot(), seed=[1, 2])
    model.summary = {"steps": 3, "members": [{"onset": 4}, {"onset": 5}], "entropy_neurons": [{"a": 1}, {"a": 2}]}
    assert summary_of(model, 1) == {"steps": 3, "onset": 5, "entropy_neurons": {"a": 2}}
