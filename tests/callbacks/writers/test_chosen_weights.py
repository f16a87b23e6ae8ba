"""Claims about the writers of weights in a run: what they refuse, report, count and keep over a resume."""

import json
import re

import lightning.pytorch as pl
import pytest
import torch

from opsin.callbacks import Clamp, Freeze, Graft, InductionHeads, KeepRun, Reinitialise
from opsin.errors import ConfigError, IdleError
from opsin.interventions.donors import Donor
from opsin.interventions.schedules import Schedule
from opsin.model.protocol import init_parameters
from opsin.model.transformer import Transformer
from opsin.reports.sites import sites_report
from opsin.tasks import FewShot, GaussianClusters
from opsin.training.module import OpsinModule
from tests.helpers.toys import SMALL, few_shot, plan_of

QKV = "blocks.1.attn.W_QKV"
ONCE = Schedule(start=5, stop=6)


def module(**settings):
    task = FewShot(GaussianClusters(classes=60, features=16), batch_size=8)
    small = {"steps_per_batch": 10, "log_every": 5, "probe_size": 16, "evaluation_size": 16, "learning_rate": 0.01}
    return OpsinModule(task, Transformer(width=16, heads=2), **{"seed": 1, **small, **settings})


def fit(model, steps, *callbacks, resume=None, **settings):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        max_steps=steps, callbacks=list(callbacks), accelerator="cpu", limit_val_batches=0, **quiet, **settings
    )
    trainer.fit(model, ckpt_path=resume, weights_only=True)
    return model


def queries_of_head_1(model):
    """W_Q of head 1 of layer 1, width 16, two heads of 8."""
    return model.members.blocks.get_submodule("1").attn.W_QKV[:, :, 8:16].detach().clone()


def test_a_frozen_head_keeps_its_first_queries_while_the_others_learn():
    model = fit(module(seed=[1, 2]), 20, Freeze(heads=["1:1"], parts=["W_Q", "W_K"]))
    first = init_parameters(model.network, model.task, [1, 2])[QKV]
    assert torch.equal(queries_of_head_1(model), first[:, :, 8:16])
    head_0 = model.parameters_by_name()[QKV][:, :, :8]
    assert (head_0 != first[:, :, :8]).all()


def test_weights_are_rewound_in_double_precision_too():
    rewind = Reinitialise(Schedule(start=19, stop=20), heads=["1:1"], parts=["W_Q"])
    model = fit(module(learning_rate=1e-9), 20, rewind, precision="64-true")
    first = init_parameters(model.network, model.task, [1])[QKV].double()[:, :, 8:16]
    assert queries_of_head_1(model).dtype == torch.float64
    # one update lies between, and nineteen would move them further
    assert (queries_of_head_1(model) - first).abs().max() < 1.5e-9


def test_a_run_resumed_within_a_window_is_bitwise_the_uninterrupted_one(tmp_path):
    def writers():
        return [
            Freeze(heads=["1:1"], parts=["W_Q", "W_K"], schedule=Schedule(start=12, stop=33, ramp=5)),
            Reinitialise(Schedule(start=15, period=13, duty=0.05), weights=["blocks.0"], seed=9),
        ]

    whole = fit(module(), 50, *writers())
    fit(module(), 20, *writers(), KeepRun(tmp_path))
    resumed = fit(module(), 50, *writers(), resume=tmp_path / "checkpoints" / "last.ckpt")
    for name, value in whole.parameters_by_name().items():
        assert torch.equal(value, resumed.parameters_by_name()[name])
    for name, skipped in whole.gates.counts.skipped.items():
        assert torch.equal(skipped, resumed.gates.counts.skipped[name]) and (skipped > 0).any()
    assert whole.gates.activity() == resumed.gates.activity()


@pytest.mark.slow
def test_one_graph_serves_all_steps_and_is_bitwise_still_where_it_should_be():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    blinking = Freeze(heads=["1:1"], parts=["W_Q"], schedule=Schedule(period=2))
    again = Reinitialise(Schedule(start=7, period=10, duty=0.1), weights=["embed"])
    model = fit(module(compile=True), 60, blinking, again, InductionHeads(every=20))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert model.gates.counts.fired[:, 0].tolist() == [6, 6, 6, 30]


