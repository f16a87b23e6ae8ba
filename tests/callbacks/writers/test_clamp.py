"""Claims about the writers: what they silence and hold, on models whose answer is known."""

import math

import pytest
import torch

from opsin.callbacks.writers.ablate import Ablate
from opsin.callbacks.writers.clamp import Clamp
from opsin.callbacks.writers.disallow import Disallow
from opsin.callbacks.writers.head_temperature import HeadTemperature
from opsin.errors import ConfigError
from opsin.model.transformer import Transformer
from tests.helpers.toys import SMALL, batch_of, few_shot, hand_batch, plan_of, run, tap_of, weights

# width 8, two heads of 4: both heads read which of four labels a token is; the first writes it to the
# outputs once, the second ten times. Queries and keys are 0, so attention is even over what is past.
COPIER = Transformer(layers=1, width=8, heads=2, norm=False)
FOUR = few_shot(n_labels=4)
CONTEXT = hand_batch(classes=[[0, 1, 0], [0, 1, 1]], labels=[[2, 3], [1, 0]], answers=[2, 0])


def copier():
    """Weights of the copier, M = 1."""
    values = {name: torch.zeros_like(value) for name, value in weights(COPIER, FOUR, [0]).items()}
    identity = torch.eye(4, dtype=torch.float64)
    values["embed.W_E"][0, :, :4] = identity
    values["blocks.0.attn.W_QKV"][0, :4, 16:20] = values["blocks.0.attn.W_QKV"][0, :4, 20:24] = identity
    values["blocks.0.attn.W_O"][0, :4, 4:], values["blocks.0.attn.W_O"][0, 4:, 4:] = identity, 10 * identity
    values["unembed.W_U"][0, 4:] = identity
    return values


def copied(*writers, gate=1.0):
    """The copier's logits at the query of each sequence."""
    tap = tap_of(COPIER, FOUR, CONTEXT, *writers, gate=gate, members=1)
    return run(COPIER, copier(), CONTEXT, tap)[0][0, :, 4]


def expect(logits, first, second):
    """Logits of both sequences; labels 2, 3 stand in the first context, 1, 0 in the second."""
    assert (logits - torch.tensor([first, second], dtype=torch.float64)).abs().max() < 1e-12


def test_an_unclamped_copier_spreads_over_both_labels():
    expect(copied(), [0, 0, 2.2, 2.2], [2.2, 2.2, 0, 0])


def test_an_induction_clamp_makes_a_head_copy_the_right_label():
    expect(copied(Clamp(heads=["0:0"], pattern="induction")), [0, 0, 3, 2], [3, 2, 0, 0])
    expect(
        copied(Clamp(heads=["0:0", "0:1"], pattern="induction", strength=0.75)), [0, 0, 8.25, 2.75], [8.25, 2.75, 0, 0]
    )


def test_a_match_clamp_copies_the_label_of_the_same_input():
    expect(copied(Clamp(heads=["0:1"], pattern="match")), [0, 0, 10.2, 0.2], [10.2, 0.2, 0, 0])
    soft = math.exp(2) / (math.exp(2) + 1)  # cosines 1 and 0 at temperature 1/2
    labels = [10 * soft + 0.2, 10 * (1 - soft) + 0.2]
    expect(copied(Clamp(heads=["0:1"], pattern="match", temperature=0.5)), [0, 0, *labels], [*labels, 0, 0])


def test_a_previous_token_clamp_shows_the_query_the_label_before_it():
    expect(copied(Clamp(heads=["0:0"], pattern="previous_token")), [0, 0, 2, 3], [3, 2, 0, 0])
    labels_only = Clamp(heads=["0:0"], pattern="previous_token", labels_only=True)
    expect(copied(labels_only), [0, 0, 2.2, 2.2], [2.2, 2.2, 0, 0])


def test_silencing_a_head_leaves_what_the_other_writes():
    expect(copied(Ablate(heads=["0:1"])), [0, 0, 0.2, 0.2], [0.2, 0.2, 0, 0])
    expect(copied(Ablate(heads=["0:0"]), gate=0.5), [0, 0, 2.1, 2.1], [2.1, 2.1, 0, 0])


def test_the_mean_of_a_head_is_over_the_batch():
    expect(copied(Ablate(heads=["0:1"], value="mean")), [1, 1, 1.2, 1.2], [1.2, 1.2, 1, 1])


def test_values_can_be_silenced_at_some_positions():
    expect(copied(Ablate(heads=["0:1"], positions=[1])), [0, 0, 0.2, 2.2], [2.2, 0.2, 0, 0])


def test_resampling_a_head_of_two_sequences_swaps_what_it_read():
    expect(copied(Ablate(heads=["0:1"], value="resample")), [2, 2, 0.2, 0.2], [0.2, 0.2, 2, 2])


def test_silencing_the_embedding_leaves_the_bias():
    expect(copied(Ablate(sites=["hook_embed"])), [0] * 4, [0] * 4)


