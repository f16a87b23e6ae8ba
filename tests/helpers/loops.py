"""Closed loops for tests: histories written by hand, schedules that follow them, and small runs."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np

from opsin.interventions.feedback import Feedback
from opsin.interventions.schedules import Schedule
from opsin.records.history import History
from opsin.training.module import OpsinModule
from tests.helpers.toys import SMALL, few_shot

ALL_HEADS = ["0:0", "0:1", "1:0", "1:1"]
STRENGTH = "induction_strength"


def history(**metrics):
    """A history of records by hand: for each metric, the values of a member (or of each) by steps finished."""
    found = History(4)
    for name, records in metrics.items():
        for step, values in records.items():
            found.declare(name, dict(zip(("layer", "head"), np.shape(values)[1:], strict=False)))
            found.record(name, step, np.atleast_1d(np.array(values, dtype=np.float64)))
    return found


def following(metric=STRENGTH, above=0.3, **settings):
    return Schedule(feedback=Feedback(metric, above=above, **settings))


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
