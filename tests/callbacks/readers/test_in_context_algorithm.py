"""Claims about InContextAlgorithm: on a model whose algorithm is known it names it, with its weights and its change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from opsin.callbacks import Ablate, InContextAlgorithm
from opsin.errors import ConfigError
from opsin.model.transformer import Transformer
from opsin.tasks import LinearRegression
from opsin.tasks.shared.references import gradient_step, in_context
from opsin.training.module import OpsinModule
from opsin.training.objective import scored_logits
from tests.helpers.gradient_steps import descending
from tests.helpers.regression import Pairs
from tests.helpers.toys import run, train

SMALL = {"steps_per_batch": 5, "log_every": 5, "probe_size": 64, "compile": False}
RATE = 1 / (4 + 3)
"""Best step after four examples of two entries."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def task():
    return LinearRegression(dimensions=2, examples=5, batch_size=4)


def descender(task) -> OpsinModule:
    """A module that begins as a step of gradient descent."""
    model, values = descending(task, RATE)
    module = OpsinModule(task, seed=1, network=model, learning_rate=1e-3, **SMALL)
    for name, parameter in module.parameters_by_name().items():
        parameter.data.copy_(values[name])
    return module


def test_a_layer_of_linear_attention_makes_one_step_of_gradient_descent(task):
    model, values = descending(task, RATE)
    batch = task.batch(3, 0, batch_size=16)
    logits, _ = run(model, {name: value.double() for name, value in values.items()}, batch)
    features = torch.nn.functional.pad(batch.features.double(), (0, 0, 0, 1))
    expected = in_context(features[:, :, ::2, 1:], features[:, :, 1::2, :1], gradient_step(lambda n: RATE))
    assert torch.allclose(scored_logits(logits, batch), expected, atol=1e-12)


def test_a_step_of_gradient_descent_is_called_so_and_linear_with_its_weights(task):
    module = descender(task)
    train(module, 5, InContextAlgorithm(every=5, contexts=8, queries=8))
    first = {name: module.history[name].values[0][0] for name in module.history.names() if "algorithm/" in name}
    distances, weights = (
        first[f"algorithm/gradient_step/{name}"] for name in ("distance_by_examples", "weight_distance")
    )
    # with four examples its rate is the best, and elsewhere it is another step
    assert distances[4] < 1e-12 < distances[1] and weights[4] < 1e-12 < weights[1]
    np.testing.assert_allclose(first["algorithm/linearity"][1:], 1, atol=1e-6)
    names = module.summary["algorithm"]["references"]
    assert first["algorithm/nearest"] == names.index("gradient_step") == first["algorithm/nearest_by_examples"][4]
    assert module.summary["algorithm"]["members"][0]["nearest"][0] == ["gradient_step", 0]
    assert first["algorithm/error"][4] == pytest.approx(float(_error(task, "gradient_step")[4]), rel=1e-5)


def _error(task, name):
    batch = task.batch(0, 0, "eval/train", SMALL["probe_size"])
    return (task.references()[name](batch) - batch.targets).square().mean((0, 1, 3)) / task.dimensions


def test_a_model_that_puts_out_nothing_is_nearest_to_zero_at_the_mean_square_of_the_rest(task):
    module = OpsinModule(task, Transformer(layers=1, width=8, heads=2), [1, 2], **SMALL)
    train(module, 5, InContextAlgorithm(every=5, contexts=4, queries=4), Ablate(sites=["hook_logits"]))
    batch = task.batch(0, 0, "eval/train", 64)
    for name, find in task.references().items():
        expected = find(batch).square().mean((0, 1, 3)) / 2
        found = module.history[f"algorithm/{name}/distance_by_examples"].values[-1]
        np.testing.assert_allclose(found, expected.expand(2, -1), rtol=1e-5)
        mean = module.history[f"algorithm/{name}/distance"].values[-1]
        np.testing.assert_allclose(mean, expected[1:].mean().expand(2), rtol=1e-5)
    assert (module.history["algorithm/nearest"].values[-1] == 0).all()
    assert np.isnan(module.history["algorithm/change"].values.block).all()
    assert module.summary["algorithm"]["change"]["value"] is None


def test_lengths_at_which_least_squares_has_no_finite_error_enter_no_mean(caplog):
    task = LinearRegression(dimensions=2, examples=5, noise=0.5, batch_size=4)
    module = OpsinModule(task, Transformer(layers=1, width=8, heads=2), 1, **SMALL)
    train(module, 5, InContextAlgorithm(every=5, contexts=4, queries=4))
    by_examples = module.history["algorithm/ridge/distance_by_examples"].values[-1][0]
    assert module.history["algorithm/ridge/distance"].values[-1][0] == pytest.approx(by_examples[[4, 5]].mean())
    names = module.summary["algorithm"]["references"]
    assert not (
        module.history["algorithm/nearest_by_examples"].values.block[..., 1:4] == names.index("least_squares")
    ).any()
    assert "least squares is no axis after 1, 2, 3 examples" in caplog.text


def test_it_says_which_metrics_it_records_and_draws_them(task):
    reader, module = InContextAlgorithm(every=5, contexts=4, queries=4), descender(task)
    train(module, 5, reader)
    recorded = {name for name in module.history.names() if name.startswith("algorithm/")}
    assert reader.task_records(task).keys() == recorded
    for name, axes in reader.task_records(task).items():
        assert module.history[name].values[-1].shape == (1, *axes.values())
    assert min(reader.picture(0).size) > 300 and Path("in_context_algorithm.png").exists()


@pytest.mark.parametrize(
    ("make", "task", "line"),
    [
        (
            lambda: InContextAlgorithm(contexts=0),
            LinearRegression,
            "InContextAlgorithm.contexts: got 0, expected at least",
        ),
        (InContextAlgorithm, Pairs, "InContextAlgorithm: got 'Pairs', expected a task of in-context regression"),
        (
            lambda: InContextAlgorithm(after="ridge"),
            LinearRegression,
            "after: got 'ridge', expected one of the task's: zero",
        ),
        (
            lambda: InContextAlgorithm(before="least_squares"),
            LinearRegression,
            "expected another reference than the one",
        ),
        (lambda: InContextAlgorithm(queries=3), LinearRegression, "queries: got 3, expected more than the 3 entries"),
        (lambda: InContextAlgorithm(contexts=65), LinearRegression, "contexts: got 65, expected at most the probe's"),
        (
            InContextAlgorithm,
            lambda: LinearRegression(examples=4, dimensions=2, noise=1.0),
            None,
        ),
        (
            InContextAlgorithm,
            lambda: LinearRegression(examples=3, dimensions=2, noise=1.0),
            "LinearRegression.examples: got 3, expected more than 3: with noise",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(make, task, line):
    module = OpsinModule(task(), Transformer(layers=1, width=8, heads=2), 1, **SMALL)
    if line is None:
        train(module, 5, make())
    else:
        with pytest.raises(ConfigError, match=line):
            train(module, 5, make())
