"""Claims about the optimizer: torch's Adam and AdamW, and a state that survives a checkpoint."""

import io

import pytest
import torch

from opsin.training.optimizers import MemberAdam
from tests.helpers.toys import BETAS, EPS, SMALL, Training, batch_of, losses, weights


@pytest.mark.parametrize(("decay", "reference"), [(0.0, torch.optim.Adam), (0.1, torch.optim.AdamW)])
def test_fifty_steps_are_those_of_torch(tiny_task, decay, reference):
    start = weights(SMALL, tiny_task)
    training = Training(SMALL, tiny_task, start, rate=3e-3, decay=decay)
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    torchs = reference(leaves.values(), lr=3e-3, betas=BETAS, eps=EPS, weight_decay=decay)
    for k in range(50):
        torchs.zero_grad()
        loss = losses(SMALL, leaves, batch_of(tiny_task, step=k, dtype=torch.float64))
        loss.sum().backward()
        torchs.step()
        assert (training.update(k)[0] - loss).abs().max() < 1e-12
    assert all((value - leaves[name]).abs().max() < 1e-12 for name, value in training.values.items())


def test_a_saved_state_goes_on_to_the_same_weights(tiny_task):
    start = weights(SMALL, tiny_task, dtype=torch.float32)
    whole = Training(SMALL, tiny_task, start)
    for k in range(4):
        whole.update(k)
    file = io.BytesIO()
    torch.save({"optimizer": whole.optimizer.state_dict(), "values": dict(whole.values)}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = Training(SMALL, tiny_task, saved["values"], rate=0.5)
    resumed.optimizer.load_state_dict(saved["optimizer"])
    assert resumed.optimizer.steps == 4
    for k in range(4, 8):
        assert torch.equal(whole.update(k), resumed.update(k))
    assert all(torch.equal(value, resumed.values[name]) for name, value in whole.values.items())


def test_a_step_without_the_fused_step_is_refused():
    optimizer = MemberAdam([("w", torch.zeros(2, 3, requires_grad=True))], 1e-3, 0.0, None, BETAS)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step()
    assert optimizer.steps == 0


def test_a_scheduler_changes_the_rate_of_every_member():
    optimizer = MemberAdam([("w", torch.zeros(2, 3, requires_grad=True))], 1e-2, 0.1, 5.0, BETAS)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(lambda: None)
    scheduler.step()
    hyper = optimizer.hyper()
    assert hyper.learning_rate.tolist() == pytest.approx([5e-3] * 2)
    assert hyper.weight_decay.tolist() == pytest.approx([0.1] * 2)
    assert hyper.clip.tolist() == [5, 5]
    assert hyper.correction.tolist() == pytest.approx([1 - 0.9**2, 1 - 0.999**2], rel=1e-4)


def test_no_clipping_is_a_bound_of_infinity():
    optimizer = MemberAdam([("w", torch.zeros(3, 1, requires_grad=True))], 1e-2, 0.0, None, BETAS)
    assert optimizer.hyper().clip.tolist() == [float("inf")] * 3


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=1e-3),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12),
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7),
    ],
)
def test_a_schedule_moves_every_member_as_it_would_move_it_alone(schedule):
    rates, decays = [1e-2, 4e-2, 1e-2, 4e-2], [0.1, 0.0, 0.1, 0.2]

    def scheduled(rate, decay, members):
        optimizer = MemberAdam([("w", torch.zeros(members, 3, requires_grad=True))], rate, decay, None, BETAS)
        scheduler, seen = schedule(optimizer), []
        for _ in range(8):
            seen.append(torch.stack([optimizer.hyper().learning_rate, optimizer.hyper().weight_decay]))
            optimizer.step(lambda: None)
            scheduler.step()
        return torch.stack(seen)

    together = scheduled(rates, decays, 4)
    for member, (rate, decay) in enumerate(zip(rates, decays, strict=True)):
        assert torch.equal(together[..., member], scheduled(rate, decay, 1)[..., 0])


def test_rates_of_several_members_go_on_after_a_resume():
    def made():
        own = [("w", torch.zeros(2, 3, requires_grad=True))]
        optimizer = MemberAdam(own, [1e-2, 4e-2], [0.1, 0.2], None, BETAS)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    (first, schedule), (again, _) = made(), made()
    first.step(lambda: None)
    schedule.step()
    again.load_state_dict(first.state_dict())
    assert again.steps == 1 and torch.equal(again.hyper().learning_rate, first.hyper().learning_rate)
    assert first.hyper().learning_rate[0] != 1e-2
