"""Claims about path patching, against a model that keeps every contribution apart and sums them for each reader."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.callbacks import Ablate, PathPatch
from opsin.errors import ConfigError
from opsin.interventions.apply import run_passes
from opsin.interventions.values.noise import another_example
from opsin.interventions.values.paths import read_receiver, read_sender, written
from opsin.model.transformer import Transformer
from tests.helpers.toys import SMALL, batch_of, few_shot, inputs_of, plan_of, run, weights

TASK = few_shot()
BATCH = batch_of(TASK, dtype=torch.float64)
LINEAR = replace(SMALL, norm=False)
FULL = Transformer(layers=3, width=8, heads=2, mlp_ratio=1.5, positions="learned")


def seen_with(model, values, *writers, gate=1.0):
    """All activations under these writers."""
    plan = plan_of(model, TASK, *writers)
    return run(model, values, BATCH, run_passes(plan, inputs_of(plan, model, values, BATCH, gate)))[1]


# ---- the slow version: one member, one head, one reader, one contribution at a time ----------------------------------


def numbers(values, member):
    return {name: value[member].detach().numpy() for name, value in values.items()}


def added_first(model, values, member):
    """Embedding and position vectors of one member, ``[B, L, D]``."""
    seen = run(model, values, BATCH)[1]
    terms = {"embed": seen["hook_embed"][member].detach().numpy()}
    if model.positions != "rope":
        terms["pos_embed"] = np.broadcast_to(seen["hook_pos_embed"][member].detach().numpy(), terms["embed"].shape)
    return terms


def slow(model, p, terms, paths=(), instead=None):
    """Logits, and every contribution; ``instead`` holds what senders of the (sender, receiver) ``paths`` are there."""
    terms, size = dict(terms), model.head_width

    def read(receiver, norm):
        x = sum(instead[name] if (name, receiver) in paths else term for name, term in terms.items())
        if not model.norm:
            return x
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p[f"{norm}.w"] + p[
            f"{norm}.b"
        ]

    def rotated(x):
        if model.positions != "rope":
            return x
        angle = np.arange(x.shape[1])[:, None] * model.position_base ** (-np.arange(0, size, 2) / size)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    for layer in range(model.layers):
        block, heads = f"blocks.{layer}", {}
        for head in range(model.heads):
            columns = {
                part: slice(n * model.width + head * size, n * model.width + (head + 1) * size)
                for n, part in enumerate("qkv")
            }
            q, k, v = (
                read(f"{layer}:{head}.{part}", f"{block}.ln1") @ p[f"{block}.attn.W_QKV"][:, columns[part]]
                for part in "qkv"
            )
            scores = rotated(q) @ rotated(k).transpose(0, 2, 1) / math.sqrt(size)
            paid = np.exp(scores) * np.tri(scores.shape[-1])
            z = paid / paid.sum(-1, keepdims=True) @ v
            heads[f"{layer}:{head}"] = z @ p[f"{block}.attn.W_O"][head * size : (head + 1) * size]
        terms |= heads
        if model.neurons:
            x = read(f"{layer}:mlp", f"{block}.ln2") @ p[f"{block}.mlp.W_in"] + p[f"{block}.mlp.b_in"]
            x = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
            terms[f"{layer}:mlp"] = x @ p[f"{block}.mlp.W_out"] + p[f"{block}.mlp.b_out"]
    return read("logits", "ln_final") @ p["unembed.W_U"] + p.get("unembed.b_U", 0), terms


def replacements(model, p, terms, paths, by, member):
    """What each sender's contribution is replaced by; mean and resample are of what goes on under the patch itself."""
    sources = another_example(torch.tensor([[0, 0], [1, 0]]), len(BATCH.tokens[0]))[member].numpy()
    how = {
        "zero": np.zeros_like,
        "mean": lambda term: np.broadcast_to(term.mean(0), term.shape),
        "resample": lambda term: term[sources],
        "plain": lambda term: term,
    }[by]
    plain = slow(model, p, terms)[1]
    instead = {name: how(term) for name, term in plain.items()}
    # a patch changes what later senders contribute, so the sound ones spread by one depth each time
    for _ in range(0 if by == "plain" else 2 * model.layers):
        instead = {name: how(term) for name, term in slow(model, p, terms, paths, instead)[1].items()}
    return instead


def slow_logits(model, values, senders, receivers, by):
    """Of all members."""
    paths = {(sender, receiver) for sender in senders for receiver in receivers}
    found = []
    for member in range(2):
        p, terms = numbers(values, member), added_first(model, values, member)
        instead = replacements(model, p, terms, paths, by, member)
        found.append(slow(model, p, terms, paths, instead)[0])
    return torch.from_numpy(np.stack(found))


