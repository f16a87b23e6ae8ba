"""Members end when what is asked of them has held long enough, and the run when nobody is left."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch

from opsin.callbacks import Ablate, Clamp, InductionHeads, KeepRun, PhaseChange, Snapshots, StopWhen
from opsin.errors import ConfigError, IdleError
from opsin.interventions.feedback import Feedback
from opsin.interventions.schedules import Schedule
from tests.training.test_module import fit, module


class Unfinished(KeepRun):
    """Is killed before the end of its run is written."""

    def on_fit_end(self, trainer, pl_module) -> None:
        pass


def test_a_member_ends_once_its_loss_was_below_the_level_in_so_many_records_in_a_row():
    model = module(seed=[1, 2, 3])
    fit(model, 200, [StopWhen(below=1.05, in_a_row=3)])
    values = torch.from_numpy(model.history["train/loss"].arrays()[1])
    for member in range(3):
        rows = (values[:, member] < 1.05).tolist()
        # records come every 5 steps, and are looked at every 10
        held = [5 * (n + 1) for n in range(2, len(rows)) if all(rows[n - 2 : n + 1]) and (n + 1) % 2 == 0]
        expected = {"status": "finished early", "stopped_at": held[0]} if held else None
        assert model.ended.get(member) == expected
    assert len(model.ended) > 0


def test_the_run_ends_and_is_whole_when_every_member_has_ended(tmp_path):
    model = module(seed=[1, 2])
    trainer = fit(model, 500, [StopWhen(below=99.0, in_a_row=4), PhaseChange(), KeepRun(tmp_path)])
    assert trainer.global_step == 20
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(row["status"], row["stopped_at"]) for row in summary["members"]] == [("finished early", 20)] * 2
    assert [event.kind for event in model.events] == ["finished early"] * 2


@pytest.mark.parametrize("seeds", [[1], [1, 2]])
def test_without_a_phase_change_callback_the_summary_says_who_ended_early(seeds, tmp_path):
    fit(module(seed=seeds), 500, [StopWhen(below=99.0, in_a_row=4), KeepRun(tmp_path)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = summary["members"] if len(seeds) > 1 else [summary]
    assert [(row["status"], row["stopped_at"]) for row in rows] == [("finished early", 20)] * len(seeds)


def test_a_run_killed_when_everyone_has_ended_ends_as_if_left_alone(tmp_path):
    """A checkpoint of its last step would be followed by more steps."""
    fit(module(seed=[1, 2]), 500, [StopWhen(below=99.0, in_a_row=4), keeper := Unfinished(tmp_path, None, 10)])
    assert torch.load(keeper.checkpoint, weights_only=True)["global_step"] == 10


def test_readers_look_once_more_when_every_member_has_ended():
    model, seen = module(seed=[1, 2]), {7: [], 10: []}

    class Reader(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            for every, steps in seen.items():
                pl_module.listen(every, lambda found, steps=steps: steps.append(found.step))

    fit(model, 500, [Reader(), StopWhen(below=99.0, in_a_row=4)])
    assert seen == {7: [0, 7, 14, 20], 10: [0, 10, 20]}


def test_a_member_that_ended_is_measured_under_what_was_in_force_at_its_own_end():
    """A clamp on head 1:1 is over when the other member ends, and was not when this one did."""
    clamp = {"heads": ["1:1"], "pattern": "match", "schedule": Schedule(stop=100)}

    def trained(seeds, below):
        model = module(seed=seeds)
        stop = StopWhen(below=99.0, in_a_row=4, members=[0])
        fit(model, 200, [InductionHeads(every=10), Clamp(**clamp), *([stop] if below else [])])
        return model

    beside, alone = trained([1, 2], True), trained([1], True)
    assert (beside.steps_done, alone.steps_done) == (200, 20)
    strengths = [model.history["induction_strength"].arrays()[1][-1][:, 1, 1] for model in (beside, alone)]
    assert strengths[0][0] == pytest.approx(strengths[1][0], abs=1e-4) and abs(strengths[0][1] - strengths[0][0]) > 0.1


def test_a_closed_loop_of_a_member_that_ended_stays_as_it_was_and_tells_nothing():
    loop = Schedule(feedback=Feedback("train/loss", below=99.0))
    model = module(seed=[1, 2])
    fit(model, 60, [Ablate(heads=["0:1"], schedule=loop), StopWhen(below=99.0, in_a_row=4, members=[0])])
    assert model.ended[0]["stopped_at"] == 20
    assert [event.step for event in model.events if event.kind == "feedback" and event.member == 0] == [5]
    assert model.gates.at(59).strength.tolist() == [[1.0, 1.0]]


def test_a_writer_that_was_idle_until_everyone_ended_is_told():
    writers = [
        Ablate(sites=["blocks.0.hook_attn_out"], order=0),
        Clamp(site="blocks.0.hook_attn_out", value=0.0, order=1),
    ]
    for members in ([1], [1, 2]):
        with pytest.raises(IdleError, match=r"^Clamp: was active for 20 steps"):
            fit(module(seed=members), 60, [*writers, StopWhen(below=99.0, in_a_row=4, members=[0])])


def test_the_last_state_of_a_run_that_ends_early_is_kept(tmp_path):
    fit(module(), 500, [StopWhen(below=99.0, in_a_row=4), Snapshots(), KeepRun(tmp_path)])
    assert max(path.name for path in (tmp_path / "snapshots").iterdir()) == "step_0000020.pt"


def test_a_head_can_be_what_is_waited_for():
    model = module(seed=[1, 2])
    stop = StopWhen("induction_strength", head="1:1", above=-2.0, in_a_row=3, members=[1])
    fit(model, 60, [InductionHeads(every=10), stop])
    assert {member: how["stopped_at"] for member, how in model.ended.items()} == {1: 20}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"StopWhen: got \{'above': None, 'below': None\}"),
        ({"below": 1.0, "in_a_row": 0}, "StopWhen.in_a_row: got 0"),
        ({"below": 1.0, "head": "own"}, "StopWhen.head: got 'own'"),
        ({"below": 1.0, "metric": "nothing"}, "StopWhen.metric: got 'nothing', expected what this run records"),
        ({"below": 1.0, "head": "0:1"}, "StopWhen.head: got '0:1', expected null"),
        ({"below": 1.0, "members": [2]}, r"StopWhen.members: got \[2\], expected members from 0 to 1"),
    ],
)
def test_what_cannot_be_waited_for_stops_the_build(settings, message):
    with pytest.raises(ConfigError, match=message):
        fit(module(seed=[1, 2]), 10, [StopWhen(**settings)])
