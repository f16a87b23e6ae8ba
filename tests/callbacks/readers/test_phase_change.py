"""Claims about PhaseChange: it finds known changes, says so once, and a resume changes nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opsin.callbacks import InductionHeads, KeepRun
from opsin.callbacks.readers.phase_change import PhaseChange, best_loss
from opsin.callbacks.readers.snapshots import Snapshots
from opsin.errors import ConfigError
from opsin.model.transformer import Transformer
from opsin.objective import CrossEntropy, LogCrossEntropy
from opsin.reports.run import final_report
from opsin.tasks import FewShot, GaussianClusters, Kind, Repeats
from opsin.training.module import OpsinModule
from tests.helpers.finite import Table
from tests.helpers.toys import train

BATCH, LOG = 32, 10
PLATEAU = float(np.log(2))


def tiny(seed: int | list[int] = 0) -> OpsinModule:
    task = FewShot(exemplars=GaussianClusters(classes=20, features=16), train_classes=12, batch_size=BATCH)
    return OpsinModule(task, Transformer(width=16, heads=2), seed=seed, steps_per_batch=10, log_every=5, compile=False)


def drop(at: float, steps: np.ndarray, seed: int = 0) -> np.ndarray:
    """A loss that falls from the plateau to 0.05 at step ``at``, within 40 steps, with noise."""
    noise = np.random.default_rng(seed).normal(0, 0.02, len(steps))
    return 0.05 + (PLATEAU - 0.05) / (1 + np.exp((steps - at) / 10)) + noise


def replay(module: OpsinModule, losses: np.ndarray, callback: PhaseChange, batch: int = 5) -> OpsinModule:
    """Feed losses ``[n, M]``, one every LOG steps, as a training run would; ``batch`` records at a time."""
    callback.setup(SimpleNamespace(callbacks=[]), module, "fit")
    for index, loss in enumerate(losses, 1):
        module.history.record("train/loss", index * LOG, loss)
        if index % batch == 0:
            callback.on_train_batch_end(None, module)
    callback.on_train_end(None, module)
    return module


STEPS = LOG * np.arange(1, 401)


def test_a_drop_is_announced_once_and_soon_after_it_happened():
    module = replay(tiny(), drop(2000, STEPS)[:, None], PhaseChange())
    (event,) = module.events
    assert (event.kind, event.member) == ("phase change", 0)
    assert 2000 <= event.step <= 2000 + 15 * LOG
    assert event.message.startswith("phase change: the loss left its plateau at about 6")
    assert event.message.endswith(f"sequences (noticed at {event.step * BATCH:,})")


def test_what_is_announced_does_not_depend_on_how_records_are_batched():
    losses = drop(2000, STEPS)[:, None]
    assert replay(tiny(), losses, PhaseChange(), 1).events == replay(tiny(), losses, PhaseChange(), 50).events


def test_the_intervals_of_onset_midpoint_and_end_cover_the_truth():
    summary = replay(tiny(), drop(2000, STEPS)[:, None], PhaseChange()).summary
    truth = {"onset": 2000 - 10 * np.log(9), "midpoint": 2000, "end": 2000 + 10 * np.log(9)}
    for name, step in truth.items():
        found = summary[name]
        assert found["low"] <= found["value"] <= found["high"]
        # a record more: the way to 0.05 is seen through noise and one record in ten steps
        assert found["low"] - LOG * BATCH <= step * BATCH <= found["high"] + LOG * BATCH
    assert summary["plateau"] == pytest.approx(PLATEAU)
    assert summary["final_loss"] == pytest.approx(0.05, abs=0.02)


def test_a_small_drop_is_a_change_where_no_predictor_could_do_better():
    task = Repeats(positions=24, longest=8, batch_size=BATCH)
    batch = task.batch(0, 0, "eval/train", 128)
    best = -float(task.exact(batch).gather(-1, batch.targets[..., None]).mean())
    plateau = task.baselines()["unigram"]
    assert 0.75 * plateau < best < plateau
    way = (drop(2000, STEPS) - 0.05) / (PLATEAU - 0.05)
    for share, changed in ((1.0, True), (0.1, False)):
        module = OpsinModule(task, Transformer(width=16, heads=2), compile=False)
        module = replay(module, (plateau + share * (way - 1) * (plateau - best))[:, None], PhaseChange())
        assert bool(module.events) == changed and (module.summary["midpoint"] is not None) == changed
    assert best_loss(task, "val/repeated/loss", plateau) < best and best_loss(task, "train/loss", best) == 0
    assert best_loss(tiny().task, "train/loss", plateau) == 0


def test_the_best_loss_on_a_fixed_set_is_that_of_the_whole_set(monkeypatch):
    table, sizes = Table(train_share=0.75), []
    monkeypatch.setattr(table, "exact", lambda batch: sizes.append(batch.targets.shape[1]))
    assert best_loss(table, "val/test/loss", 1.0) == best_loss(table, "train/loss", 1.0) == 0
    assert sizes == [3, 9]


def test_a_loss_that_stays_on_its_plateau_announces_nothing_and_has_no_onset():
    module = replay(tiny(), drop(1e9, STEPS)[:, None], PhaseChange())
    assert module.events == []
    assert module.summary["onset"] is None and module.summary["midpoint"] is None and module.summary["end"] is None
    assert module.summary["heads"] == {} and module.summary["strongest_heads"] == []


def test_a_spike_below_the_plateau_announces_nothing():
    losses = drop(1e9, STEPS)
    losses[200:205] = 0.0
    assert replay(tiny(), losses[:, None], PhaseChange()).events == []


def test_every_member_has_its_own_event_and_summary():
    losses = np.stack([drop(1000, STEPS), drop(1e9, STEPS, 1), drop(3000, STEPS, 2)], 1)
    module = replay(tiny([4, 5, 6]), losses, PhaseChange())
    assert [event.member for event in module.events] == [0, 2]
    assert "in member 2" in module.events[1].message
    first, second, third = module.summary["members"]
    assert second["onset"] is None
    assert first["onset"]["value"] < 1000 * BATCH < third["onset"]["value"] < 3000 * BATCH


def test_only_heads_that_end_above_the_threshold_have_formed():
    module, callback = tiny(), PhaseChange(head_threshold=0.3)
    module.history.declare("induction_strength", {"layer": 2, "head": 2})
    for step in range(0, 4001, 50):
        strength = np.full((1, 2, 2), 0.01)
        strength[0, 1] = [0.9 / (1 + np.exp(-(step - 2000) / 50)), 0.4 / (1 + np.exp(-(step - 3000) / 50))]
        strength[0, 0, 1] = 0.25 * (step > 2000)
        module.history.record("induction_strength", step, strength)
    summary = replay(module, drop(2000, STEPS)[:, None], callback).summary
    assert summary["strongest_heads"] == ["1:0", "1:1"]
    assert set(summary["heads"]) == {"0:0", "0:1", "1:0", "1:1"}
    assert summary["heads"]["0:1"] == {"strength": 0.25, "onset": None, "midpoint": None, "end": None}
    assert summary["heads"]["1:0"]["midpoint"]["value"] == pytest.approx(2000 * BATCH, abs=50 * BATCH)
    assert summary["heads"]["1:1"]["midpoint"]["value"] == pytest.approx(3000 * BATCH, abs=50 * BATCH)
    assert json.loads(json.dumps(summary)) == summary


def test_the_last_evaluations_are_in_the_summary():
    module = tiny()
    for step, loss in ((100, 0.7), (200, 0.25)):
        module.history.record("val/train/loss", step, np.array([loss]))
    assert replay(module, drop(2000, STEPS)[:, None], PhaseChange()).summary["evaluations"] == {"train": {"loss": 0.25}}


@pytest.mark.parametrize("cut", [120, 230, 390])
@pytest.mark.parametrize("plateau", [None, 3.0], ids=["level of the task", "level of the curve"])
def test_a_reader_that_is_resumed_announces_and_reports_what_one_left_alone_does(cut, plateau):
    losses = np.stack([drop(1000, STEPS), drop(3000, STEPS, 2)], 1)
    whole = replay(tiny([1, 2]), losses, PhaseChange(plateau=plateau))
    module, first, second = tiny([1, 2]), PhaseChange(plateau=plateau), PhaseChange(plateau=plateau)
    replay(module, losses[:cut], first)
    second.setup(SimpleNamespace(callbacks=[]), module, "fit")
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for index, loss in enumerate(losses[cut:], cut + 1):
        module.history.record("train/loss", index * LOG, loss)
        second.on_train_batch_end(None, module)
    second.on_train_end(None, module)
    assert len(whole.events) == 2 and module.events == whole.events
    assert module.summary == whole.summary


def test_the_state_of_an_earlier_version_loads_and_does_not_announce_again():
    losses, callback, module = drop(1000, STEPS)[:, None], PhaseChange(), tiny()
    replay(module, losses[:300], callback)
    old = {name: value for name, value in callback.state_dict().items() if name != "announced"}
    later = PhaseChange()
    later.setup(SimpleNamespace(callbacks=[]), module, "fit")
    later.load_state_dict(old)
    assert later.state_dict() == callback.state_dict() and len(module.events) == 1


def test_a_member_takes_its_part_of_the_state_with_it():
    callback = PhaseChange(beside=["train/accuracy"])
    replay(tiny([4, 5]), np.stack([drop(1000, STEPS), drop(1e9, STEPS)], 1), callback)
    state = callback.member_state(callback.state_dict(), 1)
    assert state["announced"] == [False] and len(state["passing"]) == 1
    assert len(state["beside"]["train/accuracy"]["leaving"]) == 1


# ---- any measure, and what is no phase change ---------------------------------------------------------


def recorded(curve: np.ndarray, callback: PhaseChange, metric: str = "train/loss") -> OpsinModule:
    """A run of one member whose metric is this curve."""
    module = tiny()
    callback.setup(SimpleNamespace(callbacks=[]), module, "fit")
    for index, value in enumerate(curve, 1):
        module.history.record(metric, index * LOG, np.array([value]))
        callback.on_train_batch_end(None, module)
    callback.on_train_end(None, module)
    return module


def test_a_smooth_descent_through_the_plateau_is_announced_by_nobody_and_has_no_onset():
    noise = np.random.default_rng(0).normal(0, 0.02, len(STEPS))
    module = recorded(1.6 * np.exp(-STEPS / 800) + noise, PhaseChange())
    assert module.events == [] and module.summary["onset"] is None
    assert module.summary["changes"]["train/loss"]["verdict"] == "smooth"
    assert module.summary["plateau"] == pytest.approx(PLATEAU)


def test_a_loss_that_falls_when_the_run_ends_is_said_to():
    noise = np.random.default_rng(0).normal(0, 0.02, len(STEPS))
    module = recorded(PLATEAU - 0.0005 * np.maximum(STEPS - 3700, 0) + noise, PhaseChange())
    reading = module.summary["changes"]["train/loss"]
    assert (reading["verdict"], reading["trend"]) == ("not by the end", "falling")
    text = final_report(module.summary, Path("run")).splitlines()[0]
    assert text == f"phase change  not by the end; {reading['final']:.3g} and still falling"


def test_a_curve_that_stays_above_the_named_plateau_leaves_its_own():
    module = recorded(drop(2000, STEPS) * 0.9 / PLATEAU, PhaseChange(plateau=0.5))
    assert module.summary["plateau"] == pytest.approx(0.9, abs=0.01)
    assert module.summary["midpoint"]["value"] == pytest.approx(2000 * BATCH, abs=20 * BATCH)
    (event,) = module.events
    assert 2000 < event.step < 2400


def test_an_accuracy_rises_and_its_measure_says_so():
    accuracy = 1 - 0.8 * drop(2000, STEPS)
    module = recorded(accuracy, PhaseChange(metric="train/accuracy"), "train/accuracy")
    reading = module.summary["changes"]["train/accuracy"]
    assert (reading["verdict"], reading["direction"]) == ("phase change", "rise")
    assert module.summary["midpoint"]["value"] == pytest.approx(2000 * BATCH, abs=20 * BATCH)
    # what is drawn and tabled beside losses is no accuracy
    assert module.summary["plateau"] is None and module.summary["final_loss"] is None
    (event,) = module.events
    assert event.message.startswith("phase change: train/accuracy left its plateau at about 6")
    assert (
        recorded(accuracy, PhaseChange("train/accuracy", direction="fall"), "train/accuracy").summary["onset"] is None
    )


def test_two_measures_side_by_side_have_a_delay():
    module, callback = tiny(), PhaseChange("train/accuracy", beside=["val/classes/accuracy"])
    callback.setup(SimpleNamespace(callbacks=[]), module, "fit")
    curves = (1 - drop(300, STEPS), 1 - drop(1620, STEPS, 1))
    for index, (train_value, test_value) in enumerate(zip(*curves, strict=True), 1):
        module.history.record("train/accuracy", index * LOG, np.array([train_value]))
        module.history.record("val/classes/accuracy", index * LOG, np.array([test_value]))
        callback.on_train_batch_end(None, module)
    callback.on_train_end(None, module)
    delay = module.summary["delays"]["val/classes/accuracy"]
    assert delay["ratio"] == pytest.approx(5.4, rel=0.03)
    assert delay["sequences"] == pytest.approx(1320 * BATCH, rel=0.03)
    assert [event.message.split()[2] for event in module.events] == ["train/accuracy", "val/classes/accuracy"]
    text = final_report(module.summary, Path("run"))
    assert f": delay {delay['sequences']:,.0f}, {delay['ratio']:.3g}x" in text


def test_the_strength_of_one_head_is_a_measure():
    module, callback = tiny(), PhaseChange(metric="induction_strength/1:0")
    callback.setup(SimpleNamespace(callbacks=[InductionHeads()]), module, "fit")
    module.history.declare("induction_strength", {"layer": 2, "head": 2})
    for step in STEPS.tolist():
        strength = np.full((1, 2, 2), 0.01)
        strength[0, 1, 0] = 0.9 / (1 + np.exp(-(step - 2000) / 50))
        module.history.record("induction_strength", step, strength)
    callback.on_train_end(None, module)
    assert module.summary["midpoint"]["value"] == pytest.approx(2000 * BATCH, abs=50 * BATCH)


def test_one_neuron_of_a_position_is_a_measure():
    class Norms:
        def records(self, sites):
            return {"norm": {"neuron": 3, "position": 2}}

    module, callback = tiny(), PhaseChange(metric="norm/2:0")
    callback.setup(SimpleNamespace(callbacks=[Norms()]), module, "fit")
    module.history.declare("norm", {"neuron": 3, "position": 2})
    for step in STEPS.tolist():
        norm = np.full((1, 3, 2), 0.01)
        norm[0, 2, 0] = 0.9 / (1 + np.exp(-(step - 2000) / 50))
        module.history.record("norm", step, norm)
    callback.on_train_end(None, module)
    assert module.summary["midpoint"]["value"] == pytest.approx(2000 * BATCH, abs=50 * BATCH)
    with pytest.raises(ConfigError, match=r"PhaseChange.metric: got 'norm/3:0', expected a metric that this run"):
        PhaseChange(metric="norm/3:0").setup(SimpleNamespace(callbacks=[Norms()]), module, "fit")


def test_a_measure_that_is_watched_already_is_refused():
    with pytest.raises(ConfigError, match=r"PhaseChange.beside: got 'train/loss', expected a measure that is not"):
        PhaseChange(beside=["train/loss"])


def test_its_state_loads_with_weights_only():
    callback = PhaseChange()
    replay(tiny(), drop(2000, STEPS)[:, None], callback)
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == callback.state_dict()


def test_different_settings_have_different_state_keys():
    settings = [{}, {"plateau": 0.5}, {"metric": "val/train/loss"}, {"head_threshold": 0.5}]
    settings += [{"direction": "fall"}, {"beside": ["train/accuracy"]}]
    assert len({PhaseChange(**setting).state_key for setting in settings}) == len(settings)


def test_a_metric_that_the_run_does_not_record_is_refused_before_training():
    with pytest.raises(ConfigError, match=r"PhaseChange.metric: got 'train/los', .*; the nearest is 'train/loss' of"):
        PhaseChange(metric="train/los").setup(SimpleNamespace(callbacks=[]), tiny(), "fit")


@pytest.mark.parametrize("setting", [{"plateau": float("inf")}, {"head_threshold": 0.0}, {"direction": "up"}])
def test_a_setting_that_cannot_work_is_refused(setting):
    with pytest.raises(ConfigError, match="PhaseChange"):
        PhaseChange(**setting)


def test_a_loss_without_a_lower_bound_has_the_best_of_a_predictor_or_the_range_of_its_curve():
    task = Repeats(positions=24, longest=8, batch_size=BATCH)
    task.objective = LogCrossEntropy()
    exact = np.log(CrossEntropy().member_loss(task.exact(batch := task.batch(0, 0, "eval/train", 128)), batch))
    assert best_loss(task, "train/loss", 1.5) == pytest.approx(exact.item())
    task = tiny().task
    task.objective = LogCrossEntropy()
    module = OpsinModule(task, Transformer(layers=2, width=16, heads=2), compile=False)
    module = replay(module, np.log(drop(2000, STEPS) + 0.1)[:, None], PhaseChange(plateau=0.1))
    assert module.summary["changes"]["train/loss"]["verdict"] == "phase change" and len(module.events) == 1


def test_a_plateau_that_no_loss_lies_below_is_refused_before_training():
    with pytest.raises(ConfigError, match=r"PhaseChange.plateau: got 0.0, expected a loss above 0, or null"):
        train(tiny(), 1, PhaseChange(plateau=0.0))


def test_it_and_snapshots_leave_the_weights_as_they_are_to_the_last_bit(tmp_path):
    plain = train(tiny([1, 2]), 60).parameters_by_name()
    readers = InductionHeads(every=10), PhaseChange(), Snapshots(ring=3, every=7), KeepRun(tmp_path)
    watched = train(tiny([1, 2]), 60, *readers)
    assert watched.summary and list(tmp_path.glob("snapshots/*.pt"))
    for name, tensor in watched.parameters_by_name().items():
        assert torch.equal(tensor, plain[name]), name


def test_a_task_whose_loss_has_no_plateau_leaves_that_of_its_curve():
    # one label stands in the whole context, so that no look-up is needed
    task = FewShot(exemplars=GaussianClusters(classes=20, features=16), kinds=[Kind(matches=2)], train_classes=12)
    module = OpsinModule(task, Transformer(width=16, heads=2), compile=False)
    module = replay(module, drop(2000, STEPS)[:, None], PhaseChange())
    assert module.summary["plateau"] == pytest.approx(PLATEAU, abs=0.01) and len(module.events) == 1
