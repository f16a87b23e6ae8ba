"""Claims about Lightning's Trainer: each of its settings and callbacks works, or is refused in one line."""

import inspect
import re

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import AsyncCheckpointIO, HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy

from opsin.callbacks import KeepRun
from opsin.errors import ConfigError
from opsin.training.module import OpsinModule
from opsin.training.trainer_settings import REFUSED_CALLBACKS, RULES, WORKING, check_trainer
from tests.helpers.toys import SMALL, few_shot

STEPS = 40
RECIPE = {
    "task": {
        "class_path": "opsin.tasks.FewShot",
        "init_args": {
            "batch_size": 4,
            "train_classes": 8,
            "exemplars": {
                "class_path": "opsin.tasks.GaussianClusters",
                "init_args": {"classes": 12, "exemplars": 2, "features": 8},
            },
        },
    },
    "model": {
        "transformer": {"width": 8, "heads": 2},
        "learning_rate": 0.01,
        "steps_per_batch": 5,
        "log_every": 5,
        "probe_size": 8,
        "evaluation_size": 8,
    },
    "trainer": {
        "max_steps": STEPS,
        "val_check_interval": 2,
        "callbacks": [{"class_path": "opsin.callbacks.InductionHeads", "init_args": {"every": 5}}],
    },
}
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

REFUSED = {
    "devices": [2, "2", [0, 1], "0,1"],
    "num_nodes": [2],
    "strategy": ["ddp", "fsdp", "ddp_spawn", "deepspeed"],
    "precision": ["bf16-mixed", "16-mixed", "bf16-true", "16-true", "transformer-engine", 16, "bf16"],
    "accumulate_grad_batches": [2, 0],
    "gradient_clip_val": [1.0],
    "gradient_clip_algorithm": ["value"],
    "overfit_batches": [1, 0.5],
    "fast_dev_run": [True, 3],
    "limit_train_batches": [0, 0.0, 0.01],
    "limit_val_batches": [0.01],
    "limit_test_batches": [2],
    "limit_predict_batches": [2],
    "min_steps": [10],
    "min_epochs": [1],
    "val_check_interval": ["00:00:00:01", {"minutes": 1}],
    "log_every_n_steps": [-1],
    "detect_anomaly": [True],
    "barebones": [True],
    "plugins": [{"class_path": "lightning.pytorch.plugins.AsyncCheckpointIO"}],
    "sync_batchnorm": [True],
    "use_distributed_sampler": [False],
    "reload_dataloaders_every_n_epochs": [1],
    "model_registry": ["somewhere"],
    "max_steps": [-1, 0],
    "accelerator": ["tpu", "abacus"],
    "profiler": ["xla", "sundial"],
}
"""Values that a recipe may not have. ``check_val_every_n_epoch: 1`` is refused beside an interval beyond the epoch."""

WORKS = {
    "accelerator": ["cpu"],
    "devices": [1, "1", "auto"],
    "strategy": ["auto"],
    "precision": ["32-true", 32],
    "logger": [True, {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}}],
    "max_epochs": [100, -1],
    "limit_train_batches": [1, 3, 0.5],
    "num_sanity_val_steps": [2, -1],
    "enable_checkpointing": [True],
    "enable_progress_bar": [False],
    "enable_model_summary": [True],
    "deterministic": [True, "warn"],
    "benchmark": [True],
    "inference_mode": [False],
    "profiler": ["simple", "advanced"],
    "default_root_dir": ["elsewhere"],
    "enable_autolog_hparams": [False],
    "max_time": ["00:01:00:00"],
}
"""Values with which a run ends as it does without them."""


