"""Claims about closed loops: known answers on histories written by hand, and what a run makes of what it measures."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from opsin.callbacks import Ablate, Clamp, Freeze, HeadTemperature, InductionHeads, KeepRun, PhaseChange
from opsin.errors import ConfigError
from opsin.feedback import Feedback
from opsin.model import Transformer
from opsin.module import OpsinModule, opsin_module
from opsin.passes import Selection
from opsin.runs import History
from opsin.schedules import Schedule
from opsin.step import has_compiler
from tests.toys import SMALL, few_shot, plan_of, train

ALL_HEADS = ["0:0", "0:1", "1:0", "1:1"]
STRENGTH = "induction_strength"


def history(**metrics):
    """A history of records by hand: for each metric, the values of a member (or of each) by steps finished."""
    found = History(4)
    for name, records in metrics.items():
        for step, values in records.items():
            found.record(name, step, np.atleast_1d(np.array(values, dtype=np.float64)))
    return found


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


def following(metric=STRENGTH, above=0.3, **settings):
    return Schedule(feedback=Feedback(metric, above=above, **settings))


def gates_of(writer, records, members=1, steps=5):
    """Strengths by head of what the writer acts on."""
    plan = plan_of(SMALL, few_shot(), writer, members=members, steps=steps)
    gates = plan.gates(0, steps, members, history(induction_strength=records))
    heads = [f"{item.site.split('.')[1]}:{item.selection.heads[0]}" for item in plan.interventions]
    assert {item.writer for item in plan.interventions} == {type(writer).__name__}
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
    assert plan.names == ("Ablate 1", "Ablate 2", "Ablate 2")
    assert [item.order for item in plan.interventions] == [1, 2, 2]
    assert [item.selection for item in plan.interventions[1:]] == [Selection(heads=(h,), members=(0,)) for h in (0, 1)]
    assert list(plan.loops) == ["Ablate 2/0:0", "Ablate 2/0:1"]


def test_changes_of_weights_go_by_the_head_too():
    model = OpsinModule(few_shot(), SMALL, [0])
    freeze = Freeze(heads=["1:0", "1:1"], parts=["W_Q", "W_K"], schedule=following(head="strongest"))
    plan = model.plan_for([freeze], 5)
    found = plan.gates(0, 3, 1, history(induction_strength={1: heads_record([0.9, 0.9, 0.4, 0.5])}))
    acting = {(c.weight, c.selection.heads) for c, gate in zip(plan.changes, found[2, :, 0], strict=True) if gate}
    assert acting == {("blocks.1.attn.W_Q", (1,)), ("blocks.1.attn.W_K", (1,))}
    assert list(plan.loops) == ["Freeze/1:0", "Freeze/1:1"]


def test_a_schedule_without_feedback_leaves_the_intervention_whole():
    (item,) = plan_of(SMALL, few_shot(), Ablate(heads=["1:0", "1:1"])).interventions
    assert item.selection.heads == (0, 1)


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


# ---- what a run makes of it -----------------------------------------------------------------------


def module(seeds=(0,), **options):
    small = {"steps_per_batch": 10, "log_every": 5, "probe_size": 8, "evaluation_size": 8, "learning_rate": 0.02}
    return OpsinModule(few_shot(), SMALL, list(seeds), **{"compile": False, **small, **options})


def validating(model, steps, *callbacks):
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        num_sanity_val_steps=0,
        **dict.fromkeys(quiet, False),
    )
    trainer.fit(model)
    return model


class Wave(pl.Callback):
    """Records ``wave``: 1 and 0 by turns, every ``every`` steps."""

    def __init__(self, every):
        self.every = every

    def records(self, sites):
        return {"wave": ()}

    def on_fit_start(self, trainer, pl_module):
        self.module = opsin_module(pl_module)
        self.module.listen(self.every, self.note)

    def note(self, seen):
        self.module.history.record(
            "wave", seen.step, torch.full([self.module.n_members], seen.step // self.every % 2.0)
        )


class Acting(pl.Callback):
    """Notes, for every step, in which members each intervention changed an activation in it."""

    def on_fit_start(self, trainer, pl_module):
        self.module, self.steps = opsin_module(pl_module), []
        self.module.listen(1, self.note)

    def note(self, seen):
        fired = self.module.control.fired.clone()
        if seen.step:
            self.steps.append((fired - self.before).bool())
        self.before = fired

    def table(self):
        return torch.stack(self.steps).numpy()


def test_the_strongest_head_is_ablated_in_just_the_steps_that_the_record_says():
    model, acting = module(seeds=(3, 5), learning_rate=0.05), Acting()
    level = 0.3
    ablate = Ablate(heads=ALL_HEADS, schedule=following(head="strongest", above=level))
    train(model, 120, ablate, InductionHeads(every=7), acting)
    labels, strengths = model.history[STRENGTH].arrays()
    expected = np.zeros((120, 4, 2), dtype=bool)
    for step in range(120):
        last = strengths[labels <= step][-1].reshape(2, 4)
        for member in range(2):
            if last[member].max() > level:
                expected[step, last[member].argmax(), member] = True
    assert np.array_equal(acting.table(), expected)
    # a fair test: it was now one head and now another, and none at times
    assert expected.any((0, 2)).sum() > 1 and expected.any(1).any() and not expected.any(1).all()
    recorded = np.zeros_like(expected)
    for row, name in enumerate(ALL_HEADS):
        steps, values = (
            model.history[f"feedback/Ablate/{name}/strength"].arrays() if expected[:, row].any() else ([], [])
        )
        for step, value in zip(steps, values, strict=True):
            recorded[step:, row] = value
    assert np.array_equal(recorded, expected)


def test_every_change_is_recorded_with_the_value_and_its_step():
    model = train(
        module(seeds=(3, 5)), 40, Ablate(heads=["1:0"], members=[1], schedule=following("wave", above=0.5)), Wave(7)
    )
    steps, strength = model.history["feedback/Ablate/strength"].arrays()
    _, value = model.history["feedback/Ablate/value"].arrays()
    _, measured = model.history["feedback/Ablate/measured_at"].arrays()
    assert steps.tolist() == [7, 14, 21, 28, 35]
    assert strength.tolist() == [[0, 1], [0, 0], [0, 1], [0, 0], [0, 1]]
    assert value.tolist() == [[1, 1], [0, 0]] * 2 + [[1, 1]]
    assert measured.tolist() == [[step, step] for step in steps]
    assert [(e.kind, e.step, e.member) for e in model.events] == [("feedback", step, 1) for step in steps]
    assert model.events[0].message == "Ablate in member 1: strength 1 from now on, as wave was 1 after step 7"


def test_what_is_in_force_before_anything_is_measured_is_recorded_as_such():
    stop = following("train/accuracy", above=-1.0, mode="stop")
    model = train(module(), 20, Ablate(heads=["1:0"], schedule=stop))
    steps, strength = model.history["feedback/Ablate/strength"].arrays()
    assert steps.tolist() == [0, 5] and strength.tolist() == [[1], [0]]
    assert np.isnan(model.history["feedback/Ablate/measured_at"].values[0]).all()
    assert model.events[0].message == "Ablate: strength 1 from now on, as train/accuracy is not measured yet"


def test_a_head_that_gives_way_to_a_stronger_one_is_told_of():
    class Turns(Wave):
        def records(self, sites):
            return {"turns": (2, 2)}

        def note(self, seen):
            values = torch.full((1, 2, 2), 0.5)
            values[0, 1, seen.step // self.every % 2] = 1.0
            self.module.history.record("turns", seen.step, values)

    model = train(module(), 20, Ablate(heads=["1:0", "1:1"], schedule=following("turns", head="strongest")), Turns(10))
    at_ten = [event.message for event in model.events if event.step == 10]
    assert at_ten == [
        "Ablate/1:0: strength 0 from now on, as turns was 0.5 after step 10, less than another head's",
        "Ablate/1:1: strength 1 from now on, as turns was 1 after step 10",
    ]


def test_a_change_of_strength_that_is_no_switch_is_recorded_and_not_announced():
    class Rising(Wave):
        def note(self, seen):
            self.module.history.record("wave", seen.step, torch.tensor([seen.step / 10]))

    scale = following("wave", above=0.9, mode="scale", full=4.9)
    model = train(module(), 40, Ablate(heads=["1:0"], schedule=scale), Rising(10))
    steps, strength = model.history["feedback/Ablate/strength"].arrays()
    assert steps.tolist() == [10, 20, 30] and strength[:, 0] == pytest.approx([0.025, 0.275, 0.525])
    assert [event.step for event in model.events] == [10]


def test_steps_in_which_the_loop_is_open_do_not_make_a_writer_idle():
    # the site is zero already, so a writer of zero that acted once would be blamed at the end
    zero = {"site": "blocks.0.hook_attn_out", "value": 0.0}
    pair = [Ablate(sites=[zero["site"]], order=0), Clamp(**zero, order=1, schedule=following("wave", above=2.0))]
    model = train(module(), 20, *pair, Wave(10))
    assert model.control.counts()[1]["active_steps"] == [0]


def test_validation_sees_a_loop_as_it_stood_at_the_last_step():
    # the first evaluation lies below the level and closes the loop for good from the step after it
    model = module()
    stop = following("val/train/loss", above=0.0, mode="stop")
    acting = Acting()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {"val_check_interval": 1, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(
        max_steps=30,
        callbacks=[Ablate(heads=["1:0"], schedule=stop), acting],
        accelerator="cpu",
        **settings,
        **dict.fromkeys(quiet, False),
    )
    trainer.fit(model)
    assert acting.table()[:, 0, 0].tolist() == [True] * 10 + [False] * 20


def test_readers_that_listen_to_phase_changes_are_not_moved_by_a_switch(tmp_path):
    ablate = Ablate(heads=["1:0"], schedule=following("wave", above=0.5))
    model = train(module(), 40, ablate, Wave(10), PhaseChange(), KeepRun(tmp_path))
    assert {event.kind for event in model.events} == {"feedback"}
    assert model.summary["onset"] is None


@pytest.mark.skipif(not has_compiler(), reason="no g++ or clang++ on the path: the step can only run eagerly")
def test_switching_by_feedback_compiles_once():
    model = module(compile=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(model, 60, Ablate(heads=["1:0", "1:1"], schedule=following("wave", above=0.5)), Wave(3))
    assert len(model.events) == 19
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert model.control.counts()[0]["changed_steps"] == [30]


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
            f"{i.site.split('.')[1]}:{i.selection.heads[0]}"
            for i, gate in zip(plan.interventions, gates, strict=True)
            if gate
        ] == [name]
