"""Claims about grafts: which blocks are the donor's, where gradient goes, and which donors are refused."""

from dataclasses import dataclass, replace

import pytest
import torch

from opsin.callbacks import Ablate, Graft, InductionHeads, KeepRun, PathPatch, Preserve, Snapshots
from opsin.errors import ConfigError
from opsin.interventions.apply import run_passes
from opsin.interventions.donors import donor_from, read_donor
from opsin.interventions.intervention import Intervention, Overwrite, Relative, Source, Value, Weight
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection
from opsin.interventions.values.passes import FromPass
from opsin.model.layers import Norm, linear, scaled_and_shifted
from opsin.model.transformer import Transformer
from opsin.tasks import FewShot, GaussianClusters
from opsin.training.module import OpsinModule
from tests.helpers.toys import SMALL, batch_of, few_shot, inputs_of, plan_of, run, train, weights

TASK = few_shot()
DEEP = Transformer(layers=3, width=8, heads=4, mlp_ratio=2.0, positions="sinusoidal")
CUT = "blocks.0.hook_resid_post"


def donor(model=SMALL, seed=7):
    """A trained model that is not the one that learns."""
    values = weights(model, TASK, seeds=(seed, seed + 1))
    return donor_from(f"donor {seed}", model, {name: value[:1] for name, value in values.items()})


def run_donor(giver, batch, tap=None):
    """The donor's own logits and activations on a batch, one row per member."""
    values = {name: x.expand(batch.tokens.shape[0], *x.shape[1:]) for name, x in giver.parameters.items()}
    return run(giver.model, values, batch, tap)


class Case:
    """A model on one batch in double precision."""

    def __init__(self, model=SMALL):
        self.model, self.batch = model, batch_of(TASK, dtype=torch.float64)
        self.values = weights(model, TASK)

    def run(self, *writers, values=None):
        values = self.values if values is None else values
        plan = plan_of(self.model, TASK, *writers)
        return run(self.model, values, self.batch, run_passes(plan, inputs_of(plan, self.model, values, self.batch)))

    def loss(self, values, *writers):
        last = self.run(*writers, values=values)[0][:, :, -1]
        return (last * torch.linspace(-1, 1, last.numel(), dtype=torch.float64).view_as(last) + last.square()).sum()

    def gradients(self, *writers):
        leaves = {name: value.clone().requires_grad_() for name, value in self.values.items()}
        found = torch.autograd.grad(self.loss(leaves, *writers), list(leaves.values()))
        return dict(zip(leaves, found, strict=True))


def lower_names(values, layer):
    """Parameters that act at or below the output of a block."""
    blocks = tuple(f"blocks.{below}." for below in range(layer + 1))
    return {name for name in values if name.startswith(("embed.", "pos_embed.", *blocks))}


@pytest.mark.parametrize("giver", [donor(), donor(DEEP)], ids=["alike", "deeper"])
def test_the_lower_blocks_hand_on_what_the_donor_would(giver):
    case = Case()
    _, plain = case.run()
    _, seen = case.run(Graft(giver, 0))
    assert torch.equal(seen[CUT], run_donor(giver, case.batch)[1][CUT]) and not torch.allclose(seen[CUT], plain[CUT])
    # what lies above is the model's own, on the donor's output
    above = run(case.model, case.values, case.batch, lambda name, x: seen[CUT] if name == CUT else x)
    assert torch.equal(seen["hook_logits"], above[1]["hook_logits"])


@pytest.mark.parametrize("layer", [0, 1])
def test_gradient_is_exactly_zero_at_and_below_a_lower_graft_and_nowhere_else(layer):
    case = Case()
    below = lower_names(case.values, layer)
    for name, gradient in case.gradients(Graft(donor(), layer)).items():
        assert (gradient == 0).all() == (name in below), name


