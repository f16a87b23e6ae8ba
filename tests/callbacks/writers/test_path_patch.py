"""Claims about the writer that patches paths."""

from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch

from opsin.callbacks import Ablate, Graft, PathPatch
from opsin.errors import ConfigError
from opsin.interventions.apply import run_passes
from opsin.interventions.donors import donor_from
from opsin.interventions.schedules import Schedule
from opsin.model.transformer import Transformer
from opsin.reports.sites import sites_report
from opsin.tasks import FewShot, GaussianClusters
from opsin.training.module import OpsinModule
from tests.helpers.toys import SMALL, ToyTokens, Training, batch_of, few_shot, inputs_of, plan_of, run, weights

TASK = few_shot()
BATCH = batch_of(TASK, dtype=torch.float64)
WITH_MLP = replace(SMALL, mlp_ratio=2.0, positions="sinusoidal")
VALUES = weights(SMALL, TASK)
KEYS = "blocks.1.attn.hook_k"


def seen_with(*writers, values=VALUES, gate=1.0):
    plan = plan_of(SMALL, TASK, *writers)
    return run(SMALL, values, BATCH, run_passes(plan, inputs_of(plan, SMALL, values, BATCH, gate)))[1]


def readers_of_block_zero(model):
    """All that may read a head of block 0."""
    heads = [f"{layer}:{h}.{part}" for layer in range(1, model.layers) for h in range(model.heads) for part in "qkv"]
    mlps = [f"{layer}:mlp" for layer in range(model.layers)] if model.neurons else []
    return [*heads, *mlps, "logits"]


def test_a_path_is_patched_at_the_named_positions_and_members_alone():
    plain, cut = seen_with(), seen_with(PathPatch(["0:1"], ["1:0.k"]))
    chosen = seen_with(PathPatch(["0:1"], ["1:0.k"], positions=[2, 4], members=[1]))
    expected = plain[KEYS].clone()
    expected[1, :, [2, 4], 0] = cut[KEYS][1, :, [2, 4], 0]
    assert torch.equal(chosen[KEYS], expected) and not torch.equal(expected, plain[KEYS])


def test_a_gate_of_zero_leaves_the_run_as_it_is_and_half_a_gate_goes_half_way():
    plain, cut, writer = seen_with(), seen_with(PathPatch(["0:1"], ["1:0.k"])), PathPatch(["0:1"], ["1:0.k"])
    assert torch.equal(seen_with(writer, gate=0.0)["hook_logits"], plain["hook_logits"])
    torch.testing.assert_close(seen_with(writer, gate=0.5)[KEYS], (plain[KEYS] + cut[KEYS]) / 2)


def test_several_senders_add_up_and_receivers_are_patched_each_by_itself():
    together = seen_with(PathPatch(["0:0", "0:1"], ["1:0.k", "1:1.v"]))
    apart = seen_with(PathPatch(["0:0", "0:1"], ["1:0.k"]), PathPatch(["0:1", "0:0", "0:1"], ["1:1.v", "1:1.v"]))
    assert torch.equal(together["hook_logits"], apart["hook_logits"])
    without = seen_with(Ablate(heads=["0:0", "0:1"]))
    for name, head in ((KEYS, 0), ("blocks.1.attn.hook_v", 1)):
        torch.testing.assert_close(together[name][:, :, :, head], without[name][:, :, :, head], rtol=1e-11, atol=1e-12)


def test_receivers_that_differ_in_their_head_alone_are_one_intervention():
    writer = PathPatch(["0:1", "embed"], ["1:1.k", "logits", "1:0.k", "1:1.q"])
    found = [(item.site, item.selection.heads) for item in writer.interventions(SMALL.sites(TASK))]
    assert found == [(KEYS, (0, 1)), ("hook_logits", None), ("blocks.1.attn.hook_q", (1,))]


def test_of_two_patches_of_one_receiver_the_later_holds():
    alone = seen_with(PathPatch(["embed"], ["1:0.k"]))
    patched = seen_with(PathPatch(["embed"], ["1:0.k"], order=1), PathPatch(["0:1"], ["1:0.k"], order=0))
    assert torch.equal(patched["hook_logits"], alone["hook_logits"])


def test_two_patches_of_one_receiver_without_an_order_stop_the_build():
    with pytest.raises(ConfigError, match=r"PathPatch.order: got .*both overwrite blocks.1.attn.hook_k"):
        plan_of(SMALL, TASK, PathPatch(["0:1"], ["1:0.k"]), PathPatch(["embed"], ["1:1.k", "1:0.k"]))


