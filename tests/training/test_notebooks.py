"""Claims about one module in several calls of Lightning: fitted twice, validated, tested."""

import csv

import lightning.pytorch as pl
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from opsin.callbacks import Ablate, InductionHeads, KeepRun, PhaseChange, Project
from opsin.errors import ConfigError
from opsin.interventions.values.directions import WeightDirections
from opsin.training.module import OpsinModule
from tests.contracts.readers import READERS, TASKS, makers, task_of
from tests.contracts.runs import FEW
from tests.contracts.runs import fit as fit_rich
from tests.contracts.runs import module as rich_module
from tests.helpers.toys import SMALL, few_shot

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def module(**settings):
    small = {"steps_per_batch": 5, "log_every": 5, "probe_size": 8, "evaluation_size": 8}
    return OpsinModule(few_shot(), SMALL, **small, **settings)


def trainer_with(*callbacks, **settings):
    often = {"check_val_every_n_epoch": None, "val_check_interval": 2}
    return pl.Trainer(callbacks=list(callbacks), accelerator="cpu", **{**QUIET, **often, **settings})


def test_a_reader_that_stands_twice_among_the_callbacks_is_refused_in_python_too(tmp_path):
    with pytest.raises(ConfigError, match="InductionHeads twice"):
        trainer_with(InductionHeads(every=5), InductionHeads(every=5), max_steps=10).fit(module())


# ---- twice ------------------------------------------------------------------------------------------


def test_a_module_that_is_fitted_twice_keeps_the_records_of_the_second_run_alone(tmp_path, caplog):
    model = module()
    for name in ("one", "two"):
        trainer_with(InductionHeads(every=5), PhaseChange(), KeepRun(tmp_path / name), max_steps=40).fit(model)
        with (tmp_path / name / "metrics.csv").open() as file:
            steps = [int(row["step"]) for row in csv.DictReader(file) if row["metric"] == "train/loss"]
        assert steps == list(model.history["train/loss"].steps) == [5, 10, 15, 20, 25, 30, 35, 40]
    assert "the module was trained before" in caplog.text


@pytest.mark.parametrize("name", READERS)
def test_a_reader_follows_a_second_run_as_a_new_one_does(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    ways = makers(name, tmp_path / "kept")
    if name == "KeepRun" or not ways:
        pytest.skip("a folder belongs to one run")
    reader, measured = ways[-1](), TASKS[task_of(name)]
    # another seed first, whose records must not be remembered
    fit_rich(rich_module(*measured(), seeds=(7, 8)), [reader], tmp_path / "first", FEW)
    second, fresh = rich_module(*measured()), rich_module(*measured())
    fit_rich(second, [reader], tmp_path / "second", FEW)
    fit_rich(fresh, [makers(name, tmp_path / "kept")[-1]()], tmp_path / "fresh", FEW)
    assert second.history.names() == fresh.history.names()
    for metric in fresh.history.names():
        assert second.history[metric].steps == fresh.history[metric].steps
        assert repr([*second.history[metric].values]) == repr([*fresh.history[metric].values])
    assert repr(second.summary) == repr(fresh.summary)


# ---- validated ----------------------------------------------------------------------------------------


def test_a_fresh_module_validates_as_its_first_validation_of_a_run_would():
    model, other = module(), module()
    (found,) = trainer_with().validate(model, verbose=False)
    assert {f"val/{name}/loss" for name in model.task.evaluations} <= found.keys() and not model.history.names()
    # and what was validated trains as what was not
    for each in (model, other):
        trainer_with(max_steps=20).fit(each)
    assert repr([*model.history["train/loss"].values]) == repr([*other.history["train/loss"].values])


@pytest.mark.parametrize("inference_mode", [True, False])
def test_a_trained_module_validates_under_the_writers_of_the_trainer(tmp_path, inference_mode):
    model = module()
    trainer = trainer_with(Ablate(heads=["0:0"]), KeepRun(tmp_path), max_steps=40, inference_mode=inference_mode)
    trainer.fit(model)
    names = [name for name in model.history.names() if name.startswith("val/")]
    last = {name: float(model.history[name].values[-1][0]) for name in names}
    records = len(model.history["val/classes/loss"].steps)
    assert trainer.validate(model, verbose=False) == [last]
    assert trainer_with(Ablate(heads=["0:0"])).validate(model, verbose=False) == [last]
    assert trainer_with().validate(model, verbose=False) != [last]
    loaded = module(seed=9)
    start = {"ckpt_path": tmp_path / "checkpoints" / "last.ckpt", "weights_only": True, "verbose": False}
    assert trainer_with(Ablate(heads=["0:0"])).validate(loaded, **start) == [last]
    assert len(model.history["val/classes/loss"].steps) == records


def test_directions_that_a_run_has_computed_are_not_invented_for_a_validation():
    silenced = Project("blocks.1.hook_resid_pre", weight=WeightDirections(name="unembed.W_U"))
    with pytest.raises(ConfigError, match=r"^Trainer.validate: got 'Project', expected ckpt_path"):
        trainer_with(silenced).validate(module(), verbose=False)


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_there_is_nothing_to_test_or_to_predict(verb):
    with pytest.raises(MisconfigurationException) as refused:
        getattr(trainer_with(), verb)(module())
    assert len(str(refused.value).splitlines()) == 1
