"""Claims about the training step: its loss, its gradient norms, its members, its compiled twin."""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from opsin.callbacks.writers.clamp import Clamp
from opsin.interventions.schedules import Schedule
from opsin.model.transformer import Transformer
from opsin.objective import accuracy, cross_entropy, restrict
from opsin.training.compiling import compile_step, has_compiler, keep_compiled
from opsin.training.objective import scored_logits
from opsin.training.optimizer_state import member_norm, update_members
from opsin.training.probe import observe
from tests.helpers.toys import BETAS, SMALL, ToyTokens, Training, batch_of, few_shot, losses, run, weights

TINY = Transformer(layers=1, width=4, heads=2)


def gradients(task, model, values):
    """Gradients of every member, from autograd on one member at a time."""
    batch = batch_of(task, dtype=torch.float64)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    each = [torch.autograd.grad(losses(model, leaves, batch)[m], list(leaves.values())) for m in range(2)]
    return {name: torch.stack([each[m][i][m] for m in range(2)]) for i, name in enumerate(leaves)}


def norms(parts):
    """2-norm of every member over all parameters."""
    return [math.sqrt(sum((part[m].numpy() ** 2).sum() for part in parts.values())) for m in range(2)]


@pytest.mark.parametrize("make_task", [few_shot, ToyTokens])
def test_the_loss_is_minus_log_p_of_the_target_at_the_scored_positions(make_task):
    task = make_task()
    values, batch = weights(SMALL, task), batch_of(task, dtype=torch.float64)
    logits = run(SMALL, values, batch)[0].numpy()
    scored, (m, b, q) = task.layout.scored, batch.targets.shape
    loss, right = np.zeros(m), np.zeros(m)
    for i, j, k in np.ndindex(m, b, q):
        row, target = logits[i, j, scored[k]], batch.targets[i, j, k]
        loss[i] -= math.log(math.exp(row[target]) / np.exp(row).sum()) / (b * q)
        right[i] += float(row.argmax() == target) / (b * q)
    result = Training(SMALL, task, values).update(0)
    assert np.abs(result[0].numpy() - loss).max() < 1e-12
    assert result[1].tolist() == pytest.approx(right.tolist())


def test_the_gradient_norm_is_each_members_own(tiny_task):
    values = weights(SMALL, tiny_task)
    result = Training(SMALL, tiny_task, values).update(0)
    assert result[2].tolist() == pytest.approx(norms(gradients(tiny_task, SMALL, values)), rel=1e-12)


def test_the_step_works_in_place(tiny_task):
    training = Training(SMALL, tiny_task, weights(SMALL, tiny_task))
    held = training.optimizer.members_state().tensors()
    before = [tensor.detach().clone() for tensor in held]
    result = training.update(0)
    after = training.optimizer.members_state().tensors()
    assert all(a is b for a, b in zip(held, after, strict=True))
    assert all((old != new).any() for old, new in zip(before, held, strict=True))
    assert not result.requires_grad


def test_clipping_bounds_a_member_and_spares_its_neighbour(tiny_task):
    values = weights(SMALL, tiny_task)
    expected = gradients(tiny_task, SMALL, values)
    norm = norms(expected)
    bound = [norm[0] / 3, norm[1] * 3]
    training = Training(SMALL, tiny_task, values)
    result = training.update(0, clip=torch.tensor(bound, dtype=torch.float64))
    first = training.kept("exp_avg")
    used = {name: mean / (1 - BETAS[0]) for name, mean in first.items()}
    assert norms(used) == pytest.approx([bound[0], norm[1]], rel=1e-12)
    assert all((used[n][0] * 3 - expected[n][0]).abs().max() < 1e-12 for n in used)
    assert result[2].tolist() == pytest.approx(norm), "what is logged is the norm before clipping"


