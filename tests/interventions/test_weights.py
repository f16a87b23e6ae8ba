"""Claims about weights that stand still or start anew: which entries, which updates, which counts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.callbacks import Ablate, Freeze, Reinitialise
from opsin.errors import ConfigError
from opsin.interventions.schedules import Schedule
from opsin.model.protocol import init_parameters
from opsin.model.transformer import Transformer
from opsin.training.compiling import compile_step, has_compiler
from tests.helpers.toys import BETAS, EPS, SMALL, Training, batch_of, few_shot, losses, plan_of, run, weights

WITH_MLP = Transformer(layers=2, width=8, heads=2, mlp_ratio=1.5)
QK = {"heads": ["1:1"], "parts": ["W_Q", "W_K"]}
QKV = "blocks.1.attn.W_QKV"


def qk_of_head_1():
    """W_Q and W_K of the second of two heads of width 4, in [member, input, q|k|v]."""
    mask = np.zeros((2, 8, 24), dtype=bool)
    mask[:, :, 4:8] = mask[:, :, 12:16] = True
    return mask


class SlowAdam:
    """Adam entry by entry in NumPy; every entry has its own count of updates, and what is skipped has no update."""

    def __init__(self, task, model, values, rate=1e-2, decay=0.0, clip=math.inf):
        self.task, self.model, self.rate, self.decay, self.clip = task, model, rate, decay, clip
        self.values = {name: value.double().numpy().copy() for name, value in values.items()}
        self.mean, self.square, self.count = ({n: np.zeros_like(v) for n, v in self.values.items()} for _ in range(3))

    def update(self, k, skipped):
        """Step k without the entries in ``skipped``; returns the norm of the others' gradient."""
        leaves = {name: torch.from_numpy(value).requires_grad_() for name, value in self.values.items()}
        loss = losses(self.model, leaves, batch_of(self.task, step=k, dtype=torch.float64)).sum()
        found = torch.autograd.grad(loss, list(leaves.values()))
        gradients = {
            n: g.numpy() * ~skipped.get(n, np.zeros(g.shape, bool)) for n, g in zip(leaves, found, strict=True)
        }
        norm = [math.sqrt(sum((g[m] ** 2).sum() for g in gradients.values())) for m in range(2)]
        for name, gradient in gradients.items():
            for m in range(2):
                free = ~skipped[name][m] if name in skipped else np.ones(gradient[m].shape, dtype=bool)
                parts = (self.values, self.mean, self.square, self.count)
                value, mean, square, count = (part[name][m] for part in parts)
                g = gradient[m][free] * min(1.0, self.clip / norm[m])
                count[free] += 1
                mean[free] = BETAS[0] * mean[free] + (1 - BETAS[0]) * g
                square[free] = BETAS[1] * square[free] + (1 - BETAS[1]) * g**2
                step = mean[free] / (1 - BETAS[0] ** count[free])
                step /= np.sqrt(square[free] / (1 - BETAS[1] ** count[free])) + EPS
                value[free] -= self.rate * (step + self.decay * value[free])
        return norm

    def agrees(self, training):
        state = training.optimizer.members_state()
        parts = zip(state.names, state.parameters, *_moments(training), strict=True)
        for name, *tensors in parts:
            for tensor, own in zip(tensors, (self.values, self.mean, self.square), strict=True):
                assert np.abs(tensor.detach().numpy() - own[name]).max() < 1e-10, name


def _moments(training):
    """The two running means of every parameter."""
    return (training.kept(name).values() for name in ("exp_avg", "exp_avg_sq"))


def snapshot(training):
    """Weights and moments, by name."""
    state = training.optimizer.members_state()
    parts = zip(state.parameters, *_moments(training), strict=True)
    return {n: [x.detach().clone() for x in tensors] for n, tensors in zip(state.names, parts, strict=True)}


