"""Members that have ended take no slot in the step, and the others learn what they would have learned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import opsin.training.module
from opsin.callbacks import Ablate, Freeze, KeepRun, Project, Reinitialise, StopWhen
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.directions import WeightDirections
from opsin.model.transformer import Transformer
from opsin.tasks import FewShot, GaussianClusters
from opsin.training.active_members import ActiveMembers, members_in_step
from opsin.training.module import OpsinModule
from tests.helpers.killers import KillAt, Killed
from tests.training.test_module import fit


def module(rates, **settings) -> OpsinModule:
    task = FewShot(GaussianClusters(classes=60, features=16), batch_size=8)
    small = {"steps_per_batch": 10, "log_every": 5, "probe_size": 16, "compile": False}
    seeds = list(range(1, len(rates) + 1))
    return OpsinModule(task, Transformer(width=16, heads=2), seeds, rates, **small, **settings).double()


def weights(model, member):
    return torch.cat([parameter.detach()[member].flatten() for parameter in model.parameters()])


@given(members=st.integers(1, 70), data=st.data())
def test_a_member_that_still_learns_has_a_slot_and_halves_are_all_that_is_left_out(members, data):
    ended = data.draw(st.dictionaries(st.integers(0, members - 1), st.integers(0, 100), max_size=members))
    chosen = members_in_step(members, {member: {"stopped_at": step} for member, step in ended.items()}, last=60)
    gone = {member for member, step in ended.items() if step <= 60}
    sizes = [members]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    size = members if chosen is None else len(chosen)
    assert {*range(members)} - gone <= {*(chosen or range(members))}
    assert size == min(s for s in sizes if s >= members - len(gone)) and chosen == (chosen and sorted({*chosen}))


def test_the_step_gets_no_more_members_than_there_are_slots():
    model, seen = module([0.01] * 5), []
    original = opsin.training.module.choose_step

    def watched(step, *settings):
        run = original(step, *settings)
        return lambda state, *rest: (seen.append(len(state.parameters[0])), run(state, *rest))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opsin.training.module, "choose_step", watched)
        patch.setattr(opsin.training.module, "COMPILE_FROM_STEPS", 0)
        stop = [StopWhen(below=99.0, in_a_row=2 + 2 * member, members=[member]) for member in (0, 1, 2, 4)]
        fit(model, 80, stop)
    # member 0 ends after 10 steps, 1 after 20, 2 after 30, 4 after 50; 5 slots become 3, 2 and 1
    assert seen == [5] * 20 + [3] * 10 + [2] * 20 + [1] * 30
    assert {member: how["stopped_at"] for member, how in model.ended.items()} == {0: 10, 1: 20, 2: 30, 4: 50}


WRITERS = [
    lambda: Ablate(heads=["0:1"], members=[1, 3], schedule=Schedule(period=7)),
    lambda: Ablate(heads=["1:0"], value="noise"),
    lambda: Freeze(["0:0"], parts=["W_Q"], members=[3], schedule=Schedule(start=15)),
    lambda: Reinitialise(Schedule(start=35, stop=36), ["1:1"], members=[1, 3]),
    lambda: Project(
        "blocks.0.hook_resid_post",
        weight=WeightDirections(name="unembed.W_U", rank=1),
        members=[3],
        schedule=Schedule(start=25),
    ),
]


@pytest.mark.parametrize("writer", range(len(WRITERS)))
def test_members_learn_beside_an_ended_one_what_they_learn_beside_one_that_goes_on(writer, monkeypatch):
    runs = []
    for patched in (members_in_step, lambda *_: None):
        monkeypatch.setattr(opsin.training.module, "members_in_step", patched)
        model = module([0.01, 0.02, 0.005, 0.01])
        stop = [StopWhen(below=99.0, in_a_row=2, members=[0]), StopWhen(below=99.0, in_a_row=4, members=[2])]
        fit(model, 60, [WRITERS[writer](), *stop])
        runs.append(model)
    for member in range(4):
        torch.testing.assert_close(weights(runs[0], member), weights(runs[1], member), rtol=1e-11, atol=1e-12)
    assert runs[0].gates.activity() == runs[1].gates.activity()


def test_a_member_that_has_ended_keeps_its_weights():
    short, long = module([0.01] * 3), module([0.01] * 3)
    fit(short, 20), fit(long, 60, [StopWhen(below=99.0, in_a_row=4, members=[0, 2])])
    for member in (0, 2):
        assert torch.equal(weights(short, member), weights(long, member))
    assert not torch.equal(weights(short, 1), weights(long, 1))


def test_a_run_killed_when_members_have_ended_goes_on_bitwise(tmp_path):
    def train(folder, *more, resume=None):
        model = module([0.01, 0.02, 0.005])
        stop = StopWhen(below=99.0, in_a_row=4, members=[0, 1])
        fit(model, 80, [stop, KeepRun(tmp_path / folder, checkpoint_every=10), *more], resume)
        return model

    whole = train("whole")
    with pytest.raises(Killed):
        train("killed", KillAt(50))
    killed = train("killed", resume=str(tmp_path / "killed" / "checkpoints" / "last.ckpt"))
    assert torch.equal(
        torch.cat([weights(whole, m) for m in range(3)]), torch.cat([weights(killed, m) for m in range(3)])
    )
    tables = [(tmp_path / folder / "metrics.csv").read_text() for folder in ("whole", "killed")]
    assert tables[0] == tables[1]


def test_without_a_slot_to_leave_the_step_is_handed_on_as_it_is():
    given_to = []
    active = ActiveMembers(lambda *arguments: given_to.append(arguments) or torch.zeros(3, 2), 2)
    active.choose(None)
    arguments = tuple(object() for _ in range(6))
    active(*arguments)
    assert given_to == [arguments]
