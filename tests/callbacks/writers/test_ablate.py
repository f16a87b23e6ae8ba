"""Claims about what takes the place of silenced heads, neurons and sites: zero, the mean, another example, noise."""

import math
from dataclasses import replace

import pytest
import torch

from opsin.callbacks import Ablate, Clamp
from opsin.errors import ConfigError, IdleError
from opsin.interventions.apply import run_passes
from opsin.interventions.values.noise import another_example, salt_of
from opsin.interventions.values.plain import Noise, Resample
from opsin.model.transformer import Transformer
from opsin.reports.sites import sites_report
from opsin.training.compiling import compile_step, has_compiler
from opsin.training.module import OpsinModule
from tests.helpers.toys import SMALL, Training, batch_of, few_shot, inputs_of, losses, plan_of, run, train, weights

TASK = few_shot()
MODEL = Transformer(layers=2, width=8, heads=2, mlp_ratio=0.5)
BATCH = batch_of(TASK, dtype=torch.float64)
WEIGHTS = weights(MODEL, TASK)
VALUES = ["zero", "mean", "overall_mean", "resample", "noise"]
PRE, POST, RESID = "blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_post", "blocks.0.hook_resid_post"
V, Z = "blocks.0.attn.hook_v", "blocks.0.attn.hook_z"


def seen_with(*writers, step=0, values=WEIGHTS):
    """All activations under these writers at this step of seeds 0 and 1."""
    return run(MODEL, values, BATCH, tap_at(step, *writers))[1]


def tap_at(step, *writers):
    plan = plan_of(MODEL, TASK, *writers)
    inputs = inputs_of(plan, MODEL, WEIGHTS, BATCH)
    return run_passes(plan, replace(inputs, clock=torch.tensor([[0, step], [1, step]])))


PLAIN = seen_with()


