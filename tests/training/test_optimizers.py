"""Claims about the optimizer object: a state that survives a checkpoint, and schedules of members."""

import io

import pytest
import torch

from opsin.errors import ConfigError
from opsin.optimizers import SGD, AdamW, Optimizer
from opsin.training.optimizers import build_scheduler, check_optimizer, member_optimizer
from tests.helpers.toys import SMALL, Training, weights


def made(optimizer, members=2, clip=None):
    """The object for one small weight."""
    return member_optimizer([("w", torch.zeros(members, 3, requires_grad=True))], optimizer, clip)


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
    optimizer = made(AdamW())
    with pytest.raises(ValueError, match="closure"):
        optimizer.step()
    assert optimizer.steps == 0


def test_a_scheduler_changes_the_rate_of_every_member():
    optimizer = made(AdamW(1e-2, 0.1), clip=5.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(lambda: None)
    scheduler.step()
    hyper = optimizer.hyper()
    assert hyper.values["learning_rate"].tolist() == pytest.approx([5e-3] * 2)
    assert hyper.values["weight_decay"].tolist() == pytest.approx([0.1] * 2)
    assert hyper.clip.tolist() == [5, 5]
    corrections = [[1 - 0.9**2] * 2, [1 - 0.999**2] * 2]
    assert torch.allclose(hyper.clock["corrections"], torch.tensor(corrections), rtol=1e-6)


def test_no_clipping_is_a_bound_of_infinity():
    assert made(AdamW(), 3).hyper().clip.tolist() == [float("inf")] * 3


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
        optimizer = made(AdamW(rate, decay), members)
        scheduler, seen = schedule(optimizer), []
        for _ in range(8):
            values = optimizer.hyper().values
            seen.append(torch.stack([values["learning_rate"], values["weight_decay"], *values["betas"]]))
            optimizer.step(lambda: None)
            scheduler.step()
        return torch.stack(seen)

    together = scheduled(rates, decays, 4)
    for member, (rate, decay) in enumerate(zip(rates, decays, strict=True)):
        assert torch.equal(together[..., member], scheduled(rate, decay, 1)[..., 0])


def test_rates_of_several_members_go_on_after_a_resume():
    def scheduled():
        optimizer = made(AdamW([1e-2, 4e-2], [0.1, 0.2]))
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    (first, schedule), (again, _) = scheduled(), scheduled()
    first.step(lambda: None)
    schedule.step()
    again.load_state_dict(first.state_dict())
    rates = [optimizer.hyper().values["learning_rate"] for optimizer in (first, again)]
    assert again.steps == 1 and torch.equal(*rates) and rates[0][0] != 1e-2


def test_a_state_of_before_that_lacks_a_hyper_parameter_goes_on_with_the_one_it_was_begun_with():
    saved = made(AdamW(eps=1e-3)).state_dict()
    for group in saved["param_groups"]:
        del group["eps"]
    again = made(AdamW(eps=1e-3))
    again.load_state_dict(saved)
    assert again.hyper().values["eps"].tolist() == pytest.approx([1e-3] * 2)


def test_a_value_for_each_member_is_one_for_each():
    assert made(SGD(momentum=[0.5, 0.9])).hyper().values["momentum"].tolist() == pytest.approx([0.5, 0.9])
    assert made(AdamW(betas=[(0.5, 0.9), (0.6, 0.8)])).hyper().values["betas"].tolist() == [
        pytest.approx([0.5, 0.6]),
        pytest.approx([0.9, 0.8]),
    ]
    with pytest.raises(ConfigError, match=r"^SGD.momentum: got \[0.5, 0.9\], expected one value, or one for each of 3"):
        made(SGD(momentum=[0.5, 0.9]), 3)


class Plain(Optimizer):
    """Gradient descent, with nothing that could be cycled."""

    learning_rate = 0.1

    def update(self, parameter, gradient, state, hyper, clock):
        return parameter - hyper["learning_rate"] * gradient, {}


def test_a_schedule_of_a_momentum_that_an_optimizer_does_not_have_is_refused_in_one_line():
    with pytest.raises(
        ConfigError, match=r"^model.lr_scheduler: got '.*momentum.*', expected a schedule of what Plain"
    ):
        build_scheduler(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9), made(Plain()))


class Broken(Optimizer):
    """Does what it is told to do wrongly."""

    def __init__(self, fault):
        self.learning_rate, self.fault = 0.1, fault

    def start(self, name, parameter):
        return {"old": parameter[..., :1] if self.fault == "shape" else parameter.clone()}

    def update(self, parameter, gradient, state, hyper, clock):
        if self.fault == "in place":
            state["old"].add_(1)
        return parameter - gradient, {} if self.fault == "forgets" else dict(state)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("shape", r"^Broken: old: got \(2, 2, 1\), expected the shape of the parameter"),
        ("in place", r"^Broken.update: got 'a change in place'"),
        ("forgets", r"^Broken.update: got \[\], expected the state that start gives: \['old'\]"),
    ],
)
def test_an_optimizer_that_does_otherwise_than_it_declares_is_refused(fault, message):
    with pytest.raises(ConfigError, match=message):
        check_optimizer(Broken(fault), 2)
