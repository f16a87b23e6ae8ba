"""What every task is handed through."""

from __future__ import annotations

import torch

from opsin import task as tasks
from tests.helpers.toys import ToyTokens, batch_of, few_shot


def test_steps_are_the_same_however_many_are_drawn_at_once(monkeypatch):
    task, seeds = few_shot(), [3, 4, 5]
    whole = task.draw(seeds, 7, 10)
    for together in (1, 6, 9, 1000):
        monkeypatch.setattr(tasks, "DRAWN_TOGETHER", together)
        steps = list(tasks.drawn_steps(task, seeds, 7, 10))
        assert len(steps) == 10
        for name, tensor in whole.items():
            assert torch.equal(tensor, torch.stack([step[name] for step in steps]))


def test_a_batch_that_members_share_is_each_member_s_and_takes_no_memory_of_its_own():
    one, several = batch_of(few_shot(), [5]), batch_of(few_shot(), [5, 5, 5])
    shared = one.shared_by(3)
    for name in ("features", "tokens", "targets", "plausible"):
        given = getattr(shared, name)
        assert torch.equal(given, getattr(several, name)) and given.stride(0) == 0
    for name in ("query", "match", "other"):
        assert torch.equal(getattr(shared.truth, name), getattr(several.truth, name))
    assert shared.layout == several.layout


def test_a_function_is_mapped_over_every_tensor_that_has_a_batch_axis():
    batch = batch_of(few_shot(), [5, 6])
    part = batch.map(lambda x: x[:, 1:3])
    for name in ("features", "tokens", "targets", "plausible"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[:, 1:3])
    for name in ("query", "match", "other"):
        assert torch.equal(getattr(part.truth, name), getattr(batch.truth, name)[:, 1:3])
    assert part.layout == batch.layout and torch.equal(part.truth.previous, batch.truth.previous)


def test_a_batch_of_tokens_is_mapped_without_features():
    part = batch_of(ToyTokens()).map(lambda x: x[:, :1])
    assert part.features is None and part.plausible is None and part.tokens.shape[:2] == (2, 1)
