"""Claims about forward passes on fixed sequences: they see the interventions in force and touch nothing."""

from __future__ import annotations

import pytest
import torch

from opsin.callbacks import Ablate
from opsin.training.module import OpsinModule
from opsin.training.objective import scored_logits
from tests.helpers.toys import SMALL, few_shot, train

PATTERN = "blocks.1.attn.hook_pattern"


@pytest.fixture(scope="module")
def trained() -> OpsinModule:
    """Two members after a few steps in which one head was silent."""
    small = {"steps_per_batch": 5, "log_every": 5, "probe_size": 8, "evaluation_size": 6, "compile": False}
    return train(OpsinModule(few_shot(), SMALL, [1, 2], **small), 10, Ablate(heads=["1:0"]))


def test_logits_are_those_of_an_observed_pass_under_the_interventions_in_force(trained):
    seen = trained.observe(trained.probe, ["hook_logits"])["hook_logits"]
    assert torch.equal(trained.forward_passes.logits(trained.probe), scored_logits(seen, trained.probe))


def test_an_intervention_can_be_left_out_of_a_pass(trained):
    sites = ["blocks.1.attn.hook_z", "hook_logits"]
    ablations = [row.intervention for row in trained.plan.interventions]
    silent, free = (trained.observe(trained.probe, sites, without) for without in ((), ablations))
    assert not silent[sites[0]][:, :, :, 0].any() and free[sites[0]][:, :, :, 0].any()
    assert not torch.equal(silent["hook_logits"], free["hook_logits"])


def test_a_tap_of_a_reader_acts_on_top_of_the_one_in_force(trained):
    passes = trained.forward_passes
    tap = passes.tap(trained.probe)

    def uniform(name, activation):
        activation = tap(name, activation)
        return torch.full_like(activation, 0.25) if name == PATTERN else activation

    seen = passes.activations(trained.probe, [PATTERN, "blocks.1.attn.hook_z"], uniform)
    assert (seen[PATTERN] == 0.25).all() and not seen["blocks.1.attn.hook_z"][:, :, :, 0].any()


def test_no_gradient_reaches_the_weights(trained):
    assert not trained.forward_passes.logits(trained.probe).requires_grad


def test_an_evaluation_set_is_made_once_and_shared_by_the_members(trained):
    batch = trained.evaluation_set("train")
    assert batch is trained.evaluation_set("train") and batch.tokens.shape[:2] == (2, 6)
    assert torch.equal(batch.tokens[0], batch.tokens[1])
