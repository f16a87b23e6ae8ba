"""Claims about idle writers and about how often each writer changed something."""

import json
import logging

import pytest
import torch

from opsin.callbacks import Ablate, Clamp, KeepRun, Preserve
from opsin.errors import DivergedError, IdleError
from opsin.interventions.schedules import Schedule
from opsin.training.gates import PATIENCE
from opsin.training.module import OpsinModule
from tests.helpers.toys import SMALL, few_shot, train

NOTHING = ["blocks.0.hook_attn_out"]


def module(seeds=(0,), idle="stop", **options):
    small = {"steps_per_batch": 10, "log_every": 5, "probe_size": 4, "compile": False}
    return OpsinModule(few_shot(), SMALL, list(seeds), idle=idle, **small | options)


def idle_pair(schedule=Schedule(), members=None):  # noqa: B008 - frozen
    """The second writer puts zero where there is zero already."""
    return [
        Ablate(sites=NOTHING, order=0),
        Clamp(site=NOTHING[0], value=0.0, schedule=schedule, members=members, order=1),
    ]


def test_a_writer_that_changes_nothing_stops_the_run_and_is_named():
    with pytest.raises(IdleError, match=rf"^Clamp: was active for {PATIENCE} steps .* blocks.0.hook_attn_out"):
        train(module(), 300, *idle_pair())


def test_one_of_several_writers_of_a_kind_is_named_by_its_number():
    writers = [Ablate(heads=["1:0"]), Ablate(sites=NOTHING, order=0), Ablate(sites=NOTHING, order=1)]
    with pytest.raises(IdleError, match=r"^Ablate 3: "):
        train(module(), 300, *writers)


def test_the_run_goes_on_with_one_warning_where_that_is_asked_for(caplog):
    with caplog.at_level(logging.WARNING, logger="lightning.pytorch.opsin"):
        model = train(module(idle="warn"), 300, *idle_pair())
    assert model.trainer.global_step == 300
    assert sum("Clamp: was active" in record.message for record in caplog.records) == 1


def test_a_writer_still_waiting_for_its_time_is_not_idle():
    late = Schedule(start=295)
    with pytest.raises(IdleError, match="was active for 5 steps"):
        train(module(), 300, *idle_pair(late))
    assert train(module(), 290, *idle_pair(Schedule(start=289))[:1]).trainer.global_step == 290


def test_a_writer_idle_in_one_member_alone_is_named_with_that_member():
    writers = [
        Ablate(sites=NOTHING, members=[1], order=0),
        Clamp(site=NOTHING[0], value=0.0, order=1),
    ]
    with pytest.raises(IdleError, match=r"no activation of member 1 \(of"):
        train(module(seeds=(3, 4)), 300, *writers)


def test_a_writer_that_makes_its_member_diverge_at_once_is_not_idle():
    # what is no number before any weight has moved was never counted as a change
    model = train(module(seeds=(3, 4)), 120, Clamp(site="hook_embed", value=1e38, members=[1]))
    assert model.ended == {1: {"status": "diverged", "stopped_at": 0}} and model.trainer.global_step == 120


def test_members_that_a_writer_does_not_select_do_not_make_it_idle():
    model = train(module(seeds=(3, 4)), 150, Ablate(heads=["0:1"], members=[1]))
    (row,) = model.gates.activity()
    assert row["active_steps"] == [0, 150] == row["changed_steps"]


def test_a_writer_of_several_sites_is_idle_only_if_none_of_them_changes():
    # patterns of block 0 are what they were: the ablation lies above them
    model = train(module(), 120, Ablate(heads=["0:0", "0:1"]), Preserve(["patterns"]))
    counts = {(row["writer"], row["site"]): row["changed_steps"] for row in model.gates.activity()}
    assert counts["Preserve", "blocks.0.attn.hook_pattern"] == [0]
    assert counts["Preserve", "blocks.1.attn.hook_pattern"] == [120]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_only_steps_that_changed_something_are_counted(compiled):
    pulses = Schedule(start=20, stop=60, period=4, duty=0.25)
    model = train(module(compile=compiled), 80, Ablate(heads=["1:1"], schedule=pulses))
    (row,) = model.gates.activity()
    assert row["active_steps"] == row["changed_steps"] == [10]


def test_counts_go_on_after_a_resume_and_end_in_the_summary(tmp_path):
    def run(folder, steps, resume=None):
        keep = KeepRun(tmp_path / folder, checkpoint_every=10)
        train(module(), steps, Ablate(heads=["1:1"], schedule=Schedule(period=2)), keep, resume=resume)
        return json.loads((tmp_path / folder / "summary.json").read_text())["interventions"]

    run("half", 30)
    assert run("half", 60, str(tmp_path / "half" / "checkpoints" / "last.ckpt")) == run("whole", 60)
    assert run("again", 60)[0]["changed_steps"] == [30]


def test_counting_does_not_change_what_is_learned():
    values = [
        torch.cat([p.detach().flatten() for p in train(module(), 20, *writers).parameters()])
        for writers in ([], [Clamp(site="hook_logits", value=9.0, schedule=Schedule(start=19, stop=20), positions=[0])])
    ]
    assert torch.equal(*values)


def parameters(model, member):
    return torch.cat([p.detach()[member].flatten() for p in model.parameters()])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_member_that_diverges_is_named_and_leaves_the_others_bitwise_alone(compiled):
    rates = [[0.01, 1e30, 0.01], [0.01, 0.02, 0.01]]
    broken, whole = (train(module(seeds=(3, 4, 5), learning_rate=r, compile=compiled), 60) for r in rates)
    assert list(broken.ended) == [1] and broken.ended[1]["status"] == "diverged"
    assert [event.kind for event in broken.events] == ["diverged"] and broken.events[0].member == 1
    for member in (0, 2):
        assert torch.equal(parameters(broken, member), parameters(whole, member))
    losses = broken.history["train/loss"].arrays()[1]
    assert parameters(broken, 1).isfinite().all() and not torch.from_numpy(losses[-1]).isfinite()[1]


def test_the_run_stops_when_every_member_has_diverged():
    with pytest.raises(DivergedError, match=r"at step \d+ of member 0"):
        train(module(seeds=(3, 4), learning_rate=1e30), 60)


def test_a_diverged_member_stays_so_after_a_resume(tmp_path):
    def run(folder, steps, resume=None):
        keep = KeepRun(tmp_path / folder, checkpoint_every=10)
        train(module(seeds=(3, 4), learning_rate=[0.01, 1e30]), steps, keep, resume=resume)
        return (tmp_path / folder / "metrics.csv").read_text()

    run("half", 30)
    assert run("half", 60, str(tmp_path / "half" / "checkpoints" / "last.ckpt")) == run("whole", 60)


def test_each_member_has_its_own_learning_rate_and_weight_decay():
    both = train(module(seeds=(3, 4), learning_rate=[0.01, 0.002], weight_decay=[0.0, 0.5]), 40)
    for member, (rate, decay) in enumerate([(0.01, 0.0), (0.002, 0.5)]):
        same = train(module(seeds=(3, 4), learning_rate=rate, weight_decay=decay), 40)
        assert torch.equal(parameters(both, member), parameters(same, member))
