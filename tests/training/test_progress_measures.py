"""Claims about progress measures as a pure function: every set in the batched pass is what it is alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.callbacks import (
    Ablate,
    Clamp,
    CopyFromPattern,
    Disallow,
    Graft,
    HeadTemperature,
    PerfectPreviousInput,
    Preserve,
    Project,
)
from opsin.errors import ConfigError
from opsin.interventions.apply import constants_of, run_passes
from opsin.interventions.donors import donor_from
from opsin.interventions.intervention import Clock, Intervention, Overwrite, Pass, Source, Supply, Value
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection
from opsin.model.transformer import Transformer
from opsin.objective import CrossEntropy, accuracy, cross_entropy
from opsin.training.objective import scored_logits
from opsin.training.progress_measures import build_measures, measure, measure_constants
from tests.helpers.toys import ToyTokens, batch_of, few_shot, inputs_of, plan_of, run, weights

MODEL = Transformer(layers=2, width=8, heads=2, mlp_ratio=2.0)
SEEDS = (3, 5, 8)
TASK = few_shot()
BATCH = batch_of(TASK, SEEDS, dtype=torch.float64)
VALUES = weights(MODEL, TASK, SEEDS)
STEP = 7


@dataclass(frozen=True)
class Shifted(Value):
    """The activation and a number that only this member at this step has."""

    @property
    def needs(self):
        return (Clock(),)

    def __call__(self, x, batch, *taken):
        shift = (taken[0][:, 0] * 10 + taken[0][:, 1]).to(x.dtype) / 100
        return Overwrite(x + shift.view(-1, *[1] * (x.dim() - 1)))


@dataclass(frozen=True)
class Given(Supply):
    """Another number for every member."""

    fixed: bool = True

    def initial(self, members):
        return torch.arange(2.0, members + 2)


@dataclass(frozen=True)
class Scaled(Value):
    """The activation times what is supplied."""

    supply: Supply

    @property
    def needs(self):
        return (self.supply,)

    def __call__(self, x, batch, *taken):
        return Overwrite(x * taken[0].view(-1, *[1] * (x.dim() - 1)))


@dataclass(frozen=True)
class Taken(Value):
    """What the activation is in another pass."""

    source: Source

    @property
    def needs(self):
        return (self.source,)

    def __call__(self, x, batch, *taken):
        return Overwrite(taken[0])


class Writes:
    """A writer of given interventions."""

    def __init__(self, *items):
        self.items = items

    def interventions(self, sites):
        return list(self.items)


def writes(value, site="blocks.0.hook_resid_post", **selected):
    return Writes(Intervention("Writes", site, Selection(**selected), value))


def silenced_elsewhere(members):
    """What block 1 hands on where block 0 is silenced in some members."""
    silent = Intervention("Other", "blocks.0.hook_attn_out", Selection(members=members), Scaled(Given()))
    return writes(Taken(Source("blocks.1.hook_resid_post", Pass((silent,)))), "blocks.1.hook_resid_post")


DONOR = donor_from("donor", MODEL, weights(MODEL, TASK, (9,)))
SETS = {
    "ablation": [Ablate(heads=["1:0"])],
    "mean": [Ablate(neurons=["0:3"], value="mean")],
    "pattern": [Clamp(heads=["1:1"], pattern="match")],
    "preserve": [Preserve(["patterns"]), Ablate(sites=["blocks.0.hook_attn_out"])],
    "copy": [CopyFromPattern("1:1")],
    "perfect": [PerfectPreviousInput()],
    "two": [Clamp(heads=["0:0"], pattern="previous_token"), Disallow(["1:1"], "non_labels")],
    "ordered": [Preserve(["values"], order=0), Ablate(heads=["1:0"], order=1), Ablate(sites=["blocks.0.hook_mlp_out"])],
    "temperature": [HeadTemperature({"1:0": 0.5})],
    "members": [Ablate(heads=["0:1", "1:1"], members=[0, 2]), Clamp(heads=["1:0"], pattern="match", members=[1])],
    "lower": [Graft(DONOR, 0)],
    "upper": [Graft(DONOR, 0, part="upper", donor_callbacks=[Ablate(heads=["1:0"], members=[1])])],
    "clock": [writes(Shifted(), "blocks.0.attn.hook_v")],
    "given": [writes(Scaled(Given()))],
    "directions": [Project("blocks.0.hook_resid_post", directions=[[1.0, 2.0, 0.0, -1.0, 0.5, 0.0, 0.0, 3.0]])],
    "members of another pass": [silenced_elsewhere((0,))],
    "other members of another pass": [silenced_elsewhere((1, 2))],
}


def build(sets, task=TASK):
    return build_measures(sets, MODEL.sites(task), len(SEEDS), task.batch_size, "sets")


def measured(sets, batch=BATCH, values=VALUES, task=TASK):
    """What evaluating all sets at once gives, and what was planned for it."""
    measures, table = build(sets, task=task), MODEL.position_table(task.layout.positions, torch.float64)
    constants = measure_constants(measures, constants_of(plan_of(MODEL, task), {}, table, len(SEEDS), table.dtype))
    return measures, measure(measures, MODEL, values, constants, batch, clock_of(SEEDS), CrossEntropy())


def clock_of(seeds):
    return torch.tensor([[seed, STEP] for seed in seeds])


def alone(writers, batch=BATCH, values=VALUES, seeds=SEEDS, task=TASK):
    """Loss and accuracy of one set in a plan, a pass and masks of its own."""
    plan = plan_of(MODEL, task, *writers, members=len(seeds))
    inputs = replace(inputs_of(plan, MODEL, values, batch), clock=clock_of(seeds))
    logits = scored_logits(run(MODEL, values, batch, run_passes(plan, inputs))[0], batch)
    return cross_entropy(logits, batch).mean((1, 2)), accuracy(logits, batch).mean((1, 2))


ALONE = {name: alone(writers) for name, writers in {"none": [], **SETS}.items()}


def assert_same(left, right, name=None):
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12, msg=name)


def test_no_two_sets_of_these_tests_have_the_same_losses():
    for (a, (loss_a, _)), (b, (loss_b, _)) in itertools.combinations(ALONE.items(), 2):
        assert (loss_a - loss_b).abs().max() > 1e-3, (a, b)


def test_every_set_and_the_base_line_are_what_they_are_alone():
    measures, found = measured(SETS)
    assert measures.names == ("none", *SETS)
    for place, name in enumerate(measures.names):
        assert_same(found.loss[place], ALONE[name][0], name)
        assert_same(found.measures["accuracy"][place], ALONE[name][1], name)


@settings(max_examples=20)
@given(st.lists(st.sampled_from(sorted(SETS)), min_size=1, max_size=3, unique=True))
def test_which_sets_stand_beside_a_set_makes_no_difference(names):
    _, found = measured({name: SETS[name] for name in names})
    for place, name in enumerate(["none", *names]):
        assert_same(found.loss[place], ALONE[name][0], name)


@pytest.mark.parametrize("name", ["ablation", "preserve", "copy", "perfect", "two", "ordered", "clock"])
def test_every_member_is_what_it_is_as_a_single_run(name):
    for member, seed in enumerate(SEEDS):
        batch = batch_of(TASK, (seed,), dtype=torch.float64)
        values = {key: value[member : member + 1] for key, value in VALUES.items()}
        loss, right = alone(SETS[name], batch, values, (seed,))
        assert_same(ALONE[name][0][member], loss[0])
        assert_same(ALONE[name][1][member], right[0])


def test_a_member_that_a_set_leaves_out_is_that_of_the_base_line():
    _, found = measured({"one": [Ablate(heads=["1:0"], members=[1])]})
    assert torch.equal(found.loss[0] == found.loss[1], torch.tensor([True, False, True]))
    assert torch.equal(found.changed[1], torch.tensor([False, True, False]))


def test_a_task_of_tokens_alone_is_measured_too():
    task = ToyTokens()
    batch, values = batch_of(task, SEEDS), weights(MODEL, task, SEEDS)
    _, found = measured({"one": [Ablate(heads=["0:1"])]}, batch, values, task)
    for place, writers in enumerate([[], [Ablate(heads=["0:1"])]]):
        assert_same(found.loss[place], alone(writers, batch, values, SEEDS, task)[0])


def test_equal_passes_of_different_sets_are_one_pass():
    plan = build({"a": [Preserve(["keys"])], "b": [CopyFromPattern("1:0")], "c": [HeadTemperature({"1:1": 2.0})]}).plan
    assert len(plan.passes) == 2


def test_nothing_but_numbers_comes_back_from_weights_that_are_trained():
    leaves = {name: value.clone().requires_grad_() for name, value in VALUES.items()}
    _, found = measured({"two passes": SETS["preserve"]}, values=leaves)
    assert not found.loss.requires_grad and not found.measures["accuracy"].requires_grad


def test_what_a_set_changes_is_told_apart_from_what_it_does_not():
    measures, found = measured({"idle": [Preserve(["values"])], "at work": SETS["two"]})
    assert torch.equal(found.changed, torch.tensor([[False], [False], [True]]).expand(3, 3))
    assert torch.equal(measures.covers(), torch.tensor([[False], [True], [True]]).expand(3, 3))


def test_writers_contest_within_a_set_and_never_between_sets():
    assert build({"a": [Ablate(heads=["0:0"])], "b": [Preserve(["values"])], "c": [Ablate(heads=["0:0"])]})


def test_what_other_passes_change_does_not_count_as_changed():
    silent = Intervention("Other", "blocks.0.hook_attn_out", Selection(), Scaled(Given()))
    same = Taken(Source("blocks.0.hook_resid_pre", Pass((silent,))))
    measures, found = measured({"idle": [writes(same, "blocks.0.hook_resid_pre", members=(1,))]})
    assert not found.changed.any()
    assert torch.equal(measures.covers(), torch.tensor([[False] * 3, [False, True, False]]))


@pytest.mark.parametrize(
    ("writers", "message"),
    [
        ([Ablate(heads=["2:0"])], r"sets.b.Ablate.heads: got '2:0', expected layer:head"),
        # the member of another copy
        ([Ablate(heads=["0:0"], members=[3])], r"sets.b.Ablate.members: got 3, expected members from 0 to 2"),
        ([Ablate(heads=["0:0"]), Preserve(["values"])], r"sets.b.Preserve.order: got .*both overwrite"),
        (
            [Ablate(heads=["0:0"], schedule=Schedule(stop=9))],
            r"sets.b.Ablate.schedule: got 'steps 0 to 9', expected none",
        ),
        (
            [Graft(DONOR, 0, donor_callbacks=[Ablate(heads=["0:1"], schedule=Schedule(stop=7))])],
            r"sets.b.Ablate.schedule: got 'steps 0 to 7', expected none",
        ),
        (
            [writes(Scaled(Given(fixed=False)))],
            r"sets.b.Writes: got 'Scaled', expected a writer whose tensors are given",
        ),
    ],
)
def test_a_set_that_cannot_be_evaluated_is_refused_by_its_name(writers, message):
    sets = {"a": [Ablate(heads=["0:0"])], "b": writers}
    with pytest.raises(ConfigError, match=f"^{message}"):
        build(sets)