def test_other_heads_of_one_layer_may_be_patched_apart():
    apart = seen_with(PathPatch(["0:1"], ["1:0.k"]), PathPatch(["0:1"], ["1:1.k"]))
    together = seen_with(PathPatch(["0:1"], ["1:0.k", "1:1.k"]))
    torch.testing.assert_close(apart["hook_logits"], together["hook_logits"], rtol=1e-11, atol=1e-12)


def test_the_plain_pass_is_shared_and_only_what_is_read_is_kept():
    writers = [PathPatch(["0:1"], ["1:0.k", "logits"], "plain"), PathPatch(["embed"], ["1:0.v"], "plain")]
    plain, trained = plan_of(SMALL, TASK, *writers).passes
    assert plain.keeps == ("blocks.0.attn.hook_z", "hook_embed")
    kept = ("blocks.0.attn.hook_z", "blocks.0.hook_attn_out", "blocks.0.hook_resid_pre", "blocks.1.hook_attn_out")
    assert trained.keeps == kept
    (alone,) = plan_of(SMALL, TASK, PathPatch(["embed"], ["1:0.v"])).passes
    assert alone.keeps == ("blocks.0.hook_attn_out",)


def test_inside_a_donor_it_is_the_donors_weights_that_are_patched():
    donors = weights(SMALL, TASK, seeds=(5, 6))
    donor = donor_from("donor", SMALL, {name: value[:1] for name, value in donors.items()})
    path, end = PathPatch(["0:1"], ["1:0.k"]), "blocks.1.hook_resid_post"
    expected = seen_with(path, values={name: value[:1].expand_as(value) for name, value in donors.items()})
    grafted = seen_with(Graft(donor, 1, "lower", donor_callbacks=[path]))
    torch.testing.assert_close(grafted[end], expected[end], rtol=1e-12, atol=1e-12)


def test_the_report_names_senders_and_what_replaces_them_and_says_that_gradient_flows():
    plan = plan_of(SMALL, TASK, PathPatch(["0:1", "embed"], ["1:0.k", "1:1.k"], "mean", schedule=Schedule(2, 6)))
    (row,) = plan.describe()
    assert row == {
        "pass": "1",
        "writer": "PathPatch",
        "site": KEYS,
        "selection": "heads [0, 1]",
        "value": "PathPatched(senders='0:1, embed', by='mean', detach=False)"
        " from this pass hook_embed, this pass blocks.0.attn.hook_z",
        "gradient": "flows",
        "schedule": "steps 2 to 6",
    }
    assert "PathPatched(senders='0:1," in sites_report(SMALL.sites(TASK), 2, 4, plan)


@pytest.mark.parametrize("value", ["zero", "mean", "resample"])
def test_adam_moves_nothing_of_a_head_whose_every_path_is_cut(value):
    values = weights(WITH_MLP, TASK, dtype=torch.float32)
    training = Training(WITH_MLP, TASK, values, PathPatch(["0:1"], readers_of_block_zero(WITH_MLP), value))
    for k in range(5):
        training.update(k)
    moved = training.values["blocks.0.attn.W_O"] != values["blocks.0.attn.W_O"]
    assert not moved[:, 4:].any() and moved[:, :4].all()


@pytest.mark.slow
def test_a_run_with_patched_paths_trains_and_compiles_to_the_same():
    def trained(compiled):
        task = FewShot(GaussianClusters(classes=60, features=16), batch_size=8)
        small = {"steps_per_batch": 10, "log_every": 5, "probe_size": 16, "learning_rate": 0.01}
        model = OpsinModule(task, Transformer(width=16, heads=2), 1, compile=compiled, **small)
        writers = [
            PathPatch(["0:1", "embed"], ["1:0.k", "1:1.k"], schedule=Schedule(start=5)),
            PathPatch(["0:0"], ["1:1.v"], "mean"),
            PathPatch(["0:0"], ["logits"], "resample"),
            PathPatch(["0:1"], ["1:0.v"], "plain"),
            Ablate(heads=["0:1"], value="mean"),
        ]
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        pl.Trainer(max_steps=20, callbacks=writers, accelerator="cpu", limit_val_batches=0, **quiet).fit(model)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.allclose(trained(False), trained(True), atol=1e-4)


