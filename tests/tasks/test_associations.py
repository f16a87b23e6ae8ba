"""Claims about associations: Zipf's law, samples that come back, and an error that is a sum over all inputs."""

import math

import numpy as np
import pytest
import torch

from opsin.errors import ConfigError
from opsin.tasks import Associations
from tests.helpers.token_tasks import near


def inputs_of(task, split="train", seed=3, step=0, size=None):
    return task.draw([seed], step, 1, split, size)["input"][0, 0].numpy()


def test_inputs_follow_zipfs_law_and_outputs_are_their_remainders():
    task = Associations(inputs=7, outputs=3, zipf=1.5)
    law = 1 / np.arange(1, 8) ** 1.5
    np.testing.assert_allclose(task.probabilities, law / law.sum())
    for split in ("train", "eval/train"):
        assert near(np.bincount(inputs_of(task, split, size=20_000), minlength=7), law / law.sum())
    batch = task.batch(3, 0)
    assert torch.equal(batch.targets, batch.tokens % 3) and (batch.weights == 1).all()
    np.testing.assert_allclose(task.unigram(), [law[[0, 3, 6]].sum(), law[[1, 4]].sum(), law[[2, 5]].sum()] / law.sum())


def test_the_error_on_all_inputs_is_the_probability_of_those_that_are_wrong():
    task = Associations(inputs=6, outputs=2, zipf=1.0)
    batch = task.batch(0, 0, "eval/inputs", task.set_size("eval/inputs"))
    assert batch.tokens[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]
    right = torch.nn.functional.one_hot(batch.targets, 2).double()
    wrong = right.clone()
    wrong[0, [1, 4]] = right[0, [1, 4]].flip(-1)
    found = task.objective.measured(wrong, batch)
    harmonic = sum(1 / k for k in range(1, 7))
    assert found["error"].item() == pytest.approx((1 / 2 + 1 / 5) / harmonic)
    assert found["accuracy"].item() == pytest.approx(1 - (1 / 2 + 1 / 5) / harmonic)


def test_limited_samples_come_back_in_one_order_and_are_drawn_by_the_law():
    task = Associations(inputs=5, outputs=2, zipf=1.0, samples=10, batch_size=4)
    seen = np.concatenate([inputs_of(task, step=step) for step in range(10)])
    assert (seen.reshape(4, 10) == seen[:10]).all() and task.set_size("train") == 10
    assert (inputs_of(task, seed=4, size=10) != seen[:10]).any()
    many = Associations(inputs=5, outputs=2, zipf=1.0, samples=20_000)
    law = 1 / np.arange(1, 6)
    assert near(np.bincount(inputs_of(many, size=20_000), minlength=5), law / law.sum())
    # more samples begin with the fewer
    assert (inputs_of(Associations(inputs=5, outputs=2, zipf=1.0, samples=20, batch_size=4)) == seen[:4]).all()


def test_a_member_sees_the_same_alone_and_among_others():
    for samples in (None, 12):
        task = Associations(samples=samples, batch_size=5)
        together = task.draw([1, 7, 1], 2, 3)["input"]
        for step in range(3):
            for member, seed in enumerate([1, 7, 1]):
                assert torch.equal(together[step, member], task.draw([seed], 2 + step, 1)["input"][0, 0])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"inputs": 1}, "Associations.inputs: got 1, expected"),
        ({"outputs": 101}, "Associations.outputs: got 101, expected"),
        ({"zipf": math.inf}, "Associations.zipf: got inf, expected a finite number"),
        ({"samples": 0}, "Associations.samples: got 0, expected"),
        ({"batch_size": 0}, "Associations.batch_size: got 0, expected"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, line):
    with pytest.raises(ConfigError, match=line):
        Associations(**settings)
