"""Claims about mean ablation: planted neurons are told apart, and every effect is that of a model run again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.callbacks import Ablate
from opsin.metrics import mean_ablation
from opsin.metrics.mean_ablation import Effect, candidates, finite_unigram, mean_ablation_effects
from opsin.metrics.neuron_weights import ReadOut, logit_var, null_share, random_outputs, weight_norm
from tests.helpers.planted_neurons import (
    ENTROPY,
    FREQUENCY,
    LAST,
    ORDINARY,
    TASK,
    UNIGRAM,
    D,
    MeasuredModel,
    N,
    any_model,
    frozen,
    planted,
)
from tests.helpers.toys import tap_of


def restored(logits, before):
    direction = UNIGRAM.log() - UNIGRAM.log().mean()
    direction = direction / direction.norm()
    return logits + ((before - logits) @ direction)[..., None] * direction


# ---- planted neurons --------------------------------------------------------------------------------


def test_an_entropy_neuron_in_the_exact_null_space_has_no_direct_effect():
    for effect in planted().effects().values():
        assert effect.direct[0, ENTROPY] < 1e-12 and effect.total[0, ENTROPY] > 1e-3
        assert effect.mediated[0, ENTROPY] == pytest.approx(1, abs=1e-9)


def test_a_token_frequency_neuron_has_its_effect_through_the_log_unigram():
    model = planted()
    kl, through_scale = model.effects(mediator="frequency")["kl"], model.effects()["kl"]
    assert kl.mediated[0, FREQUENCY] > 0.8 and kl.mediated[0, ORDINARY] < 0.3
    assert through_scale.mediated[0, FREQUENCY] < 0.3


@pytest.mark.parametrize("measure, mediator, named", [("entropy", "scale", ENTROPY), ("kl", "frequency", FREQUENCY)])
def test_candidates_name_the_planted_neuron_and_neither_of_the_others(measure, mediator, named):
    model = planted()
    control = model.effects(random_outputs(model.w_out), mediator=mediator)
    found = candidates(model.effects(mediator=mediator)[measure], control[measure])[0]
    assert [neuron for neuron in (ENTROPY, FREQUENCY, ORDINARY) if found[neuron]] == [named]
    # one control in a hundred is above the level, and so may one weak neuron be
    assert found.sum() <= 1 + 0.01 * len(found)


# ---- slow versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"unembed_bias": False}, {"layers": 2}])
def test_every_effect_is_that_of_a_model_run_again_with_an_ablate(shape):
    model = any_model(**shape)
    last = f"{model.model.layers - 1}"
    model.resid, model.post = (model.seen[f"blocks.{last}.{name}"] for name in ("hook_resid_post", "mlp.hook_post"))
    model.w_out = model.values[f"blocks.{last}.mlp.W_out"]
    found = model.effects(means=model.post.mean(1, keepdim=True))
    held = model.effects(means=model.post.mean(1, keepdim=True), mediator="frequency")
    for neuron in range(N):
        tap = tap_of(model.model, TASK, model.batch, Ablate(neurons=[f"{last}:{neuron}"], value="mean"))
        ablated = model.rerun(tap)
        total = model.change(ablated)
        direct = model.change(model.rerun(frozen(tap, model.seen["ln_final.hook_scale"])))
        through = model.change(restored(ablated, model.logits))
        for name in ("entropy", "loss", "kl"):
            close(found[name], total[name], direct[name], neuron)
            close(held[name], total[name], through[name], neuron)


def test_held_at_one_mean_a_neuron_does_what_the_overall_mean_of_ablate_does():
    model = any_model()
    found = model.effects()
    for neuron in range(N):
        tap = tap_of(model.model, TASK, model.batch, Ablate(neurons=[f"0:{neuron}"], value="overall_mean"))
        total = model.change(model.rerun(tap))
        direct = model.change(model.rerun(frozen(tap, model.seen["ln_final.hook_scale"])))
        for name in ("entropy", "loss", "kl"):
            close(found[name], total[name], direct[name], neuron)


def close(effect: Effect, total, direct, neuron):
    for values, slow in ((effect.total, total.abs()), (effect.total_signed, total)):
        assert torch.allclose(values[:, neuron], slow.mean((1, 2)), rtol=0, atol=1e-10)
    for values, slow in ((effect.direct, direct.abs()), (effect.direct_signed, direct)):
        assert torch.allclose(values[:, neuron], slow.mean((1, 2)), rtol=0, atol=1e-10)


def test_the_mean_is_one_number_a_neuron_and_the_tokens_averaged_over_are_those_asked_for():
    model = any_model()
    where = torch.rand(model.targets.shape, generator=torch.Generator().manual_seed(0)) > 0.4
    found = model.effects(where=where)
    mean = model.post.mean((1, 2))
    for neuron in range(N):
        post = model.post.clone()
        post[..., neuron] = mean[:, None, None, neuron]
        total = model.change(model.rerun(lambda name, x, post=post: post if name == LAST + "mlp.hook_post" else x))
        for name, change in total.items():
            slow = torch.stack([change[m][where[m]].abs().mean() for m in range(2)])
            assert torch.allclose(found[name].total[:, neuron], slow, rtol=0, atol=1e-10)


def test_a_control_is_ablated_along_its_own_direction_by_the_neuron_s_own_activation():
    model = any_model()
    control = random_outputs(model.w_out)
    found = model.effects(control)["entropy"]
    for neuron in range(N):
        away = model.post[..., neuron] - model.post[..., neuron].mean((1, 2), keepdim=True)
        resid = model.resid - away[..., None] * control[:, None, None, neuron]
        change = model.change(
            model.rerun(lambda name, x, resid=resid: resid if name == LAST + "hook_resid_post" else x)
        )
        assert torch.allclose(found.total[:, neuron], change["entropy"].abs().mean((1, 2)), rtol=0, atol=1e-10)


# ---- properties ---------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.floats(-5, 5), st.floats(-5, 5), st.integers(0, 100))
def test_what_layernorm_and_softmax_cannot_see_changes_no_score(in_width, in_vocabulary, seed):
    model = any_model()
    shifted = dict(model.values)
    added = torch.randn(2, N, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shifted["unembed.W_U"] = model.values["unembed.W_U"] + in_vocabulary * torch.randn(
        2, D, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    w_out, read_out = model.w_out + in_width * added, ReadOut.of(shifted)
    assert torch.allclose(weight_norm(w_out), weight_norm(model.w_out))
    assert torch.allclose(logit_var(w_out, read_out), logit_var(model.w_out, model.read_out))
    assert torch.allclose(null_share(w_out, read_out).rho, null_share(model.w_out, model.read_out).rho)
    found = mean_ablation_effects(read_out, model.resid, model.post, w_out, targets=model.targets)
    for name, effect in model.effects().items():
        if name in found:
            assert torch.allclose(found[name].total, effect.total, atol=1e-9)


def test_tiles_change_nothing(monkeypatch):
    model = any_model()
    whole = model.effects()
    monkeypatch.setattr(mean_ablation, "TILE_TOKENS", 5)
    monkeypatch.setattr(mean_ablation, "TILE", 100)
    for name, effect in model.effects().items():
        assert torch.allclose(effect.total, whole[name].total) and torch.allclose(effect.direct, whole[name].direct)


def test_a_member_has_the_effects_it_has_alone():
    together, alone = any_model((0, 1)), any_model((1,))
    single = MeasuredModel({n: v[1:] for n, v in together.values.items()}, alone.batch)
    for name, effect in together.effects().items():
        assert torch.equal(effect.total[1:], single.effects()[name].total)


def test_without_targets_or_a_unigram_there_is_no_effect_on_them():
    assert list(any_model().effects(targets=None, unigram=None)) == ["entropy"]
    assert list(any_model().effects(unigram=None)) == ["entropy", "loss"]


def test_no_share_is_taken_of_no_effect_and_it_makes_no_candidate():
    model = any_model()
    model.w_out = model.w_out.clone()
    model.w_out[:, 4] = 0
    effect, control = (model.effects(w)["entropy"] for w in (None, torch.zeros_like(model.w_out)))
    assert effect.mediated[:, 4].isnan().all() and effect.mediated[:, 5].isfinite().all()
    assert (
        not candidates(effect, control)[:, 4].any() and null_share(model.w_out, model.read_out).rho[:, 4].isnan().all()
    )


def test_a_member_without_tokens_has_no_effects():
    model = any_model()
    where = torch.zeros_like(model.targets, dtype=torch.bool)
    where[1, 0, 0] = True
    effect = model.effects(where=where)["loss"]
    assert effect.total[0].isnan().all() and effect.total[1].isfinite().all()


def test_an_output_that_never_occurs_counts_as_half_as_frequent_as_the_rarest():
    assert torch.allclose(finite_unigram(torch.tensor([0.6, 0.4, 0.0])), torch.tensor([0.5, 1 / 3, 1 / 6]))
    assert torch.allclose(finite_unigram(UNIGRAM), UNIGRAM)


def test_a_candidate_needs_both_the_share_and_the_size():
    def effect(total, direct):
        rows = [torch.tensor([values], dtype=torch.float64) for values in (total, direct)]
        return Effect(*rows, *rows)

    control = effect([0.1] * 100, [0.1] * 100)
    found = candidates(effect([0.2, 0.2, 0.05], [0.01, 0.19, 0.0]), control)
    assert found.tolist() == [[True, False, False]]
