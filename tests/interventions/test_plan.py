"""Claims about the plan: nothing is silent, nothing is contested, and gates decide."""

from dataclasses import replace

import pytest
import torch

from opsin.callbacks.writers.ablate import Ablate
from opsin.callbacks.writers.clamp import Clamp
from opsin.errors import ConfigError
from opsin.interventions.apply import run_passes
from opsin.interventions.build_plan import Writer
from opsin.interventions.intervention import Intervention
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection, parse_pairs
from opsin.interventions.values.plain import Constant
from opsin.model.transformer import Transformer
from opsin.records.history import History
from tests.helpers.toys import SMALL, batch_of, few_shot, inputs_of, plan_of, run, tap_of, weights

MLP = Transformer(layers=1, width=8, heads=2, mlp_ratio=0.5)
RESID = "blocks.0.hook_resid_post"
PATTERN = "blocks.1.attn.hook_pattern"


class Custom:
    """A writer that is no callback of this package."""

    def __init__(self, site, **selected):
        self.item = Intervention("Custom", site, Selection(**selected), Constant(1.0))

    def interventions(self, sites):
        return [self.item]


def build(*writers, model=SMALL, **options):
    return plan_of(model, few_shot(), *writers, **options)


@pytest.mark.parametrize(
    ("writer", "field", "value"),
    [
        (Clamp(heads=["1:2"], pattern="induction"), "Clamp.heads", "1:2"),
        (Clamp(heads=["2:0"], pattern="induction"), "Clamp.heads", "2:0"),
        (Clamp(heads=["-1:0"], pattern="induction"), "Clamp.heads", "-1:0"),
        (Ablate(sites=["blocks.2.hook_resid_post"]), "Ablate.sites", "blocks.2.hook_resid_post"),
        (Ablate(neurons=["0:4"]), "Ablate.neurons", "0:4"),
        (Ablate(heads=["0:0"], positions=[5]), "Ablate.positions", 5),
        (Ablate(heads=["0:0"], positions=[-1]), "Ablate.positions", -1),
        (Ablate(heads=["0:0"], members=[0, 2]), "Ablate.members", 2),
        (Ablate(heads=["0:0"], members=[]), "Ablate.members", []),
        (Custom("nowhere"), "Custom", "nowhere"),
        (Custom(RESID, heads=(0,)), "Custom.heads", [0]),
        (Custom("hook_logits", neurons=(1,)), "Custom.neurons", [1]),
        (Custom("blocks.0.attn.hook_z", heads=(0, 9)), "Custom.heads", 9),
    ],
)
def test_what_a_model_does_not_have_stops_the_build(writer, field, value):
    with pytest.raises(ConfigError) as refused:
        build(writer, model=Transformer(layers=2, width=8, heads=2, mlp_ratio=0.5))
    assert (refused.value.field, refused.value.value) == (field, value)


def test_neurons_of_a_model_without_an_mlp_stop_the_build():
    with pytest.raises(ConfigError, match=r"Ablate\.neurons.*no MLP"):
        build(Ablate(neurons=["0:0"]))


@pytest.mark.parametrize("orders", [(None, None), (1, None), (None, 1), (2, 2)])
def test_two_writers_on_the_same_entries_need_an_order(orders):
    first, second = (Clamp(site=RESID, value=value, order=order) for value, order in zip((1, 2), orders, strict=True))
    with pytest.raises(ConfigError, match=rf"Clamp\.order.*both overwrite {RESID}"):
        build(first, second)


