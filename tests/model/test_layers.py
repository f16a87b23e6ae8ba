"""Claims about the parts that models are chosen from, on cases that can be computed by hand."""

import math
from dataclasses import replace

import pytest
import torch

from opsin.errors import ConfigError
from opsin.model.layers import ACTIVATIONS, Norm, scaled_and_shifted
from opsin.model.transformer import Transformer
from tests.helpers.toys import ToyTokens, batch_of, few_shot, run, weights

BASE = Transformer(layers=1, width=8, heads=2, mlp_ratio=1, positions="none")
TASK = ToyTokens()


def ran(model, values=None):
    """Weights, logits and activations of a model on the toy task."""
    values = weights(model, TASK) if values is None else values
    logits, seen = run(model, values, batch_of(TASK))
    return values, logits, seen


@pytest.mark.parametrize(
    ("name", "at_minus_one", "at_two"),
    [
        ("relu", 0.0, 2.0),
        ("relu_squared", 0.0, 4.0),
        ("square", 1.0, 4.0),
        ("silu", -1 / (1 + math.e), 2 / (1 + math.exp(-2))),
        ("gelu", -0.5 * (1 - math.erf(1 / math.sqrt(2))), 1 + math.erf(math.sqrt(2))),
        ("gelu_tanh", -0.5 * (1 - math.tanh(math.sqrt(2 / math.pi) * 1.044715)), 1.9545976940877752),
    ],
)
def test_an_activation_is_its_formula(name, at_minus_one, at_two):
    found = ACTIVATIONS[name](torch.tensor([-1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([at_minus_one, at_two], dtype=torch.float64))


@pytest.mark.parametrize(("kind", "expected"), [("LayerNorm", [-1.0, 1.0]), ("RMSNorm", [1 / 5**0.5, 3 / 5**0.5])])
def test_a_norm_is_its_formula(kind, expected):
    x = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 1, 1, 2)
    found = scaled_and_shifted(Norm(kind).normalise(x), torch.full((1, 2), 2.0), torch.ones(1, 2))
    torch.testing.assert_close(found.flatten(), 2 * torch.tensor(expected, dtype=torch.float64) + 1, atol=2e-5, rtol=0)


def test_what_is_normalised_has_neither_weight_nor_bias_yet_and_the_output_has_both():
    values, _, seen = ran(BASE)
    normalised, out = seen["blocks.0.ln1.hook_normalized"], seen["blocks.0.ln1.hook_out"]
    torch.testing.assert_close(normalised.mean(-1), torch.zeros(2, 4, 6, dtype=torch.float64))
    weight, bias = (values[f"blocks.0.ln1.{end}"][:, None, None] for end in "wb")
    torch.testing.assert_close(out, normalised * weight + bias)


def test_norms_without_parameters_put_out_what_they_normalise():
    model = replace(BASE, norm="RMSNorm", norm_weight=False)
    values, _, seen = ran(model)
    assert not [name for name in values if name.startswith(("ln", "blocks.0.ln"))]
    assert torch.equal(seen["ln_final.hook_normalized"], seen["ln_final.hook_out"])


def test_the_last_norm_is_chosen_by_itself():
    sites = replace(BASE, norm=False, final_norm="RMSNorm").sites(TASK)
    assert "blocks.0.ln1.hook_scale" not in sites and sites.norms["ln_final"].kind == "RMSNorm"
    assert "ln_final.hook_scale" not in replace(BASE, final_norm=False).sites(TASK)


def test_a_gate_multiplies_the_second_map_before_the_bias():
    values, _, seen = ran(replace(BASE, gated=True, activation="silu"))
    read = seen["blocks.0.ln2.hook_out"]
    pre, other = (torch.einsum("mbld,mdn->mbln", read, values[f"blocks.0.mlp.{name}"]) for name in ("W_gate", "W_in"))
    torch.testing.assert_close(seen["blocks.0.mlp.hook_pre_linear"], other)
    expected = pre * pre.sigmoid() * other + values["blocks.0.mlp.b_in"][:, None, None]
    torch.testing.assert_close(seen["blocks.0.mlp.hook_post"], expected)


def test_linear_attention_weighs_values_by_scores_and_sees_nothing_of_what_is_to_come():
    _, _, seen = ran(replace(BASE, attention="linear", scale_scores=False, causal=True))
    q, k, v = (seen[f"blocks.0.attn.hook_{part}"] for part in "qkv")
    scores = torch.einsum("mblhe,mbkhe->mbhlk", q, k).tril()
    torch.testing.assert_close(seen["blocks.0.attn.hook_pattern"], scores)
    torch.testing.assert_close(seen["blocks.0.attn.hook_z"], torch.einsum("mbhlk,mbkhe->mblhe", scores, v))
    assert "blocks.0.attn.hook_attn_scores" not in seen


@pytest.mark.parametrize(("scaled", "divisor"), [(True, 2.0), (False, 1.0)])
def test_scores_are_divided_by_the_root_of_the_head_width_or_not(scaled, divisor):
    _, _, seen = ran(replace(BASE, scale_scores=scaled, causal=False))
    q, k = (seen[f"blocks.0.attn.hook_{part}"] for part in "qk")
    expected = torch.einsum("mblhe,mbkhe->mbhlk", q, k) / divisor
    torch.testing.assert_close(seen["blocks.0.attn.hook_attn_scores"], expected)


def test_relative_positions_add_the_query_times_the_row_of_the_distance_and_far_ones_share_a_row():
    model = replace(BASE, positions="relative", max_positions=2, scale_scores=False, causal=False)
    values, _, seen = ran(model)
    q, rows = seen["blocks.0.attn.hook_q"], values["blocks.0.attn.W_rel"]
    assert rows.shape == (2, 5, 4)
    for query, key, row in ((0, 0, 2), (3, 2, 1), (3, 4, 3), (5, 0, 0), (0, 5, 4)):
        expected = (q[:, :, query] * rows[:, None, None, row]).sum(-1)
        torch.testing.assert_close(seen["blocks.0.attn.hook_rel_scores"][..., query, key], expected)


def test_without_positions_and_mask_the_order_of_tokens_is_no_matter():
    model, batch = replace(BASE, causal=False), batch_of(TASK)
    values = weights(model, TASK)
    forth, _ = run(model, values, batch)
    back, _ = run(model, values, batch.map(lambda x: x.flip(2) if x.dim() == 3 and x.shape[2] == 6 else x))
    torch.testing.assert_close(forth, back.flip(2))


def test_biases_are_added_to_queries_keys_values_and_output():
    model = replace(BASE, attention_biases="qkvo")
    values, _, seen = ran(model)
    without = {name: torch.zeros_like(x) if ".attn.b_" in name else x for name, x in values.items()}
    _, _, plain = ran(model, without)
    for part in "qkv":
        difference = seen[f"blocks.0.attn.hook_{part}"] - plain[f"blocks.0.attn.hook_{part}"]
        bias = model.parameters(TASK)[f"blocks.0.attn.b_{part.upper()}"].read(values)
        torch.testing.assert_close(difference, bias[:, None, None].expand_as(difference))
    z, weight = seen["blocks.0.attn.hook_z"], model.parameters(TASK)["blocks.0.attn.W_O"].read(values)
    written = torch.einsum("mblhe,mhed->mbld", z, weight) + values["blocks.0.attn.b_O"][:, None, None]
    torch.testing.assert_close(seen["blocks.0.hook_attn_out"], written)


def test_a_tied_read_out_is_the_transposed_embedding():
    model = replace(BASE, tied=True, unembed_bias=False)
    values, logits, seen = ran(model)
    assert "unembed.W_U" not in values
    torch.testing.assert_close(logits, seen["ln_final.hook_out"] @ values["embed.W_E"][:, None].mT)
    named = model.parameters(TASK)["unembed.W_U"]
    assert torch.equal(named.read(values), values["embed.W_E"].mT) and named.parameter == "embed.W_E"


def test_some_layers_have_an_mlp():
    model = replace(BASE, layers=3, mlp_layers=(1,))
    _, _, seen = ran(model)
    assert [name for name in seen if name.endswith("hook_mlp_out")] == ["blocks.1.hook_mlp_out"]
    assert not [name for name in model.parameters(TASK).shapes if ".ln2." in name and not name.startswith("blocks.1.")]


@pytest.mark.parametrize(
    ("setting", "weight"),
    [
        ("embed_scale", "embed.W_E"),
        ("attention_scale", "blocks.0.attn.W_O"),
        ("mlp_scale", "blocks.0.mlp.W_out"),
        ("unembed_scale", "unembed.W_U"),
    ],
)
def test_a_scale_multiplies_its_kind_of_weight_alone(setting, weight):
    before = BASE.parameters(TASK).draw([3])
    after = replace(BASE, **{setting: 2 * getattr(BASE, setting)}).parameters(TASK).draw([3])
    torch.testing.assert_close(after[weight], 2 * before[weight])
    kind = next(p.kind for p in BASE.parameters(TASK) if p.name == weight)
    others = [p.name for p in BASE.parameters(TASK) if p.kind != kind]
    assert all(torch.equal(before[name], after[name]) for name in others)


def test_a_head_is_reached_in_the_shape_of_transformer_lens():
    values, _, seen = ran(BASE)
    table = BASE.parameters(TASK)
    query = table["blocks.0.attn.W_Q"].read(values)
    assert query.shape == (2, 2, 8, 4) and table["blocks.0.attn.W_O"].read(values).shape == (2, 2, 4, 8)
    expected = torch.einsum("mbld,mhde->mblhe", seen["blocks.0.ln1.hook_out"], query)
    torch.testing.assert_close(seen["blocks.0.attn.hook_q"], expected)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"gated": True, "activation": "square"}, "transformer.activation: got 'square', expected one with a gate"),
        ({"gated": True, "mlp_ratio": None}, "transformer.gated"),
        ({"activation": "tanh"}, "transformer.activation: got 'tanh', expected one of 'gelu_tanh', "),
        ({"norm": "BatchNorm"}, "transformer.norm: got 'BatchNorm', expected one of true, false, 'LayerNorm'"),
        ({"attention_biases": "qx"}, "transformer.attention_biases"),
        ({"mlp_layers": (1,)}, "transformer.mlp_layers"),
        ({"position_scale": 2.0}, "transformer.position_scale"),
        ({"tied": True, "unembed_scale": 2.0}, "transformer.unembed_scale"),
        ({"positions": "absolute"}, "transformer.positions"),
        ({"attention": "hard"}, "transformer.attention: got 'hard'"),
        ({"embed_scale": 0.0}, "transformer.embed_scale"),
    ],
)
def test_a_choice_that_cannot_be_is_one_line(settings, line):
    with pytest.raises(ConfigError) as refused:
        replace(BASE, **settings)
    assert str(refused.value).startswith(line) and "\n" not in str(refused.value)


def test_a_read_out_cannot_be_tied_to_an_embedding_of_another_size():
    task = few_shot()
    task.n_outputs = task.n_tokens + 1
    with pytest.raises(ConfigError, match=r"transformer.tied: got True, expected false: the task has \d+ tokens and"):
        Transformer(width=8, heads=2, tied=True).sites(task)
