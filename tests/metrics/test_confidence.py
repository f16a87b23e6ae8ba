"""Claims about ablating several neurons at once: it is what a model run again does, and it is told from its control."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm

from opsin.callbacks import Ablate
from opsin.metrics.confidence import Compared, change, joint_ablation, strongest
from opsin.metrics.mean_ablation import Effect
from opsin.metrics.neuron_weights import random_outputs
from opsin.model.layers import NORM_EPS
from tests.helpers.planted_neurons import ENTROPY, ORDINARY, TASK, N, any_model, frozen, planted
from tests.helpers.toys import tap_of


def joint(model, neurons, w_out=None, means=None):
    given = model.post.mean(1, keepdim=True) if means is None else means
    return joint_ablation(
        model.read_out, model.resid, model.post, model.w_out if w_out is None else w_out, neurons, given
    )


@pytest.mark.parametrize("neurons", [[4], [0, 3, 9], range(N)])
@pytest.mark.parametrize("shape", [{}, {"unembed_bias": False}])
def test_several_neurons_at_their_means_are_a_model_run_again_with_an_ablate(neurons, shape):
    model = any_model(**shape)
    tap = tap_of(model.model, TASK, model.batch, Ablate(neurons=[f"0:{n}" for n in neurons], value="mean"))
    found = joint(model, neurons)
    total = model.change(model.rerun(tap))["entropy"]
    direct = model.change(model.rerun(frozen(tap, model.seen["ln_final.hook_scale"])))["entropy"]
    assert total.abs().max() > 1e-3 and (total - direct).abs().max() > 1e-3
    assert torch.allclose(found.total, total, rtol=0, atol=1e-10)
    assert torch.allclose(found.direct, direct, rtol=0, atol=1e-10)


def test_no_neuron_changes_nothing_and_one_changes_what_its_own_effect_is():
    model = any_model()
    assert joint(model, []).total.abs().max() == 0 and joint(model, []).direct.abs().max() == 0
    alone = model.effects(means=model.post.mean(1, keepdim=True))["entropy"]
    for neuron in range(N):
        found = joint(model, [neuron])
        assert torch.allclose(found.total.mean((1, 2)), alone.total_signed[:, neuron], rtol=0, atol=1e-12)
        assert torch.allclose(found.direct.abs().mean((1, 2)), alone.direct[:, neuron], rtol=0, atol=1e-12)


def test_neurons_in_the_exact_null_space_have_no_direct_effect_together_and_others_have():
    model, means = planted(), planted().post.mean((1, 2), keepdim=True)
    model.w_out[0, 0] = -2 * model.w_out[0, ENTROPY]
    together = joint(model, [0, ENTROPY], means=means)
    assert together.direct.abs().max() < 1e-12 and together.total.abs().max() > 1e-3
    assert joint(model, [ENTROPY, ORDINARY], means=means).direct.abs().max() > 1e-3


def test_a_change_stands_beside_those_of_random_outputs_each_run_by_hand():
    model, neurons = any_model(seeds=(5,)), [2, 7]
    means = model.post.mean((1, 2), keepdim=True)
    found = change(model.read_out, model.resid, model.post, model.w_out, neurons, means, draws=5)
    away = (model.post - means)[..., neurons]

    def entropy(resid, scale=None):
        if scale is None:
            normed = layer_norm(resid, resid.shape[-1:], eps=NORM_EPS)
        else:
            normed = (resid - resid.mean(-1, keepdim=True)) / scale
        normed = normed * model.values["ln_final.w"][0] + model.values["ln_final.b"][0]
        logits = normed @ model.values["unembed.W_U"][0] + model.values["unembed.b_U"][0]
        return torch.distributions.Categorical(logits=logits).entropy().mean()

    for kind, scale in (("total", None), ("direct", model.seen["ln_final.hook_scale"])):
        slow = [
            entropy(model.resid - away @ outputs[0, neurons], scale) - entropy(model.resid)
            for outputs in (model.w_out, *(random_outputs(model.w_out, seed) for seed in range(5)))
        ]
        compared = getattr(found, kind)
        assert compared.value == pytest.approx(slow[0].item(), abs=1e-10)
        assert compared.control == pytest.approx(torch.stack(slow[1:]).mean().item(), abs=1e-10)
        assert min(slow[1:]) <= compared.low < compared.high <= max(slow[1:])


def test_the_range_of_the_controls_holds_95_percent_of_them():
    assert Compared.of(torch.tensor(7.0), torch.arange(101.0)) == Compared(7.0, 50.0, 2.5, 97.5)


def effect(total, mediated):
    total = torch.tensor([total])
    direct = total * (1 - torch.tensor([mediated]))
    return Effect(total, direct, total, direct)


def test_candidates_are_shown_strongest_first_and_without_any_those_with_the_largest_mediated_effect():
    # the last has too small an effect for a share
    found = effect([1.0, 3.0, 2.0, 4.0, 0.0], [0.9, 0.6, 0.8, -0.5, 0.0])
    assert strongest(found, torch.tensor([[True, False, True, False, False]]), 0, top=1) == [2, 0]
    assert strongest(found, torch.zeros(1, 5, dtype=torch.bool), 0, top=2) == [1, 2]
    assert strongest(found, torch.zeros(1, 5, dtype=torch.bool), 0, top=4) == [1, 2, 0, 4]
