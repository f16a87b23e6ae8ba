"""Claims about writers whose values come from another pass."""

import lightning.pytorch as pl
import pytest
import torch

from opsin.callbacks import Ablate, Clamp, CopyFromPattern, HeadTemperature, PerfectPreviousInput, Preserve
from opsin.errors import ConfigError
from opsin.interventions.apply import run_passes
from opsin.interventions.schedules import Schedule
from opsin.model.transformer import Transformer
from opsin.reports.sites import sites_report
from opsin.tasks import FewShot, GaussianClusters
from opsin.training.module import OpsinModule
from tests.helpers.toys import SMALL, batch_of, few_shot, inputs_of, plan_of, run, weights

DEEP = Transformer(layers=3, width=8, heads=2)


class Case:
    """A model on one batch in double precision."""

    def __init__(self, model=SMALL):
        self.model, self.task = model, few_shot()
        self.batch, self.values = batch_of(self.task, dtype=torch.float64), weights(model, self.task)

    def tap(self, *writers, values=None, gate=1.0):
        plan = plan_of(self.model, self.task, *writers)
        values = self.values if values is None else values
        return run_passes(plan, inputs_of(plan, self.model, values, self.batch, gate))

    def run(self, *writers):
        return run(self.model, self.values, self.batch, self.tap(*writers))

    def gradients(self, *writers):
        leaves = {name: value.clone().requires_grad_() for name, value in self.values.items()}
        loss = self.loss(leaves, *writers)
        return leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)

    def loss(self, values, *writers):
        """Some smooth function of the scored logits that are not ruled out."""
        logits, _ = run(self.model, values, self.batch, self.tap(*writers, values=values))
        last = logits[:, :, -1].masked_fill(logits[:, :, -1] <= -1e9, 0.0)
        return (last * torch.linspace(-1, 1, last.numel(), dtype=torch.float64).view_as(last) + last.square()).sum()


@pytest.mark.parametrize(
    ("what", "site"),
    [
        ("patterns", "attn.hook_pattern"),
        ("values", "attn.hook_v"),
        ("queries", "attn.hook_rot_q"),
        ("keys", "attn.hook_rot_k"),
    ],
)
def test_what_is_preserved_beside_an_ablation_is_what_it_was_without(what, site):
    case = Case(DEEP)
    _, plain = case.run()
    _, held = case.run(Ablate(sites=["blocks.0.hook_attn_out"]), Preserve([what]))
    _, lost = case.run(Ablate(sites=["blocks.0.hook_attn_out"]))
    for layer in (1, 2):
        name = f"blocks.{layer}.{site}"
        assert torch.equal(held[name], plain[name]) and not torch.allclose(lost[name], plain[name])


def test_only_the_named_layers_are_preserved():
    case = Case(DEEP)
    _, plain = case.run()
    _, held = case.run(Ablate(heads=["0:0", "0:1"]), Preserve(["patterns"], layers=[2]))
    assert torch.equal(held["blocks.2.attn.hook_pattern"], plain["blocks.2.attn.hook_pattern"])
    assert not torch.allclose(held["blocks.1.attn.hook_pattern"], plain["blocks.1.attn.hook_pattern"])


def test_an_ablation_of_higher_order_wins_over_preserved_values():
    _, seen = Case().run(Preserve(["values"], order=0), Ablate(heads=["1:0"], order=1))
    assert (seen["blocks.1.attn.hook_v"][:, :, :, 0] == 0).all() and (seen["blocks.1.attn.hook_v"] != 0).any()


def test_a_temperature_divides_the_scores_of_its_head_alone():
    case = Case()
    _, plain = case.run()
    _, seen = case.run(HeadTemperature({"1:1": 0.5}))
    name = "blocks.1.attn.hook_attn_scores"
    assert torch.equal(seen[name][:, :, 0], plain[name][:, :, 0])
    assert torch.equal(seen[name][:, :, 1], plain[name][:, :, 1] / 0.5)


