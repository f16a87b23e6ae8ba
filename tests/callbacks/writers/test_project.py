"""Claims about Project: what it leaves on models whose answer is known, and when a run takes its directions."""

from __future__ import annotations

from itertools import pairwise

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from opsin.callbacks import Ablate, InductionHeads, KeepRun, Project
from opsin.errors import ConfigError, IdleError
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.directions import LearnedDirections, WeightDirections
from opsin.interventions.values.nullspace import learn_directions
from opsin.interventions.values.subspaces import along
from opsin.model.transformer import Transformer
from opsin.reports.sites import sites_report
from opsin.tasks import FewShot, GaussianClusters
from opsin.training.module import OpsinModule
from opsin.training.probe import observe
from tests.helpers.killers import KillAt, Killed
from tests.helpers.toys import SMALL, batch_of, few_shot, hand_batch, plan_of, run, tap_of, train, weights

FOUR = few_shot(n_labels=4)
CONTEXT = hand_batch(classes=[[0, 1, 0], [0, 1, 1]], labels=[[2, 3], [1, 0]], answers=[2, 0])
LINE = Transformer(layers=1, width=8, heads=2, norm=False)
DIRECTION = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.0, 0.0, -1.0], dtype=torch.float64)
MLP = Transformer(layers=2, width=8, heads=2, mlp_ratio=1.0, positions="learned")
MIDDLE = "blocks.0.hook_resid_post"


def on_a_line():
    """Every token is embedded along one direction, as far as its number, and the logits read that direction alone."""
    values = {name: torch.zeros_like(value) for name, value in weights(LINE, FOUR, [0]).items()}
    unit = DIRECTION / DIRECTION.norm()
    values["embed.W_E"][0] = torch.arange(1.0, 5.0, dtype=torch.float64)[:, None] * unit
    values["blocks.0.attn.W_QKV"][0, :, 16:] = values["blocks.0.attn.W_O"][0] = torch.eye(8, dtype=torch.float64)
    values["unembed.W_U"][0] = unit[:, None] * torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    values["unembed.b_U"][0] = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    return values


def logits_on_the_line(*writers, gate=1.0):
    tap = tap_of(LINE, FOUR, CONTEXT, *writers, gate=gate, members=1)
    return run(LINE, on_a_line(), CONTEXT, tap)[0]


def test_without_the_direction_that_holds_the_label_the_logits_are_constant():
    free, bias = logits_on_the_line(), on_a_line()["unembed.b_U"]
    assert free.std((0, 1, 2)).min() > 0.1
    lost = logits_on_the_line(Project(MIDDLE, [(7 * DIRECTION).tolist()]))
    assert (lost - bias).abs().max() < 1e-12


def test_keeping_only_that_direction_or_removing_another_changes_no_logit():
    free, across = logits_on_the_line(), [[2.0, 1.0] + [0.0] * 6]
    assert (logits_on_the_line(Project(MIDDLE, [DIRECTION.tolist()], mode="keep")) - free).abs().max() < 1e-12
    assert (logits_on_the_line(Project(MIDDLE, across)) - free).abs().max() < 1e-12


def test_about_the_mean_every_sequence_gets_the_mean_logits():
    free = logits_on_the_line()
    lost = logits_on_the_line(Project(MIDDLE, [DIRECTION.tolist()], about="mean"))
    assert (lost - free.mean(1, keepdim=True)).abs().max() < 1e-12 and (lost - free).abs().max() > 0.1


def test_half_a_gate_removes_half():
    free, bias = logits_on_the_line(), on_a_line()["unembed.b_U"]
    half = logits_on_the_line(Project(MIDDLE, [DIRECTION.tolist()]), gate=0.5)
    assert (half - bias - (free - bias) / 2).abs().max() < 1e-12


def seen(*writers, model=MLP):
    task = few_shot()
    batch = batch_of(task, dtype=torch.float64)
    return run(model, weights(model, task), batch, tap_of(model, task, batch, *writers))[1]


