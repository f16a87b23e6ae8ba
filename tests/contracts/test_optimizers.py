"""Claims about every optimizer of the house, found by itself, and about one of a user's own."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch

import opsin.optimizers
import opsin.training.module
from opsin import OpsinModule, Transformer
from opsin.callbacks import Freeze, KeepRun, Reinitialise, StopWhen
from opsin.interventions.schedules import Schedule
from opsin.launch.check_checkpoint import check_contents
from opsin.optimizers.base import Optimizer
from opsin.records.checkpoint import load_saved
from opsin.training.active_members import members_in_step
from opsin.training.run_settings import digest
from tests.helpers.killers import KillAt, Killed
from tests.helpers.toys import SMALL, Training, few_shot, weights
from tests.training.test_module import fit


class LookAhead(Optimizer):
    """An optimizer of one file: momentum, weights that follow slowly, and a clock of its own."""

    hyper_names = ("learning_rate", "momentum")

    def __init__(self, learning_rate=1e-2, momentum=0.9, every=3):
        self.learning_rate, self.momentum, self.every = learning_rate, momentum, every

    def start(self, name, parameter):
        return {"slow": parameter.detach().clone(), "speed": torch.zeros_like(parameter)}

    def clock(self, hyper, updates):
        return {"joins": (updates % self.every == 0).to(updates.dtype)}

    def update(self, parameter, gradient, state, hyper, clock):
        speed = hyper["momentum"] * state["speed"] + gradient
        fast = parameter - hyper["learning_rate"] * speed
        slow = state["slow"] + 0.5 * clock["joins"] * (fast - state["slow"])
        return fast + clock["joins"] * (slow - fast), {"slow": slow, "speed": speed}


TINY = Transformer(layers=1, width=4, heads=2)

FURTHER = {
    "SGD": [{"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}, {"momentum": 0.9, "nesterov": True}],
    "Adam": [{"betas": (0.0, 0.0), "eps": 1e-2}],
    "Muon": [{"precision": "bfloat16", "nesterov": False, "adjust": "match_rms_adamw"}],
}
"""Settings beside the defaults, by the name of the class."""


def choices():
    """Every optimizer, with its defaults and with further settings."""
    named = [getattr(opsin.optimizers, name) for name in opsin.optimizers.__all__]
    kinds = [kind for kind in named if not inspect.isabstract(kind)]
    found = [(kind, settings) for kind in (*kinds, LookAhead) for settings in ({}, *FURTHER.get(kind.__name__, ()))]
    return [pytest.param(kind, settings, id=f"{kind.__name__}{n}") for n, (kind, settings) in enumerate(found)]


every_kind = pytest.mark.parametrize("kind", [*dict.fromkeys(choice.values[0] for choice in choices())])
every_choice = pytest.mark.parametrize(("kind", "settings"), choices())


def scaled(value, factor):
    return tuple(factor * number for number in value) if isinstance(value, tuple) else factor * value


def differing(kind, settings, members):
    """Settings with another value of every hyper-parameter in each member, and those of each member alone."""
    defaults = {name: item.default for name, item in inspect.signature(kind).parameters.items()}
    whole = {**defaults, **settings, "learning_rate": 1e-2}
    lists = {
        name: [scaled(whole[name], 0.9**member) for member in range(members)]
        if not (whole.get("nesterov") and name == "dampening")
        else whole[name]
        for name in kind.hyper_names
    }
    alone = [
        {name: values[member] for name, values in lists.items() if isinstance(values, list)}
        for member in range(members)
    ]
    return kind(**{**whole, **lists}), [kind(**{**whole, **one}) for one in alone]


def module(optimizer, seeds=(3, 5), **settings):
    """A small module in double precision."""
    small = {"steps_per_batch": 5, "log_every": 5, "probe_size": 8, "evaluation_size": 8, "compile": False}
    return OpsinModule(few_shot(), SMALL, list(seeds), optimizer=optimizer, **small, **settings).double()


def everything(model):
    """Weights and the optimizer's state in one row for each member."""
    return torch.cat(
        [tensor.detach().flatten(1) for tensor in model.optimizers().optimizer.members_state().tensors()], 1
    )


@pytest.mark.parametrize("steps", [40, pytest.param(200, marks=pytest.mark.slow)])
@every_choice
def test_a_member_learns_what_it_learns_alone(kind, settings, steps):
    task, (together, alone) = few_shot(), differing(kind, settings, 3)
    start, last = weights(TINY, task, (0, 1, 2)), 2
    single = {name: value[last:] for name, value in start.items()}
    runs = [
        Training(TINY, task, start, optimizer=together, seeds=(0, 1, 2), clip=1.0, steps=steps),
        Training(TINY, task, single, optimizer=alone[last], seeds=[last], clip=1.0, steps=steps),
    ]
    for k in range(steps):
        results = [run.update(k)[:, -1] for run in runs]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    for name, value in runs[1].values.items():
        assert (value[0] - runs[0].values[name][last]).abs().max() < 1e-12, name


