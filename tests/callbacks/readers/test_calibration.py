"""Claims about Calibration: it records what the pure functions say of the probe, and training does not notice."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from opsin.callbacks import Ablate, Calibration
from opsin.errors import ConfigError
from opsin.metrics.calibration import (
    at_temperature,
    brier_score,
    expected_calibration_error,
    fit_neural_clamping,
    fit_temperature,
    fit_vector_scaling,
    mean_entropy,
    mean_loss,
)
from opsin.model.transformer import Transformer
from opsin.training.module import OpsinModule
from opsin.training.objective import scored_logits
from tests.helpers.toys import ToyTokens, few_shot, train

FITS = ["temperature", "vector", "neural_clamping"]
QUICK = {"fit": FITS, "fit_every": 10, "clamping_steps": 3}


class KnownTokens(ToyTokens):
    """The toy task, which knows that the first of its two answers follows and can only guess the second."""

    def exact(self, batch):
        sure = torch.nn.functional.one_hot(batch.targets[..., :1], self.n_outputs).float().log()
        return torch.cat([sure, torch.full_like(sure, -math.log(self.n_outputs))], 2)


def module(task=None, seed=1, **settings) -> OpsinModule:
    small = {"steps_per_batch": 5, "log_every": 5, "probe_size": 12, "learning_rate": 0.01, "compile": False}
    shape = Transformer(layers=2, width=8, heads=2, mlp_ratio=1)
    return OpsinModule(task or ToyTokens(), shape, seed, **{**small, **settings})


def recorded(model):
    return {name: model.history[name].arrays()[1] for name in model.history.names() if name.startswith("calibration")}


def test_it_records_what_the_probe_shows_under_the_clamps_in_force():
    model = train(module(KnownTokens(), [1, 2]), 10, Calibration(every=5), Ablate(heads=["1:0"]))
    logits = scored_logits(model.observe(model.probe, ["hook_logits"])["hook_logits"], model.probe)
    targets, found = model.probe.targets, recorded(model)
    expected = {
        "ece": expected_calibration_error(logits, targets),
        "brier": brier_score(logits, targets),
        "entropy": mean_entropy(logits),
        "exact_entropy": torch.full((2,), math.log(7) / 2),
    }
    assert found.keys() == {f"calibration/{name}" for name in expected}
    for name, values in expected.items():
        assert list(model.history[f"calibration/{name}"].steps) == [0, 5, 10]
        np.testing.assert_allclose(found[f"calibration/{name}"][-1], values, atol=1e-6)


def test_a_task_that_knows_no_best_predictor_has_no_entropy_of_one():
    assert "calibration/exact_entropy" not in recorded(train(module(), 5, Calibration()))


@pytest.mark.parametrize("task", [ToyTokens, few_shot])
def test_fits_are_made_on_one_half_of_the_probe_and_measured_on_the_other(task):
    model = train(module(task(), [1, 2]), 5, Calibration(**QUICK, penalty=0.5, focus=2.0))
    found, batch = recorded(model), model.probe
    halves = [batch.map(lambda x: x[:, :6]), batch.map(lambda x: x[:, 6:12])]
    parameters = {name: x.detach() for name, x in model.parameters_by_name().items()}

    def logits_at(half, delta=0.0):
        """Embeddings of the toy task, features of the other, moved by hand."""

        def tap(name, x):
            return x + delta if name == "hook_embed" and half.features is None else x

        if half.features is not None:
            half = replace(half, features=half.features + delta)
        return scored_logits(model.network.forward(parameters, model.constants.table, half, tap), half)

    (fitted, held), targets = halves, halves[0].targets
    with torch.no_grad():
        own, unseen = logits_at(fitted), logits_at(held)
    shape = batch.features.shape[2:] if batch.features is not None else (6, 8)
    clamping = fit_neural_clamping(
        lambda delta: logits_at(fitted, delta), torch.zeros(2, 1, *shape), targets, focus=2.0, penalty=0.5, steps=3
    )
    heat = fit_temperature(own, targets)
    expected = {
        "none": unseen,
        "temperature": at_temperature(unseen, heat),
        "vector": fit_vector_scaling(own, targets)(unseen),
        "neural_clamping": at_temperature(logits_at(held, clamping.perturbation), clamping.temperature),
    }
    for name, logits in expected.items():
        error, loss = expected_calibration_error(logits, held.targets), mean_loss(logits, held.targets)
        np.testing.assert_allclose(found[f"calibration/{name}/ece"][-1], error.detach(), atol=1e-5)
        np.testing.assert_allclose(found[f"calibration/{name}/loss"][-1], loss.detach(), rtol=1e-5)
    assert len({found[f"calibration/{name}/loss"][-1].tobytes() for name in expected}) == 4
    np.testing.assert_allclose(found["calibration/temperature/temperature"][-1], heat, rtol=1e-5)
    size = clamping.perturbation.flatten(1).norm(dim=1)
    assert (size > 0).all()
    np.testing.assert_allclose(found["calibration/neural_clamping/perturbation"][-1], size, rtol=1e-4)


def test_fits_see_the_clamps_in_force():
    clamps = [
        Ablate(sites=["blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]),
        Ablate(sites=["blocks.0.hook_mlp_out"]),
    ]
    free, clamped = (
        train(module(), 1, Calibration(fit=["neural_clamping"], clamping_steps=3), *own) for own in ([], clamps)
    )
    for name in ("none", "neural_clamping"):
        first = [recorded(model)[f"calibration/{name}/loss"][-1] for model in (free, clamped)]
        assert abs(first[0] - first[1]) > 1e-5


@pytest.mark.parametrize("task", [ToyTokens, KnownTokens])
def test_it_says_which_metrics_it_records(task):
    callback, model = Calibration(**QUICK), module(task())
    train(model, 5, callback)
    stated = callback.records(model.sites) | callback.task_records(model.task)
    assert stated == {name: {} for name in recorded(model)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Calibration(every=0), r"Calibration.every: got 0"),
        (lambda: Calibration(fit_every=0), r"Calibration.fit_every: got 0"),
        (lambda: Calibration(clamping_steps=0), r"Calibration.clamping_steps: got 0"),
        (lambda: Calibration(fit=[]), r"Calibration.fit: got \[\], expected any of temperature"),
        (lambda: Calibration(fit=["platt"]), r"Calibration.fit: got 'platt'"),
        (lambda: Calibration(focus=0.5), r"Calibration.focus: got 0.5, expected 0, or at least 1"),
        (lambda: Calibration(penalty=-1), r"Calibration.penalty: got -1"),
        (lambda: train(module(probe_size=1), 1, Calibration(fit=["vector"])), r"model.probe_size: got 1"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(make, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make()


RECIPE = """
task:
  class_path: opsin.tasks.FewShot
  init_args:
    batch_size: 8
    exemplars: {class_path: opsin.tasks.GaussianClusters, init_args: {classes: 60, features: 16}}
model: {transformer: {width: 16, heads: 2, mlp_ratio: 1}, steps_per_batch: 5, log_every: 5, probe_size: 16}
trainer:
  max_steps: 5
  enable_progress_bar: false
  limit_val_batches: 0
  callbacks:
    - {class_path: opsin.callbacks.Calibration, init_args: {fit: [temperature, neural_clamping], clamping_steps: 2}}
    - {class_path: opsin.callbacks.AttentionSinks, init_args: {effect_every: 5}}
    - {class_path: opsin.callbacks.ActivationSparsity, init_args: {kinds: [dead, always_on, positional]}}
"""


def test_a_recipe_attaches_the_readers(opsin, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "run")
    assert ended.code == 0 and ended.err == ""
    table = (tmp_path / "run" / "metrics.csv").read_text()
    for name in ("calibration/ece", "calibration/neural_clamping/loss", "neurons/1/positional"):
        assert table.count(f",{name},") == 2
    assert table.count(",attention_sink_effect,") == table.count(",attention_sink,") == 2 * 2 * 2