FULL = {  # width of the last axis
    "hook_embed": 8,
    "hook_pos_embed": 8,
    "blocks.0.attn.hook_z": 4,
    "blocks.1.mlp.hook_post": 8,
    "blocks.1.ln2.hook_normalized": 8,
    "hook_logits": 5,
}


@pytest.mark.parametrize("site", FULL)
def test_away_from_the_whole_space_is_an_ablation_and_onto_it_nothing(site):
    free, everything = seen(), np.eye(FULL[site]).tolist()
    abouts = ["zero"] if site == "hook_pos_embed" else ["zero", "mean"]
    for about in abouts:
        ablated = seen(Ablate(sites=[site], value=about))
        removed = seen(Project(site, everything, about=about))
        kept = seen(Project(site, everything, about=about, mode="keep"))
        assert (removed[site] - ablated[site]).abs().max() < 1e-12
        assert (removed["hook_logits"] - ablated["hook_logits"]).abs().max() < 1e-9
        assert (kept["hook_logits"] - free["hook_logits"]).abs().max() < 1e-9


def test_only_the_selected_heads_positions_and_members_are_projected():
    free, row = seen(), [[1.0, 2.0, -1.0, 0.5]]
    z = "blocks.1.attn.hook_z"
    held = seen(Project(z, row, heads=["1:1"], positions=[0, 3], members=[1]))[z]
    changed = (held != free[z]).any(-1).any(1)  # M L H
    expected = torch.zeros(2, 5, 2, dtype=torch.bool)
    expected[1, [0, 3], 1] = True
    assert torch.equal(changed, expected)


def test_one_after_another_in_their_order():
    axis, diagonal = torch.eye(8)[:1].tolist(), (torch.eye(8)[:1] + torch.eye(8)[1:2]).tolist()
    x = seen(Project(MIDDLE, axis, order=1), Project(MIDDLE, diagonal, order=2))[MIDDLE]
    y = seen(Project(MIDDLE, axis, order=2), Project(MIDDLE, diagonal, order=1))[MIDDLE]
    assert (x @ torch.tensor(diagonal[0]).double()).abs().max() < 1e-12 and (y[..., 0].abs().max() < 1e-12)
    assert x[..., 0].abs().max() > 0.1


def test_two_on_one_site_without_an_order_stop_the_build():
    with pytest.raises(ConfigError, match=r"Project.order: got .*both overwrite blocks.0.hook_resid_post"):
        plan_of(SMALL, few_shot(), Project(MIDDLE, [[1.0] * 8]), Project(MIDDLE, [[1.0] + [0.0] * 7]))


def test_the_plan_says_that_gradient_flows_and_knows_other_directions_apart():
    plans = [plan_of(SMALL, few_shot(), Project(MIDDLE, [[1.0] + [end] * 7])) for end in (0.0, 0.5)]
    assert plans[0].digest() != plans[1].digest()
    text = sites_report(SMALL.sites(few_shot()), 1, 4, plans[0])
    (row,) = [line for line in text[text.index("plan ") :].splitlines() if "Project" in line]
    assert "flows" in row and MIDDLE in row


# ---- refused --------------------------------------------------------------------------------------