@pytest.mark.parametrize(("decay", "clip"), [(0.0, None), (0.1, 0.05)])
def test_what_is_frozen_is_skipped_and_everything_else_learns_as_under_an_adam_that_skips_it(tiny_task, decay, clip):
    start, mask = weights(SMALL, tiny_task), qk_of_head_1()
    freeze = Freeze(**QK, schedule=Schedule(start=3, stop=9))
    training = Training(SMALL, tiny_task, start, freeze, decay=decay, clip=clip, steps=14)
    slow = SlowAdam(tiny_task, SMALL, start, decay=decay, clip=clip or math.inf)
    for k in range(14):
        frozen, before = 3 <= k < 9, snapshot(training)[QKV]
        result = training.update(k)
        assert result[2].tolist() == pytest.approx(slow.update(k, {QKV: mask} if frozen else {}), rel=1e-9)
        slow.agrees(training)
        for old, new in zip(before, snapshot(training)[QKV], strict=True):
            assert torch.equal(old[mask], new[mask]) == frozen
            assert (old != new)[~mask].all()


def test_weights_let_go_start_as_gently_as_at_the_beginning_of_a_run(tiny_task):
    # the first update of Adam moves every weight by the learning rate, whatever its gradient
    training = Training(SMALL, tiny_task, weights(SMALL, tiny_task), Freeze(**QK, schedule=Schedule(stop=30)))
    for k in range(30):
        training.update(k)
    before, mask = training.values[QKV].detach().clone(), qk_of_head_1()
    training.update(30)
    moved = (training.values[QKV].detach() - before)[mask].abs()
    assert moved.max() < 1.001e-2 and moved.median() == pytest.approx(1e-2, rel=1e-2)


def test_before_its_window_a_frozen_run_is_bitwise_the_free_one(tiny_task):
    start = weights(SMALL, tiny_task, dtype=torch.float32)
    late, free = (Training(SMALL, tiny_task, start, *w, clip=1.0) for w in ([Freeze(**QK, schedule=at(5))], []))
    for k in range(6):
        late.update(k), free.update(k)
        assert all(torch.equal(value, free.values[name]) for name, value in late.values.items()) == (k < 5)


def at(step):
    """A window of one step."""
    return Schedule(start=step, stop=step + 1)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_ramp_scales_how_far_weights_and_moments_move_and_what_counts_in_the_norm(tiny_task, share):
    start, mask = weights(SMALL, tiny_task), qk_of_head_1()
    ramp = Schedule(start=6 - round(4 * share), ramp=4)
    half, free = Training(SMALL, tiny_task, start, Freeze(**QK, schedule=ramp)), Training(SMALL, tiny_task, start)
    step = 6
    half.gates[:step] = 0
    assert (half.gates[step] == share).all()
    # the update with nothing frozen, from the same state, is made by the free run
    for k in range(step):
        assert torch.equal(half.update(k), free.update(k))
    before, loose, held = snapshot(free), free.update(step), half.update(step)
    moved, ruled = snapshot(free), snapshot(half)
    for old, full, found in zip(before[QKV], moved[QKV], ruled[QKV], strict=True):
        assert ((found - (share * old + (1 - share) * full))[mask]).abs().max() < 1e-15
        assert torch.equal(found[~mask], full[~mask])
    gradient = (moved[QKV][1] - BETAS[0] * before[QKV][1])[mask].view(2, -1) / (1 - BETAS[0])
    expected = loose[2].square() - (1 - (1 - share) ** 2) * gradient.square().sum(1)
    assert (held[2].square() - expected).abs().max() < 1e-12


def with_doubled(values, *writers):
    """All activations with these weights, and with those that the writers select twice as large."""
    task = few_shot()
    plan, batch = plan_of(WITH_MLP, task, *writers), batch_of(task, dtype=torch.float64)
    (row,) = plan.changes
    change, mask = row.change, row.mask
    other = {**values, change.parameter: values[change.parameter] * (1 + mask)}
    return (run(WITH_MLP, each, batch)[1] for each in (values, other))


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_the_queries_keys_and_values_of_a_head_are_made_with_its_weights_alone(part):
    was, now = with_doubled(weights(WITH_MLP, few_shot()), Freeze(heads=["0:1"], parts=[f"W_{part.upper()}"]))
    for other in "qkv":
        site = f"blocks.0.attn.hook_{other}"
        assert torch.equal(now[site][:, :, :, 0], was[site][:, :, :, 0])
        assert torch.equal(now[site][:, :, :, 1], was[site][:, :, :, 1] * (2 if other == part else 1))


