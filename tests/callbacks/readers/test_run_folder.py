"""Claims about the folder of a run in Python: never written over, never another's, and whole when it goes on."""

import re
from datetime import timedelta

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch

from opsin.callbacks import InductionHeads, KeepRun, PhaseChange, Snapshots, StopWhen
from opsin.errors import ConfigError
from opsin.model.transformer import Transformer
from opsin.records.claim import Claim
from opsin.training.module import OpsinModule
from tests.helpers.killers import StopAfter
from tests.helpers.toys import few_shot

STEPS = 40


def module(seed=0):
    return OpsinModule(
        few_shot(),
        Transformer(width=8, heads=2),
        **{"seed": seed, "steps_per_batch": 5, "log_every": 5, "probe_size": 8, "evaluation_size": 8},
    )


def fit(model, folder, *more, resume=None, steps=STEPS, **settings):
    callbacks = [Snapshots(per_decade=1), InductionHeads(every=5), PhaseChange(), *more, KeepRun(folder)]
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=callbacks,
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"},
        **{"enable_model_summary": False, "val_check_interval": 2, "check_val_every_n_epoch": None, **settings},
    )
    trainer.fit(model, ckpt_path=resume, weights_only=True)
    return trainer


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused():
    """Check that something is refused in one line that names the folder, and changes nothing in it."""

    def check(folder, call):
        before = contents(folder)
        with pytest.raises(ConfigError) as raised:
            call()
        assert re.fullmatch(r"[^\n]+", str(raised.value)) and str(folder) in str(raised.value)
        assert contents(folder) == before
        return str(raised.value)

    return check


def test_a_finished_folder_is_never_written_over(tmp_path, refused):
    fit(module(), tmp_path / "run")
    line = refused(tmp_path / "run", lambda: fit(module(), tmp_path / "run"))
    assert "a new folder" in line and "last.ckpt" in line


def test_the_folder_of_another_run_is_not_gone_on_in(tmp_path, refused):
    fit(module(1), tmp_path / "one")
    fit(module(2), tmp_path / "two", StopWhen(below=0.0), steps=20)
    start = tmp_path / "two" / "checkpoints" / "last.ckpt"
    refused(tmp_path / "one", lambda: fit(module(2), tmp_path / "one", StopWhen(below=0.0), resume=start))


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "population.json", "chunks/00/metrics.csv"])
def test_any_part_of_a_run_makes_a_folder_one_of_a_run(tmp_path, refused, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    refused(tmp_path, lambda: fit(module(), tmp_path))


def test_a_folder_with_other_files_is_new(tmp_path):
    (tmp_path / "notes.txt").touch()
    fit(module(), tmp_path)
    assert (tmp_path / "summary.json").exists()


def test_a_folder_that_another_process_has_is_refused_before_anything_is_written(tmp_path, refused, monkeypatch):
    claim = Claim(tmp_path / "run")
    monkeypatch.setattr("opsin.records.claim._held", {})
    monkeypatch.setattr("opsin.records.claim.PATIENCE_SECONDS", 0.0)
    assert "process" in refused(tmp_path / "run", lambda: fit(module(), tmp_path / "run"))
    claim.release()


def test_the_folder_is_free_when_the_run_has_ended_whichever_way(tmp_path):
    class Crash(pl.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError

    fit(module(), tmp_path / "whole")
    with pytest.raises(RuntimeError):
        fit(module(), tmp_path / "crashed", Crash())
    with pytest.raises(ConfigError):
        fit(module(), tmp_path / "refused", StopWhen(metric="nothing"))
    assert not list(tmp_path.rglob(".claim")) and not (tmp_path / "refused").exists()


def test_a_second_run_of_a_module_has_records_of_its_own_and_says_that_weights_are_trained(tmp_path, caplog):
    model = module()
    fit(model, tmp_path / "one")
    assert not [record for record in caplog.records if "trained before" in record.message]
    fit(model, tmp_path / "two")
    assert [record for record in caplog.records if "trained before" in record.message]
    tables = [pd.read_csv(tmp_path / name / "metrics.csv").query("metric == 'train/loss'") for name in ("one", "two")]
    assert tables[0].step.tolist() == tables[1].step.tolist() == list(model.history["train/loss"].steps)


@pytest.mark.parametrize("step", [5, 10, 20])
def test_an_untrained_end_returns_with_one_line_and_goes_on_to_the_bit(tmp_path, caplog, monkeypatch, step):
    fit(module(), tmp_path / "whole")
    monkeypatch.setattr(StopAfter, "planned", {step})
    fit(module(), tmp_path / "run", StopAfter())
    lines = [record.message for record in caplog.records if "untrained" in record.message]
    assert len(lines) == 1 and f"step {step} of {STEPS}" in lines[0] and not (tmp_path / "run/summary.json").exists()
    fit(module(), tmp_path / "run", resume=tmp_path / "run" / "checkpoints" / "last.ckpt")
    one, two = contents(tmp_path / "whole"), contents(tmp_path / "run")
    assert one[tmp_path / "whole/metrics.csv"] == two[tmp_path / "run/metrics.csv"]
    # the run that ended once has a checkpoint before its last
    assert {path.name for path in two} - {path.name for path in one} <= {"previous.ckpt"}
    states = [torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True) for n in ("whole", "run")]
    whole, run = (state["state_dict"] for state in states)
    assert all(torch.equal(whole[name], run[name]) for name in whole)


def test_max_time_is_counted_anew_by_a_process_that_goes_on(tmp_path):
    fit(module(), tmp_path / "run", max_time=timedelta(microseconds=1))
    assert not (tmp_path / "run" / "summary.json").exists()
    fit(module(), tmp_path / "run", max_time=timedelta(hours=1), resume=tmp_path / "run/checkpoints/last.ckpt")
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_finished_run_that_is_resumed_keeps_what_it_found(tmp_path):
    fit(module(), tmp_path / "run")
    before = contents(tmp_path / "run")
    fit(module(), tmp_path / "run", resume=tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert contents(tmp_path / "run") == before