@every_choice
def test_a_member_that_has_ended_leaves_its_slot_and_its_neighbours_alone(kind, settings, monkeypatch):
    runs = []
    for choose in (members_in_step, lambda *_: None):
        monkeypatch.setattr(opsin.training.module, "members_in_step", choose)
        model = module(differing(kind, settings, 3)[0], (1, 2, 3))
        fit(model, 30, [StopWhen(below=99.0, in_a_row=2, members=[0]), StopWhen(below=99.0, in_a_row=4, members=[2])])
        runs.append(everything(model))
        assert {member: how["stopped_at"] for member, how in model.ended.items()} == {0: 10, 2: 20}
    # another number of slots is another kernel
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-12)
    assert torch.equal(runs[0][0], runs[1][0])


@every_choice
def test_a_run_that_is_killed_goes_on_bitwise_with_its_schedule(kind, settings, tmp_path):
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=30)

    def train(folder, *more, resume=None):
        model = module(differing(kind, settings, 2)[0], lr_scheduler=cosine)
        fit(model, 30, [KeepRun(tmp_path / folder, checkpoint_every=10), *more], resume)
        return everything(model)

    whole = train("whole")
    with pytest.raises(Killed):
        train("killed", KillAt(15))
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    check_contents(str(last), load_saved(last), module(differing(kind, settings, 2)[0]))
    assert torch.equal(whole, train("killed", resume=str(last)))


def every_weight(task):
    return {"weights": [*weights(SMALL, task)]}


@every_choice
@pytest.mark.parametrize("written", ["frozen", "drawn anew"])
def test_weights_let_go_or_drawn_anew_learn_as_those_of_a_run_that_begins_there(kind, settings, written):
    task, optimizer = few_shot(), differing(kind, settings, 2)[0]
    begun = {name: value.double() for name, value in opsin.training.module.init_parameters(SMALL, task, [0, 1]).items()}
    writers = {
        "frozen": Freeze(**every_weight(task), schedule=Schedule(stop=4)),
        "drawn anew": Reinitialise(Schedule(start=4, stop=5), **every_weight(task)),
    }
    changed = Training(SMALL, task, begun, writers[written], optimizer=optimizer)
    later = Training(SMALL, task, begun, optimizer=optimizer)
    for k in range(4):
        changed.update(k)
    moved = any(not torch.equal(value, begun[name]) for name, value in changed.values.items())
    assert moved == (written == "drawn anew")
    for k in range(4, 10):
        changed.update(k), later.update(k)
    states = [training.optimizer.members_state().tensors() for training in (changed, later)]
    for one, other in zip(*states, strict=True):
        assert (one - other).abs().max() < 1e-12


@every_choice
def test_half_frozen_weights_stand_still_bitwise_with_their_state(kind, settings):
    task, optimizer = few_shot(), differing(kind, settings, 2)[0]
    freeze = Freeze(heads=["0:1"], parts=["W_Q"], members=[1], schedule=Schedule(start=2))
    training = Training(SMALL, task, weights(SMALL, task), freeze, optimizer=optimizer)
    for k in range(2):
        training.update(k)
    name = "blocks.0.attn.W_QKV"
    index = training.optimizer.names.index(name)

    def held():
        state = training.optimizer.members_state()
        return [tensor[1, :, 4:8].clone() for tensor in (state.parameters[index], *state.kept[index].values())]

    before = held()
    for k in range(2, 5):
        training.update(k)
    assert all(torch.equal(*pair) for pair in zip(before, held(), strict=True))


@every_kind
def test_a_schedule_of_zero_moves_no_weight(kind):
    model = module(kind(), lr_scheduler=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda _: 0.0))
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    fit(model, 5)
    assert torch.equal(before, torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))


@every_kind
def test_the_settings_of_a_run_name_the_optimizer_and_all_its_settings(kind):
    model = module(kind())
    fit(model, 5)
    names = {f"model.optimizer.{name}" for name in inspect.signature(kind).parameters}
    assert model.settings["model.optimizer"] == kind.__name__ and names <= {*model.settings}
    assert "model.learning_rate" not in model.settings
    other = module(kind(learning_rate=0.02))
    fit(other, 5)
    assert digest(other.settings) != digest(model.settings)


def test_the_settings_of_the_short_form_are_those_of_before():
    model = OpsinModule(few_shot(), SMALL, steps_per_batch=5, log_every=5, probe_size=8, evaluation_size=8)
    fit(model, 5)
    assert {name: model.settings[f"model.{name}"] for name in ("learning_rate", "weight_decay", "betas", "eps")} == {
        **{"learning_rate": 1e-3, "weight_decay": 0.0},
        **{"betas": [0.9, 0.999], "eps": 1e-8},
    }
    assert not any(name.startswith("model.optimizer") for name in model.settings)