def test_what_a_head_writes_is_made_with_its_output_weights():
    values, out = weights(WITH_MLP, few_shot()), "blocks.0.hook_attn_out"
    was, now = with_doubled(values, Freeze(heads=["0:1"], parts=["W_O"]))
    written = torch.einsum(
        "mble,med->mbld", was["blocks.0.attn.hook_z"][:, :, :, 1], values["blocks.0.attn.W_O"][:, 4:]
    )
    assert (now[out] - was[out] - written).abs().max() < 1e-12


def test_the_weights_of_a_neuron_are_its_input_its_bias_and_its_output():
    plan = plan_of(WITH_MLP, few_shot(), Freeze(neurons=["1:5"]))
    values = weights(WITH_MLP, few_shot())
    chosen = {row.change.parameter: (row.mask > 0) for row in plan.changes}
    full = {name.removeprefix("blocks.1.mlp."): m.expand(values[name].shape) for name, m in chosen.items()}
    assert full["W_in"][:, :, 5].all() and full["b_in"][:, 5].all() and full["W_out"][:, 5].all()
    assert {name: mask.sum().item() for name, mask in full.items()} == {"W_in": 16, "b_in": 2, "W_out": 16}


def test_a_whole_block_is_named_by_its_beginning():
    plan = plan_of(WITH_MLP, few_shot(), Freeze(weights=["blocks.1", "unembed.W_U", "blocks.0.attn.W_K"]))
    named = {row.target for row in plan.changes}
    inside = {name for name in init_parameters(WITH_MLP, few_shot(), [0]) if name.startswith("blocks.1.")}
    assert named == inside | {"unembed.W_U", "blocks.0.attn.W_K"}


@pytest.mark.parametrize(("seed", "seeds"), [(None, [0, 1]), (7, [7, 7]), ([7, 8], [7, 8])])
def test_weights_set_anew_are_the_stated_draw_with_moments_from_zero(tiny_task, seed, seeds):
    start, mask, still = weights(SMALL, tiny_task), qk_of_head_1(), torch.zeros(2, dtype=torch.float64)
    training = Training(SMALL, tiny_task, start, Reinitialise(at(4), **QK, seed=seed))
    for k in range(4):
        training.update(k)
    before = {name: value.detach().clone() for name, value in training.values.items()}
    before[QKV][mask] = init_parameters(SMALL, tiny_task, seeds)[QKV].double()[mask]
    leaves = {name: value.requires_grad_() for name, value in before.items()}
    loss = losses(SMALL, leaves, batch_of(tiny_task, step=4, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), [leaves[QKV]])
    result = training.update(4, learning_rate=still)
    assert torch.allclose(result[0], loss, rtol=1e-14), "the batch is seen with the new weights"
    assert all(torch.equal(value, before[name]) for name, value in training.values.items())
    _, mean, square = snapshot(training)[QKV]
    assert ((mean - (1 - BETAS[0]) * gradient)[mask]).abs().max() < 1e-15
    assert ((square - (1 - BETAS[1]) * gradient**2)[mask]).abs().max() < 1e-15
    assert ((mean - (1 - BETAS[0]) * gradient)[~mask]).abs().max() > 1e-5


def test_weights_set_anew_learn_on_as_under_an_adam_that_begins_there(tiny_task):
    start, mask = weights(SMALL, tiny_task), qk_of_head_1()
    training = Training(SMALL, tiny_task, start, Reinitialise(at(5), **QK, seed=3))
    slow = SlowAdam(tiny_task, SMALL, start)
    for k in range(12):
        if k == 5:
            slow.values[QKV][mask] = init_parameters(SMALL, tiny_task, [3, 3])[QKV].double().numpy()[mask]
            for part in (slow.mean, slow.square, slow.count):
                part[QKV][mask] = 0
        slow.update(k, {})
        training.update(k)
        slow.agrees(training)