@pytest.mark.parametrize(
    ("model", "settings", "field", "value"),
    [
        (SMALL, {"senders": [], "receivers": ["logits"]}, "PathPatch.senders", []),
        (SMALL, {"senders": ["0:1"], "receivers": []}, "PathPatch.receivers", []),
        (SMALL, {"senders": ["0:1"], "receivers": ["logits"], "value": "noise"}, "PathPatch.value", "noise"),
        (SMALL, {"senders": ["0:1"], "receivers": ["logits"], "detach": True}, "PathPatch.detach", True),
        (SMALL, {"senders": ["0:2"], "receivers": ["logits"]}, "PathPatch.senders", "0:2"),
        (SMALL, {"senders": ["0:1"], "receivers": ["2:0.k"]}, "PathPatch.receivers", "2:0.k"),
        (SMALL, {"senders": ["0:mlp"], "receivers": ["logits"]}, "PathPatch.senders", "0:mlp"),
        (SMALL, {"senders": ["0:1"], "receivers": ["1:mlp"]}, "PathPatch.receivers", "1:mlp"),
        (SMALL, {"senders": ["0:1"], "receivers": ["logits", "0:0.k"]}, "PathPatch.senders", "0:1"),
        (SMALL, {"senders": ["embed", "1:0"], "receivers": ["1:1.k"]}, "PathPatch.senders", "1:0"),
        (WITH_MLP, {"senders": ["1:1"], "receivers": ["0:mlp"]}, "PathPatch.senders", "1:1"),
        (WITH_MLP, {"senders": ["0:mlp"], "receivers": ["0:mlp"]}, "PathPatch.senders", "0:mlp"),
        (WITH_MLP, {"senders": ["pos_embed"], "receivers": ["0:1.k"], "value": "mean"}, "PathPatch.value", "mean"),
        (SMALL, {"senders": ["0:1"], "receivers": ["1:1.k"], "positions": [9]}, "PathPatch.positions", 9),
        (SMALL, {"senders": ["0:1"], "receivers": ["1:1.k"], "members": [2]}, "PathPatch.members", 2),
    ],
)
def test_a_path_that_does_not_exist_is_refused(model, settings, field, value):
    with pytest.raises(ConfigError) as refused:
        plan_of(model, TASK, PathPatch(**settings))
    assert (refused.value.field, refused.value.value) == (field, value)


@pytest.mark.parametrize(("sender", "receiver"), [("1:0", "1:mlp"), ("0:mlp", "1:0.q"), ("1:mlp", "logits")])
def test_a_head_may_send_to_the_mlp_of_its_block_and_an_mlp_to_the_next(sender, receiver):
    assert len(plan_of(WITH_MLP, TASK, PathPatch([sender], [receiver])).interventions) == 1


@pytest.mark.parametrize(
    "choices",
    [
        {"norm": "RMSNorm", "attention_biases": "qkvo"},
        {"tied": True, "final_norm": False, "attention_biases": "o"},
        {"norm_weight": False, "norm_bias": False, "mlp_layers": (0,), "attention_biases": "k"},
        {
            "positions": "relative",
            "attention": "linear",
            "unembed_bias": False,
            "mlp_bias": False,
            "activation": "relu",
        },
        {"norm": False, "positions": "none", "scale_scores": False},
    ],
)
def test_paths_of_every_choice_that_change_nothing_change_nothing(choices):
    """What is made anew from its terms, as they are in a pass without interventions, is what it was."""
    model = replace(SMALL, mlp_ratio=1, **choices)
    task = ToyTokens()
    values, batch = weights(model, task), batch_of(task)
    receivers = ["1:0.q", "1:1.k", "1:0.v", "logits"]
    plan = plan_of(model, task, PathPatch(["embed", "0:1", "0:mlp"], receivers, value="plain"))
    tap = run_passes(plan, inputs_of(plan, model, values, batch))
    torch.testing.assert_close(run(model, values, batch, tap)[0], run(model, values, batch)[0], rtol=1e-10, atol=1e-10)
    cut = plan_of(model, task, PathPatch(["0:1"], receivers))
    tap = run_passes(cut, inputs_of(cut, model, values, batch))
    assert not torch.allclose(run(model, values, batch, tap)[0], run(model, values, batch)[0])


def test_a_gated_mlp_receives_no_path():
    model = replace(SMALL, mlp_ratio=1, gated=True)
    with pytest.raises(ConfigError, match=r"PathPatch.receivers: got '1:mlp', .* a gated MLP reads its input twice"):
        plan_of(model, few_shot(), PathPatch(["0:1"], ["1:mlp"]))
