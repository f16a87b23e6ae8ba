"""Claims about tasks with a fixed set: which examples are trained on, when, and that evaluation sees all of them."""

from __future__ import annotations

import json
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.callbacks import KeepRun
from opsin.errors import ConfigError
from opsin.model.transformer import Transformer
from opsin.training.module import OpsinModule
from opsin.training.objective import scored_logits
from tests.helpers.finite import Table
from tests.helpers.toys import few_shot, train

SHAPE = Transformer(layers=1, width=8, heads=2, positions="learned")


def module(task, **options):
    small = {"steps_per_batch": 5, "log_every": 5, "compile": False}
    return OpsinModule(task, SHAPE, **(small | options))


def validated(model, steps):
    """The module after so many steps and a validation at the end of every Lightning batch."""
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_steps=steps, val_check_interval=1, num_sanity_val_steps=0, enable_model_summary=False, **settings
    )
    trainer.fit(model)
    return model


def shown(task, first, count, seed=1, split="train", size=None):
    return task.draw([seed], first, count, split, size)["example"][:, 0].numpy()


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.05, 0.95), seed=st.integers(0, 2**64 - 1))
def test_the_two_parts_make_up_the_table_and_have_the_stated_size(share, seed):
    task = Table(share, seed)
    trained, tested = task.examples_of("train"), task.examples_of("eval/test")
    assert sorted([*trained, *tested]) == list(range(12)) and len(trained) == round(12 * share)
    assert np.array_equal(task.examples_of("eval/train"), trained)


def test_the_parts_are_those_of_the_split_seed_and_of_no_other_seed():
    assert np.array_equal(Table(split_seed=3).examples_of("train"), Table(split_seed=3).examples_of("train"))
    assert len({tuple(Table(split_seed=seed).examples_of("train")) for seed in range(8)}) == 8
    drawn = Table().draw([1, 2], 0, 1, "eval/test", 6)["example"][0]
    assert torch.equal(drawn[0], drawn[1])


def test_every_example_is_trained_on_equally_often_over_split_seeds():
    counts = np.bincount(np.concatenate([Table(split_seed=seed).examples_of("train") for seed in range(2000)]))
    # each of 12 is among 6 with probability 1/2: standard deviation sqrt(2000 / 4)
    assert (np.abs(counts - 1000) < 5 * math.sqrt(500)).all()


def test_without_a_batch_size_every_step_sees_the_whole_training_set_in_one_order():
    task = Table()
    assert task.batch_size == 6
    assert (shown(task, 0, 4) == task.examples_of("train")).all()


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 5), first=st.integers(0, 10**6), seed=st.integers(0, 2**64 - 1))
def test_a_minibatch_is_a_function_of_seed_and_step(size, first, seed):
    task = Table(batch_size=size)
    together = task.draw([5, seed, 5], first, 7)["example"]
    for step in range(7):
        assert np.array_equal(together[step, 1].numpy(), shown(task, first + step, 1, seed)[0])
    assert torch.equal(together[:, 0], together[:, 2])


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_an_epoch_shows_each_training_example_once_in_an_order_of_its_own(size):
    task = Table(batch_size=size)
    epochs = shown(task, 0, 12).ravel()[: 12 * size // 6 * 6].reshape(-1, 6)
    assert all(sorted(epoch) == sorted(task.examples_of("train")) for epoch in epochs)
    if len(epochs) > 2:
        assert len({tuple(epoch) for epoch in epochs}) > 1
    assert not np.array_equal(epochs[0], shown(task, 0, 12, seed=2).ravel()[:6])


def test_each_order_of_an_epoch_is_equally_likely():
    task = Table(0.25, batch_size=1)  # three examples have six orders
    epochs = shown(task, 0, 6000).reshape(-1, 3)
    _, counts = np.unique(epochs, axis=0, return_counts=True)
    # 2,000 epochs: standard deviation sqrt(2000 * 5 / 36)
    assert len(counts) == 6 and (np.abs(counts - 2000 / 6) < 5 * math.sqrt(2000 * 5 / 36)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_share": 1.0}, "Table.train_share: got 1.0, expected a share of 12 examples .*as no test set is left"),
        ({"train_share": 0.99}, "Table.train_share: got 0.99, expected .*as no test set is left"),
        ({"train_share": 0.01}, "Table.train_share: got 0.01, expected .*as no training set is left"),
        ({"train_share": math.nan}, "Table.train_share: got nan"),
        ({"batch_size": 7}, "Table.batch_size: got 7, expected 1 .. 6, the training examples, or null for all"),
        ({"batch_size": 0}, "Table.batch_size: got 0"),
        ({"split_seed": -1}, "Table.split_seed: got -1"),
    ],
    ids=str,
)
def test_a_split_that_cannot_be_is_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Table(**options)
    assert "\n" not in str(caught.value)


# --- in a run -------------------------------------------------------------------------------------


def test_the_whole_test_set_is_evaluated_whatever_the_evaluation_size():
    model = validated(module(Table(0.75), evaluation_size=2), 5)
    pairs = [[a, b] for a in range(4) for b in range(4, 7)]
    for name, count in (("train", 9), ("test", 3)):
        data = model.evaluation_set(name)
        assert data.tokens[0].tolist() == [pairs[i] for i in model.task.examples_of(f"eval/{name}")]
        assert data.tokens.shape[1] == count
        logits = scored_logits(model.observe(data, ["hook_logits"])["hook_logits"], data)[0, :, 0]
        right = [int(row.argmax()) == a + b - 4 for row, (a, b) in zip(logits, data.tokens[0].tolist(), strict=True)]
        recorded = model.history[f"val/{name}/accuracy"].values[-1][0]
        assert recorded == pytest.approx(sum(right) / count)


def test_a_run_of_minibatches_learns_the_training_pairs():
    model = validated(module(Table(batch_size=4), learning_rate=0.03, steps_per_batch=50), 150)
    assert model.history["val/train/accuracy"].values[-1][0] == 1


@pytest.mark.parametrize(("probe", "size", "count"), [(None, 128, 9), ("train", 2, 2), ("test", 128, 3)])
def test_the_probe_is_the_chosen_evaluation_set(probe, size, count):
    model = train(module(Table(0.75), probe=probe, probe_size=size), 5)
    pairs = [[a, b] for a in range(4) for b in range(4, 7)]
    chosen = model.task.examples_of(f"eval/{probe or 'train'}")[:count]
    assert model.probe.tokens[0].tolist() == [pairs[i] for i in chosen]


def test_an_unknown_evaluation_set_as_probe_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"model.probe: got 'tset', expected null, or .*: train, test$"):
        module(Table(), probe="tset")


def test_the_probe_counts_among_the_settings_of_a_run_only_where_it_is_chosen():
    assert "model.probe" not in train(module(Table()), 5).settings
    assert train(module(Table(), probe="test"), 5).settings["model.probe"] == "test"


def test_a_run_counts_epochs_where_its_task_does(tmp_path):
    train(module(Table(batch_size=2)), 5, KeepRun(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["axis"] == {"unit": "epochs", "sequences": 6}


def test_epochs_of_a_task_that_draws_for_ever_are_refused():
    task = few_shot()
    task.axis = "epochs"
    with pytest.raises(ConfigError, match=r"FewShot.axis: got 'epochs', expected sequences or steps, or epochs of a"):
        module(task)
