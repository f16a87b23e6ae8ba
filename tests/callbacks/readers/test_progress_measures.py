"""Claims about ProgressMeasures: what it records is what single evaluations give, and training does not notice."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from opsin.callbacks import (
    Ablate,
    Clamp,
    CopyFromPattern,
    InductionHeads,
    PerfectPreviousInput,
    Preserve,
    ProgressMeasures,
)
from opsin.errors import ConfigError
from opsin.interventions.apply import PassInputs, constants_of, run_passes
from opsin.interventions.build_plan import build_plan
from opsin.interventions.schedules import Schedule
from opsin.model.transformer import Transformer
from opsin.objective import accuracy, cross_entropy
from opsin.tasks import FewShot, GaussianClusters
from opsin.training.module import OpsinModule, opsin_module
from opsin.training.objective import scored_logits
from opsin.training.observers import recorded_metrics
from tests.helpers.toys import train


def module(seed=1, **settings) -> OpsinModule:
    task = FewShot(GaussianClusters(classes=60, features=16), batch_size=8)
    small = {"steps_per_batch": 10, "log_every": 5, "probe_size": 16, "learning_rate": 0.01, "compile": False}
    return OpsinModule(task, Transformer(width=16, heads=2), seed, **{**small, **settings})


SETS = {
    "ablation": lambda: [Ablate(heads=["1:0"])],
    "pattern": lambda: [Clamp(heads=["1:1"], pattern="match")],
    "preserve": lambda: [Preserve(["patterns"]), Ablate(sites=["blocks.0.hook_attn_out"])],
    "copy": lambda: [CopyFromPattern("1:1")],
    "perfect": lambda: [PerfectPreviousInput()],
    "two": lambda: [Clamp(heads=["0:0"], pattern="previous_token"), Clamp(heads=["1:0"], pattern="induction")],
    "members": lambda: [Ablate(heads=["1:0", "1:1"], members=[1])],
}


def measures(*names: str, every: int = 5) -> ProgressMeasures:
    return ProgressMeasures({name: SETS[name]() for name in names}, every)


class OneByOne(pl.Callback):
    """Evaluates each set in a plan and a pass of its own, at the same steps."""

    def __init__(self, sets, every: int) -> None:
        self.sets, self.every = {"none": [], **sets}, every
        self.found: dict[str, list[torch.Tensor]] = {}

    def on_fit_start(self, trainer, pl_module):
        self.module = opsin_module(pl_module)
        self.module.listen(self.every, self.look)

    def look(self, seen):
        own, members = self.module, self.module.n_members
        values = {name: x.detach() for name, x in own.parameters_by_name().items()}
        clock = torch.tensor([[seed, max(seen.step - 1, 0)] for seed in own.seeds])
        for name, writers in self.sets.items():
            plan = build_plan(writers, own.sites, members, 1, 1)
            table = own.constants.table
            constants = constants_of(plan, own.constants.bank, table, members, table.dtype)
            gates = torch.ones(len(plan.interventions), members, dtype=table.dtype)
            tap = run_passes(plan, PassInputs(own.network, values, constants, seen.batch, gates, clock))
            logits = scored_logits(own.network.forward(values, table, seen.batch, tap), seen.batch)
            self.found.setdefault(f"progress/{name}/loss", []).append(cross_entropy(logits, seen.batch).mean((1, 2)))
            self.found.setdefault(f"progress/{name}/accuracy", []).append(accuracy(logits, seen.batch).mean((1, 2)))


def recorded(model: OpsinModule) -> dict[str, np.ndarray]:
    return {name: model.history[name].arrays()[1] for name in model.history.names() if name.startswith("progress/")}


def test_every_record_is_what_the_set_gives_alone_whatever_training_is_clamped_by():
    sets = {name: make() for name, make in SETS.items()}
    alone, model = OneByOne(sets, 10), module([4, 7])
    clamps = [Ablate(heads=["0:0"]), Clamp(heads=["1:0"], pattern="induction", schedule=Schedule(start=15))]
    train(model, 25, ProgressMeasures(sets, 10), alone, *clamps)
    found = recorded(model)
    assert found.keys() == alone.found.keys() and len(found) == 2 * (1 + len(SETS))
    for name, values in found.items():
        assert list(model.history[name].steps) == [0, 10, 20, 25]
        np.testing.assert_allclose(values, torch.stack(alone.found[name]), rtol=0, atol=1e-6, err_msg=name)
    losses = {name: values for name, values in found.items() if name.endswith("loss")}
    assert len({values.tobytes() for values in losses.values()}) == len(losses)


def test_the_base_line_is_the_loss_without_the_clamps_of_training():
    free, clamped = module(), module()
    for model, clamps in ((free, []), (clamped, [Ablate(sites=["blocks.1.hook_attn_out"])])):
        train(model, 20, measures("ablation"), *clamps)
        # what trackers and validation see has the clamps of training
        logits = scored_logits(model.observe(model.probe, ["hook_logits"])["hook_logits"], model.probe)
        seen = cross_entropy(logits, model.probe).mean().item()
        base = recorded(model)["progress/none/loss"][-1, 0]
        assert (abs(base - seen) < 1e-6) == (model is free)


def test_in_double_precision_every_member_records_what_its_single_run_does():
    def records(seed):
        model, trainer = module(seed), pl.Trainer(max_steps=20, precision="64-true", **QUIET)
        trainer.callbacks.append(measures("pattern", "preserve", "two", every=10))
        trainer.fit(model)
        return recorded(model)

    together, single = records([4, 7]), [records(4), records(7)]
    for name, values in together.items():
        np.testing.assert_allclose(values, np.concatenate([own[name] for own in single], 1), atol=1e-7, err_msg=name)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}


def test_single_pass_sets_share_one_pass_and_others_add_one_for_each_pass_they_take_from(monkeypatch):
    seen, forward = [], Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda *a: (seen.append(len(a[3].tokens)), forward(*a))[1])
    for names, passes in ((["ablation", "pattern", "two"], [8]), (["ablation", "preserve", "copy"], [8, 8])):
        model = module([1, 2])
        train(model, 1, measures(*names))
        seen.clear()
        model._notify(0, model._listeners)
        assert seen == passes


def replay(model: OpsinModule, losses: dict[str, np.ndarray]) -> dict:
    """The summary of a run whose measures had these losses ``[n, M]``, one every ten steps."""
    callback = ProgressMeasures({name: SETS["ablation"]() for name in losses if name != "none"}, 10)
    trainer = pl.Trainer(max_steps=1, callbacks=[callback], **QUIET)
    callback.setup(trainer, model, "fit")
    for name, values in losses.items():
        for index, loss in enumerate(values):
            model.history.record(f"progress/{name}/loss", 10 * index, loss)
    callback.on_train_end(trainer, model)
    return model.summary["progress"]


def test_the_summary_holds_the_onset_and_the_final_loss_of_every_measure():
    steps, plateau = 10 * np.arange(300), float(np.log(2))
    noise = np.random.default_rng(0).normal(0, 0.01, len(steps))
    early, late = (plateau / (1 + np.exp((steps - at) / 20)) + noise for at in (800, 1800))
    flat = plateau + noise
    (one, two) = replay(
        module([1, 2]),
        {"none": np.stack([late, flat], 1), "match": np.stack([early, late], 1), "copy": np.stack([flat, early], 1)},
    )
    assert list(one) == list(two) == ["none", "match", "copy"]
    for found, at in ((one["none"], 1800), (one["match"], 800), (two["match"], 1800), (two["copy"], 800)):
        truth = 8 * (at - 20 * np.log(9))
        assert found["onset"]["low"] - 160 <= truth <= found["onset"]["high"] + 160
    assert one["copy"]["onset"] is None and two["none"]["onset"] is None
    assert one["copy"]["final_loss"] == pytest.approx(flat[-1])


def test_a_single_run_has_one_mapping_in_its_summary():
    model = train(module(), 20, measures("ablation"))
    found = model.summary["progress"]
    assert found["none"] == {"onset": None, "final_loss": recorded(model)["progress/none/loss"][-1, 0]}
    assert list(found) == ["none", "ablation"]


def test_a_set_that_changes_nothing_is_told_of_once(caplog):
    sets = {"idle": [Preserve(["values"])], "at_work": [Ablate(heads=["0:0"], members=[1])]}
    with caplog.at_level(logging.WARNING, logger="lightning.pytorch.opsin"):
        train(module([1, 2]), 20, ProgressMeasures(sets, 5))
    (line,) = [record.getMessage() for record in caplog.records if record.name.endswith("opsin")]
    assert line.startswith("opsin: ProgressMeasures.measures.idle: changed no activation of member 0 on the probe")


def test_loggers_receive_every_record_under_its_step(tmp_path):
    model, logger = module(), CSVLogger(tmp_path, "csv")
    pl.Trainer(max_steps=10, callbacks=[measures("copy")], **{**QUIET, "logger": logger}).fit(model)
    logger.save()
    text = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert "progress/copy/loss" in text and "progress/none/accuracy" in text


def test_it_says_which_metrics_it_records():
    callback, model = measures("copy", "two"), module()
    train(model, 5, callback)
    said = recorded_metrics([callback], model.sites, model.task, validates=False)
    assert set(recorded(model)) <= set(said) and len(said) == 3 + 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProgressMeasures({}), r"ProgressMeasures.measures: got \{\}, expected at least one name"),
        (lambda: ProgressMeasures({"a": []}), r"ProgressMeasures.measures.a: got \[\], expected at least one writer"),
        (lambda: ProgressMeasures({"none": SETS["copy"]()}), r"ProgressMeasures.measures: got 'none', expected a name"),
        (lambda: ProgressMeasures({"a/b": SETS["copy"]()}), r"ProgressMeasures.measures: got 'a/b', expected a name"),
        (lambda: ProgressMeasures({"a,b": SETS["copy"]()}), r"ProgressMeasures.measures: got 'a,b', expected a name"),
        (
            lambda: ProgressMeasures({"a": [InductionHeads()]}),
            r"ProgressMeasures.measures.a: got 'InductionHeads', expected callbacks that overwrite activations",
        ),
        (lambda: measures("copy", every=0), r"ProgressMeasures.every: got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(make, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            [ProgressMeasures({"a": [Ablate(heads=["0:9"])]})],
            r"ProgressMeasures.measures.a.Ablate.heads: got '0:9', expected layer:head",
        ),
        (
            [ProgressMeasures({"a": [Ablate(heads=["0:0"], schedule=Schedule(start=5))]})],
            r"ProgressMeasures.measures.a.Ablate.schedule: got 'steps 5 to end', expected none",
        ),
        ([measures("copy"), measures("two")], r"trainer.callbacks: got 'ProgressMeasures twice', expected one of them"),
    ],
)
def test_what_cannot_be_measured_on_this_run_is_refused_before_it_starts(callbacks, message):
    model = module()
    with pytest.raises(ConfigError, match=f"^{message}"):
        train(model, 5, *callbacks)
    assert not model.history.names()


RECIPE = """
task:
  class_path: opsin.tasks.FewShot
  init_args:
    batch_size: 8
    exemplars: {class_path: opsin.tasks.GaussianClusters, init_args: {classes: 60, features: 16}}