def test_a_site_is_held_at_its_number():
    expect(copied(Clamp(site="blocks.0.hook_attn_out", value=0.5)), [0.5] * 4, [0.5] * 4)
    expect(copied(Clamp(site="blocks.0.attn.hook_v", value=1.0, heads=["0:0"])), [1, 1, 3, 3], [3, 3, 1, 1])


def test_a_silent_head_is_a_head_without_value_weights(tiny_task):
    values, batch = weights(SMALL, tiny_task), batch_of(tiny_task, dtype=torch.float64)
    without = values | {"blocks.1.attn.W_QKV": values["blocks.1.attn.W_QKV"].clone()}
    without["blocks.1.attn.W_QKV"][:, :, 20:24] = 0
    logits = run(SMALL, values, batch, tap_of(SMALL, tiny_task, batch, Ablate(heads=["1:1"])))[0]
    assert (logits - run(SMALL, without, batch)[0]).abs().max() < 1e-14


@pytest.mark.parametrize("norm", [True, False])
def test_silent_neurons_are_neurons_without_output_weights(tiny_task, norm):
    model = Transformer(layers=2, width=8, heads=2, mlp_ratio=0.5, norm=norm)
    values, batch = weights(model, tiny_task), batch_of(tiny_task, dtype=torch.float64)
    without = values | {"blocks.0.mlp.W_out": values["blocks.0.mlp.W_out"].clone()}
    without["blocks.0.mlp.W_out"][:, [0, 3]] = 0
    logits = run(model, values, batch, tap_of(model, tiny_task, batch, Ablate(neurons=["0:0", "0:3"])))[0]
    assert (logits - run(model, without, batch)[0]).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("writer", "site", "entries", "value"),
    [
        (Ablate(heads=["0:1"], members=[1]), "blocks.0.attn.hook_v", (1, ..., 1, slice(None)), 0.0),
        (Ablate(sites=["blocks.1.mlp.hook_post"]), "blocks.1.mlp.hook_post", (...,), 0.0),
        (
            Clamp(site="blocks.0.hook_resid_post", value=2, positions=[1, 3]),
            "blocks.0.hook_resid_post",
            (..., [1, 3], slice(None)),
            2,
        ),
        (Clamp(neurons=["1:2"], value=-1, at="pre"), "blocks.1.mlp.hook_pre", (..., 2), -1.0),
        (
            Clamp(site="blocks.1.attn.hook_attn_scores", value=3, heads=["1:0"]),
            "blocks.1.attn.hook_attn_scores",
            (slice(None), slice(None), 0),
            3.0,
        ),
        (Clamp(site="ln_final.hook_scale", value=2), "ln_final.hook_scale", (...,), 2.0),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_a_writer_is_the_same_as_overwriting_by_hand(tiny_task, writer, site, entries, value):
    model = Transformer(layers=2, width=8, heads=2, mlp_ratio=0.5)
    values, batch = weights(model, tiny_task), batch_of(tiny_task, dtype=torch.float64)

    def by_hand(name, activation):
        if name == site:
            activation = activation.clone()
            activation[entries] = value
        return activation

    logits, seen = run(model, values, batch, tap_of(model, tiny_task, batch, writer))
    expected, wanted = run(model, values, batch, by_hand)
    assert torch.equal(logits, expected)
    assert torch.equal(seen[site], wanted[site])
    assert not torch.equal(expected, run(model, values, batch)[0])


def test_a_mean_over_the_batch_keeps_members_and_positions_apart(tiny_task):
    values, batch = weights(SMALL, tiny_task), batch_of(tiny_task, dtype=torch.float64)
    name = "blocks.0.hook_resid_post"
    plain = run(SMALL, values, batch)[1][name]
    seen = run(SMALL, values, batch, tap_of(SMALL, tiny_task, batch, Ablate(sites=[name], value="mean")))[1][name]
    for b in range(4):
        assert torch.equal(seen[:, b], plain.mean(1))


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Ablate(), "Ablate"),
        (lambda: Ablate(heads=[]), "Ablate"),
        (lambda: Ablate(heads=["0:0"], value="max"), "Ablate.value"),
        (lambda: Clamp(heads=["0:0"]), "Clamp"),
        (lambda: Clamp(heads=["0:0"], pattern="match", site="hook_embed"), "Clamp"),
        (lambda: Clamp(pattern="match"), "Clamp.heads"),
        (lambda: Clamp(pattern="match", heads=[]), "Clamp.heads"),
        (lambda: Clamp(heads=["0:0"], pattern="copy"), "Clamp.pattern"),
        (lambda: Clamp(heads=["0:0"], pattern="induction", strength=1.5), "Clamp.strength"),
        (lambda: Clamp(heads=["0:0"], pattern="match", temperature=-1.0), "Clamp.temperature"),
        (lambda: Clamp(site="hook_embed"), "Clamp.value"),
    ],
)
def test_an_argument_that_cannot_work_is_refused_when_it_is_given(make, field):
    with pytest.raises(ConfigError) as refused:
        make()
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"heads": ["0:0"], "pattern": "induction", "value": 0.5}, "value"),
        ({"heads": ["0:0"], "pattern": "match", "strength": 0.5}, "strength"),
        ({"heads": ["0:0"], "pattern": "induction", "temperature": 0.5}, "temperature"),
        ({"heads": ["0:0"], "pattern": "induction", "labels_only": True}, "labels_only"),
        ({"site": "hook_embed", "value": 1.0, "strength": 0.5}, "strength"),
        ({"site": "hook_embed", "value": float("nan")}, "value"),
        ({"site": "hook_embed", "value": float("-inf")}, "value"),
    ],
)
def test_an_argument_without_effect_is_refused(settings, field):
    with pytest.raises(ConfigError, match=rf"Clamp\.{field}"):
        Clamp(**settings)