@pytest.mark.parametrize("orders", [(1, 2), (2, 1), (0, -3)])
def test_the_later_of_two_ordered_writers_wins(tiny_task, orders):
    writers = [Clamp(site=RESID, value=value, order=order) for value, order in zip((1, 2), orders, strict=True)]
    batch = batch_of(tiny_task, dtype=torch.float64)
    tap = tap_of(SMALL, tiny_task, batch, *writers)
    last = 1.0 if orders[0] > orders[1] else 2.0
    assert (run(SMALL, weights(SMALL, tiny_task), batch, tap)[1][RESID] == last).all()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"heads": ["1:0"]}, {"heads": ["1:1"]}),
        ({"heads": ["0:0"]}, {"heads": ["1:0"]}),
        ({"heads": ["1:0"], "positions": [1, 3]}, {"heads": ["1:0"], "positions": [4]}),
        ({"heads": ["1:0"], "members": [0]}, {"heads": ["1:0"], "members": [1]}),
    ],
)
def test_writers_of_disjoint_entries_do_not_contest(one, other):
    assert len(build(Clamp(pattern="induction", **one), Clamp(pattern="previous_token", **other)).rows) == 2


@pytest.mark.parametrize(
    "schedule",
    [Schedule(start=10), Schedule(start=9, ramp=3), Schedule(start=40, unit="sequences")],
)
def test_a_schedule_that_never_acts_is_refused(schedule):
    with pytest.raises(ConfigError, match=r"Ablate\.schedule.*to act within the run's 10 steps"):
        build(Ablate(heads=["0:0"], schedule=schedule), steps=10)
    assert build(Ablate(heads=["0:0"], schedule=schedule), steps=12).rows


def test_equal_plans_have_equal_digests_and_different_plans_different_ones():
    base = {"heads": ["1:0"], "pattern": "induction"}
    changes = [
        {},
        {"heads": ["1:1"]},
        {"pattern": "match"},
        {"strength": 0.5},
        {"positions": [4]},
        {"members": [1]},
        {"order": 1},
        {"schedule": Schedule(start=1)},
        {"schedule": Schedule(period=2)},
    ]
    digests = [build(Clamp(**base | change)).digest() for change in changes]
    assert digests == [build(Clamp(**base | change)).digest() for change in changes]
    assert len(set(digests) | {build().digest()}) == len(changes) + 1


def test_equal_numbers_give_equal_digests():
    one, other = (build(Clamp(site=RESID, value=zero)) for zero in (0, 0.0))
    assert one.row_identities() == other.row_identities()
    assert one.digest() == other.digest()


def test_writers_are_ordered_by_computation_and_not_by_mention():
    late, early = Clamp(site="hook_logits", value=0.0), Clamp(site="hook_embed", value=0.0)
    assert [row.target for row in build(late, early).rows] == ["hook_embed", "hook_logits"]
    assert build(late, early).digest() == build(early, late).digest()


def test_gates_follow_their_schedules_for_every_member():
    writers = [
        Ablate(heads=["0:0"], schedule=Schedule(start=3)),
        Ablate(heads=["1:0"], schedule=Schedule(stop=5, ramp=4)),
    ]
    gates = build(*writers).gates(2, 4, 3, History(4))
    assert gates.shape == (4, 2, 3)
    assert gates[..., 0].tolist() == [[0, 0.5], [1, 0.75], [1, 1], [1, 0]]
    assert (gates == gates[..., :1]).all()
    assert build().gates(0, 4, 3, History(4)).shape == (4, 0, 3)


def test_a_closed_gate_leaves_the_logits_bitwise_alone(tiny_task):
    batch, values = batch_of(tiny_task), weights(MLP, tiny_task, dtype=torch.float32)
    writers = [Clamp(site=site.name, value=3.0) for site in MLP.sites(tiny_task)]
    tap = tap_of(MLP, tiny_task, batch, *writers, gate=0.0, dtype=torch.float32)
    assert torch.equal(run(MLP, values, batch, tap)[0], run(MLP, values, batch)[0])


def test_a_gate_of_one_member_leaves_the_others_bitwise_alone(tiny_task):
    batch, values = batch_of(tiny_task), weights(MLP, tiny_task, dtype=torch.float32)
    plan = plan_of(MLP, tiny_task, Ablate(heads=["0:0"]), Ablate(neurons=["0:1", "0:3"]))
    inputs = replace(inputs_of(plan, MLP, values, batch, dtype=torch.float32), gates=torch.tensor([[0.0, 1.0]] * 2))
    tap = run_passes(plan, inputs)
    plain, clamped = run(MLP, values, batch)[0], run(MLP, values, batch, tap)[0]
    assert torch.equal(plain[0], clamped[0]) and (plain[1] != clamped[1]).any()