ROW = [[1.0] * 8]


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Project(MIDDLE), "Project"),
        (lambda: Project(MIDDLE, ROW, learn=LearnedDirections()), "Project"),
        (lambda: Project(MIDDLE, ROW, mode="lose"), "Project.mode"),
        (lambda: Project(MIDDLE, ROW, about="median"), "Project.about"),
        (lambda: Project(MIDDLE, [[1.0] * 7]), "Project.directions"),
        (lambda: Project(MIDDLE, [[0.0] * 8]), "Project.directions"),
        (lambda: Project("blocks.0.hook_resid_past", ROW), "Project.site"),
        (lambda: Project("blocks.0.attn.hook_pattern", [[1.0] * 5]), "Project.site"),
        (lambda: Project("blocks.0.ln1.hook_scale", [[1.0]]), "Project.site"),
        (lambda: Project("hook_pos_embed", ROW, about="mean"), "Project.site"),
        (lambda: Project("hook_pos_embed", learn=LearnedDirections()), "Project.site"),
        (lambda: Project(MIDDLE, ROW, heads=["0:0"]), "Project.heads"),
        (lambda: Project("blocks.0.attn.hook_z", [[1.0] * 4], heads=["1:0"]), "Project.heads"),
        (lambda: Project("blocks.0.attn.hook_z", [[1.0] * 4], heads=["0:2"]), "Project.heads"),
        (lambda: Project(MIDDLE, ROW, positions=[5]), "Project.positions"),
        (lambda: Project(MIDDLE, ROW, members=[2]), "Project.members"),
        (lambda: Project(MIDDLE, weight=WeightDirections(name="unembed.W_U", rank=9)), "Project.weight.rank"),
        (lambda: Project(MIDDLE, weight=WeightDirections(name="unembed.W_U", at=1)), "Project.weight.at"),
    ],
)
def test_what_cannot_be_projected_is_refused_when_the_plan_is_made(make, field):
    with pytest.raises(ConfigError) as refused:
        plan_of(MLP, few_shot(), make())
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Project(MIDDLE, weight=WeightDirections(name="unembed.W")), "Project.weight.name"),
        (lambda: Project(MIDDLE, weight=WeightDirections(name="unembed.W_U", side="output")), "Project.weight"),
        (lambda: Project(MIDDLE, weight=WeightDirections(name="unembed.W_U", rank=6)), "Project.weight.rank"),
        (lambda: Project(MIDDLE, learn=LearnedDirections(), positions=[0, 1]), "Project.positions"),
        (lambda: Project("hook_embed", learn=LearnedDirections(label="token")), "model.probe_size"),
    ],
)
def test_what_the_model_or_the_probe_cannot_give_is_refused_before_the_first_step(make, field):
    with pytest.raises(ConfigError) as refused:
        train(module(probe_size=17), 10, make())
    assert refused.value.field == field


# ---- while training -------------------------------------------------------------------------------


def module(seed=(3, 4), layers=2, **settings) -> OpsinModule:
    task = FewShot(GaussianClusters(classes=20, features=16), train_classes=12, batch_size=8)
    small = {"steps_per_batch": 10, "log_every": 5, "probe_size": 64, "learning_rate": 0.01, "compile": False}
    return OpsinModule(task, Transformer(layers, width=16, heads=2), list(seed), **{**small, **settings})


def flat(model: OpsinModule) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten(1) for parameter in model.parameters()], 1)


class Spy(pl.Callback):
    """The directions after every step, and the model's weights."""

    def __init__(self) -> None:
        self.bases, self.weights = [], []

    def on_fit_start(self, trainer, pl_module):
        self.module = pl_module
        pl_module.listen(1, self.look)

    def look(self, seen):
        self.bases.append(self.module.constants.supplied[0].clone())
        self.weights.append({name: x.detach().clone() for name, x in self.module.parameters_by_name().items()})


def spied(writer, steps=30, **settings) -> Spy:
    spy = Spy()
    train(module(**settings), steps, writer, spy)
    return spy


def changes(spy: Spy) -> list[int]:
    """Steps before which the directions changed; 0 where they were there from the beginning."""
    bases = [torch.zeros_like(spy.bases[0]), *spy.bases]
    return [step for step, (a, b) in enumerate(pairwise(bases)) if not torch.equal(a, b)]


WEIGHT = {"name": "unembed.W_U", "rank": 2}