model:
  transformer: {width: 16, heads: 2}
  steps_per_batch: 10
  log_every: 5
  probe_size: 16
  evaluation_size: 16
trainer:
  max_steps: 20
  enable_progress_bar: false
  callbacks:
    - class_path: opsin.callbacks.ProgressMeasures
      init_args:
        every: 10
        measures:
          match: [{class_path: opsin.callbacks.Clamp, init_args: {heads: ["1:1"], pattern: match SCHEDULE}}]
          copy:
            - class_path: opsin.callbacks.CopyFromPattern
              init_args: {head: "1:1"}
"""


def test_a_recipe_names_sets_of_writers(opsin, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("SCHEDULE", ""))
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "run")
    assert ended.code == 0 and ended.err == ""
    table = (tmp_path / "run" / "metrics.csv").read_text()
    for name in ("none", "match", "copy"):
        assert table.count(f"progress/{name}/loss") == table.count(f"progress/{name}/accuracy") == 3
    again = opsin("fit", "--config", "run/config.yaml", "--run_folder", "again")
    assert again.code == 0 and (tmp_path / "again" / "metrics.csv").read_text() == table


def test_a_schedule_inside_a_measure_is_refused_in_one_line(opsin, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("SCHEDULE", ", schedule: {start: 5}"))
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "run")
    expected = (
        "opsin: ProgressMeasures.measures.match.Clamp.schedule: got 'steps 5 to end', expected none: a measure is"
    )
    assert ended.code == 2 and ended.err.startswith(expected) and ended.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
