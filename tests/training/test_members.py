"""Each member of a population is the run of its own seed and condition.

In double precision to 1e-12 after 200 steps: other numbers of members run other kernels, which add up in another order,
and training multiplies the rounding. In single precision what is compared is when it forms.
"""

from __future__ import annotations

import pytest

from opsin.callbacks import (
    Ablate,
    Clamp,
    Clip,
    CopyFromPattern,
    Disallow,
    Freeze,
    Graft,
    HeadTemperature,
    InductionHeads,
    PathPatch,
    PerfectPreviousInput,
    PhaseChange,
    Preserve,
    Project,
    Reinitialise,
)
from opsin.interventions.donors import donor_from
from opsin.interventions.feedback import Feedback
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.directions import WeightDirections
from opsin.model.protocol import init_parameters
from opsin.model.transformer import Transformer
from opsin.tasks import FewShot, GaussianClusters
from opsin.training.module import OpsinModule
from tests.helpers.toys import train

STEPS = 200
MODEL = Transformer(layers=2, width=16, heads=2, mlp_ratio=2)
TASK = FewShot(GaussianClusters(classes=60, features=16), batch_size=8)
DONOR = donor_from("donor", MODEL, init_parameters(MODEL, TASK, [9]))
PULSED = Schedule(start=20, stop=150, period=30, ramp=10)

CONDITIONS = {
    "nothing": lambda **_: [],
    "previous token": lambda **o: [Clamp(["0:1"], "previous_token", schedule=PULSED, **o)],
    "induction": lambda **o: [Clamp(["1:0"], "induction", strength=0.7, **o)],
    "match": lambda **o: [Clamp(["1:0"], "match", temperature=0.5, **o)],
    "disallow": lambda **o: [Disallow(["0:1"], "previous_token", schedule=PULSED, **o)],
    "silence": lambda **o: [Disallow(["1:1"], "non_labels", **o)],
    "number": lambda **o: [Clamp(site="blocks.0.hook_attn_out", value=0.5, schedule=PULSED, **o)],
    "ablated head": lambda **o: [Ablate(heads=["1:1"], **o)],
    "mean": lambda **o: [Ablate(heads=["1:1"], value="mean", **o)],
    "overall mean": lambda **o: [Ablate(heads=["1:1"], value="overall_mean", **o)],
    "resample": lambda **o: [Ablate(heads=["1:1"], value="resample", **o)],
    "noise": lambda **o: [Ablate(heads=["0:0"], value="noise", schedule=PULSED, **o)],
    "neurons": lambda **o: [Ablate(neurons=["1:0", "1:5"], at="pre", **o)],
    "clip": lambda **o: [Clip(["1:2", "1:3"], **o)],
    "temperature": lambda **o: [HeadTemperature({"1:0": 0.5}, **o)],
    "preserve": lambda **o: [Preserve(["patterns"], **o), Ablate(heads=["0:0"], **o)],
    "scales": lambda **o: [Preserve(["scales"], **o), Ablate(neurons=["1:1"], **o)],
    "copy": lambda **o: [CopyFromPattern("1:0", **o)],
    "perfect input": lambda **o: [PerfectPreviousInput(**o)],
    "graft lower": lambda **o: [Graft(DONOR, 0, "lower", **o)],
    "graft upper": lambda **o: [Graft(DONOR, 0, "upper", schedule=PULSED, **o)],
    "path": lambda **o: [PathPatch(["0:1"], ["1:0.k"], **o)],
    "subspace": lambda **o: [Project("blocks.0.hook_resid_post", weight=WeightDirections(name="unembed.W_U"), **o)],
    "freeze": lambda **o: [Freeze(["0:0"], parts=["W_Q", "W_K"], schedule=PULSED, **o)],
    "draw anew": lambda **o: [Reinitialise(Schedule(start=100, stop=101), ["1:1"], seed=5, **o)],
    "feedback": lambda **o: [Ablate(["1:0"], schedule=Schedule(feedback=Feedback("train/loss", below=1.2)), **o)],
}


def module(seeds, rates, **settings):
    small = {"steps_per_batch": 50, "log_every": 10, "probe_size": 8, "compile": False, "idle": "warn"}
    return OpsinModule(TASK, MODEL, seeds, rates, **small | settings).double()


@pytest.fixture(scope="module")
def together():
    writers = [writer for slot, make in enumerate(CONDITIONS.values()) for writer in ordered(make(members=[slot]))]
    return train(module(seeds_of(), rates_of()), STEPS, *writers)


def ordered(writers):
    """With an order, which says nothing where members differ, as an order among writers of one member does."""
    for writer in writers:
        writer.order = 0
    return writers


def seeds_of():
    return [3 + slot % 4 for slot in range(len(CONDITIONS))]


def rates_of():
    return [0.002 * (1 + slot % 3) for slot in range(len(CONDITIONS))]


LIKE_ANOTHER = {
    *("match", "disallow", "silence", "number", "overall mean", "resample", "clip", "temperature", "preserve"),
    *("perfect input", "graft lower"),
}
"""Conditions whose kind of value and of pass another has as well: trained alone among the slow tests."""


@pytest.mark.parametrize(
    "slot",
    [
        pytest.param(slot, marks=[pytest.mark.slow] if name in LIKE_ANOTHER else [], id=name)
        for slot, name in enumerate(CONDITIONS)
    ],
)
def test_a_member_among_others_with_other_clamps_rates_and_seeds_is_the_run_of_its_own(slot, together):
    writers = list(CONDITIONS.values())[slot](members=[0])
    alone = train(module([seeds_of()[slot]], rates_of()[slot]), STEPS, *writers)
    for name, values in together.parameters_by_name().items():
        own = alone.parameters_by_name()[name]
        assert (values[slot] - own[0]).abs().max() <= 1e-12 * own.abs().max().clamp(min=1), name


def test_what_is_compared_is_not_what_the_others_are(together):
    # members so many places apart share seed and rate, and differ by their interventions alone
    apart = 12
    for slot in range(len(CONDITIONS) - apart):
        values = together.parameters_by_name().values()
        assert max((value[slot] - value[slot + apart]).abs().max() for value in values) > 1e-6


@pytest.mark.slow
def test_in_single_precision_members_and_runs_of_their_own_form_at_the_same_time():
    """Compiled and as long as the recipe: about three minutes."""
    task = FewShot(GaussianClusters(classes=100, exemplars=5, features=512), batch_size=32, train_classes=50)
    model, seeds, readers = Transformer(), [1, 2, 3], lambda: [InductionHeads(), PhaseChange()]

    def fitted(seeds, *writers):
        return train(OpsinModule(task, model, seeds, 3e-5, compile=True), 12_000, *writers, *readers()).summary

    several = fitted(seeds, Clamp(["0:2"], "previous_token", members=[1]))["members"]
    for slot, seed in enumerate(seeds):
        alone = fitted([seed], *([Clamp(["0:2"], "previous_token")] if slot == 1 else []))
        assert several[slot]["onset"] and alone["onset"]
        width = alone["onset"]["high"] - alone["onset"]["low"]
        assert abs(several[slot]["onset"]["value"] - alone["onset"]["value"]) <= width
