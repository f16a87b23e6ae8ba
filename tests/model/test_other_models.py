"""Claims about the models beside the transformer, on cases that can be computed by hand."""

from dataclasses import replace

import pytest
import torch

from opsin.errors import ConfigError
from opsin.model.associative_memory import AssociativeMemory
from opsin.model.birth import BirthTransformer
from opsin.model.clustering import ClusteringTransformer
from opsin.model.context_or_weights import ReddyNetwork
from opsin.model.mlp import MLP
from opsin.model.transformer import Transformer
from tests.helpers.toys import ToySums, ToyTokens, batch_of, few_shot, run, weights


def test_a_quadratic_network_is_the_sum_of_squares_of_sums():
    model, task = MLP(width=3, activation="square", bias="none"), ToySums()
    values, batch = weights(model, task), batch_of(task)
    logits, _ = run(model, values, batch)
    by_position = values["blocks.0.mlp.W_in"].unflatten(1, (4, 3))  # of each position, one row a token
    for example in range(4):
        tokens = batch.tokens[1, example]
        hidden = sum(by_position[1, place, token] for place, token in enumerate(tokens.tolist())) ** 2
        torch.testing.assert_close(logits[1, example, 2], hidden @ values["unembed.W_U"][1])


def test_features_come_after_the_tokens():
    model, task = MLP(width=5, bias="all"), few_shot()
    values, batch = weights(model, task), batch_of(task)
    _, seen = run(model, values, batch)
    ones = torch.nn.functional.one_hot(batch.tokens, task.n_tokens).double().flatten(2)
    x = torch.cat([ones, batch.features.double().flatten(2)], 2)
    expected = torch.einsum("mbi,min->mbn", x, values["blocks.0.mlp.W_in"]) + values["blocks.0.mlp.b_in"][:, None]
    torch.testing.assert_close(seen["blocks.0.mlp.hook_pre"][:, :, 0], expected)


def test_weights_are_of_he_times_alpha_and_biases_where_they_are_asked_for():
    drawn = MLP(width=4000, init_scale=3.0).parameters(ToySums()).draw([1])
    assert drawn["blocks.0.mlp.W_in"].std().item() == pytest.approx(3 * (2 / 12) ** 0.5, rel=0.02)
    assert set(drawn) == {"blocks.0.mlp.W_in", "blocks.0.mlp.b_in", "unembed.W_U"}