@pytest.mark.parametrize("kind", ["weight", "learn"])
@pytest.mark.parametrize(
    ("times", "schedule", "expected"),
    [
        ({}, Schedule(), [0]),
        ({"every": 12}, Schedule(), [0, 12, 24]),
        ({}, Schedule(start=7), [7]),
        ({"at": 3, "every": 12}, Schedule(start=7), [3, 15, 27]),
        ({"at": 0}, Schedule(start=7, ramp=5), [0]),
        ({"every": 15}, Schedule(start=50, unit="sequences"), [7, 22]),
    ],
)
def test_directions_are_taken_at_their_steps_and_at_no_other(kind, times, schedule, expected):
    origin = WeightDirections(**WEIGHT, **times) if kind == "weight" else LearnedDirections(**times)
    spy = spied(Project(MIDDLE, **{kind: origin}, schedule=schedule))
    assert changes(spy) == expected


@pytest.mark.parametrize("part", ["top", "bottom"])
def test_directions_of_a_weight_are_those_it_has_when_they_are_taken(part):
    spy = spied(Project(MIDDLE, weight=WeightDirections(**WEIGHT, part=part, every=10)))
    for step in (0, 10, 20):
        for member in range(2):
            left, _, _ = np.linalg.svd(spy.weights[step]["unembed.W_U"][member].double().numpy(), full_matrices=False)
            vectors = torch.from_numpy(left[:, :2] if part == "top" else left[:, -2:])
            basis = spy.bases[step][member].double()
            assert torch.allclose(basis @ basis.T, vectors @ vectors.T, atol=1e-5)


def test_every_head_has_the_directions_of_its_own_part_of_the_weight():
    weight = WeightDirections(name="blocks.1.attn.W_O", rank=3)
    spy = spied(Project("blocks.1.attn.hook_z", heads=["1:1"], weight=weight), steps=5)
    for head in range(2):
        part = spy.weights[0]["blocks.1.attn.W_O"][0, 8 * head : 8 * head + 8].double().numpy()
        vectors = torch.from_numpy(np.linalg.svd(part, full_matrices=False)[0][:, :3])
        basis = spy.bases[0][0, head].double()
        assert torch.allclose(basis @ basis.T, vectors @ vectors.T, atol=1e-5)


def probe_of(model, parameters, site):
    """The activation of the probe that no intervention touches."""
    tap = lambda name, activation: activation  # noqa: E731
    return observe(model.network, parameters, model.constants.table, model.probe, tap, [site])[site]


@pytest.mark.parametrize(("site", "heads"), [("hook_embed", None), ("blocks.0.attn.hook_v", ["0:1"])])
def test_learned_directions_are_those_of_the_activation_that_is_not_projected(site, heads):
    learn = LearnedDirections(label="token", rounds=1, every=10)
    spy = spied(Project(site, learn=learn, heads=heads), seed=[3])
    for step in (0, 10, 20):
        x = probe_of(spy.module, spy.weights[step], site)[:, :, [1, 3]].double()
        x, got = (x, spy.bases[step][0]) if heads is None else (x[..., 1, :], spy.bases[step][0, 1])
        expected = learn_directions(x, spy.module.probe.tokens, 5, 1, x.shape[-1]).basis[0]
        got = got.double()
        assert (expected != 0).any(0).sum() == 4
        assert torch.allclose(got @ got.T, expected @ expected.T, atol=1e-4)
        if heads is not None:
            assert (spy.bases[step][0, 0] == 0).all()


def test_the_classifier_reads_the_token_before_and_is_at_chance_after():
    model = train(module(), 20, Project("hook_embed", learn=LearnedDirections(label="token", every=10)))
    names = [f"subspace/hook_embed/token/{name}" for name in ("accuracy_after_0", "accuracy_after_1", "chance")]
    before, after, chance = (model.history[name].arrays() for name in names)
    assert before[0].tolist() == after[0].tolist() == chance[0].tolist() == [0, 10, 20]
    assert before[1].shape == (3, 2) and (before[1] == 1).all()
    # with the labels' embeddings gone, what is left of every label is the same
    assert np.array_equal(after[1], chance[1])


