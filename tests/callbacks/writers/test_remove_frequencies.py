"""Claims about RemoveFrequencies: what the model sees, and what is refused."""

from __future__ import annotations

import pytest
import torch

from opsin.callbacks import FourierStructure, RemoveFrequencies
from opsin.errors import ConfigError
from opsin.metrics.fourier import power_by_frequency
from opsin.model.mlp import MLP
from opsin.model.transformer import Transformer
from opsin.optimizers import SGD
from opsin.tasks import ModularArithmetic
from opsin.training.module import OpsinModule
from tests.helpers.toys import plan_of, train

MODEL = Transformer(layers=1, width=8, heads=2, mlp_ratio=1, positions="learned", max_positions=3)
TASK = ModularArithmetic(7)


def test_under_sgd_weight_decay_alone_moves_the_embedding_along_what_is_taken_away():
    model = OpsinModule(TASK, MODEL, optimizer=SGD(learning_rate=0.1, weight_decay=0.2), compile=False)
    before = power_by_frequency(model.parameters_by_name()["embed.W_E"].detach()[:, :7].double())
    train(model, 20, RemoveFrequencies([2]))
    power = power_by_frequency(model.parameters_by_name()["embed.W_E"].detach()[:, :7].double())
    # each of 20 steps takes a share of 0.02 of the weight
    torch.testing.assert_close(power[:, 1], before[:, 1] * 0.98**40, rtol=1e-3, atol=0)
    assert ((power / before)[:, [0, 2]] - 0.98**40).abs().min() > 1e-2


def test_a_reader_sees_the_embedding_without_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = train(OpsinModule(TASK, MODEL, compile=False), 5, RemoveFrequencies([1, 3]), FourierStructure(5, 1))
    assert model.summary["fourier"] == {"key_frequencies": [2]}
    assert model.history["fourier/gini"].values[-1][0] == pytest.approx(2 / 3)


@pytest.mark.parametrize("frequencies", [[], [1, 1], [0], [4]], ids=str)
def test_frequencies_that_the_numbers_do_not_have_are_refused_in_one_line(frequencies):
    with pytest.raises(ConfigError, match=r"^RemoveFrequencies.frequencies: got .*, expected") as caught:
        plan_of(MODEL, TASK, RemoveFrequencies(frequencies))
    assert "\n" not in str(caught.value)


def test_a_model_without_an_embedding_of_the_numbers_is_refused():
    with pytest.raises(ConfigError, match=r"RemoveFrequencies: got 'embed.W_E', expected a weight of this model"):
        plan_of(MLP(), TASK, RemoveFrequencies([1]))
