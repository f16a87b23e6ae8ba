"""Claims about what Lightning's callbacks monitor: what the run records, by the names of metrics.csv, or one line."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger

from opsin.callbacks import InductionHeads, KeepRun
from opsin.callbacks.readers.base import ProbeReader
from opsin.errors import ConfigError
from opsin.training.module import OpsinModule
from tests.helpers.toys import SMALL, few_shot

QUIET = dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False)


def module(**settings):
    small = {"steps_per_batch": 5, "log_every": 5, "probe_size": 8, "evaluation_size": 8, "learning_rate": 0.01}
    return OpsinModule(few_shot(), SMALL, **{**small, **settings})


def fit(model, *callbacks, steps=40, ckpt_path=None, **settings):
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    often = {"check_val_every_n_epoch": None, "val_check_interval": 2, "logger": False}
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_checkpointing=checkpoints,
        **{**QUIET, **often, **settings},
    )
    trainer.fit(model, ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("name", ["train/loss", "val/classes/loss", "induction_strength/1:1"])
def test_what_metrics_csv_records_can_be_monitored_and_is_the_mean_of_the_members(name, members, tmp_path):
    model = module(seed=[*range(members)])
    best = ModelCheckpoint(tmp_path, monitor=name, mode="max", save_top_k=1, every_n_train_steps=10)
    fit(model, InductionHeads(every=5), EarlyStopping(name, patience=100), best)
    metric, _, head = name.partition("/1:")
    recorded = [values[..., 1, 1] if head else values for values in model.history[metric].values]
    assert float(best.best_model_score) in [pytest.approx(float(np.mean(values)), rel=1e-6) for values in recorded]


def test_a_monitored_record_ends_the_run():
    model = module()
    trainer = fit(model, InductionHeads(every=5), EarlyStopping("induction_strength/0:0", patience=2, min_delta=10.0))
    # at the first validation nothing was better, and then twice
    assert trainer.global_step == 30


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("val_loss", "val/train/loss"),
        ("train_loss", "train/loss"),
        ("val/clases/loss", "val/classes/loss"),
        ("induction_strength", "induction_strength/1:1"),
        ("accuracy", "train/accuracy"),
    ],
)
@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_a_name_that_nobody_records_is_refused_with_the_nearest_before_the_folder_is_made(
    tmp_path, kind, name, nearest
):
    keeper = KeepRun(tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"^{kind.__name__}.monitor: got '{name}', .* nearest is '{nearest}'"):
        fit(module(), InductionHeads(every=5), keeper, kind(monitor=name))
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_set_that_no_validation_sees_is_not_recorded():
    with pytest.raises(ConfigError, match=r"^EarlyStopping.monitor: got 'val/classes/loss'"):
        fit(module(), EarlyStopping("val/classes/loss"), limit_val_batches=1)


def test_steps_epochs_and_rates_can_be_monitored(tmp_path):
    newest = ModelCheckpoint(tmp_path, monitor="step", mode="max", every_n_train_steps=10)
    rate = EarlyStopping("lr-MemberAdam", patience=100)
    fit(module(), newest, rate, LearningRateMonitor("step"), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert "step=40" in newest.best_model_path


def test_what_a_callback_of_the_user_logs_can_be_monitored():
    class Mine(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.log("mine", 1.0)

    trainer = fit(module(), Mine(), EarlyStopping("mine", patience=1, min_delta=1.0))
    assert trainer.global_step == 20


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"val_check_interval": 100}, r"^trainer.val_check_interval: got 100, expected at most 8"),
        ({"limit_val_batches": 0}, r"^trainer.val_check_interval: got 2, expected at most 8"),
        (
            {"check_val_every_n_epoch": 1, "val_check_interval": None},
            r"^EarlyStopping.check_on_train_epoch_end: got True",
        ),
    ],
)
def test_an_early_stopping_that_would_never_look_is_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        fit(module(), EarlyStopping("train/loss"), **settings)


def test_a_resumed_run_shows_what_was_recorded_last(tmp_path):
    shown = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            shown.append(trainer.callback_metrics.get("induction_strength/0:0"))

    callbacks = [InductionHeads(every=5), EarlyStopping("induction_strength/0:0", patience=100)]
    model = module()
    fit(model, *callbacks, KeepRun(tmp_path), steps=20)
    last = torch.tensor(model.history["induction_strength"].values[-1][0, 0, 0])
    again = [InductionHeads(every=5), EarlyStopping("induction_strength/0:0", patience=100)]
    fit(module(), *again, Look(), KeepRun(tmp_path), steps=40, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert shown[0] == last


def test_a_plateau_follows_the_training_loss_and_no_other_metric():
    def plateau(monitor):
        return lambda optimizer: ReduceLROnPlateau(optimizer, monitor, patience=0, threshold=10.0)

    model = module(lr_scheduler=plateau("train/loss"))
    fit(model)
    assert model.optimizers().param_groups[0]["lr"] < 0.01
    with pytest.raises(ConfigError, match=r"^model.lr_scheduler.monitor: got 'val/classes/loss', expected 'train"):
        fit(module(lr_scheduler=plateau("val/classes/loss")))


class Concepts(ProbeReader):
    """Records numbers of axes that it invents: few and many."""

    def records(self, sites):
        return {"few": {"concept": 2, "layer": 1}, "many": {"concept": 70}}

    def measure(self, seen):
        self._module.record(seen.step, {"few": torch.tensor([[[1.0], [seen.step]]]), "many": torch.arange(70.0)[None]})


def test_numbers_of_any_axes_are_monitored_and_logged_and_of_many_the_largest_and_the_mean(tmp_path):
    stop = EarlyStopping("few/1:0", patience=2, mode="min")
    trainer = fit(module(), Concepts(every=5), stop, steps=30, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert trainer.global_step == 30 and float(stop.best_score) == 10.0
    (path,) = tmp_path.rglob("metrics.csv")
    columns = path.read_text().splitlines()[0].split(",")
    assert [name for name in columns if name.startswith(("few", "many"))] == [
        "few/0:0",
        "few/1:0",
        "many/max",
        "many/mean",
    ]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 70, 1), "metric many: got 'values of shape"), ((1, 69), "metric many: got 'values of shape")],
)
def test_a_reader_that_records_another_shape_than_it_says_ends_the_run_in_one_line(shape, message):
    class Other(Concepts):
        def measure(self, seen):
            self._module.record(seen.step, {"many": torch.zeros(shape)})

    with pytest.raises(ConfigError, match=message):
        fit(module(), Other(every=5), steps=5)


def test_two_readers_that_record_one_metric_with_different_axes_are_refused(tmp_path):
    class Other(Concepts):
        def records(self, sites):
            return {"few": {"concept": 3}}

    line = (
        r"^Other.records, metric few: got \{'concept': 3\}, expected \{'concept': 2, 'layer': 1\}, as others record it"
    )
    with pytest.raises(ConfigError, match=line):
        fit(module(), Concepts(every=5), Other(every=5), KeepRun(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("axes", [(), (2, 2)])
def test_a_reader_that_returns_shapes_is_refused_with_what_would_do(axes, tmp_path):
    class Old(Concepts):
        def records(self, sites):
            return {"few": axes}

    with pytest.raises(ConfigError, match=r"^axes of metric few: got .*, expected sizes by name, as in \{'layer': 2,"):
        fit(module(), Old(every=5), KeepRun(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