def test_a_copied_pattern_is_the_logit_of_the_label_it_falls_on():
    case = Case()
    _, plain = case.run()
    logits, _ = case.run(CopyFromPattern("1:0"))
    scores = plain["blocks.1.attn.hook_attn_scores"][:, :, 0, -1]
    tokens = case.batch.tokens
    for member in range(2):
        for item in range(tokens.shape[1]):
            expected = torch.full((case.task.n_outputs,), -1e9, dtype=torch.float64)
            for index, token in enumerate(tokens[member, item]):
                expected[token] = scores[member, item, 2 * index + 1]
            assert torch.equal(logits[member, item, -1], expected)
    assert torch.equal(logits[:, :, :-1], plain["hook_logits"][:, :, :-1])


def test_other_writers_do_not_touch_what_is_copied():
    case = Case()
    alone, _ = case.run(CopyFromPattern("1:0"))
    beside, _ = case.run(CopyFromPattern("1:0"), Ablate(heads=["0:0", "1:1"]), Clamp(["0:1"], "previous_token"))
    assert torch.equal(alone[:, :, -1], beside[:, :, -1])


def test_perfect_input_lets_layer_one_look_where_labels_carry_their_exemplars():
    case = Case()
    _, plain = case.run()
    _, seen = case.run(PerfectPreviousInput())
    embedding = plain["hook_embed"]
    assert torch.equal(seen["blocks.0.hook_resid_post"], embedding)
    assert torch.equal(seen["blocks.1.attn.hook_v"], run_from(case, embedding)["blocks.1.attn.hook_v"])
    moved = embedding[:, :, [0, 0, 1, 2, 4]]
    assert torch.equal(seen["blocks.1.attn.hook_pattern"], run_from(case, moved)["blocks.1.attn.hook_pattern"])


def run_from(case, resid):
    """All activations when block 0 hands on ``resid``."""

    def tap(name, activation):
        return resid if name == "blocks.0.hook_resid_post" else activation

    return run(case.model, case.values, case.batch, tap)[1]


def test_under_perfect_input_block_zero_gets_exactly_no_gradient():
    leaves, gradients = Case().gradients(PerfectPreviousInput())
    for name, gradient in zip(leaves, gradients, strict=True):
        assert (gradient == 0).all() == name.startswith("blocks.0.")


@pytest.mark.parametrize(
    "writers",
    [
        lambda detach: [Preserve(["patterns"], layers=[1], detach=detach), Ablate(sites=["blocks.0.hook_attn_out"])],
        lambda detach: [HeadTemperature({"1:0": 0.5}, detach=detach), Ablate(sites=["blocks.0.hook_attn_out"])],
        lambda detach: [CopyFromPattern("1:0", detach=detach)],
    ],
)
def test_gradient_flows_into_the_other_pass_unless_it_is_detached(writers):
    # block 0 reaches the loss through the other pass alone
    for detach in (False, True):
        leaves, gradients = Case().gradients(*writers(detach))
        reached = dict(zip(leaves, gradients, strict=True))["blocks.0.attn.W_QKV"]
        assert (reached == 0).all() == detach


@pytest.mark.parametrize(
    "writers",
    [
        [Preserve(["patterns", "values"], layers=[1]), Ablate(sites=["blocks.0.hook_attn_out"])],
        [HeadTemperature({"1:0": 0.5})],
        [CopyFromPattern("1:0")],
        [PerfectPreviousInput()],
        [CopyFromPattern("1:1", perfect_input=True)],
    ],
)
def test_the_gradient_through_every_pass_is_the_finite_difference(writers):
    case, step = Case(), 1e-6
    leaves, gradients = case.gradients(*writers)
    direction = {
        name: torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view_as(value) for name, value in leaves.items()
    }
    ends = [
        case.loss({name: value.detach() + sign * step * direction[name] for name, value in leaves.items()}, *writers)
        for sign in (1, -1)
    ]
    slope = sum((gradient * direction[name]).sum() for name, gradient in zip(leaves, gradients, strict=True))
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-6, atol=1e-8)


def test_equal_passes_are_one_pass_and_nothing_is_kept_that_nobody_reads():
    plan = plan_of(SMALL, few_shot(), Preserve(["keys"]), HeadTemperature({"0:0": 2.0}), CopyFromPattern("1:0"))
    plain, trained = plan.passes
    assert trained.keeps == () and not plain.nested
    names = [f"blocks.{layer}.attn.hook_{what}" for layer in (0, 1) for what in ("attn_scores", "rot_k")]
    assert plain.keeps == tuple(sorted(names)) and plain.rows == ()


