"""Claims about W&B: offline files hold the whole run, read back with wandb's own reader."""

import json
import random
import shutil
import signal
import time

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import wandb
import yaml

import opsin.callbacks.wandb.start as opsin_wandb
from opsin.callbacks import InductionHeads, KeepRun
from opsin.callbacks.readers import run_folder
from opsin.callbacks.wandb.callback import WeightsAndBiases, scalars
from opsin.callbacks.wandb.member_run import flat
from opsin.callbacks.wandb.members import resolved_config
from opsin.callbacks.wandb.offline_files import last_step
from opsin.callbacks.wandb.start import default_mode, finish, start
from opsin.cli import main
from opsin.errors import ConfigError
from opsin.figures.attention import attention_figure, position_names
from opsin.figures.style import as_image
from opsin.model.transformer import Transformer
from opsin.optimizers import SGD
from opsin.task import Layout
from opsin.tasks import FewShot, GaussianClusters
from opsin.training.module import OpsinModule
from opsin.training.observers import Event
from tests.helpers.killers import Killed, kill
from tests.helpers.processes import Started
from tests.helpers.wandb_files import NAMES, history, of_type, offline_runs, read, run_id, steps_of
from tests.helpers.wandb_files import summary as summary_in

CLUSTERS = {"classes": 20, "exemplars": 5, "features": 6}
TINY = {"layers": 2, "width": 16, "heads": 2}
BATCH_SIZE = 8
ONSET = {"value": 960.0, "low": 900.0, "high": 1000.0}


class Announcer(pl.Callback):
    """Announces a phase change and a switch at a step, and knows an onset at the end."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 80:
            pl_module.announce(Event("phase change", 80, 0, "the loss fell at step 80"))
            pl_module.announce(Event("feedback", 80, 0, "a switch is no reason to wake anybody"))

    def on_train_end(self, trainer, pl_module):
        pl_module.summary["onset"] = ONSET


class Crash(pl.Callback):
    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            raise self.error


def fit(folder, *callbacks, **settings):
    return train(KeepRun(folder, checkpoint_every=60), *callbacks, **settings)


def train(keeper, *callbacks, steps=120, seed=0, ckpt_path=None):
    task = FewShot(GaussianClusters(**CLUSTERS), train_classes=12, batch_size=BATCH_SIZE)
    settings = {"steps_per_batch": 20, "evaluation_size": 8, "probe_size": 16}
    module = OpsinModule(task, Transformer(**TINY), seed, learning_rate=1e-3, **settings)
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[*callbacks, InductionHeads(every=20), keeper],
        check_val_every_n_epoch=None,
        val_check_interval=5,
        accelerator="cpu",
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
    return module


def forget_run(folder):
    """Remove what a run has left in a folder, its W&B files apart."""
    shutil.rmtree(folder / "checkpoints")
    for name in ("config.yaml", "metrics.csv", "summary.json", "summary.md"):
        (folder / name).unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder whose run came to its end, and what its offline file holds."""
    folder = tmp_path_factory.mktemp("finished")
    module = fit(folder, WeightsAndBiases(mode="offline", group="claims", tags=["tiny"]), Announcer())
    (path,) = offline_runs(folder)
    return folder, read(path), module


# --- what an offline run holds -----------------------------------------------------------------


def test_the_configuration_plan_and_seeds_are_in_the_run(finished):
    folder, records, module = finished
    run = of_type(records, "run")[0]
    config = run["config"]["update"]
    assert run["project"] == "opsin" and run["display_name"] == folder.name
    assert run["run_group"] == "claims" and run["tags"] == ["tiny"]
    assert config["model"]["transformer"]["width"] == 16 and config["model"]["learning_rate"] == 1e-3
    assert config["task"]["init_args"]["batch_size"] == BATCH_SIZE and config["trainer"]["max_steps"] == 120
    assert config["seed"] == 0 and config["plan_digest"] == module.plan.digest()


def test_every_number_of_the_history_is_in_the_run(finished):
    _, records, module = finished
    logged = {row["_step"]: row for row in history(records)}
    for metric in module.history.names():
        series = module.history[metric]
        for step, (values,) in zip(series.steps, series.values, strict=True):
            for key, value in scalars(metric, module.history.axes(metric), values).items():
                assert logged[step][key] == pytest.approx(value, nan_ok=True)
    assert {"train/loss", "val/train/loss", "induction_strength/1:1", "induction_strength/max"} <= logged[100].keys()


def test_sequences_seen_are_the_x_axis(finished):
    _, records, _ = finished
    metrics = of_type(records, "metric")
    assert {"sequences"} == {metric.get("name") for metric in metrics} - {None}
    assert [metric["step_metric"] for metric in metrics if metric.get("glob_name") == "*"] == ["sequences"]
    rows = history(records)
    assert all(row["sequences"] == BATCH_SIZE * row["step"] and row["step"] == row["_step"] for row in rows)