@pytest.mark.parametrize(
    ("writer", "field"),
    [
        (Clamp(heads=["0:2"], pattern="match"), "Clamp.heads"),
        (Clamp(heads=["1:0"], site="blocks.0.attn.hook_z", value=1.0), "Clamp.heads"),
        (Clamp(heads=["0:0", "1:0"], site="blocks.0.attn.hook_z", value=1.0), "Clamp.heads"),
        (Clamp(heads=[], site="blocks.0.attn.hook_z", value=1.0), "Clamp.heads"),
        (Clamp(heads=["0:0"], site="hook_embed", value=1.0), "Clamp.heads"),
        (Clamp(heads=["0:0"], site="blocks.0.hook_attn_out", value=1.0), "Clamp.heads"),
        (Clamp(site="blocks.0.mlp.hook_post", value=1.0), "Clamp.site"),
        (Clamp(site="hook_embed", value=1.0, positions=[7]), "Clamp.positions"),
        (Clamp(heads=["0:0"], pattern="match", members=[2]), "Clamp.members"),
        (Ablate(heads=["2:0"]), "Ablate.heads"),
        (Ablate(neurons=["0:0"]), "Ablate.neurons"),
        (Ablate(sites=["hook_embedding"]), "Ablate.sites"),
        (Ablate(sites=["hook_embed"], positions=[]), "Ablate.positions"),
    ],
)
def test_a_clamp_on_what_is_missing_stops_the_build(tiny_task, writer, field):
    with pytest.raises(ConfigError) as refused:
        plan_of(SMALL, tiny_task, writer)
    assert refused.value.field == field


def patterns_under(task, writer):
    """Attention of both heads of layer 0 with and without the writer, of member 0."""
    batch, values = batch_of(task, dtype=torch.float64), weights(SMALL, task)
    name = "blocks.0.attn.hook_pattern"
    with_it = run(SMALL, values, batch, tap_of(SMALL, task, batch, writer))[1][name][0]
    return with_it, run(SMALL, values, batch)[1][name][0]


@pytest.mark.parametrize(("labels_only", "rows"), [(False, [1, 2, 3, 4]), (True, [1, 3])])
def test_a_head_that_may_not_look_back_shares_the_rest_among_the_other_keys(tiny_task, labels_only, rows):
    after, before = patterns_under(tiny_task, Disallow(["0:1"], "previous_token", labels_only=labels_only))
    assert torch.equal(after[:, 0], before[:, 0])
    for row in range(5):
        if row not in rows:
            assert torch.equal(after[:, 1, row], before[:, 1, row])
            continue
        kept = before[:, 1, row].clone()
        kept[:, row - 1] = 0
        torch.testing.assert_close(after[:, 1, row], kept / kept.sum(-1, keepdim=True))


def test_a_head_silenced_on_what_is_no_label_divides_the_query_row_among_labels(tiny_task):
    after, before = patterns_under(tiny_task, Disallow(["0:0"], "non_labels"))
    assert torch.equal(after[:, 0, :4], before[:, 0, :4]) and torch.equal(after[:, 1], before[:, 1])
    labels = before[:, 0, 4] * torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(after[:, 0, 4], labels / labels.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Disallow(["0:0"], "next_token"), "Disallow.attention"),
        (lambda: Disallow(["0:0"], "non_labels", labels_only=True), "Disallow.labels_only"),
        (lambda: Disallow([], "non_labels").interventions(SMALL.sites(few_shot())), "Disallow.heads"),
        (lambda: Disallow(["0:9"], "non_labels").interventions(SMALL.sites(few_shot())), "Disallow.heads"),
    ],
)
def test_a_disallow_that_cannot_work_is_refused(make, field):
    with pytest.raises(ConfigError) as refused:
        make()
    assert refused.value.field == field


@pytest.mark.parametrize("writer", [Disallow(["0:0"], "previous_token"), HeadTemperature({"0:0": 0.5})])
def test_what_changes_the_scores_before_the_softmax_is_refused_where_attention_is_linear(writer):
    linear = Transformer(layers=1, width=8, heads=2, attention="linear", scale_scores=False)
    with pytest.raises(ConfigError, match=r"blocks\.0\.attn\.hook_attn_scores.*a site of this model"):
        plan_of(linear, FOUR, writer)
