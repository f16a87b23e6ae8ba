"""Claims about resuming: another run's settings are refused by name, and what is allowed acts and is recorded."""

from __future__ import annotations

import json
import shutil
from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from opsin import Transformer
from opsin.callbacks import Clamp, InductionHeads, KeepRun, StopWhen
from opsin.errors import ConfigError
from opsin.interventions.feedback import Feedback
from opsin.interventions.schedules import Schedule
from opsin.records.checkpoint import load_saved, read_checkpoint
from opsin.tasks import ArrayFile, Characters, FewShot, GaussianClusters, Kind
from opsin.training.module import OpsinModule
from opsin.training.run_settings import digest
from opsin.training.same_run import check_same_run, differences
from tests.helpers.toys import SMALL, few_shot, train

COSINE = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=100)
EXEMPLARS = {"classes": 12, "exemplars": 2, "features": 8}


def module(task=None, **settings):
    """A small module."""
    usual = {"learning_rate": 1e-2, "steps_per_batch": 10, "log_every": 5, "probe_size": 8, "evaluation_size": 8}
    return OpsinModule(**{"task": task or few_shot(), "transformer": SMALL} | usual | settings)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run of 20 steps with a schedule of its rate."""
    folder = tmp_path_factory.mktemp("begun")
    train(module(lr_scheduler=COSINE), 20, KeepRun(folder))
    return folder


def resume(folder, tmp_path, changed, *callbacks, steps=40, allow=()):
    """Go on from a copy of a run with another module."""
    copied = tmp_path / "again"
    shutil.copytree(folder, copied, dirs_exist_ok=True)
    changed.allow = allow
    return train(changed, steps, *callbacks, KeepRun(copied), resume=copied / "checkpoints/last.ckpt")


CHANGES = {
    "model.seed": {"seed": 1},
    "model.learning_rate": {"learning_rate": 2e-2},
    "model.weight_decay": {"weight_decay": 0.1},
    "model.gradient_clip": {"gradient_clip": 1e-3},
    "model.betas": {"betas": (0.8, 0.999)},
    "model.eps": {"eps": 1e-6},
    "model.steps_per_batch": {"steps_per_batch": 20},
    "model.probe_size": {"probe_size": 16},
    "model.evaluation_size": {"evaluation_size": 16},
    "model.transformer.position_base": {"transformer": Transformer(2, 8, 2, position_base=100.0)},
    "model.lr_scheduler.T_max": {"lr_scheduler": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=50)},
    "task.batch_size": {"task": few_shot(batch_size=8)},
    "task.zipf": {"task": few_shot(zipf=0.5)},
    "task.noise": {"task": few_shot(noise=0.1)},
    "task.exemplars.seed": {"task": few_shot(exemplars=GaussianClusters(**EXEMPLARS, seed=9))},
    "task.exemplars.within": {"task": few_shot(exemplars=GaussianClusters(**EXEMPLARS, within=0.4))},
    "task.kinds": {"task": few_shot(kinds=[Kind(no_support=0.001)])},
    "task.labels": {"task": few_shot(labels="fixed")},
    "model.probe": {"probe": "classes"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_refused_by_its_name_and_value(begun, tmp_path, name):
    with pytest.raises(ConfigError, match=r"expected .* as the run was begun with") as refused:
        resume(begun, tmp_path, module(**{"lr_scheduler": COSINE} | CHANGES[name]))
    assert refused.value.field == name and "\n" not in str(refused.value)
    assert (tmp_path / "again/metrics.csv").read_bytes() == (begun / "metrics.csv").read_bytes()


def test_settings_that_earlier_versions_lacked_count_only_where_they_are_chosen(begun):
    saved = read_checkpoint(begun / "checkpoints/last.ckpt")["opsin"]["run"]["settings"]
    chosen = run_settings_of(few_shot(kinds=[Kind(new_classes=True)], evaluation_kinds={"far": [Kind(among=3)]}))
    for name in ("task.labels", "task.label_seed", "task.evaluation_kinds", "task.kinds[0].new_classes", "model.probe"):
        assert name not in saved
    assert chosen["task.kinds[0].new_classes"] is True and chosen["task.evaluation_kinds.far[0].among"] == 3
    assert "task.kinds[0].among" not in chosen and "task.labels" not in chosen


def run_settings_of(task):
    """The named settings of a run of one step."""
    return train(module(task), 10).settings


def test_another_scheduler_is_refused(begun, tmp_path):
    with pytest.raises(ConfigError, match=r"model.lr_scheduler"):
        resume(begun, tmp_path, module())


def test_other_interventions_are_refused_by_their_writer_and_never_allowed(begun, tmp_path):
    writer = Clamp(heads=["0:0"], pattern="previous_token")
    for allow in ((), ("Clamp",)):
        with pytest.raises(ConfigError, match=r"^Clamp: got .*`opsin fork` begins a branch"):
            resume(begun, tmp_path, module(lr_scheduler=COSINE), writer, allow=allow)


def test_a_changed_schedule_of_a_writer_is_shown_where_it_differs(tmp_path):
    train(module(), 20, Clamp(heads=["0:0"], pattern="previous_token", schedule=Schedule(start=5)), KeepRun(tmp_path))
    with pytest.raises(ConfigError, match=r"^Clamp: got .*start=6.*expected .*start=5"):
        later = Clamp(heads=["0:0"], pattern="previous_token", schedule=Schedule(start=6))
        train(module(), 40, later, KeepRun(tmp_path), resume=tmp_path / "checkpoints/last.ckpt")


def test_how_a_member_is_ended_counts(tmp_path):
    train(module(), 20, StopWhen(below=0.01), KeepRun(tmp_path))
    with pytest.raises(ConfigError, match=r"^StopWhen: got"):
        train(module(), 40, StopWhen(below=0.02), KeepRun(tmp_path), resume=tmp_path / "checkpoints/last.ckpt")


def test_another_precision_is_refused(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "again")
    trainer = pl.Trainer(max_steps=40, precision="64-true", logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(ConfigError, match=r"trainer.precision"):
        again = tmp_path / "again/checkpoints/last.ckpt"
        trainer.fit(module(lr_scheduler=COSINE), ckpt_path=again, weights_only=True)


def test_how_long_how_often_logged_and_who_reads_may_change(begun, tmp_path):
    resumed = resume(begun, tmp_path, module(lr_scheduler=COSINE, log_every=10), InductionHeads(every=10), steps=60)
    assert resumed.steps_done == 60 and resumed.allowed == []


def test_how_often_is_logged_counts_where_a_schedule_reads_it(tmp_path):
    def writer():
        feedback = Feedback("train/loss", below=0.1)
        return Clamp(heads=["0:0"], pattern="previous_token", schedule=Schedule(feedback=feedback))

    train(module(idle="warn"), 20, writer(), KeepRun(tmp_path))
    with pytest.raises(ConfigError, match=r"model.log_every"):
        again = module(idle="warn", log_every=10)
        train(again, 40, writer(), KeepRun(tmp_path), resume=tmp_path / "checkpoints/last.ckpt")


# ---- data files -----------------------------------------------------------------------------------------


def features(path, seed=0):
    np.savez(path, np.random.default_rng(seed).standard_normal((12, 2, 8)).astype(np.float32))
    return str(path)


def test_a_data_file_may_move_and_not_change(tmp_path):
    first, moved, other = (features(tmp_path / f"{n}.npz", seed) for n, seed in (("a", 0), ("b", 0), ("c", 1)))

    def task(path):
        return FewShot(ArrayFile(path), batch_size=4, train_classes=8)

    train(module(task(first)), 20, KeepRun(tmp_path / "run"))
    assert resume(tmp_path / "run", tmp_path, module(task(moved))).steps_done == 40
    with pytest.raises(ConfigError, match=r"task.exemplars.path: got 'file \w{16}', expected 'file \w{16}'"):
        resume(tmp_path / "run", tmp_path, module(task(other)))


def test_the_content_of_a_text_counts_beyond_what_the_first_batch_shows(tmp_path):
    text = "to be or not to be, that is the question. " * 200
    (tmp_path / "one.txt").write_text(text), (tmp_path / "two.txt").write_text(text[:-1] + "?")
    settings = {"positions": 6, "batch_size": 2}
    train(module(Characters(str(tmp_path / "one.txt"), **settings)), 20, KeepRun(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"task.path: got 'file"):
        resume(tmp_path / "run", tmp_path, module(Characters(str(tmp_path / "two.txt"), **settings)))


# ---- what is allowed ------------------------------------------------------------------------------------


def test_an_allowed_rate_acts_with_its_schedule_and_is_recorded(begun, tmp_path):
    changed = resume(
        begun, tmp_path, module(lr_scheduler=COSINE, learning_rate=2e-2), allow=["model.learning_rate"], steps=40
    )
    plain = resume(begun, tmp_path / "plain", module(lr_scheduler=COSINE), steps=40)
    ratio = changed.optimizers().param_groups[0]["lr"] / plain.optimizers().param_groups[0]["lr"]
    assert ratio == pytest.approx(2)
    record = {"setting": "model.learning_rate", "from": 0.01, "to": 0.02, "step": 20}
    summary = json.loads((tmp_path / "again/summary.json").read_text())
    assert summary["allowed"] == [record]
    assert load_saved(tmp_path / "again/checkpoints/last.ckpt")["opsin"]["run"]["allowed"] == [record]
    assert "allowed" not in json.loads((tmp_path / "plain/again/summary.json").read_text())


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("model.gradient_clip", lambda m: m.optimizers().param_groups[0]["clip"] == 1e-3),
        ("model.weight_decay", lambda m: m.optimizers().param_groups[0]["weight_decay"] == 0.1),
        ("model.betas", lambda m: tuple(m.optimizers().param_groups[0]["betas"]) == (0.8, 0.999)),
        ("model.lr_scheduler.T_max", lambda m: m.lr_schedulers().T_max == 50),
        ("model.seed", lambda m: m.seeds == [1]),
        ("task.zipf", lambda m: m.task.settings["zipf"] == 0.5),
    ],
)
def test_what_is_allowed_acts(begun, tmp_path, name, held):
    allowed = resume(begun, tmp_path, module(**{"lr_scheduler": COSINE} | CHANGES[name]), allow=[name])
    assert held(allowed) and [change["setting"] for change in allowed.allowed] == [name]


def test_what_was_allowed_once_is_the_run_from_then_on_and_may_be_named_again(begun, tmp_path):
    resume(begun, tmp_path, module(lr_scheduler=COSINE, seed=1), allow=["model.seed"])
    again = tmp_path / "again/checkpoints/last.ckpt"
    third = module(lr_scheduler=COSINE, seed=1)
    third.allow = ["model.seed"]
    assert [change["step"] for change in train(third, 60, KeepRun(tmp_path / "again"), resume=again).allowed] == [20]


def test_a_name_that_nothing_has_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"--allow: got 'model.sed', expected .*model.seed"):
        check_same_run({"model.seed": [0]}, {"model.seed": [1]}, ["model.sed"], 1)


def test_a_whole_section_can_be_allowed():
    before, now = {"task.a": 1, "task.b": 1, "model.seed": [0]}, {"task.a": 2, "task.c": 1, "model.seed": [0]}
    assert [c["setting"] for c in check_same_run(before, now, ["task"], 1)] == ["task.a", "task.b", "task.c"]


def test_equal_settings_have_equal_digests_and_no_differences(begun):
    settings = load_saved(begun / "checkpoints/last.ckpt")["opsin"]["run"]["settings"]
    assert differences(settings, dict(settings)) == {} and digest(settings) == digest(dict(settings))
    assert differences({"a": float("nan")}, {"a": float("nan")}) == {}


# ---- checkpoints of before ------------------------------------------------------------------------------


def test_a_checkpoint_of_before_goes_on_with_one_line_that_says_what_was_not_checked(begun, tmp_path, caplog):
    folder = shutil.copytree(begun, tmp_path / "old")
    saved = read_checkpoint(folder / "checkpoints/last.ckpt", history=True)
    del saved["opsin"]["run"], saved["opsin"]["metrics"]
    torch.save(saved, folder / "checkpoints/last.ckpt")
    caplog.clear()
    train(module(lr_scheduler=COSINE), 40, KeepRun(folder), resume=folder / "checkpoints/last.ckpt")
    lines = [record.getMessage() for record in caplog.records if "not checked" in record.getMessage()]
    assert len(lines) == 1 and "earlier version" in lines[0]
    train(module(lr_scheduler=COSINE), 40, KeepRun(tmp_path / "whole"))
    assert (folder / "metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()
