"""Claims about what a plan is to a checkpoint: its digest is that of every version before.

The digests were computed by the version that wrote the first checkpoints of these writers. A checkpoint whose digest
differs from that of the plan it is resumed with is refused, so none of them may ever change.
"""

import pytest

from opsin import callbacks
from opsin.callbacks import (
    Ablate,
    Clamp,
    Clip,
    CopyFromPattern,
    Disallow,
    Freeze,
    Graft,
    HeadTemperature,
    PathPatch,
    PerfectPreviousInput,
    Preserve,
    Project,
    Reinitialise,
    RemoveFrequencies,
)
from opsin.interventions.donors import Donor
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.directions import GivenDirections, LearnedDirections, WeightDirections
from opsin.model.transformer import Transformer
from tests.helpers.toys import few_shot, plan_of, weights

TASK = few_shot()
FIVE = few_shot(n_labels=5)
MODEL = Transformer(layers=2, width=8, heads=2, mlp_ratio=1)
DONOR = Donor("donor", "0123456789abcdef", MODEL, {name: x[:1] for name, x in weights(MODEL, TASK).items()})
LATE = Schedule(start=2, stop=4)
RESID = "blocks.0.hook_resid_post"


def given_directions():
    """A projection whose basis has a digest that does not depend on the machine's rounding."""
    writer = Project(RESID, directions=[[1.0, 2, 0, 0, 0, 0, 0, 0]])
    writer.origin = GivenDirections("fedcba9876543210", writer.origin.basis)
    return writer


PLANS = {
    "zero": [Ablate(heads=["0:1"], schedule=LATE, members=[0])],
    "mean": [Ablate(neurons=["1:1", "1:2"], at="pre", value="mean", positions=[0, 1])],
    "overall mean": [Ablate(sites=[RESID], value="overall_mean")],
    "resample": [Ablate(heads=["0:1"], value="resample")],
    "noise": [Ablate(neurons=["0:3"], value="noise")],
    "number": [Clamp(site="blocks.1.attn.hook_z", heads=["1:0"], value=0.5, positions=[2], members=[1])],
    "previous token": [Clamp(["0:1"], "previous_token", strength=0.7, labels_only=True)],
    "induction": [Clamp(["1:0"], "induction", strength=0.8)],
    "match": [Clamp(["1:0"], "match", temperature=0.5)],
    "clip": [Clip(["1:3"], side="below", at="pre", members=[1])],
    "disallow": [Disallow(["0:1"], "previous_token", labels_only=True), Disallow(["1:0"], "non_labels", members=[0])],
    "preserve": [Preserve(["patterns", "values", "scales"], layers=[1], norms=["blocks.1.ln1"], detach=True)],
    "temperature": [HeadTemperature({"1:1": 0.5})],
    "perfect input": [PerfectPreviousInput(detach=True)],
    "copy": [CopyFromPattern("1:1")],
    "copy of perfect input": [CopyFromPattern("1:1", perfect_input=True, members=[1])],
    "lower graft": [Graft(DONOR, 0, "lower", donor_callbacks=[Clamp(["0:1"], "previous_token")])],
    "upper graft": [Graft(DONOR, 0, "upper", donor_callbacks=[Preserve(["patterns"])], members=[0])],
    "path": [PathPatch(["0:0", "0:mlp", "embed"], ["1:1.q", "1:0.q", "logits"], "resample", positions=[1])],
    "path as without the others": [PathPatch(["0:0"], ["1:mlp"], "plain", detach=True)],
    "given directions": [given_directions()],
    "directions of a weight": [Project(RESID, weight=WeightDirections(name="unembed.W_U", rank=2, every=3))],
    "learned directions": [Project(RESID, learn=LearnedDirections(rounds=2), mode="keep", about="mean", schedule=LATE)],
    "directions of a head": [
        Project(
            "blocks.1.attn.hook_z",
            weight=WeightDirections(name="blocks.1.attn.W_O", part="bottom"),
            heads=["1:1"],
            positions=[0],
        )
    ],
    "frequencies": [RemoveFrequencies([1, 2], schedule=LATE, members=[1])],
    "freeze": [Freeze(heads=["0:1"], neurons=["1:2"], parts=["W_Q", "W_in"], weights=["ln_final"], members=[1])],
    "reinitialise": [
        Reinitialise(LATE, heads=["0:1"], seed=[3, 4], order=1),
        Reinitialise(LATE, weights=["embed.W_E"]),
    ],
}

DIGESTS = {
    "zero": "87541aca14179827",
    "mean": "3e4e8e58f9882f8a",
    "overall mean": "194702b9b1907976",
    "resample": "fb08cc5261a25821",
    "noise": "eeb5dec16ce2edab",
    "number": "9904433f950b4c0a",
    "previous token": "a2495576a8f65283",
    "induction": "c02bf5f225f0e24d",
    "match": "96ebc204bedde7bc",
    "clip": "fda628a4885016dd",
    "disallow": "f42e2ddba7728eb4",
    "preserve": "5ecfac2049f595d3",
    "temperature": "737ba2d1ab1ea10e",
    "perfect input": "5dca06925fc82489",
    "copy": "de93fc6eb6a03b51",
    "copy of perfect input": "fa15cc6f93f95eea",
    "lower graft": "5be2edb66b386fdf",
    "upper graft": "42ccc05e3d6c3beb",
    "path": "d6b73d0dc1bd49a6",
    "path as without the others": "80b4018ad1686c68",
    "given directions": "f74d263995a4fdd2",
    "directions of a weight": "aaec236ce44ad770",
    "learned directions": "009d8d3f2f8563c1",
    "directions of a head": "6fb18e3ccf429df0",
    "frequencies": "b673a4822d711ed8",
    "freeze": "3c1b3bb76364226f",
    "reinitialise": "26c6173e6e55fed1",
}


@pytest.mark.parametrize("name", PLANS)
def test_the_digest_of_a_plan_is_the_one_that_checkpoints_hold(name):
    assert plan_of(MODEL, FIVE if name == "frequencies" else TASK, *PLANS[name]).digest() == DIGESTS[name]


def test_the_digest_of_every_writer_is_held():
    """A new writer gets a row above."""
    writers = {name for name in callbacks.__all__ if hasattr(getattr(callbacks, name), "interventions")}
    writers |= {name for name in callbacks.__all__ if hasattr(getattr(callbacks, name), "weight_changes")}
    assert writers == {type(writer).__name__ for row in PLANS.values() for writer in row}
