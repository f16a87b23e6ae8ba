"""Claims about SparseProbes, on networks whose neurons are known."""

from __future__ import annotations

import pytest

from opsin.callbacks import SparseProbes
from opsin.errors import ConfigError
from opsin.model.mlp import MLP
from opsin.tasks import BinaryFeatures
from opsin.training.module import OpsinModule
from tests.helpers.toys import train


def module(width: int = 4) -> OpsinModule:
    small = {"steps_per_batch": 4, "log_every": 2, "probe_size": 256, "compile": False, "learning_rate": 1e-30}
    task = BinaryFeatures({"easy": 1, "hard": 2}, unused=1, batch_size=8)
    return OpsinModule(task, network=MLP(width=width, layers=2), seed=[1, 2], **small)


def test_a_neuron_that_is_a_feature_is_found_and_the_curve_is_by_layer_feature_and_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, reader = module(), SparseProbes(every=4, sizes=[1, 4])
    weight = dict(model.members.named_parameters())["blocks.0.mlp.W_in"].data
    weight.zero_()
    weight[:, 1, 2] = 1  # neuron 2 is the first bit
    train(model, 4, reader)
    values = model.history["sparse_probe"].values[-1]
    assert values.shape == (2, 2, 3, 2)
    assert model.history.axes("sparse_probe") == {"layer": 2, "feature": 3, "size": 2}
    assert (values[:, 0, 0] == 1).all() and (abs(values[:, 0, 1:] - 0.5) < 0.2).all()
    assert (tmp_path / "sparse_probes.png").exists() and reader.picture(1).size[0] > 300


def test_more_units_than_there_are_and_sizes_out_of_order_are_refused():
    with pytest.raises(ConfigError, match=r"SparseProbes\.sizes: got 8, expected at most 4"):
        train(module(), 4, SparseProbes(every=4, sizes=[1, 8]))
    for sizes in ([], [2, 1], [0, 1]):
        with pytest.raises(ConfigError, match=r"SparseProbes\.sizes"):
            SparseProbes(sizes=sizes)
