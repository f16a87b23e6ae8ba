"""The module under the Trainer: Lightning stays Lightning, steps are optimizer steps, readers read."""

from __future__ import annotations

import json
import logging

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau

from opsin.callbacks import (
    Ablate,
    AttentionSinks,
    Clamp,
    InductionHeads,
    KeepRun,
    PreviousTokenHeads,
    Progress,
)
from opsin.errors import ConfigError, DivergedError
from opsin.interventions.schedules import Schedule
from opsin.model.transformer import Transformer
from opsin.records.history import History
from opsin.tasks import FewShot, GaussianClusters
from opsin.training.compiling import COMPILE_FROM_STEPS, choose_step
from opsin.training.module import OpsinModule, opsin_module
from opsin.training.observers import Observation


def module(**settings) -> OpsinModule:
    task = FewShot(GaussianClusters(classes=60, features=16), batch_size=8)
    small = {"steps_per_batch": 10, "log_every": 5, "probe_size": 16, "evaluation_size": 16, "learning_rate": 0.01}
    return OpsinModule(task, Transformer(width=16, heads=2), **{"seed": 1, **small, **settings})


def fit(model: OpsinModule, steps: int = 40, callbacks=(), ckpt_path=None, **settings) -> pl.Trainer:
    quiet = {"logger": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_checkpointing=checkpoints,
        enable_progress_bar=any(isinstance(callback, Progress) for callback in callbacks),
        **{**quiet, "limit_val_batches": 0, **settings},
    )
    trainer.fit(model, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def weights(model: OpsinModule) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_one_lightning_batch_carries_several_steps_and_global_step_counts_them():
    trainer = fit(module(steps_per_batch=10), steps=35)
    assert trainer.global_step == 35
    assert trainer.fit_loop.epoch_loop.batch_progress.current.completed == 4


def test_how_many_steps_a_batch_carries_does_not_change_the_weights():
    a, b = module(steps_per_batch=10), module(steps_per_batch=5)
    fit(a, steps=30), fit(b, steps=30)
    assert torch.equal(weights(a), weights(b))


def test_trackers_of_one_step_share_one_pass(monkeypatch):
    model, passes = module(), []
    seen = OpsinModule.observe
    monkeypatch.setattr(OpsinModule, "observe", lambda *a: (passes.append(1), seen(*a))[1])
    fit(model, steps=20, callbacks=[InductionHeads(every=5), PreviousTokenHeads(every=5), AttentionSinks(10, None)])
    assert len(passes) == 5  # before the first step, and after 5, 10, 15 and 20


def test_trackers_see_the_model_under_the_clamp_in_force():
    model = module()
    clamp = Clamp(heads=["1:0"], pattern="induction", schedule=Schedule(start=10))
    fit(model, steps=20, callbacks=[InductionHeads(every=5), clamp])
    steps, strength = model.history["induction_strength"].arrays()
    held = strength[:, 0, 1, 0] == 1
    assert dict(zip(steps.tolist(), held.tolist(), strict=True)) == {0: False, 5: False, 10: False, 15: True, 20: True}


def test_a_clamp_that_is_scheduled_throughout_equals_one_that_is_always_on():
    a, b, free = module(), module(), module()
    fit(a, callbacks=[Ablate(heads=["1:1"])])
    fit(b, callbacks=[Ablate(heads=["1:1"], schedule=Schedule(start=0, stop=40 * 8, unit="sequences"))])
    fit(free)
    assert torch.equal(weights(a), weights(b)) and not torch.equal(weights(a), weights(free))


def test_a_clamp_acts_from_its_first_step_on_and_not_before():
    free, late = module(), module()
    fit(free, steps=20), fit(late, steps=20, callbacks=[Ablate(heads=["1:1"], schedule=Schedule(start=19))])
    assert not torch.equal(weights(free), weights(late))
    losses = [m.history["train/loss"].arrays()[1][:3] for m in (free, late)]
    assert (losses[0] == losses[1]).all()


def test_switching_a_clamp_a_hundred_times_compiles_once(graphs):
    model = module(compile=True)
    clamp = Clamp(heads=["0:1"], pattern="previous_token", schedule=Schedule(period=2))
    fit(model, steps=200, callbacks=[clamp, InductionHeads(every=50)])
    gates = model.plan.gates(0, 200, 1, History(8))[:, 0, 0]
    assert abs(gates[1:] - gates[:-1]).sum() == 199
    assert graphs() == 1


def test_the_compiled_run_follows_the_eager_one(graphs):
    eager, compiled = module(compile=False), module(compile=True)
    fit(eager, steps=30), fit(compiled, steps=30)
    assert graphs() == 1
    assert torch.allclose(weights(eager), weights(compiled), atol=1e-4)


@pytest.mark.parametrize("steps, words", [(10, "runs eagerly"), (COMPILE_FROM_STEPS, "compiling the step")])
def test_one_line_says_whether_the_step_is_compiled_and_why(steps, words, caplog):
    model = module()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.opsin"):
        model.trainer = pl.Trainer(max_steps=steps, logger=False, enable_checkpointing=False, accelerator="cpu")
        model.setup("fit")
        choose_step(model.step, model.compile_setting, steps)
    (line,) = [record.getMessage() for record in caplog.records if record.name.endswith("opsin")]
    assert words in line and f"{steps:,} steps" in line


def test_checkpoints_early_stopping_and_schedulers_of_lightning_work_unchanged(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="train/loss", every_n_train_steps=20, save_top_k=1)
    stop = EarlyStopping("val/train/loss", patience=1, min_delta=10.0, mode="min")
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "board")]
    model = module(lr_scheduler=lambda optimizer: ExponentialLR(optimizer, 0.9))
    callbacks = [best, stop, LearningRateMonitor("step")]
    trainer = fit(
        model, 400, callbacks, logger=loggers, limit_val_batches=None, val_check_interval=4, log_every_n_steps=1
    )
    assert trainer.global_step == 80  # two validations of 40 steps each, and nothing got better by 10
    assert torch.load(best.best_model_path, weights_only=True)["global_step"] % 20 == 0
    assert model.optimizers().param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**80)
    table = pd.read_csv(f"{loggers[0].log_dir}/metrics.csv")
    assert table["step"].max() == 80 and table["val/classes/loss"].notna().any()
    rates = table.dropna(subset=["lr-MemberAdam"])
    # the monitor looks before a batch and labels what it sees with a step of that batch
    assert (abs(rates["lr-MemberAdam"] - 0.01 * 0.9 ** (rates["step"] // 10 * 10)) < 1e-9).all()
    assert any((tmp_path / "board").rglob("events.out.tfevents*"))


def test_a_plateau_scheduler_lowers_the_rate_when_the_loss_stays():
    model = module(lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, patience=0, threshold=10.0))
    fit(model, steps=40)
    assert model.optimizers().param_groups[0]["lr"] < 0.01


def test_a_scheduler_that_follows_the_loss_of_all_members_is_refused():
    model = module(seed=[1, 2], lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer))
    with pytest.raises(ConfigError, match=r"model.lr_scheduler: got 'ReduceLROnPlateau', expected .* 2 members share"):
        fit(model)


def test_a_checkpoint_between_lightning_batches_is_refused():
    with pytest.raises(ConfigError, match=r"ModelCheckpoint.every_n_train_steps: got 15, expected a multiple of .* 10"):
        fit(module(), callbacks=[ModelCheckpoint(every_n_train_steps=15)])


def test_a_run_without_a_length_is_refused():
    with pytest.raises(ConfigError, match=r"trainer.max_steps: got -1"):
        fit(module(), steps=-1, max_epochs=1)


@pytest.mark.parametrize(
    "name, value",
    [("learning_rate", 0.0), ("log_every", 3), ("seed", []), ("seed", -1), ("gradient_clip", 0.0), ("threads", 0)],
)
def test_a_setting_that_cannot_work_is_named(name, value):
    with pytest.raises(ConfigError, match=rf"^model\.{name}: got "):
        module(**{name: value})


def test_a_clamp_on_a_missing_head_stops_the_build():
    with pytest.raises(
        ConfigError, match=r"Clamp.heads: got '0:2', expected layer:head with layer 0 to 1 and head 0 to 1"
    ):
        fit(module(), callbacks=[Clamp(heads=["0:2"], pattern="match")])


@pytest.mark.parametrize("cycles", [True, False])
def test_a_schedule_may_cycle_the_betas(cycles):
    rate = {"max_lr": 0.01, "total_steps": 21, "cycle_momentum": cycles, "base_momentum": 0.5}
    model = module(lr_scheduler=lambda optimizer: OneCycleLR(optimizer, **rate))
    fit(model, steps=6)
    assert (model.optimizers().param_groups[0]["betas"][0] != 0.9) == cycles


def test_a_loss_that_is_no_number_stops_at_its_step_and_keeps_the_run(tmp_path):
    model = module(learning_rate=1e30)
    with pytest.raises(
        DivergedError, match=r"^train/loss: got no finite number at step \d+ of member 0, expected a finite loss"
    ) as e:
        fit(model, steps=100, callbacks=[KeepRun(tmp_path)])
    assert "\n" not in str(e.value)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table[table.metric == "train/loss"].value.isna().any()
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "diverged"


def test_members_of_different_seeds_differ_and_equal_seeds_agree():
    model = module(seed=[4, 5, 4])
    fit(model, steps=20)
    for parameter in model.parameters():
        assert torch.equal(parameter[0], parameter[2])
    assert not torch.equal(model.members.embed.W_F[0], model.members.embed.W_F[1])
    assert model.history["train/loss"].arrays()[1].shape == (4, 3)


def test_a_member_is_bitwise_the_same_in_any_slot_and_beside_any_neighbours():
    a, b = module(seed=[4, 5, 6]), module(seed=[7, 4, 8])
    fit(a, steps=30), fit(b, steps=30)
    for left, right in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(left[0], right[1])


def test_in_double_precision_a_member_equals_the_single_run_of_its_seed():
    many, one = module(seed=[4, 5]), module(seed=5)
    fit(many, steps=30, precision="64-true"), fit(one, steps=30, precision="64-true")
    for left, right in zip(many.parameters(), one.parameters(), strict=True):
        assert left.dtype == torch.float64 and torch.allclose(left[1], right[0], rtol=1e-10, atol=1e-12)


def test_a_run_resumed_with_another_plan_is_refused(tmp_path):
    fit(module(), steps=20, callbacks=[KeepRun(tmp_path)])
    with pytest.raises(ConfigError, match=r"Ablate: got .*, expected 'none' as the run was begun with"):
        fit(module(), 40, [Ablate(heads=["0:0"])], ckpt_path=tmp_path / "checkpoints" / "last.ckpt")


def test_a_listener_is_called_before_the_first_at_every_cadence_and_after_the_last_step():
    calls = []

    class Listen(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            opsin_module(pl_module).listen(10, self.note)

        def note(self, seen: Observation):
            calls.append(seen.step)

    fit(module(), steps=25, callbacks=[Listen()])
    assert calls == [0, 10, 20, 25]


def test_training_draws_nothing_from_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    fit(module(), callbacks=[InductionHeads(every=5)], limit_val_batches=None, val_check_interval=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_callback_of_the_package_refuses_another_module():
    with pytest.raises(ConfigError, match="model: got 'LightningModule', expected an OpsinModule"):
        opsin_module(pl.LightningModule())
