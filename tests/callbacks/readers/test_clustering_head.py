"""Claims about ClusteringHead and GradientNorms, on heads made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opsin.callbacks import Ablate, ClusteringHead, GradientNorms
from opsin.errors import ConfigError
from opsin.model.clustering import ClusteringTransformer
from opsin.model.transformer import Transformer
from opsin.tasks import SparseModularAddition
from opsin.training.module import OpsinModule
from opsin.training.objective import scored_logits
from tests.helpers.toys import ToyTokens, train


def task(**options):
    settings = {"positions": 4, "relevant": 2, "train_sequences": 64, "test_sequences": 64, "batch_size": 8}
    return SparseModularAddition(**settings | options)


def module(learned=None, network=None, seeds=(1, 2), learning_rate=0.01, **options) -> OpsinModule:
    small = {"steps_per_batch": 4, "log_every": 2, "probe_size": 64, "compile": False, "probe": "test"}
    network = network or ClusteringTransformer(neurons=4)
    found = {**small, **options}
    return OpsinModule(learned or task(), network=network, seed=list(seeds), learning_rate=learning_rate, **found)


def set_weights(model: OpsinModule, **values) -> None:
    """Overwrite weights of all members by name, with ``__`` in the place of a dot."""
    named = dict(model.members.named_parameters())
    for name, value in values.items():
        named[name.replace("__", ".")].data[:] = torch.tensor(value)


def last(model: OpsinModule, number: str) -> np.ndarray:
    return model.history[f"clustering/{number}"].values[-1]


def test_a_head_that_sees_nothing_but_the_relevant_tokens_makes_perfect_clusters():
    model = module(learning_rate=1e-30)
    # tokens left and right; later positions high up, where the query does not look and which has no value
    relevant, other = [[0.0, 0.0]] * 2, [[0.0, 1e4]] * 2
    set_weights(
        model,
        embed__W_E=[[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]],
        pos_embed__W_pos=relevant + other + [[0.0, 0.0]] * 8,
        pool__q=[0.0, -1e3],
        pool__W_V=[[1.0, 0.0], [0.0, 0.0]],
    )
    train(model, 4, ClusteringHead(every=4))
    np.testing.assert_allclose(last(model, "within_share"), 0, atol=1e-6)
    np.testing.assert_allclose(last(model, "irrelevant_attention"), 0, atol=1e-6)
    # the points are the means of two tokens: -1, 0 or 1; odd sums at 0, even ones at both ends, whose mean is near 0
    assert (last(model, "within_target_share") > 0.9).all()
    assert (last(model, "clustered_at") == 0).all()


def test_a_head_that_counts_ones_at_one_position_and_noughts_at_another_has_clusters_as_well():
    model = module(learning_rate=1e-30)
    # a one turns the vector upwards: from the right at the first position, which lowers x, from the left at the second
    set_weights(
        model,
        embed__W_E=[[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]],
        pos_embed__W_pos=[[1.0, 0.0], [-1.0, 0.0], [0.0, 1e4], [0.0, 1e4]] + [[0.0, 0.0]] * 8,
        pool__q=[0.0, 0.0],
        pool__W_V=[[1.0, 0.0], [0.0, 0.0]],
    )
    train(model, 4, ClusteringHead(every=4))
    np.testing.assert_allclose(last(model, "within_share"), 0, atol=1e-6)
    assert (last(model, "within_counts_share") > 0.7).all()
    assert model.summary["clustering"][0]["shift"] == [0, 1]


def test_a_query_of_zeros_attends_evenly():
    model = module(learning_rate=1e-30)
    set_weights(model, pool__q=[0.0, 0.0])
    train(model, 4, ClusteringHead(every=4))
    np.testing.assert_allclose(last(model, "irrelevant_attention"), 0.5, rtol=1e-5)


def test_accuracy_is_that_of_the_probe_and_outcomes_follow_from_the_records():
    model = module(task(relevant=1), learning_rate=0.05, seeds=(1, 2, 3, 4, 5, 6))
    train(model, 240, ClusteringHead(every=20))
    batch = model.probe
    logits = scored_logits(model.observe(batch, ["hook_logits"])["hook_logits"], batch)
    right = (logits.argmax(-1) == batch.targets).float().mean((1, 2))
    np.testing.assert_allclose(last(model, "accuracy"), right, rtol=1e-6)
    steps, accuracies = model.history["clustering/accuracy"].arrays()
    _, shares = model.history["clustering/within_share"].arrays()
    solved = (accuracies >= 0.99).any(0)
    assert solved.sum() > 0
    assert (last(model, "solved") == solved).all()
    for member in np.flatnonzero(solved):
        at = steps[(accuracies[:, member] >= 0.99).argmax()]
        clustered = steps[(shares[:, member] < 0.1).argmax()] if (shares[:, member] < 0.1).any() else np.inf
        assert last(model, "solved_at")[member] == at
        assert last(model, "clusters_first")[member] == (clustered < at)
        assert model.summary["clustering"][member]["solved_at"] == at
    assert np.isnan(last(model, "clusters_first")[~solved]).all()


def test_it_draws_the_steps_that_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, reader = module(), ClusteringHead(every=4, pictures=[0, 4])
    train(model, 8, reader)
    assert (tmp_path / "plane.png").exists() and reader.picture(1).size[0] > 300
    assert [row["step"] for row in reader.member_state(reader.state_dict(), 1)["states"]] == [0, 4]


def test_interventions_in_force_are_seen():
    model = module()
    # without values all points are one
    train(model, 4, ClusteringHead(every=4), Ablate(sites=["pool.hook_v"]))
    assert np.isnan(last(model, "within_share")).all()


def test_members_without_numbers_and_points_that_are_all_one_are_drawn_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = module()
    dict(model.members.named_parameters())["pool.q"].data[0] = torch.nan
    dict(model.members.named_parameters())["pool.W_V"].data[1] = 0
    reader = ClusteringHead(every=4, pictures=[0])
    train(model, 4, reader)
    assert (tmp_path / "plane.png").exists() and reader.picture(1).size == reader.picture(0).size


@pytest.mark.parametrize(
    ("model", "reader", "line"),
    [
        (lambda: module(network=ClusteringTransformer(width=3)), {"pictures": [0]}, "ClusteringHead.pictures"),
        (lambda: module(ToyTokens(), Transformer(layers=1, width=8, heads=2), probe="train"), {}, "ClusteringHead"),
    ],
)
def test_a_run_that_lacks_something_is_refused(model, reader, line):
    with pytest.raises(ConfigError, match=line):
        train(model(), 4, ClusteringHead(every=4, **reader))


def test_a_picture_between_measurements_is_refused():
    with pytest.raises(ConfigError, match="pictures"):
        ClusteringHead(every=64, pictures=[100])


def test_gradient_norms_are_those_of_the_probes_loss_by_kind():
    model = module(learning_rate=1e-30)
    train(model, 4, GradientNorms(every=4))
    weights = {name: value.detach().double().requires_grad_() for name, value in model.parameters_by_name().items()}
    outputs = scored_logits(model.network.forward(weights, model.constants.table, model.probe), model.probe)
    losses = model.task.objective.member_loss(outputs, model.probe)
    gradients = dict(zip(weights, torch.autograd.grad(losses.sum(), [*weights.values()]), strict=True))
    kinds = {"embed": ["embed.W_E"], "position": ["pos_embed.W_pos"], "attention": ["pool.q", "pool.W_V"]}
    kinds["mlp"] = ["mlp.W_in", "mlp.b_in", "mlp.W_out", "mlp.b_out"]
    for kind, names in kinds.items():
        expected = sum(gradients[name].flatten(1).square().sum(1) for name in names).sqrt()
        np.testing.assert_allclose(model.history[f"gradient_norm/{kind}"].values[-1], expected, rtol=1e-4)