def gelu(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# ---- the values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(5))
def test_a_resampled_site_is_the_batch_rolled_and_never_by_nothing(step):
    seen = seen_with(Ablate(sites=[RESID], value="resample"), step=step)[RESID]
    for member in range(2):
        rolls = [n for n in range(4) if torch.equal(seen[member], PLAIN[RESID][member].roll(-n, 0))]
        assert len(rolls) == 1 and rolls != [0]


def test_all_that_is_resampled_in_one_step_comes_from_one_example():
    clock = torch.tensor([[0, 3], [1, 3]])
    sources = another_example(clock, 4)
    assert sources.unique(dim=0).shape[0] == 2, "the two members look at different ones"
    seen = seen_with(Ablate(heads=["0:1"], value="resample"), step=3)[Z]
    later = Resample()(PLAIN["hook_logits"], BATCH, clock).value
    for member in range(2):
        for example in range(4):
            assert torch.equal(seen[member, example, :, 1], PLAIN[Z][member, sources[member, example], :, 1])
            assert torch.equal(later[member, example], PLAIN["hook_logits"][member, sources[member, example]])


def test_the_mean_leaves_no_variance_over_the_batch():
    seen = seen_with(Ablate(neurons=["0:0", "0:3"], value="mean", at="pre"))
    assert (seen[PRE][..., [0, 3]].std(1) == 0).all() and (seen[POST][..., [0, 3]].std(1) == 0).all()
    assert (seen[PRE][..., [1, 2]].std(1) > 0).all()


def test_the_overall_mean_is_one_number_a_neuron_and_member():
    seen = seen_with(Ablate(neurons=["0:0", "0:3"], value="overall_mean"))[POST]
    for member in range(2):
        for neuron in (0, 3):
            values = PLAIN[POST][member, ..., neuron]
            assert values.std(0).max() > 0 and values.mean(0).std() > 0
            assert (seen[member, ..., neuron] == seen[member, 0, 0, neuron]).all()
            assert seen[member, 0, 0, neuron].item() == pytest.approx(sum(values.flatten().tolist()) / values.numel())
    assert torch.equal(seen[..., [1, 2]], PLAIN[POST][..., [1, 2]])


def test_noise_has_mean_and_standard_deviation_of_the_batch():
    steps = 20_000
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(1, 4, 2, 3, dtype=torch.float64, generator=generator)
    # a member for every step
    clock = torch.stack([torch.full((steps,), 5), torch.arange(steps)], 1)
    drawn = Noise(1)(x.expand(steps, -1, -1, -1), BATCH, clock).value.flatten(0, 1)
    mean, spread = x[0].mean(0), (x[0] - x[0].mean(0)).square().mean(0).sqrt()
    n = 4 * steps
    assert ((drawn.mean(0) - mean).abs() < 4 * spread / n**0.5).all()
    assert ((drawn.std(0) / spread - 1).abs() < 4 / (2 * n) ** 0.5).all()


def test_noise_differs_between_steps_members_sites_and_examples_and_is_the_same_when_asked_again():
    silence = Ablate(heads=["0:0", "1:0"], value="noise")
    first, again, next_step = (seen_with(silence, step=step) for step in (0, 0, 1))
    assert torch.equal(first[Z], again[Z])

    def normals(seen, site):
        part = seen[site][:, :, :, 0]
        # what is over the batch and not in the noise cancels
        return (part - part.mean(1, keepdim=True)) / PLAIN[site][:, :, :, 0].std(1, keepdim=True)

    a, b = normals(first, Z), normals(next_step, Z)
    assert not torch.isclose(a, b).any() and not torch.isclose(a[0], a[1]).any()
    assert not torch.isclose(a[:, 0], a[:, 1]).any()
    clock = torch.tensor([[0, 0], [1, 0]])
    layer_0, layer_1 = (Noise(salt_of(site))(PLAIN[Z], BATCH, clock).value for site in (Z, "blocks.1.attn.hook_z"))
    assert not torch.isclose(layer_0, layer_1).any()


# ---- where they act -------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "site"), [("zero", V), *((value, Z) for value in VALUES[1:])])
def test_zero_takes_a_heads_values_and_the_others_what_it_read(value, site):
    (item,) = Ablate(heads=["0:1"], value=value).interventions(MODEL.sites(TASK))
    assert item.site == site
    seen = seen_with(Ablate(heads=["0:1"], value=value))
    changed = (seen[site] != PLAIN[site]).any(-1)
    # two examples that begin alike read alike
    assert not changed[:, :, :, 0].any() and changed[:, :, 1:, 1].all()
    assert torch.equal(seen["blocks.0.attn.hook_pattern"], PLAIN["blocks.0.attn.hook_pattern"])


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("at", "site"), [(None, POST), ("post", POST), ("pre", PRE)])
def test_only_the_named_neurons_positions_and_members_are_silenced(value, at, site):
    writer = Ablate(neurons=["0:1", "0:2"], value=value, at=at, positions=[1, 4], members=[1])
    changed = seen_with(writer)[site] != PLAIN[site]
    expected = torch.zeros_like(changed)
    for position in (1, 4):
        expected[1, :, position, 1:3] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("value", VALUES)
def test_silencing_some_positions_puts_there_what_silencing_all_would(value):
    at_one, everywhere = (seen_with(Ablate(sites=[RESID], value=value, positions=at))[RESID] for at in ([2], None))
    assert torch.equal(at_one[:, :, 2], everywhere[:, :, 2])
    assert torch.equal(at_one[:, :, [0, 1, 3, 4]], PLAIN[RESID][:, :, [0, 1, 3, 4]])


@pytest.mark.parametrize("held", [-0.7, 0.0, 1.5])
def test_a_neuron_held_before_its_nonlinearity_hands_on_the_gelu_of_that(held):
    seen = seen_with(Clamp(neurons=["0:3"], value=held, at="pre"))
    assert (seen[PRE][..., 3] == held).all()
    assert (seen[POST][..., 3] - gelu(held)).abs().max() < 1e-15
    assert torch.equal(seen[POST][..., :3], PLAIN[POST][..., :3])


def test_a_neuron_held_after_its_nonlinearity_adds_its_output_weights_times_that():
    seen = seen_with(Clamp(neurons=["0:3"], value=1.5))
    without = seen_with(Ablate(neurons=["0:3"]))
    added = seen["blocks.0.hook_mlp_out"] - without["blocks.0.hook_mlp_out"]
    expected = 1.5 * WEIGHTS["blocks.0.mlp.W_out"][:, None, None, 3]
    assert torch.equal(seen[PRE], PLAIN[PRE])
    torch.testing.assert_close(added, expected.expand_as(added), rtol=0, atol=1e-14)