def test_steps_only_grow(finished):
    steps = [row["_step"] for row in history(finished[1])]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 120


def test_attention_is_drawn_at_log_spaced_steps_at_events_and_at_both_ends(finished):
    folder, records, _ = finished
    drawn = {row["_step"]: row for row in history(records) if "attention.path" in row}
    assert set(drawn) == {0, 20, 40, 60, 80, 100, 120}
    files = offline_runs(folder)[0].parent / "files"
    assert all((files / row["attention.path"]).stat().st_size > 1_000 for row in drawn.values())


def test_the_phase_change_is_an_alert(finished):
    (alert,) = of_type(finished[1], "alert")
    assert (alert["title"], alert["text"]) == ("phase change", "the loss fell at step 80")


def test_the_summary_holds_the_onset_and_what_other_callbacks_add_last(finished):
    folder, records, module = finished
    summary = summary_in(*offline_runs(folder))
    assert {name: summary[f"onset/{name}"] for name in ONSET} == ONSET
    assert summary["steps"] == 120 and summary["wall_time_seconds"] == module.summary["wall_time_seconds"]
    assert of_type(records, "exit")[0].get("exit_code", 0) == 0


# --- a run that stops ----------------------------------------------------------------------------


def test_a_crashed_run_is_kept(tmp_path):
    with pytest.raises(RuntimeError):
        fit(tmp_path, WeightsAndBiases(mode="offline", pictures=0), Crash(20, RuntimeError("crash")))
    records = read(offline_runs(tmp_path)[0])
    assert of_type(records, "exit")[0]["exit_code"] == 1
    assert [row["_step"] for row in history(records)] == [0, 10, 20]