def test_a_pass_is_planned_after_those_it_takes_from():
    plan = plan_of(SMALL, few_shot(), PerfectPreviousInput())
    plain, moved, trained = plan.passes
    assert plain.keeps == ("blocks.0.hook_resid_pre",) and moved.keeps == ("blocks.1.attn.hook_pattern",)
    assert len(moved.rows) == 1 and len(trained.rows) == 2


def test_a_gate_of_zero_leaves_the_run_as_it_is():
    case = Case()
    plain, _ = case.run()
    tap = case.tap(Preserve(["values"], order=0), Ablate(heads=["1:0"], order=1), gate=0.0)
    assert torch.equal(run(case.model, case.values, case.batch, tap)[0], plain)


def test_the_report_says_which_pass_a_value_comes_from_and_whether_gradient_flows():
    text = sites_report(
        SMALL.sites(few_shot()), 1, 4, plan_of(SMALL, few_shot(), Preserve(["values"], layers=[1], detach=True))
    )
    (row,) = [line for line in text[text.index("plan ") :].splitlines() if "Preserve" in line]
    assert row.split()[:3] == ["1", "2", "Preserve"] and "pass 1" in row and "stops" in row


def test_a_run_with_three_passes_trains_and_compiles_to_the_same(graphs):
    def trained(compiled):
        task = FewShot(GaussianClusters(classes=60, features=16), batch_size=8)
        small = {"steps_per_batch": 10, "log_every": 5, "probe_size": 16, "learning_rate": 0.01}
        model = OpsinModule(task, Transformer(width=16, heads=2), 1, compile=compiled, **small)
        writers = [PerfectPreviousInput(schedule=Schedule(start=5)), Ablate(heads=["1:0"])]
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        pl.Trainer(max_steps=20, callbacks=writers, accelerator="cpu", limit_val_batches=0, **quiet).fit(model)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.allclose(trained(False), trained(True), atol=1e-4) and graphs() == 1


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Preserve([]), "Preserve.what"),
        (lambda: Preserve(["scores"]), "Preserve.what"),
        (lambda: Preserve(["keys"], layers=[2]), "Preserve.layers"),
        (lambda: HeadTemperature({"0:0": 0.0}), "HeadTemperature.temperatures[0:0]"),
        (lambda: HeadTemperature({}), "HeadTemperature.temperatures"),
        (lambda: HeadTemperature({"0:2": 1.0}), "HeadTemperature.temperatures"),
        (lambda: CopyFromPattern("2:0"), "CopyFromPattern.head"),
    ],
)
def test_what_cannot_be_taken_from_another_pass_is_refused(make, field):
    with pytest.raises(ConfigError) as refused:
        plan_of(SMALL, few_shot(), make())
    assert refused.value.field == field


def test_perfect_input_needs_a_second_layer():
    with pytest.raises(ConfigError, match=r"PerfectPreviousInput: got 1, expected a layer from 0 to 0"):
        plan_of(Transformer(layers=1, width=8, heads=2), few_shot(), PerfectPreviousInput())


def test_values_preserved_and_ablated_without_an_order_stop_the_build():
    with pytest.raises(ConfigError, match=r"order: got .*both overwrite blocks.0.attn.hook_v"):
        plan_of(SMALL, few_shot(), Preserve(["values"]), Ablate(heads=["0:0"]))


@pytest.mark.parametrize(
    "make",
    [
        lambda members: [Preserve(["patterns"], members=members), Ablate(heads=["0:0", "0:1"])],
        lambda members: [HeadTemperature({"1:0": 0.5}, members=members)],
        lambda members: [PerfectPreviousInput(members=members)],
        lambda members: [CopyFromPattern("1:0", members=members)],
    ],
)
def test_other_members_are_bitwise_as_without_the_writer(make):
    case = Case()
    chosen, rest = case.run(*make([1]))[0], case.run(*make([1])[1:])[0]
    everyone = case.run(*make(None))[0]
    assert torch.equal(chosen[0], rest[0]) and torch.equal(chosen[1], everyone[1])
    assert (chosen[1] != rest[1]).any()
