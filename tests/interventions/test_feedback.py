"""Claims about closed loops: known answers on histories written by hand, and what a run makes of what it measures."""

from __future__ import annotations

import numpy as np
import pytest

from opsin.callbacks import Ablate, Freeze, HeadTemperature, InductionHeads, KeepRun
from opsin.errors import ConfigError
from opsin.interventions.feedback import Feedback
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection
from opsin.model.transformer import Transformer
from opsin.records.history import History
from opsin.training.module import OpsinModule
from tests.helpers.loops import ALL_HEADS, STRENGTH, following, history, module, validating
from tests.helpers.toys import SMALL, few_shot, plan_of, train

LOSS = {2: 1.0, 4: 0.5, 5: 2.0, 8: 0.8}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"above": 0.9}, [0, 0, 1, 1, 0, 1, 1, 1, 0, 0]),
        ({"below": 0.9}, [0, 0, 0, 0, 1, 0, 0, 0, 1, 1]),
        ({"above": 0.5}, [0, 0, 1, 1, 0, 1, 1, 1, 1, 1]),  # 0.5 is not above 0.5
        ({"below": 0.9, "mode": "start"}, [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]),
        ({"below": 0.9, "mode": "stop"}, [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]),
        ({"below": 0.1, "mode": "start"}, [0] * 10),
        ({"below": 0.1, "mode": "stop"}, [1] * 10),
        ({"above": 0.5, "mode": "scale", "full": 1.5}, [0, 0, 0.5, 0.5, 0, 1, 1, 1, 0.3, 0.3]),
        ({"below": 1.0, "mode": "scale", "full": 0.0}, [0, 0, 0, 0, 0.5, 0, 0, 0, 0.2, 0.2]),
    ],
)
def test_each_mode_has_the_known_strengths(settings, expected):
    feedback = Feedback("loss", **settings)
    assert feedback.strengths(0, 10, 1, history(loss=LOSS))[:, 0] == pytest.approx(expected)
    assert feedback.strengths(0, 10, 1, history())[:, 0].tolist() == [float(feedback.mode == "stop")] * 10


def test_each_member_follows_its_own_record():
    feedback = Feedback("loss", below=1.0, mode="start")
    strengths = feedback.strengths(0, 4, 3, history(loss={1: [2.0, 0.5, 2.0], 3: [0.5, 2.0, 2.0]}))
    assert strengths.tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 0], [1, 1, 0]]


def test_the_window_multiplies_the_loop():
    schedule = Schedule(start=2, stop=9, ramp=4, feedback=Feedback("loss", above=0.9))
    gates = schedule.gates(0, 10, 1, history(loss=LOSS))[:, 0]
    assert gates.tolist() == [0, 0, 0, 0.25, 0, 0.75, 1, 1, 0, 0]


def heads_record(*members):
    """Records ``[M, 2, 2]`` from rows of the four heads."""
    return np.array(members).reshape(len(members), 2, 2)


def test_a_head_that_is_named_is_read_whatever_the_writer_acts_on():
    plan = plan_of(SMALL, few_shot(), Ablate(heads=["0:0"], schedule=following(head="1:0")), members=1)
    gates = plan.gates(
        0, 3, 1, history(induction_strength={1: heads_record([0.9, 0, 0.4, 0]), 2: heads_record([0] * 4)})
    )
    assert gates[:, 0, 0].tolist() == [0, 1, 0] and len(plan.interventions) == 1


def gates_of(writer, records, members=1, steps=5):
    """Strengths by head of what the writer acts on."""
    plan = plan_of(SMALL, few_shot(), writer, members=members, steps=steps)
    gates = plan.gates(0, steps, members, history(induction_strength=records))
    heads = [f"{row.target.split('.')[1]}:{row.intervention.selection.heads[0]}" for row in plan.rows]
    assert {row.writer for row in plan.rows} == {type(writer).__name__}
    return {head: gates[:, row].T.tolist() for row, head in enumerate(heads)}


