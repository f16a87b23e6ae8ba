"""Claims about AttentionSinks and ActivationSparsity: planted neurons are counted, and training does not notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opsin.callbacks import Ablate, ActivationSparsity, AttentionSinks, InductionHeads
from opsin.errors import ConfigError
from opsin.metrics.activity import by_tokens
from opsin.metrics.heads import attention_sink
from opsin.model.transformer import Transformer
from opsin.training.module import OpsinModule
from opsin.training.observers import recorded_metrics
from tests.helpers.killers import SaveAt
from tests.helpers.toys import ToyTokens, few_shot, train

SHAPE = Transformer(layers=2, width=8, heads=2, mlp_ratio=1)
POST = "blocks.1.mlp.hook_post"


def module(task=None, seed=1, transformer=SHAPE, **settings) -> OpsinModule:
    small = {"steps_per_batch": 5, "log_every": 5, "probe_size": 32, "learning_rate": 0.01, "compile": False}
    return OpsinModule(task or ToyTokens(), transformer, seed, **{**small, **settings})


def last(model, metric):
    return model.history[metric].arrays()[1][-1]


def activations(model, change=lambda name, x: x):
    """Activations on the probe, by a plain pass of the current weights."""
    seen = {}

    def tap(name, x):
        seen[name] = change(name, x)
        return seen[name]

    with torch.no_grad():
        model.network.forward(model.parameters_by_name(), model.constants.table, model.probe, tap)
    return seen


def test_attention_sinks_are_those_of_every_pattern_on_the_probe():
    model = train(module(seed=[1, 2]), 10, AttentionSinks(every=5, effect_every=None))
    seen = activations(model)
    for layer in range(2):
        expected = attention_sink(seen[f"blocks.{layer}.attn.hook_pattern"])
        np.testing.assert_allclose(last(model, "attention_sink")[:, layer], expected, atol=1e-6)
    assert list(model.history["attention_sink"].steps) == [0, 5, 10] and "attention_sink_effect" not in model.history


def test_the_effect_of_a_sink_is_what_a_pattern_overwritten_by_hand_does_to_the_last_neurons():
    model = train(module(seed=[1, 2]), 5, AttentionSinks(effect_every=5))
    plain, found = activations(model)[POST], last(model, "attention_sink_effect")
    assert found.shape == (2, 2, 2) and (found > 0).all()
    for layer in range(2):
        for head in range(2):

            def forced(name, x, layer=layer, head=head):
                if name == f"blocks.{layer}.attn.hook_pattern":
                    x = x.clone()
                    x[:, :, head] = torch.eye(6)[torch.zeros(6, dtype=torch.int64)]
                return x

            moved = (activations(model, forced)[POST] - plain)[:, :, 1:].abs().mean((1, 2, 3))
            np.testing.assert_allclose(found[:, layer, head], moved, rtol=1e-4, atol=1e-7)


def test_a_head_that_writes_nothing_has_no_effect_wherever_it_looks():
    model = train(module(), 5, AttentionSinks(effect_every=5), Ablate(heads=["0:1"]))
    effect = last(model, "attention_sink_effect")[0]
    assert effect[0, 1] == 0 and (np.delete(effect.flatten(), 1) > 0).all()


def plant(model):
    """In layer 0, neuron 0 dead, neuron 1 always on; in layer 1 all on."""
    with torch.no_grad():
        parameters = model.parameters_by_name()
        parameters["blocks.0.mlp.b_in"][:, 0], parameters["blocks.0.mlp.b_in"][:, 1] = -1e3, 1e3
        parameters["blocks.1.mlp.b_in"][:] = 1e3
    return model


def test_planted_neurons_are_counted_in_their_layer():
    model = train(plant(module(seed=[1, 2], learning_rate=1e-5)), 5, ActivationSparsity(kinds=["dead", "always_on"]))
    others = (activations(model)["blocks.0.mlp.hook_pre"] > 0)[..., 2:].flatten(1, 2)
    assert last(model, "neurons/1/always_on").tolist() == [8, 8] and last(model, "neurons/1/dead").tolist() == [0, 0]
    expected = 1 + (~others.any(1)).sum(1)
    assert last(model, "neurons/0/dead").tolist() == expected.tolist()
    assert last(model, "neurons/0/always_on").tolist() == (1 + others.all(1).sum(1)).tolist()


def test_neurons_that_see_the_current_token_alone_are_all_told_by_it():
    # rotary positions act in attention alone, so nothing but the token is left
    ablated = Ablate(sites=["blocks.0.hook_attn_out"])
    model = train(module(), 5, ActivationSparsity(explained=0.99), ablated)
    counts = {
        kind: last(model, f"neurons/0/{kind}").item() for kind in ("dead", "always_on", "current_token", "bigram")
    }
    assert counts["current_token"] == 8 - counts["dead"] - counts["always_on"] == counts["bigram"] > 0
    assert last(model, "neurons/0/positional") == last(model, "neurons/0/previous_token") == 0


def test_the_token_before_is_that_of_the_row_before():
    model = train(module(), 5, ActivationSparsity(explained=0.1))
    for layer in range(2):
        active = activations(model)[f"blocks.{layer}.mlp.hook_pre"] > 0
        shifted = model.probe.tokens.roll(1, -1)
        share = by_tokens(active[:, :, 1:], shifted[..., 1:], 0)
        assert last(model, f"neurons/{layer}/previous_token") == (share > 0.1).sum()


def readers():
    return [AttentionSinks(every=3, effect_every=10), ActivationSparsity(every=4), InductionHeads(every=5)]


def test_a_resumed_run_records_what_an_uninterrupted_one_does(tmp_path):
    saved = tmp_path / "middle.ckpt"
    whole = train(module(seed=[1, 2]), 20, *readers(), SaveAt(10, saved))
    resumed = train(module(seed=[1, 2]), 20, *readers(), resume=str(saved))
    assert whole.history.names() == resumed.history.names()
    for name in whole.history.names():
        for one, other in zip(whole.history[name].arrays(), resumed.history[name].arrays(), strict=True):
            assert np.array_equal(one, other)
    steps = {name: list(whole.history[name].steps) for name in ("attention_sink", "attention_sink_effect")}
    assert steps == {"attention_sink": [0, 3, 6, 9, 12, 15, 18, 20], "attention_sink_effect": [0, 10, 20]}


def test_they_say_which_metrics_they_record():
    model, attached = module(), readers()
    train(model, 5, *attached)
    said = recorded_metrics(attached, model.sites, model.task, validates=False)
    assert {name: model.history.axes(name) for name in model.history.names()} == said
    shapes = {name: model.history[name].values[0].shape[1:] for name in model.history.names()}
    assert shapes == {name: tuple(axes.values()) for name, axes in said.items()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionSinks(every=0), r"AttentionSinks.every: got 0"),
        (lambda: AttentionSinks(effect_every=0), r"AttentionSinks.effect_every: got 0"),
        (lambda: ActivationSparsity(every=0), r"ActivationSparsity.every: got 0"),
        (lambda: ActivationSparsity(kinds=[]), r"ActivationSparsity.kinds: got \[\]"),
        (lambda: ActivationSparsity(kinds=["lazy"]), r"ActivationSparsity.kinds: got 'lazy'"),
        (lambda: ActivationSparsity(explained=1.0), r"ActivationSparsity.explained: got 1.0"),
        (
            lambda: train(module(transformer=Transformer(width=8, heads=2)), 1, AttentionSinks()),
            r"AttentionSinks.effect_every: got 1000, expected null: this model has no MLP",
        ),
        (
            lambda: train(module(transformer=Transformer(width=8, heads=2)), 1, ActivationSparsity()),
            r"ActivationSparsity: got 'a model without MLPs'",
        ),
        (
            lambda: train(module(few_shot()), 1, ActivationSparsity()),
            r"ActivationSparsity.kinds: got \['current_token', 'previous_token', 'bigram'\], expected any of dead",
        ),
    ],
)
def test_what_cannot_be_watched_is_refused_in_one_line(make, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make()