def test_weights_set_anew_where_they_are_frozen_stand_still_at_their_new_values(tiny_task):
    writers = [Freeze(**QK), Reinitialise(at(3), heads=["1:1"])]
    start, mask = weights(SMALL, tiny_task), qk_of_head_1()
    training = Training(SMALL, tiny_task, start, *writers)
    first = init_parameters(SMALL, tiny_task, [0, 1])[QKV].double()
    for k in range(6):
        training.update(k)
        values, expected = training.values[QKV], start[QKV] if k < 3 else first
        assert torch.equal(values[mask], expected[mask])


def test_members_that_are_not_chosen_train_as_if_nothing_was(tiny_task):
    start = weights(SMALL, tiny_task, dtype=torch.float32)
    writers = [Freeze(weights=["blocks.0"], members=[1]), Reinitialise(at(2), weights=["blocks.1"], members=[1])]
    changed, free = Training(SMALL, tiny_task, start, *writers), Training(SMALL, tiny_task, start)
    for k in range(5):
        changed.update(k), free.update(k)
    for name, value in changed.values.items():
        assert torch.equal(value[0], free.values[name][0])
        assert not torch.equal(value[1], free.values[name][1])
        assert torch.equal(value[1], start[name][1]) == name.startswith("blocks.0.")


@pytest.mark.parametrize("shares", [(0.25, 0.5), (0.5, 0.25)])
def test_where_freezes_overlap_the_stronger_one_counts(tiny_task, shares):
    start, whole = weights(SMALL, tiny_task), [Freeze(weights=[QKV]), Freeze(weights=["blocks.1.attn"])]
    both, one = Training(SMALL, tiny_task, start, *whole), Training(SMALL, tiny_task, start, *whole)
    both.gates[:], one.gates[:] = torch.tensor([shares[0], shares[1], 0])[:, None], torch.tensor([0, 0.5, 0])[:, None]
    for k in range(3):
        assert torch.equal(both.update(k), one.update(k))
    assert all(torch.equal(value, one.values[name]) for name, value in both.values.items())


def test_two_draws_of_the_same_weights_need_an_order_and_the_later_wins(tiny_task):
    def draws(first, second):
        return [
            Reinitialise(at(0), **QK, seed=7, order=first),
            Reinitialise(at(0), weights=[QKV], seed=8, order=second),
        ]

    with pytest.raises(ConfigError, match=r"^Reinitialise.order: got \[None, 2\], expected two different orders"):
        plan_of(SMALL, tiny_task, *draws(None, 2))
    mask, still = qk_of_head_1(), torch.zeros(2, dtype=torch.float64)
    for orders, seed in (((1, 2), 8), ((2, 1), 7)):
        training = Training(SMALL, tiny_task, weights(SMALL, tiny_task), *draws(*orders))
        training.update(0, learning_rate=still)
        drawn = init_parameters(SMALL, tiny_task, [seed, seed])[QKV].double()
        assert torch.equal(training.values[QKV][mask], drawn[mask])


def test_draws_of_different_weights_need_no_order(tiny_task):
    parts = [Reinitialise(at(0), heads=[head]) for head in ("1:0", "1:1")]
    plan = plan_of(SMALL, tiny_task, *parts)
    assert [row.name for row in plan.rows] == ["Reinitialise 1"] * 4 + ["Reinitialise 2"] * 4


@settings(max_examples=10)
@given(start=st.integers(0, 5), length=st.integers(1, 5), period=st.sampled_from([None, 1, 2, 3]))
def test_weights_stand_still_at_exactly_the_steps_at_which_the_schedule_is_on(start, length, period):
    task, mask = few_shot(), qk_of_head_1()
    schedule = Schedule(start=start, stop=start + length, period=period)
    training = Training(SMALL, task, weights(SMALL, task, dtype=torch.float32), Freeze(**QK, schedule=schedule))
    on = schedule.strength(np.arange(8), 4)
    for k in range(8):
        before = training.values[QKV].detach().clone()
        training.update(k)
        assert (training.values[QKV] == before)[mask].all() == (on[k] > 0)
    assert training.counts.fired.tolist() == [[int(on.sum())] * 2] * 2