def test_with_own_every_head_follows_its_own_value():
    records = {1: heads_record([0.4, 0.1, 0.5, 0.9]), 3: heads_record([0.1, 0.4, 0.5, 0.9])}
    found = gates_of(Ablate(heads=["1:0", "0:0", "0:1"], schedule=following(head="own")), records)
    assert found == {"0:0": [[0, 1, 1, 0, 0]], "0:1": [[0, 0, 0, 1, 1]], "1:0": [[0, 1, 1, 1, 1]]}


def test_with_strongest_the_intervention_moves_from_head_to_head():
    records = {
        1: heads_record([0.4, 0.1, 0.5, 0.9]),  # 1:1 is stronger, but not the writer's to act on
        2: heads_record([0.6, 0.1, 0.5, 0.2]),
        3: heads_record([0.2, 0.25, 0.1, 0.9]),  # nobody past the level
        4: heads_record([0.5, 0.7, 0.7, 0.1]),  # of equal ones the first
    }
    found = gates_of(Ablate(heads=["1:0", "0:0", "0:1"], schedule=following(head="strongest")), records)
    assert found == {"0:0": [[0, 0, 1, 0, 0]], "0:1": [[0, 0, 0, 0, 1]], "1:0": [[0, 1, 0, 0, 0]]}


def test_in_every_member_another_head_may_be_the_strongest():
    records = {1: heads_record([0.4, 0.1, 0.5, 0.0], [0.5, 0.9, 0.1, 0.2])}
    found = gates_of(Ablate(heads=ALL_HEADS, schedule=following(head="strongest")), records, members=2, steps=2)
    assert found == {"0:0": [[0, 0]] * 2, "0:1": [[0, 0], [0, 1]], "1:0": [[0, 1], [0, 0]], "1:1": [[0, 0]] * 2}


def test_a_head_starts_for_good_when_it_was_once_the_strongest_and_past_the_level():
    records = {1: heads_record([0.4, 0.35, 0.1, 0.1]), 3: heads_record([0.1, 0.1, 0.9, 0.5])}
    found = gates_of(Ablate(heads=ALL_HEADS, schedule=following(head="strongest", mode="start")), records)
    assert found == {"0:0": [[0, 1, 1, 1, 1]], "0:1": [[0] * 5], "1:0": [[0, 0, 0, 1, 1]], "1:1": [[0] * 5]}


def test_a_value_that_is_no_number_is_past_nothing_and_stronger_than_nothing():
    records = {1: heads_record([np.nan, 0.5, 0.4, 0.1]), 2: heads_record([np.nan] * 4)}
    scale = following(head="strongest", mode="scale", full=0.5)
    for schedule in (following(head="strongest"), scale):
        found = gates_of(Ablate(heads=ALL_HEADS, schedule=schedule), records, steps=3)
        assert found == {"0:0": [[0] * 3], "0:1": [[0, 1, 0]], "1:0": [[0] * 3], "1:1": [[0] * 3]}


def test_a_split_writer_keeps_its_order_its_members_and_its_number():
    schedule = following(head="own")
    writers = [
        Ablate(heads=["0:0"], members=[0], order=1),
        Ablate(heads=["0:0", "0:1"], members=[0], order=2, schedule=schedule),
    ]
    plan = plan_of(SMALL, few_shot(), *writers)
    assert [row.name for row in plan.rows] == ["Ablate 1", "Ablate 2", "Ablate 2"]
    assert [row.intervention.order for row in plan.rows] == [1, 2, 2]
    assert [row.intervention.selection for row in plan.rows[1:]] == [
        Selection(heads=(h,), members=(0,)) for h in (0, 1)
    ]
    assert list(plan.loops) == ["Ablate 2/0:0", "Ablate 2/0:1"]


