"""Claims about FeatureVariance, on networks whose neurons are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opsin.callbacks import FeatureVariance
from opsin.errors import ConfigError
from opsin.metrics.clusters import explained_share
from opsin.model.clustering import ClusteringTransformer
from opsin.model.mlp import MLP
from opsin.model.transformer import Transformer
from opsin.tasks import BinaryFeatures, SparseModularAddition
from opsin.training.module import OpsinModule
from tests.helpers.regression import Pairs
from tests.helpers.toys import ToyTokens, train


def module(task=None, network=None, seeds=(1, 2), **options) -> OpsinModule:
    small = {"steps_per_batch": 4, "log_every": 2, "probe_size": 256, "compile": False, "learning_rate": 1e-30}
    task = BinaryFeatures({"easy": 1, "hard": 2}, unused=1, batch_size=8) if task is None else task
    return OpsinModule(task, network=network or MLP(width=4, layers=2), seed=list(seeds), **(small | options))


def test_neurons_that_are_a_feature_have_all_their_variance_explained_by_it():
    model = module()
    weights = dict(model.members.named_parameters())
    for name in ("blocks.0.mlp.W_in", "blocks.1.mlp.W_in"):
        weights[name].data.zero_()
    # the one-hot vectors of four bits, one after the other: neuron 0 is the first bit, neuron 1 three times the last
    weights["blocks.0.mlp.W_in"].data[:, 1, 0] = 1
    weights["blocks.0.mlp.W_in"].data[:, 7, 1] = 3
    weights["blocks.1.mlp.W_in"].data[:, 0, 0] = 1
    train(model, 4, FeatureVariance(every=4))
    first, last = model.history["feature_variance"].values[-1][0]  # layer feature
    bits = model.probe.tokens[0, :, [0, 3]].double()
    bit, other = (bits.var(0) * torch.tensor([1, 9])).tolist()
    # the two bits are nearly independent on the probe
    assert first.tolist() == pytest.approx([bit / (bit + other), 0, other / (bit + other)], abs=0.03)
    assert last[0] == pytest.approx(1) and last[1] < 0.03 and last[2] < 0.03
    assert model.history["feature_variance/easy"].values[-1].tolist() == pytest.approx([1, 1])
    assert model.summary["feature_variance"][1]["easy"][1] == pytest.approx(1)


def test_the_shares_are_those_of_the_residual_stream_at_the_last_scored_position():
    model = module(ToyTokens(), Transformer(layers=2, width=8, heads=2), probe_size=40)
    train(model, 4, FeatureVariance(every=4))
    values = model.history["feature_variance"].values[-1]
    assert values.shape == (2, 2, 1) and model.history.axes("feature_variance") == {"layer": 2, "feature": 1}
    x = model.observe(model.probe, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"][:, :, 4]
    np.testing.assert_allclose(values[:, 1, 0], explained_share(x, model.probe.targets[..., -1]), rtol=1e-5)


def test_sites_of_any_model_can_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = SparseModularAddition(positions=4, relevant=2, train_sequences=64, test_sequences=64, batch_size=8)
    model, reader = (
        module(task, ClusteringTransformer(), probe_size=64),
        FeatureVariance(4, ["hook_embed", "pool.hook_z"]),
    )
    train(model, 4, reader)
    assert [*model.summary["feature_variance"][0]] == ["target", "counts"]
    assert (tmp_path / "feature_variance.png").exists() and reader.picture(0).size[0] > 300


@pytest.mark.parametrize(
    ("model", "sites", "line"),
    [
        (lambda: module(Pairs(), Transformer(layers=1, width=8, heads=2)), None, "expected a task that declares"),
        (lambda: module(network=MLP(width=4)), ["hook_embed"], "hook_embed"),
        (lambda: module(ToyTokens(), Transformer(layers=1, positions="learned")), ["hook_pos_embed"], "hook_pos_embed"),
    ],
)
def test_a_run_that_lacks_something_is_refused(model, sites, line):
    with pytest.raises(ConfigError, match=line):
        train(model(), 4, FeatureVariance(4, sites))