def test_the_records_of_a_site_with_heads_name_the_head():
    learn = LearnedDirections(label="token")
    model = train(module(), 10, Project("blocks.0.attn.hook_v", heads=["0:1"], learn=learn))
    names = [name for name in model.history.names() if name.startswith("subspace/")]
    ends = ("accuracy_after_0", "accuracy_after_1", "chance")
    assert names == [f"subspace/blocks.0.attn.hook_v:1/token/{end}" for end in ends]


def test_readers_are_shown_the_first_state_with_its_directions():
    class Look(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.listen(100, self.look, ["hook_embed"])

        def look(self, seen):
            if seen.step == 0:
                self.embed = seen.activations["hook_embed"]

    look, spy = Look(), Spy()
    train(module(), 5, look, Project("hook_embed", weight=WeightDirections(name="embed.W_E", side="output")), spy)
    assert along(look.embed, spy.bases[0]).abs().max() < 1e-6 and (spy.bases[0] != 0).any()


WRITERS = {
    "weight": lambda: Project(MIDDLE, weight=WeightDirections(**WEIGHT, every=7), schedule=Schedule(start=5)),
    "weight once": lambda: Project(MIDDLE, weight=WeightDirections(**WEIGHT, at=2), schedule=Schedule(start=5)),
    "learn": lambda: Project(MIDDLE, learn=LearnedDirections(rounds=2, every=20), mode="keep", about="mean"),
    "learn late": lambda: Project(MIDDLE, learn=LearnedDirections(label="token", every=9), schedule=Schedule(start=23)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_killed_and_resumed_run_ends_bitwise_as_the_whole_one(tmp_path, name):
    # continued from step 20, where the directions of one of them are due
    whole = train(module(), 45, WRITERS[name](), InductionHeads(every=15))
    callbacks = lambda: (WRITERS[name](), InductionHeads(every=15), KeepRun(tmp_path, checkpoint_every=20))  # noqa: E731
    with pytest.raises(Killed):
        train(module(), 45, *callbacks(), KillAt(30))
    resumed = train(module(), 45, *callbacks(), resume=tmp_path / "checkpoints/last.ckpt")
    assert torch.equal(flat(whole), flat(resumed))
    assert torch.equal(whole.constants.supplied[0], resumed.constants.supplied[0])
    assert whole.history.names() == resumed.history.names()
    for metric in whole.history.names():
        for a, b in zip(whole.history[metric].arrays(), resumed.history[metric].arrays(), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.slow
def test_the_compiled_run_follows_the_eager_one_without_compiling_anew():
    def writers():
        z = Project("blocks.0.attn.hook_z", weight=WeightDirections(name="blocks.0.attn.W_O", every=4), heads=["0:0"])
        return WRITERS["learn"](), z

    eager = train(module(layers=1), 30, *writers())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train(module(layers=1, compile=True), 30, *writers())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.allclose(flat(eager), flat(compiled), atol=1e-4)
    assert not torch.allclose(flat(eager), flat(train(module(layers=1), 30)), atol=1e-3)


@pytest.mark.parametrize("name", ["weight", "learn"])
def test_a_member_is_bitwise_the_same_in_any_slot_and_beside_any_neighbours(name):
    a, b = train(module([3, 4]), 30, WRITERS[name]()), train(module([5, 3]), 30, WRITERS[name]())
    assert torch.equal(flat(a)[0], flat(b)[1]) and not torch.equal(flat(a)[1], flat(b)[0])


def test_directions_that_were_never_found_stop_the_run_by_name():
    # the model embeds one label only as soon as its table is silenced, so that no direction tells it
    writers = [Ablate(sites=["hook_embed"], order=1), Project("hook_embed", learn=LearnedDirections(), order=2)]
    with pytest.raises(IdleError, match=r"^Project: was active for .* changed no activation"):
        train(module(), 30, *writers)