def test_changes_of_weights_go_by_the_head_too():
    model = OpsinModule(few_shot(), SMALL, [0])
    freeze = Freeze(heads=["1:0", "1:1"], parts=["W_Q", "W_K"], schedule=following(head="strongest"))
    plan = model.plan_for([freeze], 5)
    found = plan.gates(0, 3, 1, history(induction_strength={1: heads_record([0.9, 0.9, 0.4, 0.5])}))
    acting = {
        (row.target, row.change.selection.heads) for row, gate in zip(plan.changes, found[2, :, 0], strict=True) if gate
    }
    assert acting == {("blocks.1.attn.W_Q", (1,)), ("blocks.1.attn.W_K", (1,))}
    assert list(plan.loops) == ["Freeze/1:0", "Freeze/1:1"]


def test_a_schedule_without_feedback_leaves_the_intervention_whole():
    (row,) = plan_of(SMALL, few_shot(), Ablate(heads=["1:0", "1:1"])).rows
    assert row.intervention.selection.heads == (0, 1)


# ---- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({}, ""),
        ({"above": 1.0, "below": 2.0}, ""),
        ({"above": float("nan")}, ".above"),
        ({"below": float("inf")}, ".below"),
        ({"above": 1.0, "head": "1.3"}, ".head"),
        ({"above": 1.0, "head": "all"}, ".head"),
        ({"above": 1.0, "mode": "until"}, ".mode"),
        ({"above": 1.0, "mode": "scale"}, ".full"),
        ({"above": 1.0, "mode": "scale", "full": 1.0}, ".full"),
        ({"above": 1.0, "mode": "scale", "full": 0.5}, ".full"),
        ({"below": 1.0, "mode": "scale", "full": 1.5}, ".full"),
        ({"above": 1.0, "full": 2.0}, ".full"),
    ],
)
def test_feedback_that_cannot_work_is_refused_by_name(settings, field):
    with pytest.raises(ConfigError) as refused:
        Feedback("train/loss", **settings)
    assert refused.value.field == f"schedule.feedback{field}"


@pytest.mark.parametrize("head", ["own", "strongest"])
@pytest.mark.parametrize("writer", [Ablate(sites=["hook_embed"]), HeadTemperature({"1:0": 0.5})])
def test_going_by_the_head_needs_a_selection_of_heads(writer, head):
    writer.schedule = following(head=head)
    with pytest.raises(ConfigError, match=rf"schedule\.feedback\.head: got '{head}', expected a head as layer:head"):
        plan_of(SMALL, few_shot(), writer)


def test_a_head_that_the_model_does_not_have_is_refused_as_without_feedback():
    with pytest.raises(ConfigError, match=r"^Ablate\.heads: got '1:2'"):
        plan_of(SMALL, few_shot(), Ablate(heads=["1:2"], schedule=following(head="own")))


RUN_RECORDS = (
    "train/loss, train/accuracy, train/grad_norm, val/train/loss, val/train/accuracy, "
    "val/train/accuracy_in_context, val/train/probability_in_context"
)


@pytest.mark.parametrize(
    ("feedback", "message"),
    [
        ({"metric": "loss"}, f"metric: got 'loss', expected what this run records: {RUN_RECORDS}"),
        ({"metric": "previous_token_strength", "head": "own"}, "metric: got 'previous_token_strength'"),
        (
            {"metric": "train/loss", "head": "own"},
            "head: got 'own', expected null: train/loss has one value per member",
        ),
        (
            {"metric": STRENGTH},
            "head: got None, expected layer:head with layer 0 to 1 and head 0 to 1, own or strongest",
        ),
        ({"metric": STRENGTH, "head": "2:0"}, "head: got '2:0', expected layer:head with layer 0 to 1 and head 0 to 1"),
        ({"metric": STRENGTH, "head": "1:2"}, "head: got '1:2'"),
    ],
)
def test_a_run_refuses_to_follow_what_it_does_not_measure_and_says_what_it_does(tmp_path, feedback, message):
    ablate = Ablate(heads=["1:0"], schedule=following(**feedback))
    with pytest.raises(ConfigError) as refused:
        validating(module(), 2, ablate, InductionHeads(), KeepRun(tmp_path / "run"))
    assert str(refused.value).startswith(f"Ablate.schedule.feedback.{message}")
    assert not (tmp_path / "run").exists()