@pytest.mark.parametrize("giver", [donor(), donor(DEEP)], ids=["alike", "deeper"])
def test_the_upper_blocks_answer_as_the_donor_would_from_the_cut_on(giver):
    case = Case()
    _, plain = case.run()
    logits, seen = case.run(Graft(giver, 0, part="upper"))
    assert torch.equal(seen[CUT], plain[CUT])
    expected, _ = run_donor(giver, case.batch, lambda name, x: plain[CUT] if name == CUT else x)
    assert torch.equal(logits, expected) and not torch.allclose(logits, plain["hook_logits"])


@pytest.mark.parametrize("giver", [donor(), donor(DEEP)], ids=["alike", "deeper"])
def test_gradient_flows_through_the_donor_into_the_lower_blocks_alone(giver):
    case, step = Case(), 1e-6
    writers = [Graft(giver, 0, part="upper"), Ablate(heads=["0:1"])]
    gradients = case.gradients(*writers)
    below = lower_names(case.values, 0)
    for name, gradient in gradients.items():
        assert (gradient == 0).all() == (name not in below), name
    direction = {n: torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x) for n, x in case.values.items()}
    ends = [case.loss({n: x + s * step * direction[n] for n, x in case.values.items()}, *writers) for s in (1, -1)]
    slope = sum((gradients[name] * direction[name]).sum() for name in gradients)
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-6, atol=1e-8)


# ---- clamps inside the donor -----------------------------------------------------------------------------


def test_a_clamp_of_the_donor_acts_in_the_donor_alone():
    case, giver = Case(), donor()
    silent = Ablate(heads=["0:0", "0:1"])
    for part in ("lower", "upper"):
        _, seen = case.run(Graft(giver, 0, part=part, donor_callbacks=[silent]))
        assert (seen["blocks.0.attn.hook_v"] != 0).all()
    embedding = run_donor(giver, case.batch)[1]["blocks.0.hook_resid_pre"]
    _, seen = case.run(Graft(giver, 0, donor_callbacks=[silent]))
    assert torch.equal(seen[CUT], embedding)


def test_what_a_clamp_of_the_donor_preserves_is_the_donors_own():
    case, giver = Case(), donor(DEEP)
    inside = [Ablate(sites=["blocks.0.hook_attn_out"]), Preserve(["patterns"])]
    _, seen = case.run(Graft(giver, 1, donor_callbacks=inside))
    _, plain = run_donor(giver, case.batch)

    def tap(name, x):
        if name == "blocks.0.hook_attn_out":
            return torch.zeros_like(x)
        return plain[name] if name.endswith("hook_pattern") else x

    name = "blocks.1.hook_resid_post"
    assert torch.equal(seen[name], run_donor(giver, case.batch, tap)[1][name])


@dataclass(frozen=True)
class Bias(Value):
    """The read-out's bias of the model that the pass runs."""

    needs = (Weight("unembed.b_U"),)

    def __call__(self, x, batch, *inputs):
        return Overwrite(inputs[0][:, None, None].expand_as(x))


class AnswerWithBias(Ablate):
    """Logits that are the read-out's bias."""

    def interventions(self, sites):
        return [Intervention("AnswerWithBias", "hook_logits", Selection(), Bias())]


def test_a_weight_that_a_clamp_of_the_donor_asks_for_is_the_donors():
    case, giver = Case(), donor()
    logits, _ = case.run(Graft(giver, 0, part="upper", donor_callbacks=[AnswerWithBias(sites=["hook_logits"])]))
    assert torch.equal(logits, giver.parameters["unembed.b_U"][:, None, None].expand_as(logits))
    logits, _ = case.run(AnswerWithBias(sites=["hook_logits"]))
    assert torch.equal(logits, case.values["unembed.b_U"][:, None, None].expand_as(logits))


# ---- plans -----------------------------------------------------------------------------------------------


