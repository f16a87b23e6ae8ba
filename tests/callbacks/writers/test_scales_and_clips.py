"""Claims about preserved LayerNorm scales and clipped neurons, on models whose answer is known."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opsin.callbacks import Ablate, Clip, Preserve, ProgressMeasures
from opsin.errors import ConfigError
from opsin.interventions.apply import run_passes
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.plain import Clipped
from opsin.model.transformer import Transformer
from opsin.training.module import OpsinModule
from tests.helpers.toys import ToyTokens, batch_of, inputs_of, plan_of, run, train, weights

MODEL = Transformer(layers=2, width=8, heads=2, mlp_ratio=1)
TASK = ToyTokens()
VALUES = weights(MODEL, TASK)
BATCH = batch_of(TASK)
SCALE = "ln_final.hook_scale"
QUERIES = [3, 4]  # of the toy task


def seen(*writers, values=VALUES):
    plan = plan_of(MODEL, TASK, *writers)
    return run(MODEL, values, BATCH, run_passes(plan, inputs_of(plan, MODEL, values, BATCH)))


def with_silent_neuron():
    """The same weights, but neuron 1:2 writes, strongly, where the read-out after the last LayerNorm cannot see."""
    values = {name: value.clone() for name, value in VALUES.items()}
    values["unembed.W_U"][:, :, 4:] = 0
    centre = torch.eye(8, dtype=torch.float64) - 1 / 8
    for member in range(2):
        read = centre @ (values["ln_final.w"][member, :, None] * values["unembed.W_U"][member])
        # the read-out sees four directions, and none of those that are left is the mean
        unseen = torch.linalg.svd(torch.cat([read, torch.ones(8, 1, dtype=torch.float64)], 1))[0][:, -1]
        values["blocks.1.mlp.W_out"][member, 2] = 10 * unseen
    return values


def test_a_neuron_in_the_null_space_has_no_direct_effect_and_a_total_one():
    values, ablated = with_silent_neuron(), Ablate(neurons=["1:2"], value="mean")
    plain = run(MODEL, values, BATCH)[0]
    direct, total = seen(ablated, Preserve(["scales"]), values=values)[0], seen(ablated, values=values)[0]
    assert (direct - plain).abs().max() < 1e-12
    assert (total - plain).abs().flatten(1).amax(1).min() > 1e-2


def test_with_the_scale_preserved_the_logits_are_the_ablated_residual_over_the_old_scale():
    plain = run(MODEL, VALUES, BATCH)[1]
    logits, after = seen(Ablate(neurons=["1:2", "1:5"]), Preserve(["scales"]))
    x = after["blocks.1.hook_resid_post"]
    for member in range(2):
        for item in range(4):
            for row in range(6):
                centred = x[member, item, row] - x[member, item, row].mean()
                normal = centred / plain[SCALE][member, item, row] * VALUES["ln_final.w"][member]
                expected = (normal + VALUES["ln_final.b"][member]) @ VALUES["unembed.W_U"][member]
                expected = expected + VALUES["unembed.b_U"][member]
                assert (logits[member, item, row] - expected).abs().max() < 1e-12


def test_the_last_scale_is_preserved_unless_others_are_named():
    lost = Ablate(sites=["blocks.0.hook_attn_out"])
    names = [name for name in run(MODEL, VALUES, BATCH)[1] if name.endswith("hook_scale")]
    plain, default = run(MODEL, VALUES, BATCH)[1], seen(lost, Preserve(["scales"]))[1]
    named = seen(lost, Preserve(["scales"], norms=["blocks.0.ln2", "blocks.1.ln1"]))[1]
    kept = {key: {n for n in names if torch.equal(of[n], plain[n])} for key, of in (("d", default), ("n", named))}
    before = {"blocks.0.ln1.hook_scale"}
    assert kept["d"] == before | {SCALE}
    assert kept["n"] == before | {"blocks.0.ln2.hook_scale", "blocks.1.ln1.hook_scale"}


def test_patterns_and_scales_are_preserved_together():
    plain, held = run(MODEL, VALUES, BATCH)[1], seen(Ablate(heads=["0:0"]), Preserve(["patterns", "scales"]))[1]
    for name in ("blocks.1.attn.hook_pattern", SCALE):
        assert torch.equal(held[name], plain[name])


def clipped_by_loops(x, side):
    """What a clip of all neurons leaves of ``x``."""
    after = x.clone()
    for member in range(x.shape[0]):
        for neuron in range(x.shape[3]):
            rest = [x[member, b, row, neuron] for b in range(x.shape[1]) for row in range(6) if row not in QUERIES]
            mean = sum(rest) / len(rest)
            for b in range(x.shape[1]):
                for row in QUERIES:
                    value = x[member, b, row, neuron]
                    after[member, b, row, neuron] = min(value, mean) if side == "above" else max(value, mean)
    return after


@pytest.mark.parametrize("side", ["above", "below"])
@pytest.mark.parametrize("at", ["pre", "post"])
def test_a_clip_holds_its_neurons_at_their_mean_over_rows_that_are_no_query(side, at):
    site = f"blocks.1.mlp.hook_{at}"
    plain, after = run(MODEL, VALUES, BATCH)[1][site], seen(Clip(["1:1", "1:6"], side, at))[1][site]
    expected = plain.clone()
    expected[..., [1, 6]] = clipped_by_loops(plain, side)[..., [1, 6]]
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-14)
    assert (after != plain).flatten(1).any(1).all()


@given(st.integers(0, 2**16), st.sampled_from(["above", "below"]))
def test_a_clip_never_moves_an_entry_away_from_the_mean_and_acts_at_queries_alone(seed, side):
    x = torch.randn(2, 4, 6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = Clipped(side)(x, BATCH)
    after = torch.where(found.where, found.value, x)
    torch.testing.assert_close(after, clipped_by_loops(x, side), rtol=0, atol=1e-14)


def test_of_a_batch_of_queries_alone_nothing_is_clipped():
    everywhere = replace(BATCH, truth=replace(BATCH.truth, query=torch.ones_like(BATCH.truth.query)))
    assert not Clipped("above")(torch.ones(2, 4, 6, 3), everywhere).where.any()


def test_no_gradient_passes_a_clipped_entry_and_all_of_it_an_entry_that_is_left():
    x = torch.randn(2, 4, 6, 3, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    found = Clipped("above")(x, BATCH)
    torch.where(found.where, found.value, x).sum().backward()
    assert found.where.any() and torch.equal(x.grad, (~found.where).double())


def test_at_strength_zero_the_logits_are_bitwise_as_they_are():
    plan = plan_of(MODEL, TASK, Ablate(neurons=["1:2"]), Preserve(["scales"]), Clip(["1:3"]))
    tap = run_passes(plan, inputs_of(plan, MODEL, VALUES, BATCH, gate=0.0))
    assert torch.equal(run(MODEL, VALUES, BATCH, tap)[0], run(MODEL, VALUES, BATCH)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clip(["0:1"], side="beside"), r"Clip.side: got 'beside'"),
        (lambda: Clip(["0:1"], at="mid"), r"Clip.at: got 'mid'"),
        (lambda: Preserve(["patterns"], norms=["ln_final"]), r"Preserve.norms: got \['ln_final'\], expected nothing"),
        (lambda: Preserve(["scales"], layers=[0]), r"Preserve.layers: got \[0\], expected nothing"),
        (lambda: plan_of(MODEL, TASK, Preserve(["scales"], norms=["ln1"])), r"Preserve.norms: got 'ln1', expected any"),
        (lambda: plan_of(MODEL, TASK, Preserve(["scales"], norms=[])), r"Preserve.norms: got \[\]"),
        (
            lambda: plan_of(Transformer(layers=1, width=8, heads=2, norm=False), TASK, Preserve(["scales"])),
            r"Preserve.what: got 'scales', expected nothing of them",
        ),
        (lambda: plan_of(MODEL, TASK, Clip(["1:8"])), r"Clip.neurons: got '1:8'"),
        (lambda: plan_of(Transformer(layers=2, width=8, heads=2), TASK, Clip(["1:0"])), r"Clip.neurons: .*no MLP"),
    ],
)
def test_what_cannot_be_held_or_clipped_is_refused_in_one_line(make, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make()


def test_both_act_in_training_and_as_progress_measures():
    def model():
        small = {"steps_per_batch": 5, "log_every": 5, "probe_size": 16, "compile": False}
        return OpsinModule(ToyTokens(), MODEL, [1, 2], **small)

    sets = {"direct": [Ablate(neurons=["1:2"], value="mean"), Preserve(["scales"])], "clip": [Clip(["1:2", "1:3"])]}
    free = train(model(), 10, ProgressMeasures(sets, every=5))
    losses = [free.history[f"progress/{name}/loss"].arrays()[1] for name in ("none", *sets)]
    assert len({loss.tobytes() for loss in losses}) == 3
    final = [torch.cat([p.detach().flatten() for p in free.parameters()])]
    for writers in ([Clip(["1:2"], schedule=Schedule(start=5))], sets["direct"]):
        trained = train(model(), 10, *writers)
        final.append(torch.cat([p.detach().flatten() for p in trained.parameters()]))
    assert all(not torch.equal(final[0], ended) for ended in final[1:])