def depth(name, layers):
    """Where a sender or receiver stands in the order of computation."""
    if name in ("embed", "pos_embed", "logits"):
        return 2 * layers if name == "logits" else -1
    return 2 * int(name.split(":")[0]) + name.endswith("mlp")


def all_names(model):
    """Senders and receivers of a model."""
    heads = [f"{layer}:{head}" for layer in range(model.layers) for head in range(model.heads)]
    mlps = [f"{layer}:mlp" for layer in range(model.layers) if model.neurons]
    added = ["embed"] if model.positions == "rope" else ["embed", "pos_embed"]
    return [*added, *heads, *mlps], [*(f"{head}.{part}" for head in heads for part in "qkv"), *mlps, "logits"]


def test_the_slow_version_is_the_model_where_nothing_is_patched():
    for model in (SMALL, LINEAR, FULL):
        values = weights(model, TASK)
        expected = [slow(model, numbers(values, m), added_first(model, values, m))[0] for m in range(2)]
        torch.testing.assert_close(run(model, values, BATCH)[0], torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize("by", ["zero", "mean", "resample", "plain"])
@pytest.mark.parametrize(
    "model", [LINEAR, SMALL, FULL, replace(FULL, norm=False, positions="rope"), replace(SMALL, unembed_bias=False)]
)
@given(st.data())
@settings(max_examples=3)
def test_any_patched_path_is_what_the_slow_version_says(model, by, data):
    senders, receivers = all_names(model)
    into = data.draw(st.lists(st.sampled_from(receivers[3 * model.heads :]), min_size=1, max_size=4, unique=True))
    first = min(depth(name, model.layers) for name in into)
    fit = [name for name in senders if depth(name, model.layers) < first]
    fit = [name for name in fit if name != "pos_embed" or by in ("zero", "plain")]
    sent = data.draw(st.lists(st.sampled_from(fit), min_size=1, max_size=4, unique=True))
    values = weights(model, TASK)
    seen = seen_with(model, values, PathPatch(sent, into, by))
    expected = slow_logits(model, values, sent, into, by)
    torch.testing.assert_close(seen["hook_logits"], expected, rtol=1e-9, atol=1e-11)


# ---- what is known without it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("receiver", ["1:1.q", "1:0.k", "1:1.v", "1:mlp", "logits"])
def test_a_receiver_cut_from_every_sender_reads_nothing(receiver):
    model = replace(FULL, layers=2, norm=False)
    values = weights(model, TASK)
    senders = [name for name in all_names(model)[0] if depth(name, 2) < depth(receiver, 2)]
    seen = seen_with(model, values, PathPatch(senders, [receiver]))
    if receiver == "logits":
        read, left = seen["hook_logits"], values["unembed.b_U"]
    elif receiver == "1:mlp":
        read, left = seen["blocks.1.mlp.hook_pre"], values["blocks.1.mlp.b_in"]
    else:
        read, left = seen[f"blocks.1.attn.hook_{receiver[-1]}"][..., int(receiver[2]), :], torch.zeros(2, 4).double()
    assert torch.equal(read, left[:, None, None].expand_as(read))


def test_the_norm_of_a_receiver_that_is_cut_from_everything_leaves_its_bias():
    values = weights(SMALL, TASK)
    seen = seen_with(SMALL, values, PathPatch(["embed", "0:0", "0:1"], ["1:1.k"]))
    keys = torch.einsum("md,mdf->mf", values["blocks.1.ln1.b"], values["blocks.1.attn.W_QKV"])[:, 12:16]
    torch.testing.assert_close(
        seen["blocks.1.attn.hook_k"][:, :, :, 1], keys[:, None, None].expand(2, 4, 5, 4), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("model", [LINEAR, SMALL, FULL], ids=["linear", "norm", "deep"])
def test_a_head_cut_from_everything_that_reads_it_is_an_ablated_head(model):
    values = weights(model, TASK)
    later = [name for name in all_names(model)[1] if depth(name, model.layers) > 0]
    cut = seen_with(model, values, PathPatch(["0:1"], later))["hook_logits"]
    ablated = seen_with(model, values, Ablate(heads=["0:1"]))["hook_logits"]
    torch.testing.assert_close(cut, ablated, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(cut, seen_with(model, values)["hook_logits"])


def test_plain_changes_nothing_where_nothing_else_acts():
    values = weights(FULL, TASK)
    held = seen_with(FULL, values, PathPatch(["embed", "0:1", "0:mlp"], ["1:0.k", "1:mlp", "logits"], "plain"))
    torch.testing.assert_close(held, seen_with(FULL, values), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("by", ["zero", "mean"])
def test_plain_beside_an_ablation_of_the_sender_restores_that_receiver_alone(by):
    values, ablation = weights(SMALL, TASK), Ablate(heads=["0:1"], value=by)
    plain, lost = seen_with(SMALL, values), seen_with(SMALL, values, ablation)
    held = seen_with(SMALL, values, ablation, PathPatch(["0:1"], ["1:0.k"], "plain"))
    torch.testing.assert_close(
        held["blocks.1.attn.hook_k"][:, :, :, 0], plain["blocks.1.attn.hook_k"][:, :, :, 0], rtol=1e-11, atol=1e-12
    )
    assert torch.equal(held["blocks.1.attn.hook_k"][:, :, :, 1], lost["blocks.1.attn.hook_k"][:, :, :, 1])
    for name in ("blocks.1.hook_resid_pre", "blocks.1.attn.hook_q", "blocks.1.attn.hook_v"):
        assert torch.equal(held[name], lost[name]) and not torch.allclose(held[name], plain[name])


@pytest.mark.parametrize("by", ["zero", "mean", "resample"])
def test_everything_but_the_receiver_and_what_follows_it_is_untouched_to_the_last_bit(by):
    values = weights(FULL, TASK)
    plain = seen_with(FULL, values)
    held = seen_with(FULL, values, PathPatch(["0:1", "0:mlp"], ["1:0.k"], by))
    keys = "blocks.1.attn.hook_k"
    # queries, keys and values are computed together, so the values come after the keys and are not changed by them
    before = [*list(plain)[: list(plain).index(keys)], "blocks.1.attn.hook_v", "blocks.1.attn.hook_rot_q"]
    assert "blocks.1.hook_resid_pre" in before and all(torch.equal(held[name], plain[name]) for name in before)
    assert torch.equal(held[keys][:, :, :, 1], plain[keys][:, :, :, 1])
    assert not torch.allclose(held[keys][:, :, :, 0], plain[keys][:, :, :, 0])
    answered = seen_with(FULL, values, PathPatch(["0:1"], ["logits"], by))
    assert [name for name in plain if not torch.equal(answered[name], plain[name])] == ["hook_logits"]


def test_heads_that_are_not_replaced_write_what_they_wrote():
    generator = torch.Generator().manual_seed(0)
    z, new = torch.randn(2, 2, 3, 5, 4, 2, generator=generator).unbind()
    weight = torch.randn(2, 8, 8, generator=generator)
    found = written(z, new, weight.unflatten(1, (4, 2)), (1, 3), constant=True)
    expected = sum(
        torch.einsum("mble,med->mbld", (new if h in (1, 3) else z)[:, :, :, h], weight[:, 2 * h : 2 * h + 2])
        for h in range(4)
    )
    torch.testing.assert_close(found, expected)


# ---- gradient --------------------------------------------------------------------------------------------------------


def loss_of(logits):
    """Some smooth function of the logits."""
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits) + logits.square()).sum()


def gradients(model, values, *writers):
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    loss = loss_of(seen_with(model, leaves, *writers)["hook_logits"])
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("value", ["zero", "mean", "resample", "plain", "plain, detached"])
@pytest.mark.parametrize("model", [SMALL, FULL], ids=["small", "deep"])
def test_gradient_is_the_finite_difference_with_what_replaces_a_path_held_constant(model, value):
    by, detach = value.split(",")[0], value.endswith("detached")
    senders = ["embed", "0:1"] if model is SMALL else ["embed", "0:1", "0:mlp"]
    receivers = ["1:0.k", "1:1.v", "logits"] if model is SMALL else ["1:0.q", "1:mlp", "logits"]
    paths = {(sender, receiver) for sender in senders for receiver in receivers}
    values, step = weights(model, TASK), 1e-5
    found = gradients(model, values, PathPatch(senders, receivers, by, detach))
    constants = []
    for member in range(2):
        p, terms = numbers(values, member), added_first(model, values, member)
        constants.append(replacements(model, p, terms, paths, by, member))

    def loss(moved):
        logits = []
        for member in range(2):
            p, terms, instead = numbers(moved, member), added_first(model, moved, member), constants[member]
            if value == "plain":
                instead = replacements(model, p, terms, paths, by, member)
            logits.append(slow(model, p, terms, paths, instead)[0])
        return loss_of(torch.from_numpy(np.stack(logits)))

    way = {n: torch.linspace(-1, 1, v.numel(), dtype=torch.float64).view_as(v).sin() for n, v in values.items()}
    ends = [loss({n: v + sign * step * way[n] for n, v in values.items()}) for sign in (1, -1)]
    slope = sum((found[name] * way[name]).sum() for name in found)
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("by", ["zero", "mean", "resample"])
@pytest.mark.parametrize("model", [SMALL, FULL], ids=["small", "deep"])
def test_a_head_whose_every_path_is_cut_gets_exactly_no_gradient(model, by):
    later = [name for name in all_names(model)[1] if depth(name, model.layers) > 0]
    found = gradients(model, weights(model, TASK), PathPatch(["0:1"], later, by))
    out = found["blocks.0.attn.W_O"]
    assert (out[:, 4:] == 0).all() and (out[:, :4] != 0).all()
    parts = found["blocks.0.attn.W_QKV"].unflatten(-1, (3, 2, 4))  # queries, keys and values by head
    assert (parts[..., 1, :] == 0).all() and (parts[..., 0, :] != 0).any()


@pytest.mark.parametrize("by", ["zero", "mean", "resample"])
def test_an_mlp_whose_every_path_is_cut_gets_exactly_no_gradient(by):
    later = [name for name in all_names(FULL)[1] if depth(name, FULL.layers) > 1]
    found = gradients(FULL, weights(FULL, TASK), PathPatch(["0:mlp"], later, by))
    assert all((found[f"blocks.0.mlp.{name}"] == 0).all() for name in ("W_in", "b_in", "W_out", "b_out"))
    assert (found["blocks.1.mlp.W_out"] != 0).any() and (found["blocks.0.attn.W_O"] != 0).any()


def test_gradient_reaches_an_ablated_sender_through_plain_unless_it_is_detached():
    values, ablation = weights(SMALL, TASK), Ablate(heads=["0:1"])
    for detach in (False, True):
        found = gradients(SMALL, values, ablation, PathPatch(["0:1"], ["1:0.k"], "plain", detach))
        assert (found["blocks.0.attn.W_O"][:, 4:] == 0).all() == detach


# ---- names -----------------------------------------------------------------------------------------------------------

ATTENTION = "with layer 0 to 1 and head 0 to 1; this model has no MLP"
WITH_MLP = "with layer 0 to 2 and head 0 to 1"


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        (SMALL, "0:2", f"embed, layer:head or layer:mlp, {ATTENTION}"),
        (SMALL, "2:0", f"embed, layer:head or layer:mlp, {ATTENTION}"),
        (SMALL, "0:mlp", f"embed, layer:head or layer:mlp, {ATTENTION}"),
        (SMALL, "pos_embed", f"embed, layer:head or layer:mlp, {ATTENTION}"),
        (FULL, "3:mlp", f"embed, pos_embed, layer:head or layer:mlp, {WITH_MLP}"),
        (FULL, "mlp", f"embed, pos_embed, layer:head or layer:mlp, {WITH_MLP}"),
        (FULL, "logits", f"embed, pos_embed, layer:head or layer:mlp, {WITH_MLP}"),
        (FULL, 2, f"embed, pos_embed, layer:head or layer:mlp, {WITH_MLP}"),
        (FULL, "0:1.q", "a sender, which has no .q: 0:1"),
    ],
)
def test_a_sender_that_the_model_lacks_is_refused(model, name, expected):
    with pytest.raises(ConfigError) as refused:
        read_sender(name, "PathPatch.senders", model.sites(TASK))
    assert (refused.value.field, refused.value.value) == ("PathPatch.senders", name)
    assert str(refused.value).endswith(f"expected {expected}")


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        (SMALL, "1:2.k", f"logits, layer:head.q, .k or .v, or layer:mlp, {ATTENTION}"),
        (SMALL, "2:0.k", f"logits, layer:head.q, .k or .v, or layer:mlp, {ATTENTION}"),
        (SMALL, "1:mlp", f"logits, layer:head.q, .k or .v, or layer:mlp, {ATTENTION}"),
        (FULL, "1:0.z", f"logits, layer:head.q, .k or .v, or layer:mlp, {WITH_MLP}"),
        (FULL, "1:mlp.q", f"logits, layer:head.q, .k or .v, or layer:mlp, {WITH_MLP}"),
        (FULL, "embed", f"logits, layer:head.q, .k or .v, or layer:mlp, {WITH_MLP}"),
        (FULL, "1:0", "which input of the head: 1:0.q, 1:0.k or 1:0.v"),
    ],
)
def test_a_receiver_that_the_model_lacks_is_refused(model, name, expected):
    with pytest.raises(ConfigError) as refused:
        read_receiver(name, "PathPatch.receivers", model.sites(TASK))
    assert (refused.value.field, refused.value.value) == ("PathPatch.receivers", name)
    assert str(refused.value).endswith(f"expected {expected}")
