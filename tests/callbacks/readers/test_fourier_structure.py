"""Claims about FourierStructure: weights of one frequency are told, numbers follow the weights, others are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opsin.callbacks import FourierStructure
from opsin.errors import ConfigError
from opsin.metrics.fourier import excluded, neuron_concentration, restricted
from opsin.model.mlp import MLP
from opsin.model.transformer import Transformer
from opsin.tasks import ModularArithmetic
from opsin.training.module import OpsinModule
from tests.helpers.toys import ToyTokens, train

P = 7
TASK = ModularArithmetic(P, "a - b")
MODEL = Transformer(layers=1, width=8, heads=2, mlp_ratio=1, positions="learned", max_positions=3)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    # figures are written where the run is kept
    monkeypatch.chdir(tmp_path)


def module(task=TASK, network=MODEL, seeds=(1, 2)):
    small = {"steps_per_batch": 5, "log_every": 5, "learning_rate": 0.01, "compile": False}
    return OpsinModule(task, network=network, seed=list(seeds), **small)


def last(model, name):
    return model.history[f"fourier/{name}"].values[-1]


def losses(logits, targets):
    return torch.nn.functional.cross_entropy(logits.mT, targets.expand(len(logits), -1), reduction="none").mean(1)


def test_its_numbers_are_those_of_the_final_weights():
    model = train(module(), 10, FourierStructure(5, 2))
    batch = TASK.table(TASK.bank()).shared_by(2)
    seen = model.observe(batch, ["hook_logits", "blocks.0.mlp.hook_post"])
    logits, answers = seen["hook_logits"][:, :, -1].double(), batch.targets[0, :, 0]
    embedding = model.parameters_by_name()["embed.W_E"].detach()[:, :P].numpy()
    power = (np.abs(np.fft.rfft(embedding, axis=1)[:, 1:]) ** 2).sum(2)
    key = torch.from_numpy(power >= np.sort(power, 1)[:, 1:2])
    trained = TASK.examples_of("train")
    neurons = neuron_concentration(seen["blocks.0.mlp.hook_post"][:, :, -1].double().unflatten(1, (P, P)))
    expected = {
        "key_share": np.sort(power, 1)[:, 1:].sum(1) / power.sum(1),
        "neuron_share": neurons.nanmean(1),
        "restricted_loss": losses(restricted(logits, answers, key), answers),
        "excluded_loss": losses(excluded(logits, answers, key)[:, trained], answers[trained]),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(last(model, name), values, rtol=1e-4, err_msg=name)
    order = np.argsort(-power, 1)[:, :2] + 1
    assert model.summary["fourier"] == [{"key_frequencies": row} for row in order.tolist()]
    assert list(model.history["fourier/gini"].steps) == [0, 5, 10]


def test_an_embedding_of_one_frequency_is_told():
    model = module(seeds=[1])
    x = torch.arange(P) * 2 * math.pi * 3 / P
    with torch.no_grad():
        model.parameters_by_name()["embed.W_E"].zero_()[0, :P, :2] = torch.stack([x.cos(), x.sin()], 1)
    train(model, 1, FourierStructure(1, 1))
    assert model.history["fourier/key_share"].values[0][0] == pytest.approx(1)
    assert model.history["fourier/gini"].values[0][0] == pytest.approx(2 / 3)


def test_a_model_without_neurons_has_no_share_of_them():
    model = train(module(network=Transformer(layers=1, width=8, heads=2)), 5, FourierStructure(5, 2))
    assert "fourier/gini" in model.history and "fourier/neuron_share" not in model.history


@pytest.mark.parametrize(
    ("task", "network", "message"),
    [
        (
            ModularArithmetic(P, "a * b"),
            MODEL,
            "FourierStructure: got 'ModularArithmetic', expected a whole table",
        ),
        (
            ModularArithmetic(P, "a / b"),
            MODEL,
            "FourierStructure: got 'ModularArithmetic', expected a whole table",
        ),
        (
            ModularArithmetic(8),
            MODEL,
            "FourierStructure: got 'ModularArithmetic', expected a whole table",
        ),
        (ToyTokens(), Transformer(layers=1, width=8, heads=2), "FourierStructure: got 'ToyTokens'"),
        (TASK, MLP(), "FourierStructure: got 'a model without hook_embed"),
        (ModularArithmetic(5), MODEL, "FourierStructure.key_frequencies: got 3, expected at most 2"),
    ],
    ids=["unbalanced", "not whole", "even", "another task", "no embedding", "too many"],
)
def test_a_run_without_such_a_table_is_refused_in_one_line(task, network, message):
    with pytest.raises(ConfigError, match=message) as caught:
        train(module(task, network), 1, FourierStructure(1, 3))
    assert "\n" not in str(caught.value)


def test_numbers_by_frequency_add_up_to_those_of_all():
    model = train(module(), 10, FourierStructure(5, 3))
    assert model.history.axes("fourier/power") == {"frequency": 3}
    np.testing.assert_allclose(last(model, "power").sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        np.sort(last(model, "power"), 1)[:, ::-1][:, :3].sum(1), last(model, "key_share"), rtol=1e-5
    )
    batch = TASK.table(TASK.bank()).shared_by(2)
    logits = model.observe(batch, ["hook_logits"])["hook_logits"][:, :, -1].double()
    centred = logits - logits.mean(-1, keepdim=True)
    share = np.square(last(model, "coefficient")).sum(1) / centred.square().sum((1, 2)).numpy()
    np.testing.assert_allclose(share, last(model, "logit_share"), rtol=1e-4)
    trained, second = TASK.examples_of("train"), torch.tensor([[False, True, False]]).expand(2, -1)
    answers = batch.targets[0, :, 0]
    expected = losses(excluded(logits, answers, second)[:, trained], answers[trained])
    np.testing.assert_allclose(last(model, "loss_without")[:, 1], expected, rtol=1e-5)
