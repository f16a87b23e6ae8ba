"""Claims about the transformer: its mathematics, its members, its initialisation."""

import math

import numpy as np
import pytest
import torch

from opsin.errors import ConfigError
from opsin.model import layers as model_file
from opsin.model.parameters import Members
from opsin.model.protocol import init_parameters
from opsin.model.transformer import Transformer
from tests.helpers.toys import SMALL, ToyTokens, Training, batch_of, few_shot, losses, run, weights

VARIANTS = [
    {},
    {"positions": "sinusoidal", "position_base": 100.0},
    {"positions": "learned"},
    {"norm": False},
    {"causal": False},
    {"mlp_ratio": 1.5},
    {"mlp_ratio": 2, "positions": "learned", "norm": False, "causal": False},
    {"layers": 3, "heads": 4, "positions": "rope"},
    {"unembed_bias": False},
]


def slow_logits(p, batch, model, b):
    """The mathematics of the reference's section 1, one token and one head at a time (M = 1)."""
    p = {name: value[0].numpy() for name, value in p.items()}
    width, size, length = model.width, model.head_width, batch.layout.positions
    tau = model.position_base

    def layer_norm(x, name):
        if not model.norm:
            return x
        variance = ((x - x.mean()) ** 2).mean()
        return (x - x.mean()) / math.sqrt(variance + 1e-5) * p[f"{name}.w"] + p[f"{name}.b"]

    def rotate(x, position):
        out = x.copy()
        for j in range(size // 2):
            angle = position * tau ** (-2 * j / size)
            a, c = x[2 * j], x[2 * j + 1]
            out[2 * j : 2 * j + 2] = [
                a * math.cos(angle) - c * math.sin(angle),
                c * math.cos(angle) + a * math.sin(angle),
            ]
        return out

    def attend(normed, block):
        written = []
        qkv = [x @ p[f"{block}.attn.W_QKV"] for x in normed]
        for i in range(length):
            z = np.zeros(width)
            for h in range(model.heads):
                mine = slice(h * size, (h + 1) * size)
                q, keys = qkv[i][:width][mine], [x[width : 2 * width][mine] for x in qkv]
                if model.positions == "rope":
                    q, keys = rotate(q, i), [rotate(key, j) for j, key in enumerate(keys)]
                seen = range(i + 1 if model.causal else length)
                weight = {j: math.exp(q @ keys[j] / math.sqrt(size)) for j in seen}
                z[mine] = sum(weight[j] * qkv[j][2 * width :][mine] for j in seen) / sum(weight.values())
            written.append(z @ p[f"{block}.attn.W_O"])
        return written

    def mlp(x, block):
        hidden = x @ p[f"{block}.mlp.W_in"] + p[f"{block}.mlp.b_in"]
        hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        return hidden @ p[f"{block}.mlp.W_out"] + p[f"{block}.mlp.b_out"]

    resid = []
    for i in range(length):
        if i in batch.layout.features:
            x = batch.features[0, b, batch.layout.features.index(i)].numpy() @ p["embed.W_F"] + p["embed.b_F"]
        else:
            x = p["embed.W_E"][batch.tokens[0, b, batch.layout.tokens.index(i)]].copy()
        if model.positions == "learned":
            x = x + p["pos_embed.W_pos"][i]
        if model.positions == "sinusoidal":
            angle = [i * tau ** (-(c - c % 2) / width) for c in range(width)]
            x = x + [math.cos(a) if c % 2 else math.sin(a) for c, a in enumerate(angle)]
        resid.append(x)
    for layer in range(model.layers):
        block = f"blocks.{layer}"
        written = attend([layer_norm(x, f"{block}.ln1") for x in resid], block)
        resid = [x + w for x, w in zip(resid, written, strict=True)]
        if model.mlp_ratio is not None:
            resid = [x + mlp(layer_norm(x, f"{block}.ln2"), block) for x in resid]
    return np.array([layer_norm(x, "ln_final") @ p["unembed.W_U"] + p.get("unembed.b_U", 0) for x in resid])


@pytest.mark.parametrize("make_task", [few_shot, ToyTokens])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_logits_are_those_of_a_slow_loop_over_tokens_and_heads(make_task, variant):
    task, model = make_task(), Transformer(**{"layers": 2, "width": 8, "heads": 2} | variant)
    batch, parameters = batch_of(task, [0], dtype=torch.float64), weights(model, task, [3])
    logits = run(model, parameters, batch)[0][0]
    for b in range(2):
        assert np.abs(logits[b].numpy() - slow_logits(parameters, batch, model, b)).max() < 1e-12


def test_both_ways_to_multiply_scores_agree(tiny_task, monkeypatch):
    batch, parameters = batch_of(tiny_task, dtype=torch.float64), weights(SMALL, tiny_task)
    broadcast, _ = run(SMALL, parameters, batch)
    monkeypatch.setattr(model_file, "BROADCAST_POSITIONS", 0)
    assert (run(SMALL, parameters, batch)[0] - broadcast).abs().max() < 1e-13


def test_the_loss_of_a_member_has_no_gradient_in_another(tiny_task):
    model = Transformer(layers=2, width=8, heads=2, mlp_ratio=1)
    parameters = {name: value.requires_grad_() for name, value in weights(model, tiny_task, [0, 1, 2]).items()}
    losses(model, parameters, batch_of(tiny_task, [0, 1, 2], dtype=torch.float64))[0].backward()
    assert all(value.grad[0].any() for value in parameters.values())
    assert not any(value.grad[1:].any() for value in parameters.values())


@pytest.mark.parametrize("make_task", [few_shot, ToyTokens])
def test_a_member_of_three_learns_as_if_alone(make_task):
    task, model, seeds = make_task(), Transformer(layers=1, width=8, heads=2, mlp_ratio=1), [4, 5, 6]
    together = weights(model, task, seeds)
    population = Training(model, task, together, seeds=seeds, clip=0.5)
    alone = [
        Training(model, task, {n: v[m, None] for n, v in together.items()}, seeds=[seeds[m]], clip=0.5)
        for m in range(3)
    ]
    for k in range(5):
        logged = population.update(k)
        assert (logged - torch.cat([single.update(k) for single in alone], dim=1)).abs().max() < 1e-12
    for name, value in population.values.items():
        assert (value - torch.cat([single.values[name] for single in alone])).abs().max() < 1e-12


def test_linear_weights_have_unit_fan_in_variance_and_end_at_two_sigma():
    model = Transformer(layers=1, width=128, mlp_ratio=2, init_scale=3.0)
    values = init_parameters(model, few_shot(), range(3))
    for name, fan_in in {"attn.W_QKV": 128, "attn.W_O": 128, "mlp.W_in": 128, "mlp.W_out": 256}.items():
        weight = values[f"blocks.0.{name}"]
        std = 3 / math.sqrt(fan_in)
        assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert 1.99 * std < 0.87962566103423978 * weight.abs().max() <= 2.0001 * std


def test_labels_start_at_the_unscaled_truncated_normal():
    labels = init_parameters(Transformer(layers=1), few_shot(), range(40))["embed.W_E"]
    assert labels.std().item() == pytest.approx(0.02 * 0.8796, rel=0.02)
    assert 0.0395 < labels.abs().max() <= 0.04


def test_positions_start_uniform_biases_at_zero_and_norms_at_one():
    values = init_parameters(Transformer(positions="learned", mlp_ratio=1), few_shot(), range(4))
    assert values["pos_embed.W_pos"].abs().max().item() == pytest.approx(1 / math.sqrt(32), rel=1e-3)
    assert values["pos_embed.W_pos"].std().item() == pytest.approx(1 / math.sqrt(3 * 32), rel=0.03)
    assert all((value == 0).all() for name, value in values.items() if ".b" in name)
    assert all((value == 1).all() for name, value in values.items() if name.endswith(".w"))


def test_a_member_starts_from_its_own_seed_alone(tiny_task):
    one, other = init_parameters(SMALL, tiny_task, [7]), init_parameters(SMALL, tiny_task, [1, 7, 2])
    assert all(torch.equal(one[name][0], other[name][1]) for name in one)
    assert not torch.equal(other["unembed.W_U"][0], other["unembed.W_U"][1])


def test_members_keep_the_names_of_their_parameters(tiny_task):
    values = init_parameters(SMALL, tiny_task, [0])
    assert {n: p.data_ptr() for n, p in Members(values).named_parameters()} == {
        n: v.data_ptr() for n, v in values.items()
    }


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"layers": 0}, "layers"),
        ({"width": 0}, "width"),
        ({"heads": 0}, "heads"),
        ({"width": 10, "heads": 4}, "heads"),
        ({"width": 6, "heads": 2}, "heads"),
    ],
)
def test_an_impossible_shape_is_refused(settings, field):
    with pytest.raises(ConfigError, match=rf"transformer\.{field}"):
        Transformer(**settings)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"positions": "rotary"}, "positions"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"positions": "sinusoidal", "width": 5, "heads": 1}, "width"),
        ({"position_base": 0.0}, "position_base"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(settings, field):
    with pytest.raises(ConfigError, match=rf"transformer\.{field}"):
        Transformer(**settings)