def test_rates_and_decays_belong_to_members(tiny_task):
    training = Training(SMALL, tiny_task, weights(SMALL, tiny_task))
    before = {name: value.detach().clone() for name, value in training.values.items()}
    zero, some = torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, 0.1], dtype=torch.float64)
    training.update(0, learning_rate=some, weight_decay=zero)
    changed = {name: (value != before[name]).flatten(1).any(1).tolist() for name, value in training.values.items()}
    assert set(map(tuple, changed.values())) == {(False, True)}


def test_a_member_that_is_no_number_leaves_its_neighbour_bitwise_alone(tiny_task):
    values = weights(SMALL, tiny_task, dtype=torch.float32)
    broken = {name: value.clone() for name, value in values.items()}
    broken["embed.W_F"][0, 0, 0] = float("nan")
    runs = [Training(SMALL, tiny_task, start, clip=1.0) for start in (values, broken)]
    for k in range(3):
        well, ill = (training.update(k) for training in runs)
        assert torch.equal(well[:, 1], ill[:, 1]) and ill[0, 0].isnan()
    assert all(torch.equal(runs[0].values[name][1], runs[1].values[name][1]) for name in values)


def test_without_clipping_a_norm_that_overflows_breaks_nothing(tiny_task):
    training = Training(SMALL, tiny_task, weights(SMALL, tiny_task, dtype=torch.float32))
    state, part = training.optimizer.members_state(), training.optimizer.rule
    steep = [torch.full_like(tensor, 1e19) for tensor in state.parameters]
    with torch.no_grad():
        update_members(state, steep, member_norm(steep), training.optimizer.hyper(), training.counts.alive, part)
    assert all(tensor.isfinite().all() for tensor in state.parameters)


def test_outputs_not_in_the_context_cannot_be_predicted(tiny_task):
    batch = batch_of(tiny_task)
    logits = torch.zeros(2, 4, 1, 5)
    allowed = restrict(logits, batch.plausible)
    assert torch.equal(allowed == 0, batch.plausible[:, :, None])
    wrong = logits.masked_fill(~batch.plausible[:, :, None], 9.0)
    assert accuracy(wrong, batch).mean((1, 2)).tolist() == [0, 0]
    certain = wrong.scatter(-1, batch.targets[..., None], 1.0)
    assert accuracy(restrict(certain, batch.plausible), batch).mean((1, 2)).tolist() == [1, 1]


def test_observing_shows_what_goes_on_after_the_tap_and_moves_nothing(tiny_task):
    values = {name: value.requires_grad_() for name, value in weights(SMALL, tiny_task).items()}
    batch, name = batch_of(tiny_task, dtype=torch.float64), "blocks.0.hook_resid_post"

    def tap(site, activation):
        return activation * 0 + 2 if site == name else activation

    table = SMALL.position_table(5, torch.float64)
    kept = observe(SMALL, values, table, batch, tap, [name, "hook_logits"])
    logits = kept["hook_logits"]
    assert list(kept) == [name, "hook_logits"] and (kept[name] == 2).all()
    assert torch.equal(logits, run(SMALL, values, batch, tap)[0]) and not logits.requires_grad
    assert cross_entropy(scored_logits(logits, batch), batch).shape == (2, 4, 1)


def test_a_look_ends_at_the_last_site_that_is_asked_for(tiny_task):
    values, batch = weights(SMALL, tiny_task), batch_of(tiny_task, dtype=torch.float64)
    passed = []

    def tap(site, activation):
        passed.append(site)
        return activation

    observe(SMALL, values, SMALL.position_table(5, torch.float64), batch, tap, ["blocks.0.attn.hook_v", "hook_embed"])
    assert passed[-1] == "blocks.0.attn.hook_v"