def test_an_associative_memory_of_outer_products_recalls_them():
    model, task = AssociativeMemory(width=32), ToyTokens()
    values, batch = weights(model, task), batch_of(task)
    e = torch.linalg.qr(torch.randn(2, 32, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0].mT
    values["embed.W_E"], values["unembed.W_U"] = e, e.roll(2, 1).mT
    # output (x + 5) mod 7 for token x
    values["memory.W"] = torch.einsum("mxd,mxe->mde", e, values["unembed.W_U"].mT[:, (torch.arange(7) + 5) % 7])
    logits, _ = run(model, values, batch)
    assert torch.equal(logits.argmax(-1), (batch.tokens + 5) % 7)
    assert model.parameters(task).untrained == ("embed.W_E", "unembed.W_U")


def test_the_frozen_transformer_reads_with_its_residual_stream():
    model, task = BirthTransformer(width=8, max_positions=6), ToyTokens()
    values, batch = weights(model, task), batch_of(task)
    _, seen = run(model, values, batch)
    resid = seen["blocks.1.hook_resid_pre"]
    scores = torch.einsum("mbld,mbkd->mblk", resid, seen["blocks.1.attn.hook_k"][:, :, :, 0])
    causal = torch.ones(6, 6).tril().bool()
    found = seen["blocks.1.attn.hook_attn_scores"][:, :, 0]
    torch.testing.assert_close(found[..., causal], scores[..., causal] / 8**0.5)
    trained = [p.name for p in model.parameters(task) if p.trained]
    assert trained == ["blocks.0.attn.W_K", "blocks.1.attn.W_K", "blocks.1.attn.W_O"]


def test_the_clustering_model_pools_by_one_query_and_reads_out_with_its_tokens():
    model, task = ClusteringTransformer(neurons=4, max_positions=4), ToySums()
    values, batch = weights(model, task), batch_of(task)
    logits, seen = run(model, values, batch)
    x = values["embed.W_E"][0][batch.tokens[0]] + values["pos_embed.W_pos"][0][:4]
    h = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    pattern = ((h @ values["pool.q"][0]) / 2**0.5).softmax(-1)
    z = (pattern[..., None] * (h @ values["pool.W_V"][0])).sum(1)
    torch.testing.assert_close(seen["pool.hook_z"][0, :, 0], z)
    point = z + seen["hook_mlp_out"][0, :, 0]
    torch.testing.assert_close(logits[0, :, 1], point @ values["embed.W_E"][0].T)


def test_the_network_of_reddy_sees_positions_as_channels_from_an_offset_on():
    model, task = ReddyNetwork(position_width=9, neurons=5, hidden_layers=2), few_shot()
    values, batch = weights(model, task), batch_of(task)
    _, seen = run(model, values, batch)
    assert torch.equal(seen["hook_embed"][..., :9], torch.eye(9).double()[:5].expand(2, 4, 5, 9))
    shifted = replace(batch, offset=torch.full((2, 4), 3))
    _, moved = run(model, values, shifted)
    assert torch.equal(moved["hook_embed"][..., 3:8], seen["hook_embed"][..., :5])
    torch.testing.assert_close(seen["hook_embed"][:, :, 0, 9:], batch.features[:, :, 0].double())
    q, k = (seen[f"blocks.0.attn.hook_{part}"][:, :, :, 0] for part in "qk")
    scores = seen["blocks.0.attn.hook_attn_scores"][:, :, 0]
    torch.testing.assert_close(scores[..., 4, :], torch.einsum("mbd,mbkd->mbk", q[:, :, 4], k))
    added = seen["blocks.0.hook_resid_post"] - seen["blocks.0.hook_resid_pre"]
    torch.testing.assert_close(added, seen["blocks.0.attn.hook_z"][:, :, :, 0])


@pytest.mark.parametrize(
    ("model", "task", "line"),
    [
        (MLP(), ToyTokens(), r"MLP: got 'a task that scores positions \[3, 4\]', expected one that scores the last, 5"),
        (ClusteringTransformer(), ToyTokens(), "ClusteringTransformer: got 'a task that scores"),
        (ClusteringTransformer(), few_shot(), "ClusteringTransformer: got 'a task with 8 features"),
        (ClusteringTransformer(max_positions=3), ToySums(), "ClusteringTransformer.max_positions: got 3"),
        (AssociativeMemory(), few_shot(), "AssociativeMemory: got 'a task with 8 features'"),
        (BirthTransformer(), few_shot(), "BirthTransformer: got 'a task with 8 features'"),
        (BirthTransformer(max_positions=5), ToyTokens(), "BirthTransformer.max_positions: got 5"),
        (ReddyNetwork(position_width=4), ToyTokens(), "ReddyNetwork.position_width: got 4"),
        (Transformer(positions="learned", max_positions=5), ToyTokens(), "transformer.max_positions: got 5"),
    ],
)
def test_a_task_that_a_model_cannot_take_is_refused_by_name(model, task, line):
    with pytest.raises(ConfigError, match=line):
        model.sites(task)


@pytest.mark.parametrize("settings", [{"width": 0}, {"layers": 0}, {"init_scale": 0.0}, {"bias": "some"}])
def test_a_bad_setting_of_a_model_is_named(settings):
    with pytest.raises(ConfigError, match=rf"MLP.{next(iter(settings))}: got"):
        MLP(**settings)