def test_a_gradient_that_is_no_number_does_not_move_what_is_frozen(tiny_task):
    start = weights(SMALL, tiny_task, dtype=torch.float32)
    start["embed.W_F"][0, 0, 0] = float("nan")
    training = Training(SMALL, tiny_task, start, Freeze(weights=["blocks.0"]))
    training.update(0)
    kept = snapshot(training)["blocks.0.attn.W_QKV"]
    assert torch.equal(kept[0], start["blocks.0.attn.W_QKV"]) and (kept[1] == 0).all() and (kept[2] == 0).all()


def test_what_changes_weights_is_listed_and_belongs_to_the_digest(tiny_task):
    plans = [
        plan_of(SMALL, tiny_task, *writers)
        for writers in (
            [],
            [Freeze(**QK)],
            [Freeze(**QK, members=[1])],
            [Reinitialise(at(2), **QK)],
            [Reinitialise(at(2), **QK, seed=1)],
        )
    ]
    assert len({plan.digest() for plan in plans}) == len(plans)
    row = plans[4].describe()[1]
    assert row["writer"] == "Reinitialise" and row["site"] == "blocks.1.attn.W_K" and row["selection"] == "heads [1]"
    assert row["value"] == "Fresh(seed=1)" and row["schedule"] == "steps 2 to 3" and row["gradient"] == "flows"


def test_gates_of_interventions_keep_their_rows_before_those_of_weights(tiny_task):
    plan = plan_of(SMALL, tiny_task, Freeze(**QK), Ablate(heads=["0:0"]), Reinitialise(at(2), heads=["0:1"]))
    assert plan.rows[0].target == "blocks.0.attn.hook_v"
    assert [row.name for row in plan.rows] == ["Ablate", *["Reinitialise"] * 4, "Freeze", "Freeze"]
    assert [row.gate for row in plan.rows] == list(range(7))


def test_a_weight_is_found_by_the_names_it_has():
    table = WITH_MLP.parameters(few_shot())
    assert table.find("blocks.0.attn.W_Q", "f") == ["blocks.0.attn.W_Q"]
    assert table.find("ln_final", "f") == ["ln_final.w", "ln_final.b"]
    with pytest.raises(ConfigError, match=r"^f: got 'blocks.0.mlp.W_inn', .*; nearest: blocks.0.mlp.W_in, "):
        table.find("blocks.0.mlp.W_inn", "f")


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no g++ or clang++ on the path: the step can only run eagerly")
def test_the_compiled_step_freezes_and_draws_as_the_eager_one_and_switching_recompiles_nothing(tiny_task):
    tiny, mask = Transformer(layers=1, width=4, heads=2), slice(0, 2)
    blinking = [
        Freeze(heads=["0:0"], parts=["W_Q"], schedule=Schedule(start=4, period=4)),
        Reinitialise(Schedule(start=9, period=10, duty=0.1), heads=["0:1"]),
    ]
    start = weights(tiny, tiny_task, dtype=torch.float32)
    eager, compiled = (Training(tiny, tiny_task, start, *blinking, rate=1e-3, clip=0.5, steps=60) for _ in range(2))
    compiled.call = compile_step(compiled.step)
    compiled.update(0), eager.update(0)
    compiled_once = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for k in range(1, 60):
        before = compiled.values["blocks.0.attn.W_QKV"][:, :, mask].detach().clone()
        assert (compiled.update(k) - eager.update(k))[0].abs().max() < 1e-5
        frozen = torch.equal(before, compiled.values["blocks.0.attn.W_QKV"][:, :, mask])
        assert frozen == bool(eager.gates[k, 4, 0]), "bit for bit when compiled too"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled_once
    assert torch.equal(eager.counts.fired, compiled.counts.fired) and (eager.counts.fired > 0).all()
