"""Claims about Delay: the first record at the level counts, nothing is said before, and unknown metrics are refused."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from opsin.callbacks import Delay
from opsin.errors import ConfigError
from opsin.model.transformer import Transformer
from opsin.training.module import OpsinModule
from tests.helpers.finite import Table

SHAPE = Transformer(layers=1, width=8, heads=2, positions="learned")


ONE = [[0.0, 0.9], [0.5, 0.1], [0.9, 0.9]]
TWO = [[0.0, 0.0], [0.5, 0.7], [0.2, 0.9]]
"""A record of two members in each row."""


class Scripted(Delay):
    """A delay between numbers that are written down beforehand."""

    def records(self, sites):
        return {**super().records(sites), "one": {}, "two": {}}

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            step = self._module.steps_done
            one, two = (torch.tensor(rows)[step // 5 - 1] for rows in (ONE, TWO))
            self._module.record(step, {"one": one, "two": two})
        super().on_validation_end(trainer, pl_module)


def validated(reader, steps=15):
    model = OpsinModule(Table(), SHAPE, [1, 2], steps_per_batch=5, log_every=5, compile=False)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        max_steps=steps, callbacks=[reader], val_check_interval=1, num_sanity_val_steps=2, accelerator="cpu", **quiet
    )
    trainer.fit(model)
    return model.history


def test_the_first_record_at_the_level_counts_for_each_member():
    history = validated(Scripted("one", "two", 0.5))
    found = {name: history[f"delay/{name}"].values.block for name in ("first", "second", "ratio")}
    nan = np.nan
    np.testing.assert_array_equal(found["first"], [[nan, 5], [10, 5], [10, 5]])
    np.testing.assert_array_equal(found["second"], [[nan, nan], [10, 10], [10, 10]])
    np.testing.assert_array_equal(found["ratio"], [[nan, nan], [1, 2], [1, 2]])


def test_what_training_records_can_be_first():
    history = validated(Delay("train/accuracy", "val/test/accuracy", 0.0))
    assert history["delay/first"].values[-1].tolist() == [5, 5] == history["delay/second"].values[-1].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("val/train/accuracy", "val/train/accuracy"), "Delay.second: got 'val/train/accuracy', expected another"),
        (("val/trian/accuracy",), "Delay.first: got 'val/trian/accuracy', expected a metric that this run records"),
    ],
)
def test_metrics_that_cannot_be_are_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        validated(Delay(*settings))
    assert "\n" not in str(caught.value)
