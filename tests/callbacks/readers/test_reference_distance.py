"""Claims about ReferenceDistance: what it records is the objective's distance from each reference, by the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opsin.callbacks import Ablate, ReferenceDistance
from opsin.errors import ConfigError
from opsin.model.transformer import Transformer
from opsin.tasks import Repeats
from opsin.training.module import OpsinModule
from tests.helpers.regression import Pairs
from tests.helpers.toys import ToyTokens, train


def module(task, seeds=(1, 2)) -> OpsinModule:
    small = {"steps_per_batch": 5, "log_every": 5, "probe_size": 12, "learning_rate": 0.01, "compile": False}
    return OpsinModule(task, Transformer(layers=1, width=8, heads=2, positions="learned"), list(seeds), **small)


def repeats():
    return Repeats(vocabulary=10, positions=12, batch_size=4, segments=1, shortest=2, longest=4)


def test_a_model_that_puts_out_nothing_is_at_the_squared_size_of_what_a_reference_says():
    model = module(Pairs(weighted=True))
    train(model, 5, ReferenceDistance(every=5), Ablate(sites=["hook_logits"]))
    predicted = model.task.references()["ridge"](model.probe)
    weights = model.probe.weights
    expected = (predicted.square().mean(-1) * weights).sum((1, 2)) / weights.sum((1, 2))
    found = model.history["reference/ridge/squared_distance"].values[-1]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    rows = model.summary["references"]
    assert len(rows) == 2 and rows[0]["ridge"]["squared_distance"] == pytest.approx(expected[0].item(), rel=1e-5)
    losses = (predicted - model.probe.targets).square().mean(-1)
    assert rows[1]["ridge"]["loss"] == pytest.approx(((losses * weights).sum((1, 2)) / weights.sum((1, 2)))[1].item())


def test_even_logits_are_at_no_distance_from_chance_and_at_the_unigrams_divergence_from_it():
    model = module(repeats())
    train(model, 5, ReferenceDistance(every=5, references=["uniform", "unigram"]), Ablate(sites=["hook_logits"]))
    assert "reference/exact/kl" not in model.history
    np.testing.assert_allclose(model.history["reference/uniform/kl"].values[-1], 0, atol=1e-6)
    p = model.task.unigram()
    divergence = (p * (p * 10).log()).sum().item()
    np.testing.assert_allclose(model.history["reference/unigram/kl"].values[-1], divergence, rtol=1e-5)


def test_training_brings_the_model_nearer_to_what_it_can_learn():
    model = module(Pairs())
    train(model, 150, ReferenceDistance(every=50))
    values = model.history["reference/gradient_step/squared_distance"].values.block
    assert list(model.history["reference/gradient_step/squared_distance"].steps) == [0, 50, 100, 150]
    assert (values[-1] < 0.8 * values[0]).all()


def test_it_says_which_metrics_it_records():
    reader, model = ReferenceDistance(every=5), module(repeats())
    train(model, 5, reader)
    recorded = {name for name in model.history.names() if name.startswith("reference/")}
    assert reader.task_records(model.task).keys() == recorded and len(recorded) == 3


class Misshapen(Pairs):
    def references(self):
        return {"short": lambda batch: torch.zeros(1, 2, 3)}


@pytest.mark.parametrize(
    ("make", "task", "line"),
    [
        (lambda: ReferenceDistance(0), Pairs, "ReferenceDistance.every: got 0, expected at least 1"),
        (lambda: ReferenceDistance(references=[]), Pairs, "ReferenceDistance.references: got .., expected names of"),
        (
            lambda: ReferenceDistance(references=["ols"]),
            Pairs,
            "got 'ols', expected references of Pairs: least",
        ),
        (ReferenceDistance, ToyTokens, "ReferenceDistance: got 'ToyTokens', expected a task with references"),
        (ReferenceDistance, Misshapen, r"Misshapen.references.short: got 'shape \[1, 2, 3\]', expected \[1, 2, 3, 2\]"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_training(make, task, line):
    with pytest.raises(ConfigError, match=line):
        train(module(task()), 5, make())