def test_a_chosen_folder_for_kernels_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "chosen")
    keep_compiled(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "chosen"


def test_kernels_are_kept_where_the_compiler_has_put_its_default(monkeypatch, tmp_path):
    for there in (default_cache_dir(), ""):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", there)
        keep_compiled(tmp_path)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


@pytest.mark.skipif(not has_compiler(), reason="no g++ or clang++ on the path: the step can only run eagerly")
def test_the_compiled_step_is_the_eager_step_and_switching_recompiles_nothing(tiny_task):
    blinking = Clamp(heads=["0:0"], pattern="induction", schedule=Schedule(period=2))
    start = weights(TINY, tiny_task, dtype=torch.float32)
    eager, compiled = (Training(TINY, tiny_task, start, blinking, rate=1e-3, steps=200) for _ in range(2))
    compiled.call = compile_step(compiled.step)
    compiled.update(0), eager.update(0)
    compiled_once = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for k in range(1, 200):
        result = compiled.update(k)
        if k < 20:
            assert (result[0] - eager.update(k)[0]).abs().max() < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled_once
    assert eager.gates[:4, 0, 0].tolist() == [1, 0, 1, 0]


def rows_seen(model, task, *writers):
    """Rows of every activation of a training step's own pass, by site."""
    training = Training(model, task, weights(model, task), *writers)
    needed = training.step.rows
    batch = replace(batch_of(task, dtype=torch.float64), rows=needed)
    values = {name: value.detach() for name, value in training.values.items()}
    logits, activations = run(model, values, batch)
    table = model.sites(task)
    seen = {name: x.shape[table[name].axes.index("L")] for name, x in activations.items() if "L" in table[name].axes}
    return logits, seen


def test_the_last_block_is_computed_at_scored_rows_alone(tiny_task):
    _, rows = rows_seen(SMALL, tiny_task)
    assert {name for name, count in rows.items() if count == 1} == {
        site.name for site in SMALL.sites(tiny_task) if site.row_by_row
    }
    assert rows["blocks.1.attn.hook_pattern"] == 1 and rows["blocks.1.attn.hook_k"] == 5


def test_what_an_intervention_acts_on_is_computed_at_all_rows(tiny_task):
    _, rows = rows_seen(SMALL, tiny_task, Clamp(heads=["1:0"], pattern="induction"))
    assert rows["blocks.1.attn.hook_pattern"] == rows["blocks.1.attn.hook_rot_q"] == 5
    assert rows["blocks.1.attn.hook_z"] == rows["hook_logits"] == 1


@pytest.mark.parametrize("make_task", [few_shot, ToyTokens])
def test_an_intervention_without_strength_leaves_training_bitwise_as_it_is_at_every_site(make_task):
    task, model = make_task(), Transformer(layers=2, width=8, heads=2, mlp_ratio=2, attention_biases="qkvo")
    values = weights(model, task, dtype=torch.float32)
    free = Training(model, task, values)
    free.update(0)
    for site in model.sites(task):
        idle = Training(model, task, values, Clamp(site=site.name, value=0.3))
        idle.gates = torch.zeros_like(idle.gates)
        idle.update(0)
        assert all(torch.equal(value, free.values[name]) for name, value in idle.values.items()), site.name


def test_a_set_that_is_embedded_once_trains_like_features_that_are_embedded_one_by_one(monkeypatch):
    task = few_shot()
    values = weights(SMALL, task)
    runs = [Training(SMALL, task, values) for _ in range(2)]
    runs[0].update(0)
    monkeypatch.setattr(type(task), "shown", lambda *_: None)
    runs[1].update(0)
    for name, value in runs[0].values.items():
        torch.testing.assert_close(value, runs[1].values[name], rtol=1e-10, atol=1e-12)


def test_the_set_that_a_task_shows_has_the_features_of_its_batches():
    task = few_shot(train_classes=8)
    draw = {name: tensor[0] for name, tensor in task.draw([0, 1], 0, 1).items()}
    shown = task.shown(task.bank(), draw)
    assert torch.equal(shown.vectors[shown.which], task.assemble(task.bank(), draw).features)