@pytest.fixture(autouse=True)
def torch_flags():
    """What the Trainer sets for the whole process."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.fixture
def fit(opsin, tmp_path):
    """Train the recipe with settings of its Trainer and callbacks added."""

    def run(settings=None, callbacks=(), folder="run"):
        trainer = {**RECIPE["trainer"], **(settings or {})}
        trainer["callbacks"] = [*RECIPE["trainer"]["callbacks"], *callbacks]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "trainer": trainer}))
        return opsin("fit", "--config", "recipe.yaml", "--run_folder", folder)

    return run


def module(**settings):
    small = {"steps_per_batch": 5, "log_every": 5, "probe_size": 8, "evaluation_size": 8}
    return OpsinModule(few_shot(), SMALL, **small, **settings)


def pairs(table):
    return [pytest.param(name, value, id=f"{name}={value}") for name, values in table.items() for value in values]


def one_line(ended, *named):
    assert ended.code == 2 and re.fullmatch(r"opsin: [^\n]+\n", ended.err), ended.err
    assert all(name in ended.err for name in named), ended.err


# ---- settings -----------------------------------------------------------------------------------------


def test_every_setting_of_the_trainer_is_judged():
    known = {*inspect.signature(pl.Trainer.__init__).parameters} - {"self"}
    assert {rule.setting for rule in RULES} | {*WORKING} == known
    assert not {rule.setting for rule in RULES} & {*WORKING}
    assert REFUSED.keys() >= {rule.setting for rule in RULES}
    tested_elsewhere = {"callbacks", "max_steps", "limit_val_batches", "check_val_every_n_epoch"}
    assert WORKS.keys() | tested_elsewhere >= {*WORKING}


@pytest.mark.parametrize(("name", "value"), pairs(REFUSED))
def test_a_setting_that_does_not_work_is_refused_in_one_line_before_the_folder_is_made(fit, tmp_path, name, value):
    # of what Lightning itself refuses the message has its words
    one_line(fit({name: value}), name if name in {rule.setting for rule in RULES} else "")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.fixture(scope="module")
def plain_metrics(tmp_path_factory):
    """Numbers of the recipe with no further setting."""
    from opsin.cli import main

    folder = tmp_path_factory.mktemp("plain")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert main(["fit", "--config", str(folder / "recipe.yaml"), "--run_folder", str(folder / "run")]) == 0
    return (folder / "run" / "metrics.csv").read_bytes()


@pytest.mark.parametrize(("name", "value"), pairs(WORKS))
def test_a_setting_that_works_leaves_the_numbers_as_they_are(fit, plain_metrics, tmp_path, name, value):
    ended = fit({name: value})
    assert ended.code == 0, ended.err
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == plain_metrics
    made = {path.name for path in tmp_path.iterdir()} - {"recipe.yaml", "run"}
    # nothing lies in the working folder that was not put there by name
    assert made <= {"logs", "elsewhere"}


def test_one_means_one_batch_and_not_all_of_them(fit, tmp_path):
    assert fit({"limit_val_batches": 1}).code == 0
    names = {line.split(",")[2] for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()}
    assert {name.split("/")[1] for name in names if name.startswith("val/")} == {"train"}


def test_validation_within_epochs_needs_an_interval_within_an_epoch(fit, tmp_path):
    one_line(fit({"check_val_every_n_epoch": 1, "val_check_interval": 20}), "val_check_interval", "20", "at most the 9")
    assert fit({"check_val_every_n_epoch": 1, "limit_train_batches": 2, "val_check_interval": 1.0}).code == 0
    assert "val/train/loss" in (tmp_path / "run" / "metrics.csv").read_text()


def test_a_profiler_ends_with_its_report(fit, caplog):
    assert fit({"profiler": "simple"}).code == 0
    assert "run_training_batch" in caplog.text


def test_double_precision_trains_in_double_precision(fit, plain_metrics, tmp_path):
    assert fit({"precision": "64-true"}).code == 0
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert {tensor.dtype for tensor in saved["state_dict"].values()} == {torch.float64}
    assert (tmp_path / "run" / "metrics.csv").read_bytes() != plain_metrics


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"devices": 2}, "trainer.devices: got 2"),
        ({"strategy": DDPStrategy()}, "trainer.strategy: got 'DDPStrategy'"),
        ({"precision": "bf16-mixed"}, "trainer.precision: got 'bf16-mixed'"),
        ({"plugins": [HalfPrecision("bf16-true")]}, "trainer.precision: got 'bf16-true'"),
        ({"plugins": [MixedPrecision("bf16-mixed", "cpu")]}, "trainer.precision: got 'bf16-mixed'"),
        ({"plugins": [AsyncCheckpointIO()]}, r"trainer.plugins: got \['AsyncCheckpointIO'\]"),
        ({"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches: got 2"),
        ({"gradient_clip_val": 1.0}, "trainer.gradient_clip_val: got 1.0, expected null; model.gradient_clip"),
        ({"overfit_batches": 1}, "trainer.overfit_batches: got 1"),
        ({"fast_dev_run": True}, "trainer.fast_dev_run: got True"),
        ({"min_steps": 10}, "trainer.min_steps: got 10"),
        ({"val_check_interval": "00:00:00:01"}, "trainer.val_check_interval: got '1 s'"),
        ({"detect_anomaly": True}, "trainer.detect_anomaly: got True"),
        ({"reload_dataloaders_every_n_epochs": 1}, "trainer.reload_dataloaders_every_n_epochs: got 1"),
    ],
)
def test_a_trainer_built_in_python_is_refused_too(tmp_path, settings, named):
    trainer = pl.Trainer(**{"max_steps": STEPS, "accelerator": "cpu", **QUIET, **settings})
    with pytest.raises(ConfigError, match=f"^{named}"):
        check_trainer(trainer)


def test_fitting_checks_the_trainer_before_a_callback_is_set_up(tmp_path):
    trainer = pl.Trainer(
        max_steps=STEPS, accelerator="cpu", callbacks=[KeepRun(tmp_path / "run")], precision="bf16-mixed", **QUIET
    )
    with pytest.raises(ConfigError, match=r"^trainer.precision"):
        trainer.fit(module())
    assert not (tmp_path / "run").exists()


# ---- the seed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", ["1", "true"])
def test_lightnings_seed_is_refused_by_the_name_of_the_seed_that_counts(opsin, tmp_path, seed):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    one_line(opsin("fit", "--config", "recipe.yaml", "--seed_everything", seed), "seed_everything", "model.seed")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_run_of_before_that_had_it_still_resumes(opsin, fit, tmp_path):
    assert fit().code == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({**saved, "seed_everything": 3}))
    ended = opsin("resume", "run")
    assert ended.code == 0, ended.err


# ---- Lightning's callbacks ----------------------------------------------------------------------------

WORKING_CALLBACKS = {
    "DeviceStatsMonitor": {},
    "EarlyStopping": {"monitor": "val/train/loss", "patience": 100},
    "LambdaCallback": {},
    "LearningRateMonitor": {},
    "ModelCheckpoint": {"monitor": "val/train/loss", "dirpath": "kept"},
    "ModelSummary": {},
    "OnExceptionCheckpoint": {"dirpath": "kept"},
    "RichModelSummary": {},
    "RichProgressBar": {},
    "TQDMProgressBar": {},
    "Timer": None,
    "ThroughputMonitor": None,
}
"""How each is made; None for one that a recipe cannot name: ``trainer.max_time`` is its Timer."""
NEEDED_PACKAGES = {"RichProgressBar": "rich", "RichModelSummary": "rich", "DeviceStatsMonitor": "psutil"}
NEED_LOGGERS = ("DeviceStatsMonitor", "LearningRateMonitor")
BASES = {"Callback", "Checkpoint", "ProgressBar"}


def test_every_callback_of_lightning_is_judged():
    refused = {
        name
        for name in lightning_callbacks.__all__
        if issubclass(getattr(lightning_callbacks, name), tuple(REFUSED_CALLBACKS))
    }
    assert refused | WORKING_CALLBACKS.keys() | BASES == {*lightning_callbacks.__all__}


@pytest.mark.parametrize("name", [name for name, settings in WORKING_CALLBACKS.items() if settings is not None])
def test_a_callback_that_works_leaves_the_numbers_as_they_are(fit, plain_metrics, tmp_path, name):
    added = {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": WORKING_CALLBACKS[name]}
    if package := NEEDED_PACKAGES.get(name):
        pytest.importorskip(package, reason=f"{package}, which {name} needs, is not installed")
    logger = {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}}}
    ended = fit(logger if name in NEED_LOGGERS else None, [added])
    assert ended.code == 0, ended.err
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == plain_metrics


@pytest.mark.parametrize("refused", REFUSED_CALLBACKS, ids=lambda kind: kind.__name__)
def test_a_callback_that_does_not_work_is_refused_before_it_is_set_up(refused):
    class Refused(refused):
        def __init__(self):
            pass

        def setup(self, *_, **__):
            raise AssertionError("it was set up")

        # what is abstract in one of them
        write_on_batch_end = freeze_before_training = finetune_function = setup

    trainer = pl.Trainer(max_steps=STEPS, accelerator="cpu", callbacks=[Refused()], **QUIET)
    with pytest.raises(ConfigError, match=r"^trainer.callbacks: got 'Refused', expected "):
        trainer.fit(module())


@pytest.mark.parametrize("name", ["BatchSizeFinder", "LearningRateFinder", "GradientAccumulationScheduler"])
def test_it_is_refused_from_a_recipe_too(fit, tmp_path, name):
    settings = {"scheduling": {4: 2}} if name == "GradientAccumulationScheduler" else {}
    one_line(fit(None, [{"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": settings}]), name)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: lightning_callbacks.Timer(duration="00:01:00:00"),
        lambda: lightning_callbacks.ThroughputMonitor(batch_size_fn=lambda batch: 20),
    ],
    ids=["Timer", "ThroughputMonitor"],
)
def test_a_callback_that_python_alone_can_make_leaves_the_weights_as_they_are(make, tmp_path):
    weights = []
    for callbacks in ([make()], []):
        model = module(seed=4)
        logger = CSVLogger(tmp_path) if callbacks else False
        pl.Trainer(max_steps=20, accelerator="cpu", callbacks=callbacks, **{**QUIET, "logger": logger}).fit(model)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)


def test_a_callback_without_its_package_is_one_line(fit, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.callbacks.device_stats_monitor._PSUTIL_AVAILABLE", False)
    added = {"class_path": "lightning.pytorch.callbacks.DeviceStatsMonitor"}
    one_line(fit({"logger": True}, [added]), "DeviceStatsMonitor", "psutil")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_callback_may_save_before_training_starts(tmp_path):
    class SaveAtOnce(Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "first.ckpt")

    for path in ("one", "two"):
        model = module(seed=4)
        trainer = pl.Trainer(
            max_steps=10, accelerator="cpu", callbacks=[SaveAtOnce(), KeepRun(tmp_path / path)], **QUIET
        )
        trainer.fit(model, ckpt_path=tmp_path / "first.ckpt" if path == "two" else None, weights_only=True)
    assert (tmp_path / "one" / "metrics.csv").read_bytes() == (tmp_path / "two" / "metrics.csv").read_bytes()