def test_half_open_gates_go_half_way(tiny_task):
    batch = batch_of(tiny_task, dtype=torch.float64)
    tap = tap_of(SMALL, tiny_task, batch, Clamp(site="hook_logits", value=2.0, positions=[4]), gate=0.5)
    values = weights(SMALL, tiny_task)
    plain, clamped = run(SMALL, values, batch)[0], run(SMALL, values, batch, tap)[0]
    assert (clamped[:, :, 4] - (plain[:, :, 4] + 2) / 2).abs().max() < 1e-15
    assert torch.equal(clamped[:, :, :4], plain[:, :, :4])


def test_the_description_tells_every_intervention():
    writers = [Clamp(heads=["1:0"], pattern="induction", schedule=Schedule(start=3)), Ablate(sites=["hook_embed"])]
    assert build(*writers).describe() == [
        {
            "pass": "1",
            "writer": "Ablate",
            "site": "hook_embed",
            "selection": "all",
            "value": "Constant(constant=0.0)",
            "gradient": "stops",
            "schedule": "always",
        },
        {
            "pass": "1",
            "writer": "Clamp",
            "site": PATTERN,
            "selection": "heads [0]",
            "value": "Induction(strength=1.0)",
            "gradient": "stops",
            "schedule": "steps 3 to end",
        },
    ]


def test_a_callback_with_interventions_is_a_writer():
    assert isinstance(Ablate(heads=["0:0"]), Writer) and not isinstance(object(), Writer)


@pytest.mark.parametrize("items", [["1"], ["a:b"], ["1:2:3"], ["1:"], [], [13]])
def test_a_pair_that_is_none_is_refused(items):
    with pytest.raises(ConfigError, match=r"Clamp\.heads.*layer:head"):
        parse_pairs("Clamp.heads", items, 2, 4, "head")


def test_pairs_are_gathered_by_layer():
    assert parse_pairs("Clamp.heads", ["1:3", "0:1", "1:0"], 2, 4, "head") == {1: [3, 0], 0: [1]}


def test_one_value_on_different_heads_or_members_acts_at_once_and_as_one_after_the_other(tiny_task):
    batch, values = batch_of(tiny_task), weights(SMALL, tiny_task, dtype=torch.float32)
    writers = [
        Clamp(["1:0"], "previous_token", members=[0]),
        Clamp(["1:0"], "previous_token", members=[1]),
        Clamp(["1:1"], "previous_token"),
    ]
    plan = plan_of(SMALL, tiny_task, *writers)
    apart = replace(plan, passes=(replace(plan.passes[0], groups=tuple((row,) for row in plan.rows)),))
    assert plan.passes[0].groups == (plan.rows,) and len(plan.rows) == 3
    gates = torch.tensor([[0.3, 1.0], [1.0, 0.0], [1.0, 0.6]])
    seen, fired = [], []
    for each in (plan, apart):
        fired.append({})
        inputs = replace(inputs_of(each, SMALL, values, batch, dtype=torch.float32), gates=gates)
        seen.append(run(SMALL, values, batch, run_passes(each, inputs, fired[-1]))[0])
    assert torch.equal(*seen)
    assert fired[0].keys() == fired[1].keys() == {0, 1, 2}
    assert all(torch.equal(fired[0][index], fired[1][index]) for index in fired[0])
    assert fired[0][1].tolist() == [False, False] and fired[0][0].tolist() == [True, False]


def test_different_values_and_common_entries_act_one_after_the_other(tiny_task):
    different = plan_of(SMALL, tiny_task, Clamp(["1:0"], "previous_token"), Clamp(["1:1"], "induction"))
    common = plan_of(SMALL, tiny_task, *(Clamp(["1:0"], "induction", order=order) for order in (0, 1)))
    for plan in (different, common):
        assert [[row.gate for row in group] for group in plan.passes[0].groups] == [[0], [1]]