def test_what_an_evaluation_measures_is_followed_only_where_there_are_evaluations():
    following_one = Ablate(heads=["1:0"], schedule=following("val/exemplars/accuracy_in_context", above=2.0))
    assert validating(module(), 2, following_one).trainer.global_step == 2
    with pytest.raises(
        ConfigError, match=r"expected what this run records: train/loss, train/accuracy, train/grad_norm$"
    ):
        train(module(), 2, following_one)


def test_a_long_history_is_asked_once():
    asked = []

    class Counted(Feedback):
        def holds(self, values):
            asked.append(1)
            return super().holds(values)

    feedback, found = Counted("loss", above=5.0, mode="start"), history(loss={step: 0.1 for step in range(1000)})
    for step in range(1000, 1100):
        assert feedback.strengths(step, 1, 1, found).tolist() == [[0]]
        found.record("loss", step, np.array([0.1]))
    assert len(asked) == 1099


def norms(*records):
    """A history with two numbers for each of three neurons: the n-th argument is recorded at step n."""
    found = History(4)
    found.declare("norm", {"neuron": 3, "concept": 2})
    for step, values in enumerate(records, 1):
        found.record("norm", step, np.array([values]))
    return found


def test_one_number_of_any_metric_is_followed_by_its_indices():
    found = norms([[0, 0], [0, 0], [0, 0]], [[9, 9], [9, 9], [9, 1]], [[0, 0], [0, 0], [0, 9]])
    assert Feedback("norm/2:1", above=1.5).strengths(0, 5, 1, found).tolist() == [[0], [0], [0], [1], [1]]
    assert Feedback("norm/2:0", above=1.5).reading(2, 1, found).value.tolist() == [9]


def test_a_metric_that_is_called_like_a_number_of_another_is_followed_by_its_name():
    found = norms([[5, 5], [5, 5], [5, 5]])
    found.record("norm/2:1", 1, np.array([0.5]))
    assert Feedback("norm/2:1", above=0.1).reading(1, 1, found).value.tolist() == [0.5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "norm"}, "metric: got 'norm', expected norm/0:0 or so: one number by its neuron (3), concept (2)"),
        ({"metric": "norm/3:0"}, "metric: got 'norm/3:0', expected norm/0:0 or so: one number by its neuron (3)"),
        ({"metric": "norm", "head": "2:1"}, "metric: got 'norm', expected norm/0:0 or so"),
        ({"metric": "norm/2:1", "head": "2:1"}, "head: got '2:1', expected null: norm/2:1 has one value per member"),
        ({"metric": "loss/0"}, "metric: got 'loss/0', expected loss, one value per member"),
        ({"metric": "none/0"}, "metric: got 'none/0', expected what this run records: loss, norm"),
    ],
)
def test_what_is_no_number_of_a_metric_is_refused_with_what_is_one(settings, message):
    recorded = {"loss": {}, "norm": {"neuron": 3, "concept": 2}}
    Feedback("norm/2:1", above=1.0).check("Ablate", recorded)
    with pytest.raises(ConfigError) as refused:
        Feedback(above=1.0, **settings).check("Ablate", recorded)
    assert str(refused.value).startswith(f"Ablate.schedule.feedback.{message}")


def test_deeper_models_are_followed_head_by_head():
    model = Transformer(layers=3, width=12, heads=3)
    names = [f"{layer}:{head}" for layer in range(3) for head in range(3)]
    plan = plan_of(
        model, few_shot(), Ablate(heads=names, value="mean", schedule=following(head="strongest")), members=1
    )
    for place, name in enumerate(names):
        values = np.full((1, 9), 0.1)
        values[0, place] = 0.4
        gates = plan.gates(1, 1, 1, history(induction_strength={1: values.reshape(1, 3, 3)}))[0, :, 0]
        assert [
            f"{row.target.split('.')[1]}:{row.intervention.selection.heads[0]}"
            for row, gate in zip(plan.rows, gates, strict=True)
            if gate
        ] == [name]
