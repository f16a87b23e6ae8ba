"""Claims about runs whose interventions follow what they measure: what is in force, recorded and told."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from opsin.callbacks import Ablate, Clamp, InductionHeads, KeepRun, PhaseChange
from opsin.training.compiling import has_compiler
from opsin.training.module import opsin_module
from tests.helpers.loops import ALL_HEADS, STRENGTH, following, module
from tests.helpers.toys import train


class Wave(pl.Callback):
    """Records ``wave``: 1 and 0 by turns, every ``every`` steps."""

    def __init__(self, every):
        self.every = every

    def records(self, sites):
        return {"wave": {}}

    def on_fit_start(self, trainer, pl_module):
        self.module = opsin_module(pl_module)
        self.module.listen(self.every, self.note)

    def note(self, seen):
        self.module.history.record(
            "wave", seen.step, torch.full([self.module.n_members], seen.step // self.every % 2.0)
        )


class StepsWithEffect(pl.Callback):
    """Notes, for every step, in which members each intervention changed an activation in it."""

    def on_fit_start(self, trainer, pl_module):
        self.module, self.steps = opsin_module(pl_module), []
        self.module.listen(1, self.note)

    def note(self, seen):
        fired = self.module.gates.counts.fired.clone()
        if seen.step:
            self.steps.append((fired - self.before).bool())
        self.before = fired

    def table(self):
        return torch.stack(self.steps).numpy()


def test_the_strongest_head_is_ablated_in_just_the_steps_that_the_record_says():
    model, watcher = module(seeds=(3, 5), learning_rate=0.05), StepsWithEffect()
    level = 0.3
    ablate = Ablate(heads=ALL_HEADS, schedule=following(head="strongest", above=level))
    train(model, 120, ablate, InductionHeads(every=7), watcher)
    labels, strengths = model.history[STRENGTH].arrays()
    expected = np.zeros((120, 4, 2), dtype=bool)
    for step in range(120):
        last = strengths[labels <= step][-1].reshape(2, 4)
        for member in range(2):
            if last[member].max() > level:
                expected[step, last[member].argmax(), member] = True
    assert np.array_equal(watcher.table(), expected)
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
            return {"turns": {"layer": 2, "head": 2}}

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
    assert model.gates.activity()[1]["active_steps"] == [0]


def test_validation_sees_a_loop_as_it_stood_at_the_last_step():
    # the first evaluation lies below the level and closes the loop for good from the step after it
    model = module()
    stop = following("val/train/loss", above=0.0, mode="stop")
    watcher = StepsWithEffect()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {"val_check_interval": 1, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(
        max_steps=30,
        callbacks=[Ablate(heads=["1:0"], schedule=stop), watcher],
        accelerator="cpu",
        **settings,
        **dict.fromkeys(quiet, False),
    )
    trainer.fit(model)
    assert watcher.table()[:, 0, 0].tolist() == [True] * 10 + [False] * 20


def test_readers_that_listen_to_phase_changes_are_not_moved_by_a_switch(tmp_path):
    ablate = Ablate(heads=["1:0"], schedule=following("wave", above=0.5))
    model = train(module(), 40, ablate, Wave(10), PhaseChange(), KeepRun(tmp_path))
    assert {event.kind for event in model.events} == {"feedback"}
    assert model.summary["onset"] is None


@pytest.mark.skipif(not has_compiler(), reason="no g++ or clang++ on the path: the step can only run eagerly")
def test_switching_by_feedback_compiles_once(graphs):
    model = module(compile=True)
    train(model, 60, Ablate(heads=["1:0", "1:1"], schedule=following("wave", above=0.5)), Wave(3))
    assert len(model.events) == 19
    assert graphs() == 1
    assert model.gates.activity()[0]["changed_steps"] == [30]