def test_grafts_of_equal_weights_share_one_pass_that_keeps_what_they_take():
    # the second is read from elsewhere
    again = donor_from("elsewhere", SMALL, {name: x.clone() for name, x in donor().parameters.items()})
    plan = plan_of(SMALL, TASK, Graft(donor(), 0), Graft(again, 1), Preserve(["keys"]))
    of_donor, plain, trained = plan.passes
    assert len(plan.donors) == 1 and (of_donor.donor, plain.donor, trained.donor) == (0, None, None)
    assert of_donor.keeps == (CUT, "blocks.1.hook_resid_post") and of_donor.rows == ()


def test_other_weights_are_another_donor_and_another_plan():
    plans = [plan_of(SMALL, TASK, Graft(donor(seed=seed), 0)) for seed in (7, 7, 8)]
    assert plans[0].digest() == plans[1].digest() != plans[2].digest()
    assert plan_of(SMALL, TASK, Graft(donor(), 0)).digest() != plan_of(SMALL, TASK, Graft(donor(), 0, "upper")).digest()
    assert len(plan_of(SMALL, TASK, Graft(donor(), 0), Graft(donor(seed=8), 1)).donors) == 2


@pytest.mark.parametrize(("part", "rule"), [("lower", "stops"), ("upper", "flows")])
def test_a_graft_says_whether_gradient_flows_and_whose_pass_it_is(part, rule):
    rows = plan_of(SMALL, TASK, Graft(donor(), 0, part)).describe()
    row = rows[-1]
    assert row["writer"] == "Graft" and row["gradient"] == rule and "pass 1" in row["value"]
    if part == "upper":
        assert rows[0]["pass"] == "1 (of donor 7)"


class Skipped(Ablate):
    """A block that hands on what it was given, taken from the same pass."""

    def interventions(self, sites):
        value = FromPass(Source("blocks.0.hook_resid_pre", Relative.SAME_PASS))
        return [Intervention("Skipped", CUT, Selection(), value)]


def test_what_a_donor_takes_from_its_own_pass_lets_no_gradient_out():
    inside = Skipped(sites=[CUT])
    _, graft = plan_of(SMALL, TASK, Graft(donor(), 1, donor_callbacks=[inside])).describe()
    assert graft["writer"] == "Graft" and graft["gradient"] == "stops"
    below = lower_names(Case().values, 1)
    for name, gradient in Case().gradients(Graft(donor(), 1, donor_callbacks=[inside])).items():
        assert (gradient == 0).all() == (name in below), name


def test_a_path_into_the_read_out_of_a_donor_without_an_unembedding_bias_is_patched_without_one():
    model = replace(SMALL, unembed_bias=False)
    giver, case = donor(model), Case()
    assert "unembed.b_U" not in giver.sites(TASK.layout.positions).weights
    patched = case.run(Graft(giver, 0, part="upper", donor_callbacks=[PathPatch(["1:0"], ["logits"])]))[0]
    handed = case.run()[1][CUT]

    def join(name, activation):
        return handed if name == CUT else activation

    plain, seen = run_donor(giver, case.batch, join)
    written = torch.einsum("mbld,mdw->mblw", seen["blocks.1.attn.hook_z"][:, :, :, 0], _rows_of_head(giver, 1, 0))
    resid = seen["blocks.1.hook_resid_post"] - written
    names = ("ln_final.w", "ln_final.b", "unembed.W_U")
    weight, bias, unembed = (giver.parameters[name].expand(2, *giver.parameters[name].shape[1:]) for name in names)
    torch.testing.assert_close(
        patched, linear(scaled_and_shifted(Norm().normalise(resid), weight, bias), unembed), rtol=1e-12, atol=1e-12
    )
    assert not torch.allclose(patched, plain)


def _rows_of_head(giver, layer, head):
    """The rows of W_O that belong to one head, one copy per member."""
    rows = giver.parameters[f"blocks.{layer}.attn.W_O"].unflatten(1, (giver.model.heads, -1))[:, head]
    return rows.expand(2, *rows.shape[1:])


