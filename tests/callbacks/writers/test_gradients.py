"""Claims about the gradient rule of every value an activation can be overwritten by.

The overwritten entries themselves are looked at: where a value stops the gradient, no parameter gets any from
them, exactly; where it lets it flow, every parameter gets what a finite difference says.
"""

import pytest
import torch

from opsin.callbacks import (
    Ablate,
    Clamp,
    Clip,
    CopyFromPattern,
    Disallow,
    Graft,
    HeadTemperature,
    PathPatch,
    PerfectPreviousInput,
    Preserve,
    Project,
)
from opsin.interventions.apply import run_passes
from opsin.interventions.donors import donor_from
from opsin.interventions.intervention import Clock
from opsin.model.transformer import Transformer
from tests.helpers.toys import batch_of, few_shot, inputs_of, plan_of, run, weights

MODEL = Transformer(layers=2, width=8, heads=2, mlp_ratio=1)
TASK = few_shot()
VALUES = weights(MODEL, TASK)
BATCH = batch_of(TASK, dtype=torch.float64)
DONOR = donor_from("donor", MODEL, {name: value[:1] for name, value in weights(MODEL, TASK, seeds=(5, 6)).items()})
BEFORE = Ablate(heads=["0:0"], value="mean")
ROWS = [[1.0, 2, 0, 0, 0, 0, 0, 0]]

STOPS = {
    "number": [Clamp(site="blocks.1.attn.hook_z", value=0.5)],
    "zero": [Ablate(heads=["1:1"])],
    "mean": [Ablate(heads=["1:1"], value="mean")],
    "overall mean": [Ablate(heads=["1:1"], value="overall_mean")],
    "resample": [Ablate(neurons=["1:3"], value="resample")],
    "noise": [Ablate(neurons=["1:3"], at="pre", value="noise")],
    "previous token": [Clamp(["1:1"], "previous_token", strength=0.7)],
    "previous token at labels": [Clamp(["1:1"], "previous_token", labels_only=True)],
    "induction": [Clamp(["1:1"], "induction", strength=0.8)],
    "match": [Clamp(["1:1"], "match", temperature=0.5)],
    "clipped": [Clip(["1:3"])],
    "clipped from below": [Clip(["1:3"], side="below", at="pre")],
    "disallowed": [Disallow(["1:1"], "previous_token")],
    "silenced": [Disallow(["1:1"], "non_labels")],
    "donor's blocks": [Graft(DONOR, 1, "lower")],
    "preserved, detached": [Preserve(["patterns"], layers=[1], detach=True), BEFORE],
    "temperature, detached": [HeadTemperature({"1:1": 0.5}, detach=True), BEFORE],
    "copied pattern, detached": [CopyFromPattern("1:1", detach=True)],
}
FLOWS = {
    "preserved": [Preserve(["patterns"], layers=[1]), BEFORE],
    "preserved values": [Preserve(["values"], layers=[1]), BEFORE],
    "preserved scales": [Preserve(["scales"], norms=["blocks.1.ln1", "ln_final"]), BEFORE],
    "temperature": [HeadTemperature({"1:1": 0.5}), BEFORE],
    "copied pattern": [CopyFromPattern("1:1")],
    "copied pattern of perfect input": [CopyFromPattern("1:1", perfect_input=True)],
    "perfect input": [PerfectPreviousInput()],
    "through a donor's blocks": [Graft(DONOR, 0, "upper")],
    "kept part of a projection": [Project("blocks.1.hook_resid_post", directions=ROWS, mode="remove")],
    "a path cut": [PathPatch(["0:0"], ["1:1.q"])],
    "a path as without the others": [PathPatch(["0:0"], ["1:1.q"], value="plain"), Ablate(heads=["0:0"])],
}


def of_overwritten(writers, values):
    """A number that the entries overwritten by the first writer determine, and nothing else does."""
    plan = plan_of(MODEL, TASK, *writers)
    seen = run(MODEL, values, BATCH, run_passes(plan, inputs_of(plan, MODEL, values, BATCH)))[1]
    total = torch.zeros((), dtype=torch.float64)
    for item in writers[0].interventions(MODEL.sites(TASK)):
        x = seen[item.site]
        entries = item.selection.mask(MODEL.sites(TASK)[item.site], 2, "test").double().expand_as(x)
        if all(isinstance(need, Clock) for need in item.value.needs):
            clock = [torch.tensor([[0, 0], [1, 0]]) for _ in item.value.needs]
            where = item.value(x.detach(), BATCH, *clock).where
            entries = entries if where is None else entries * where.double()
        # what is ruled out stays so
        entries = entries * (x.detach() > -1e8)
        scored = entries if item.site != "hook_logits" else entries * (torch.arange(5) == 4)[:, None]
        total = total + (x * scored * torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)).sum()
    return total


def gradients(writers):
    leaves = {name: value.clone().requires_grad_() for name, value in VALUES.items()}
    total = of_overwritten(writers, leaves)
    if not total.requires_grad:
        return leaves, [torch.zeros_like(leaf) for leaf in leaves.values()]
    return leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", STOPS)
def test_where_a_value_stops_the_gradient_nothing_gets_any(name):
    writers = STOPS[name]
    items = writers[0].interventions(MODEL.sites(TASK))
    assert {item.value.gradient for item in items} == {"stops"}
    assert all((gradient == 0).all() for gradient in gradients(writers)[1])


@pytest.mark.parametrize("name", FLOWS)
def test_where_a_value_lets_the_gradient_flow_it_is_the_finite_difference(name):
    writers, step = FLOWS[name], 1e-6
    assert "flows" in {item.value.gradient for item in writers[0].interventions(MODEL.sites(TASK))}
    leaves, found = gradients(writers)
    along = {name: torch.linspace(1, -1, v.numel(), dtype=torch.float64).view_as(v) for name, v in VALUES.items()}
    ends = [of_overwritten(writers, {n: v + s * step * along[n] for n, v in VALUES.items()}) for s in (1, -1)]
    slope = sum((gradient * along[name]).sum() for name, gradient in zip(leaves, found, strict=True))
    assert abs(slope) > 1e-3
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-6, atol=1e-8)