def test_an_interrupted_run_resumes_into_the_same_run(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        fit(tmp_path, WeightsAndBiases(mode="offline"), Announcer(), Crash(100, KeyboardInterrupt()))
    # Lightning ignores further interrupts
    signal.signal(signal.SIGINT, handler)
    fit(tmp_path, WeightsAndBiases(mode="offline"), Announcer(), ckpt_path=tmp_path / "checkpoints/last.ckpt")
    first, second = offline_runs(tmp_path)
    assert of_type(read(first), "exit")[0]["exit_code"] == 1
    assert run_id(first) == run_id(second)
    assert steps_of([first, second]) == list(range(0, 121, 10))
    # the resumed process lives through step 80 again
    assert len([alert for path in (first, second) for alert in of_type(read(path), "alert")]) == 1


def cli_recipe(folder, steps):
    recipe = {
        "task": {
            "class_path": "opsin.tasks.FewShot",
            "init_args": {
                "batch_size": BATCH_SIZE,
                "train_classes": 12,
                "exemplars": {"class_path": "opsin.tasks.GaussianClusters", "init_args": CLUSTERS},
            },
        },
        "model": {"transformer": TINY, "learning_rate": 1e-4, "steps_per_batch": 20},
        "trainer": {"max_steps": steps, "callbacks": [{"class_path": "opsin.callbacks.WeightsAndBiases"}]},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return ["--config", str(path), "--run_folder", str(folder / "run"), "--checkpoint_every", "100"]


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.wait()
        assert time.monotonic() < until, "the run hangs"
        time.sleep(0.02)


def test_a_killed_run_without_an_account_asks_nothing_and_resumes_without_a_step_back(tmp_path, monkeypatch):
    steps = 300
    # with wandb's service of this process, the child would not be killed whole
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    run = tmp_path / "run"
    ledger, checkpoint = run / "wandb_run.json", run / "checkpoints" / "last.ckpt"
    process = Started("fit", *cli_recipe(tmp_path, steps), folder=tmp_path)
    wait_for(lambda: checkpoint.exists() and json.loads(ledger.read_text())["logged_until"] >= 110, process)
    process.send_signal(signal.SIGKILL)
    said = process.wait().err
    assert "API key" not in said and "offline" in said
    assert main(["resume", str(run)]) == 0
    first, second = offline_runs(run)
    taken = steps_of([first, second])
    assert taken == sorted(set(taken)) and taken[-1] == steps
    # what did not reach the file of the killed process stands in the second; step 0 has pictures, and no number
    assert [step for step in taken if step > 0] == list(range(10, steps + 1, 10))
    assert run_id(first) == run_id(second)
    config = of_type(read(second), "run")[0]["config"]["update"]
    assert config["model"]["learning_rate"] == 1e-4 and config["model"]["eps"] == 1e-8
    assert config["task"]["class_path"] == "opsin.tasks.FewShot" and config["trainer"]["max_steps"] == steps


def test_a_process_that_starts_in_the_second_of_a_killed_one_does_not_write_over_its_file(tmp_path):
    now = time.time()
    names = [time.strftime("%Y%m%d_%H%M%S", time.localtime(now + ahead)) for ahead in (0, 1)]
    for name in names:
        (tmp_path / "wandb" / f"offline-run-{name}-abc").mkdir(parents=True)
    opsin_wandb.wait_for_free_second(tmp_path, "other")
    assert time.time() - now < 1
    opsin_wandb.wait_for_free_second(tmp_path, "abc")
    assert time.strftime("%Y%m%d_%H%M%S") not in names


def test_the_file_of_a_run_that_has_ended_is_whole(tmp_path):
    runs = start("offline", tmp_path, [{"project": "opsin", "id": name} for name in "abcd"])
    for run in runs:
        run.log({"x": 1.0}, step=7)
        finish(run)
        assert [last_step(path) for path in offline_runs(tmp_path) if path.name == f"run-{run.id}.wandb"] == [7]


def test_a_run_counts_as_finished_once_its_offline_file_is_whole(tmp_path, monkeypatch):
    found = []

    def look(folder, content, finished=False):
        if finished:
            found.append(steps_of(offline_runs(folder)))
            found.append(json.loads((folder / "wandb_run.json").read_text())["finished"])

    monkeypatch.setattr(run_folder, "write_last", look)
    fit(tmp_path, WeightsAndBiases(mode="offline", pictures=0), steps=20)
    # one that is killed in this moment goes back, and needs its ledger
    assert found == [[0, 10, 20], False]
    assert json.loads((tmp_path / "wandb_run.json").read_text())["finished"]


@pytest.mark.parametrize("steps", [120, 40], ids=["after a checkpoint", "before the first checkpoint"])
def test_a_run_that_is_killed_as_it_finishes_is_sent_once(tmp_path, monkeypatch, steps):
    write, checkpoint = run_folder.write_last, tmp_path / "checkpoints" / "last.ckpt"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_folder, "write_last", lambda *given: kill() if given[2] else write(*given))
        fit(tmp_path, WeightsAndBiases(mode="offline", pictures=0), steps=steps)
    keeper, start_from = KeepRun(tmp_path, checkpoint_every=60), checkpoint if checkpoint.exists() else None
    keeper.goes_on = start_from is None
    train(keeper, WeightsAndBiases(mode="offline", pictures=0), steps=steps, ckpt_path=start_from)
    assert len({run_id(path) for path in offline_runs(tmp_path)}) == 1
    assert steps_of(offline_runs(tmp_path)) == list(range(0, steps + 1, 10))


def test_a_new_run_where_a_finished_one_was_removed_has_an_id_of_its_own(finished, tmp_path):
    fit(tmp_path, WeightsAndBiases(mode="offline", pictures=0), steps=20)
    forget_run(tmp_path)
    fit(tmp_path, WeightsAndBiases(mode="offline", pictures=0), steps=20)
    first, second = offline_runs(tmp_path)
    assert run_id(first) != run_id(second)
    assert steps_of([second]) == [0, 10, 20]
    assert not any("attention.path" in row for row in history(read(second)))


# --- it harms nothing ----------------------------------------------------------------------------


def test_weights_and_random_numbers_are_the_same_without_it(tmp_path):
    weights, numbers = [], []
    for name, watchers in (("with", [WeightsAndBiases(mode="offline"), Announcer()]), ("without", [])):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        module = fit(tmp_path / name, *watchers, steps=40)
        weights.append(module.state_dict())
        numbers.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert numbers[0] == numbers[1]


def test_a_run_outlives_its_observer(tmp_path, monkeypatch, caplog):
    def broken(*_, **__):
        raise ConnectionError("wandb-core\nis gone")

    monkeypatch.setattr("wandb.Run.log", broken)
    with caplog.at_level("INFO"):
        module = fit(tmp_path, WeightsAndBiases(mode="offline"), steps=40)
    assert module.summary["steps"] == 40
    assert "W&B failed (wandb-core is gone); the run goes on without it" in caplog.text


def test_an_unreachable_server_means_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(opsin_wandb, "CONNECT_SECONDS", 1)
    monkeypatch.setattr(opsin_wandb, "WANDB_SETTINGS", {**opsin_wandb.WANDB_SETTINGS, "base_url": "http://127.0.0.1:9"})
    monkeypatch.setattr(opsin_wandb, "has_key", lambda: True)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with caplog.at_level("INFO"):
        (run,) = start("online", tmp_path, [{"project": "opsin", "id": "abc"}])
    run.finish()
    # it remembers the key
    wandb.teardown()
    assert run.offline and len(offline_runs(tmp_path)) == 1
    (line,) = [record.message for record in caplog.records if "did not start online" in record.message]
    assert "\n" not in line


def test_a_run_goes_on_where_not_even_an_offline_one_starts(tmp_path, monkeypatch, caplog):
    def broken(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("wandb.init", broken)
    with caplog.at_level("INFO"):
        module = fit(tmp_path, WeightsAndBiases(mode="offline"), steps=20)
    assert module.summary["steps"] == 20
    assert "no space left on device); the run goes on without it" in caplog.text


def test_online_without_a_key_means_offline_with_one_line(tmp_path, caplog):
    with caplog.at_level("INFO"):
        (run,) = start("online", tmp_path, [{"project": "opsin", "id": "abc"}])
    run.finish()
    assert run.offline and "no W&B API key is configured" in caplog.text


def test_the_mode_follows_the_environment(monkeypatch, tmp_path):
    assert default_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password none\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert default_mode() == "online"
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert default_mode() == "online"
    for said, mode in {"offline": "offline", "dryrun": "offline", "disabled": "disabled", "online": "online"}.items():
        monkeypatch.setenv("WANDB_MODE", said)
        assert default_mode() == mode


def test_disabled_writes_nothing(tmp_path):
    fit(tmp_path, WeightsAndBiases(mode="disabled"), steps=20)
    assert not (tmp_path / "wandb").exists() and not (tmp_path / "wandb_run.json").exists()


# --- what is sent -------------------------------------------------------------------------------


def test_heads_are_named_layer_and_head():
    assert scalars("s", {"layer": 2, "head": 2}, np.array([[0.0, 1.0], [2.0, 3.0]])) == {
        "s/0:0": 0.0,
        "s/0:1": 1.0,
        "s/1:0": 2.0,
        "s/1:1": 3.0,
        "s/max": 3.0,
    }
    assert scalars("loss", {}, np.array(1.0)) == {"loss": 1.0}


def test_of_many_neurons_the_largest_and_the_mean_are_sent_and_of_few_every_one():
    norms = np.arange(65.0)
    norms[3] = np.nan  # a neuron without a number
    mean = (65 * 32 - 3) / 64
    assert scalars("norm", {"neuron": 65}, norms) == {"norm/max": 64.0, "norm/mean": pytest.approx(mean)}
    assert len(scalars("norm", {"neuron": 64}, np.arange(64.0))) == 64 + 1
    assert len(scalars("s", {"layer": 9, "head": 8}, np.zeros((9, 8)))) == 72 + 1


def test_a_nested_summary_becomes_flat():
    assert flat({"a": {"b": {"c": 1}}, "d": [{"e": 2}], "f": [3, 4]}) == {"a/b/c": 1, "d/0/e": 2, "f": [3, 4]}


def test_a_negative_number_of_pictures_is_refused():
    with pytest.raises(ConfigError, match="pictures"):
        WeightsAndBiases(pictures=-1)


@pytest.mark.parametrize("positions", [5, 41])
def test_a_picture_has_a_panel_for_every_head(positions):
    names = [str(position) for position in range(positions)]
    patterns = np.random.default_rng(0).random((2, 3, positions, positions))
    figure = attention_figure(patterns, np.array([[0.0, 0.5, 1.0], [np.nan] * 3]), names, "title")
    image = np.asarray(as_image(figure))
    drawn = np.stack([panel.get_array() for panel in figure.axes[0].images])
    assert np.array_equal(drawn, patterns.reshape(6, positions, positions))
    assert [text.get_text() for text in figure.axes[0].texts][2:4] == ["0:2  induction 1.00", "head 1:0"]
    assert image.shape[2] == 3 and image.std() > 0


def test_positions_are_named_by_what_they_hold():
    few_shot = FewShot(GaussianClusters(**CLUSTERS), train_classes=12)
    assert position_names(few_shot.layout) == ["x1", "y1", "x2", "y2", "x3"]
    tokens_only = Layout(features=(), tokens=(0, 1, 2), labels=(), scored=(2,))
    assert position_names(tokens_only) == ["t1", "t2", "t3"]


def test_a_model_and_an_optimizer_with_a_class_are_in_the_configuration_as_a_recipe_names_them():
    task = FewShot(GaussianClusters(**CLUSTERS), batch_size=BATCH_SIZE, train_classes=12)
    model = OpsinModule(task, Transformer(width=8, heads=2), optimizer=SGD(learning_rate=0.5), compile=False)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(max_steps=1, accelerator="cpu", **quiet).fit(model)
    found = resolved_config(model, None)["model"]
    assert found["optimizer"]["class_path"] == "opsin.optimizers.sgd.SGD"
    assert found["optimizer"]["init_args"]["learning_rate"] == 0.5
    assert found["transformer"]["width"] == 8 and found["network"] is None