def test_a_freeze_of_weights_that_would_not_move_stops_the_run():
    # the clamp takes all gradient from the head's queries
    clamp, freeze = Clamp(heads=["1:0"], pattern="induction"), Freeze(heads=["1:0"], parts=["W_Q"])
    message = r"^Freeze: was active for 20 steps and changed no weight \(of blocks.1.attn.W_Q\)"
    with pytest.raises(IdleError, match=message):
        fit(module(), 20, clamp, freeze)


def test_setting_weights_to_what_they_are_stops_the_run():
    rewind = Reinitialise(Schedule(stop=1), weights=["blocks.0.attn.W_Q", "unembed"])
    with pytest.raises(IdleError, match=r"^Reinitialise: was active for 1 steps and changed no weight"):
        fit(module(), 20, rewind)


def test_the_summary_counts_the_steps_in_which_weights_were_changed(tmp_path):
    fit(module(), 20, Freeze(weights=["unembed.W_U"], schedule=Schedule(start=15)), KeepRun(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    (row,), (counts,) = summary["plan"], summary["interventions"]
    assert row["site"] == "unembed.W_U" and row["value"] == "Frozen()" and row["pass"] == "weights"
    assert counts == {"writer": "Freeze", "site": "unembed.W_U", "active_steps": [5], "changed_steps": [5]}


def test_the_report_lists_what_becomes_of_weights():
    plan = plan_of(SMALL, few_shot(), Freeze(heads=["1:0", "1:1"], parts=["W_Q"], schedule=ONCE))
    text = sites_report(SMALL.sites(few_shot()), 2, 4, plan)
    (row,) = [line for line in text[text.index("plan ") :].splitlines() if "Freeze" in line]
    expected = r"1 +weights +Freeze +blocks.1.attn.W_Q +heads \[0, 1\] +Frozen +flows +steps 5 to 6"
    assert re.fullmatch(expected, row)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Freeze(), "Freeze"),
        (lambda: Freeze(heads=[]), "Freeze"),
        (lambda: Freeze(heads=["0:2"]), "Freeze.heads"),
        (lambda: Freeze(heads=["0:0"], parts=["W_QK"]), "Freeze.parts"),
        (lambda: Freeze(heads=["0:0"], parts=["W_in"]), "Freeze.parts"),
        (lambda: Freeze(heads=["0:0"], parts=[]), "Freeze.parts"),
        (lambda: Freeze(weights=["embed"], parts=["W_Q"]), "Freeze.parts"),
        (lambda: Freeze(neurons=["0:0"]), "Freeze.neurons"),
        (lambda: Freeze(weights=["blocks.2"]), "Freeze.weights"),
        (lambda: Freeze(weights=["blocks"], members=[2]), "Freeze.members"),
        (lambda: Freeze(weights=["embed"], schedule=Schedule(start=10)), "Freeze.schedule"),
        (lambda: Reinitialise(ONCE), "Reinitialise"),
        (lambda: Reinitialise(ONCE, weights=["embed"], seed=-1), "Reinitialise.seed"),
        (lambda: Reinitialise(ONCE, weights=["embed"], seed=[]), "Reinitialise.seed"),
        (lambda: Reinitialise(ONCE, weights=["embed"], seed=[1, 2, 3]), "Reinitialise.seed"),
        (lambda: Reinitialise(Schedule(), weights=["embed"]), "Reinitialise.schedule"),
        (lambda: Reinitialise(Schedule(ramp=3), weights=["embed"]), "Reinitialise.schedule.ramp"),
        (lambda: Reinitialise(Schedule(stop=3, ramp_down=3), weights=["embed"]), "Reinitialise.schedule.ramp_down"),
    ],
)
def test_a_setting_that_cannot_work_is_named(make, field):
    with pytest.raises(ConfigError) as refused:
        plan_of(SMALL, few_shot(), make())
    assert refused.value.field == field


def test_both_heads_and_neurons_need_parts_of_their_own():
    with pytest.raises(ConfigError, match=r"^Freeze.parts: got \['W_Q'\], expected for its neurons any of W_in"):
        Freeze(heads=["0:0"], neurons=["0:1"], parts=["W_Q"])


def test_weights_of_a_donor_are_out_of_reach():
    model = module()
    donor = Donor("file", "digest", model.network, init_parameters(model.network, model.task, [3]))
    graft = Graft(donor, 0, donor_callbacks=[Freeze(weights=["embed"])])
    with pytest.raises(ConfigError, match=r"^Graft.donor_callbacks: got 'Freeze'"):
        graft.interventions(model.sites)