# ---- training --------------------------------------------------------------------------------------------

SHAPE = Transformer(width=16, heads=2)


def module(seed=1, compiled=False, **task):
    task = FewShot(GaussianClusters(classes=60, features=16), batch_size=8, **task)
    small = {"steps_per_batch": 10, "log_every": 5, "probe_size": 16, "learning_rate": 0.01}
    return OpsinModule(task, SHAPE, seed, compile=compiled, **small)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two members with a checkpoint and snapshots: its folder and its final weights."""
    folder = tmp_path_factory.mktemp("donor")
    run = train(module([3, 4]), 20, KeepRun(folder), Snapshots(per_decade=1))
    return folder, {name: x.detach().clone() for name, x in run.parameters_by_name().items()}


@pytest.mark.parametrize(
    ("part", "compiled"), [("lower", False), ("upper", False), pytest.param("upper", True, marks=pytest.mark.slow)]
)
def test_training_moves_what_the_donor_does_not_give_and_never_the_donor(finished, part, compiled):
    folder, final = finished
    model = module([5, 6], compiled)
    start = {name: x.detach().clone() for name, x in model.parameters_by_name().items()}
    train(model, 20, Graft(str(folder), 0, part, member=1))
    for name, x in model.constants.donors[0].items():
        assert torch.equal(x, final[name][1:]) and not x.requires_grad
    still = {name for name, x in model.parameters_by_name().items() if torch.equal(x, start[name])}
    below = lower_names(start, 0)
    assert still == (below if part == "lower" else start.keys() - below)
    if compiled:
        eager = train(module([5, 6]), 20, Graft(str(folder), 0, part, member=1)).parameters_by_name()
        assert all(torch.allclose(x, eager[name], atol=1e-4) for name, x in model.parameters_by_name().items())


@pytest.mark.parametrize("name", ["", "checkpoints/last.ckpt", "snapshots/step_0000020.pt"])
@pytest.mark.parametrize("member", [0, 1])
def test_a_donor_is_read_from_a_run_folder_a_checkpoint_and_a_snapshot(finished, name, member):
    folder, final = finished
    found = read_donor("Graft", folder / name, member)
    assert found.model == SHAPE and found.parameters.keys() == final.keys()
    assert all(torch.equal(x, final[key][member : member + 1]) for key, x in found.parameters.items())
    batch = batch_of(module().task)
    table = SHAPE.position_table(batch.layout.positions)
    alone = SHAPE.forward({key: x.expand(2, *x.shape[1:]) for key, x in found.parameters.items()}, table, batch)
    model = train(module([5, 6]), 10, Graft(folder / name, 1, part="upper", member=member))
    # the whole of the donor but its read-out is cut off, so its own answer differs
    assert not torch.allclose(model.observe(batch, ["hook_logits"])["hook_logits"], alone)


def test_an_earlier_snapshot_is_another_donor(finished):
    folder, _ = finished
    assert read_donor("Graft", folder) != read_donor("Graft", folder / "snapshots/step_0000010.pt")
    assert read_donor("Graft", folder) == read_donor("Graft", folder / "snapshots/step_0000020.pt")


def test_a_resume_with_another_donor_is_refused(finished, tmp_path):
    folder, _ = finished
    train(module(), 10, Graft(folder, 0), KeepRun(tmp_path))
    last = str(tmp_path / "checkpoints/last.ckpt")
    train(module(), 20, Graft(folder, 0), resume=last)
    with pytest.raises(ConfigError) as refused:
        train(module(), 20, Graft(folder, 0, member=1), resume=last)
    assert refused.value.field == "Graft"


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Graft(donor(), 2), "Graft.layer"),
        (lambda: Graft(donor(), -1), "Graft.layer"),
        (lambda: Graft(donor(Transformer(layers=1, width=8, heads=2)), 1), "Graft.layer"),
        (lambda: Graft(donor(), 0, part="middle"), "Graft.part"),
        (lambda: Graft(donor(Transformer(width=16, heads=2)), 0), "Graft.donor"),
        (lambda: Graft(donor(), 0, donor_callbacks=[InductionHeads()]), "Graft.donor_callbacks"),
        (lambda: Graft(donor(), 0, donor_callbacks=[Ablate(heads=["0:2"])]), "Ablate.heads"),
        (lambda: Graft(donor(), 0, schedule=Schedule(start=10)), "Graft.schedule"),
    ],
)
def test_a_graft_that_cannot_be_made_is_refused(make, field):
    with pytest.raises(ConfigError) as refused:
        plan_of(SMALL, TASK, make())
    assert refused.value.field == field


def test_a_file_that_holds_no_donor_and_a_member_that_is_not_there_are_refused(finished, tmp_path):
    folder, _ = finished
    (tmp_path / "noise.pt").write_bytes(b"no weights")
    torch.save({"some": torch.zeros(1)}, tmp_path / "other.pt")
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "noise.pt", tmp_path / "other.pt"):
        with pytest.raises(ConfigError, match="snapshot") as refused:
            Graft(path, 0)
        assert refused.value.field == "Graft.donor"
    for member in (2, -1):
        with pytest.raises(ConfigError, match="a member from 0 to 1") as refused:
            Graft(folder, 0, member=member)
        assert refused.value.field == "Graft.member"


@pytest.mark.parametrize("task", [{"n_labels": 6}, {"context": 4, "n_labels": 5}])
def test_a_donor_of_another_task_is_refused_and_one_of_another_length_is_not(finished, task):
    folder, _ = finished
    graft = Graft(folder, 0)
    if task["n_labels"] == 5:
        train(module(**task), 10, graft)
        return
    with pytest.raises(ConfigError, match="6 outputs") as refused:
        train(module(**task), 10, graft)
    assert refused.value.field == "Graft.donor"


def test_a_donor_with_too_few_learned_positions_is_refused():
    short = donor(Transformer(width=8, heads=2, positions="learned", max_positions=4))
    with pytest.raises(ConfigError, match="4 learned positions"):
        short.check(TASK)
    donor(Transformer(width=8, heads=2, positions="learned", max_positions=5)).check(TASK)


RECIPE = """
task: {{class_path: opsin.tasks.FewShot, init_args: {{batch_size: 8, exemplars:
  {{class_path: opsin.tasks.GaussianClusters, init_args: {{classes: 60, features: 16}}}}}}}}