def test_neurons_of_several_layers_are_held_each_in_its_own():
    seen = seen_with(Clamp(neurons=["0:3", "1:0", "0:1"], value=2.0, positions=[4]))
    for layer, neurons in ((0, [1, 3]), (1, [0])):
        held = seen[f"blocks.{layer}.mlp.hook_post"] == 2.0
        assert held.nonzero()[:, 2:].unique(dim=0).tolist() == [[4, neuron] for neuron in neurons]


# ---- gradient -------------------------------------------------------------------------------------


def gradients(*writers):
    leaves = {name: value.clone().requires_grad_() for name, value in WEIGHTS.items()}
    total = losses(MODEL, leaves, BATCH, tap_at(0, *writers)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("value", VALUES)
def test_upstream_of_a_silenced_site_the_gradient_is_exactly_zero(value):
    for name, gradient in gradients(Ablate(sites=[RESID], value=value)).items():
        upstream = name.startswith(("embed", "blocks.0"))
        # queries and keys of what is the same everywhere make no difference
        assert (gradient == 0).all() if upstream else gradient.any() or value == "zero"


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("at", ["pre", "post"])
def test_upstream_of_silenced_neurons_the_gradient_is_exactly_zero(value, at):
    found = gradients(Ablate(neurons=["0:0", "0:2"], value=value, at=at))
    for name in ("blocks.0.mlp.W_in", "blocks.0.mlp.b_in"):
        assert (found[name][..., [0, 2]] == 0).all() and (found[name][..., [1, 3]] != 0).all()
    assert found["blocks.0.mlp.W_out"][:, [0, 2]].any() == (value != "zero")


@pytest.mark.parametrize("value", VALUES)
def test_upstream_of_a_silenced_head_the_gradient_is_exactly_zero(value):
    found = gradients(Ablate(heads=["0:1"], value=value))
    by_head = found["blocks.0.attn.W_QKV"].view(2, 8, 3, 2, 4)
    assert (by_head[:, :, :, 1] == 0).all() and (by_head[:, :, :, 0] != 0).any()
    assert found["blocks.0.attn.W_O"][:, 4:].any() == (value != "zero")


@pytest.mark.parametrize("site", [V, Z, PRE, POST, RESID])
@pytest.mark.parametrize("value", VALUES)
def test_the_gradient_of_what_is_silenced_by_half_is_half(site, value):
    """Nothing comes back through the mean, the other example or the spread of the noise."""
    x = PLAIN[site].clone().requires_grad_()
    plan = plan_of(MODEL, TASK, Ablate(sites=[site], value=value))
    after = run_passes(plan, inputs_of(plan, MODEL, WEIGHTS, BATCH, gate=0.5))(site, x)
    (gradient,) = torch.autograd.grad(after.sum(), x)
    assert (gradient == 0.5).all()


# ---- runs -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no g++ or clang++ on the path: the step can only run eagerly")
def test_compiled_steps_under_noise_are_the_eager_ones_whatever_the_slots_of_the_members():
    writers = [Ablate(heads=["0:0"], value="noise"), Ablate(neurons=["0:1"], value="resample", at="pre")]
    tiny = Transformer(layers=1, width=4, heads=2, mlp_ratio=1)
    start = weights(tiny, TASK, dtype=torch.float32)
    turned = {name: value.flip(0) for name, value in start.items()}
    eager, compiled = (Training(tiny, TASK, start, *writers, seeds=(3, 2**33)) for _ in range(2))
    swapped = Training(tiny, TASK, turned, *writers, seeds=(2**33, 3))
    compiled.call = swapped.call = compile_step(compiled.step)
    for k in range(10):
        wanted, result, swapped_result = eager.update(k), compiled.update(k), swapped.update(k)
        assert (result[0] - wanted[0]).abs().max() < 1e-5
        assert torch.equal(result, swapped_result.flip(1))
    for name, value in compiled.values.items():
        assert torch.equal(value, swapped.values[name].flip(0))


@pytest.mark.parametrize("value", ["mean", "resample", "noise"])
def test_in_a_batch_of_one_nothing_but_zero_can_silence_and_the_run_says_so(value):
    small = {"steps_per_batch": 10, "log_every": 5, "probe_size": 4, "compile": False}
    model = OpsinModule(few_shot(batch_size=1), SMALL, **small)
    with pytest.raises(IdleError, match=r"^Ablate: was active for 10 steps and changed no activation"):
        train(model, 10, Ablate(heads=["0:0"], value=value))


def test_the_plan_shows_each_value_beside_its_site():
    writers = [Ablate(neurons=["0:1"], value=value, at="pre", order=i) for i, value in enumerate(VALUES)]
    rows = plan_of(MODEL, TASK, *writers).describe()
    assert [row["value"] for row in rows] == ["Constant(constant=0.0)", "BatchMean", "OverallMean", "Resample", "Noise"]
    assert {row["gradient"] for row in rows} == {"stops"} and {row["site"] for row in rows} == {PRE}
    text = sites_report(MODEL.sites(TASK), 2, 4, plan_of(MODEL, TASK, *writers))
    assert "5  1     Ablate 5  blocks.0.mlp.hook_pre  neurons [1]  Noise" in text


# ---- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Ablate(heads=["0:0"], at="pre"), "Ablate.at"),
        (lambda: Ablate(sites=["hook_embed"], at="post"), "Ablate.at"),
        (lambda: Ablate(neurons=["0:0"], at="before"), "Ablate.at"),
        (lambda: Clamp(neurons=["0:0"]), "Clamp.value"),
        (lambda: Clamp(neurons=["0:0"], value=1.0, at="out"), "Clamp.at"),
        (lambda: Clamp(neurons=["0:0"], value=1.0, heads=["0:0"]), "Clamp.heads"),
        (lambda: Clamp(neurons=["0:0"], value=1.0, strength=0.5), "Clamp.strength"),
        (lambda: Clamp(neurons=["0:0"], value=1.0, site=PRE), "Clamp"),
        (lambda: Clamp(neurons=["0:0"], pattern="match", heads=["0:0"]), "Clamp"),
        (lambda: Clamp(site="hook_embed", value=1.0, at="pre"), "Clamp.at"),
        (lambda: Clamp(heads=["0:0"], pattern="match", at="pre"), "Clamp.at"),
    ],
)
def test_a_neuron_setting_that_cannot_work_is_refused_when_it_is_given(make, field):
    with pytest.raises(ConfigError) as refused:
        make()
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("model", "writer", "field"),
    [
        (SMALL, Clamp(neurons=["0:0"], value=1.0), "Clamp.neurons"),
        (SMALL, Ablate(neurons=["0:0"], value="noise"), "Ablate.neurons"),
        (MODEL, Clamp(neurons=["0:4"], value=1.0), "Clamp.neurons"),
        (MODEL, Clamp(neurons=["3"], value=1.0), "Clamp.neurons"),
        (MODEL, Clamp(neurons=[], value=1.0), "Clamp.neurons"),
        (MODEL, Ablate(neurons=["2:0"], at="pre"), "Ablate.neurons"),
    ],
)
def test_a_neuron_that_is_missing_stops_the_build(model, writer, field):
    with pytest.raises(ConfigError) as refused:
        plan_of(model, TASK, writer)
    assert refused.value.field == field


@pytest.mark.parametrize("site", ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"])
def test_a_site_with_keys_has_no_overall_mean(site):
    message = rf"^Ablate.value: got 'overall_mean', expected another: {site} has not one vector for each position$"
    with pytest.raises(ConfigError, match=message):
        plan_of(MODEL, TASK, Ablate(sites=[site], value="overall_mean"))


@pytest.mark.parametrize("value", VALUES[1:])
def test_what_is_the_same_for_the_whole_batch_can_only_be_silenced_by_zero(value):
    model = Transformer(layers=1, width=8, heads=2, positions="learned")
    with pytest.raises(ConfigError, match=rf"Ablate.value: got '{value}', expected zero: hook_pos_embed is the same"):
        plan_of(model, TASK, Ablate(sites=["hook_pos_embed"], value=value))