model: {{transformer: {{width: 16, heads: 2}}, steps_per_batch: 5, log_every: 5, probe_size: 8, evaluation_size: 8}}
trainer:
  max_steps: 5
  enable_progress_bar: false
  callbacks:
    - class_path: opsin.callbacks.Graft
      init_args:
        donor: {donor}
        member: 1
        layer: 0
        donor_callbacks:
          - class_path: opsin.callbacks.Clamp
            init_args: {{heads: ["0:1"], pattern: previous_token}}
"""


def test_a_recipe_names_a_donor_and_its_clamps(opsin, finished, tmp_path):
    folder, _ = finished
    (tmp_path / "given").symlink_to(folder)
    (tmp_path / "graft.yaml").write_text(RECIPE.format(donor="given"))
    ended = opsin("sites", "--config", "graft.yaml")
    (clamp,) = [line for line in ended.out.splitlines() if "PreviousToken" in line]
    assert ended.code == 0 and "(of given)" in clamp and "Clamp" in clamp
    assert opsin("fit", "--config", "graft.yaml", "--run_folder", "run").code == 0
    (tmp_path / "lost.yaml").write_text(RECIPE.format(donor="nowhere"))
    ended = opsin("fit", "--config", "lost.yaml", "--run_folder", "lost")
    assert ended.code == 2 and "Graft.donor" in ended.err and not (tmp_path / "lost").exists()
