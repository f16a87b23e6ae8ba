"""Claims about every optimizer: its weights after fifty steps are those of torch's own on the same gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from opsin.optimizers import SGD, Adam, AdamW, Muon
from opsin.training.optimizer_state import member_norm, update_members
from opsin.training.optimizers import member_optimizer

SHAPES = {"blocks.0.W": (3, 5), "blocks.0.V": (7, 2), "blocks.0.b": (5,), "embed.W": (6, 4)}
STEPS = 50


def gradients(step, name, shape):
    """A gradient of two members that changes its sign and its size from step to step."""
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64) * (1 + step % 7)


def start(name, shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)


def trained(optimizer, schedule=None, steps=STEPS):
    """Weights of two members after so many steps of an optimizer of Opsin."""
    leaves = {name: start(name, shape).requires_grad_() for name, shape in SHAPES.items()}
    made = member_optimizer(leaves.items(), optimizer)
    scheduler = schedule(made) if schedule else None
    alive = torch.ones(2, dtype=torch.bool)
    for step in range(steps):
        found = [gradients(step, name, shape) for name, shape in SHAPES.items()]
        state, hyper = made.members_state(), made.hyper()
        with torch.no_grad():
            made.step(lambda s=state, f=found, h=hyper: update_members(s, f, member_norm(f), h, alive, optimizer))
        if scheduler:
            scheduler.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


def of_torch(build, member, schedule=None, steps=STEPS, names=tuple(SHAPES), turned=False):
    """Weights of one member after so many steps of an optimizer of torch; matrices turned as in a Linear layer."""

    def layout(tensor):
        return tensor.mT.contiguous() if turned and tensor.dim() == 2 else tensor

    leaves = {name: layout(start(name, SHAPES[name])[member]).clone().requires_grad_() for name in names}
    optimizer = build(list(leaves.values()))
    scheduler = schedule(optimizer) if schedule else None
    for step in range(steps):
        for name, leaf in leaves.items():
            leaf.grad = layout(gradients(step, name, SHAPES[name])[member]).clone()
        optimizer.step()
        if scheduler:
            scheduler.step()
    return {name: layout(leaf.detach()) for name, leaf in leaves.items()}


def agree(found, member, expected):
    for name, value in expected.items():
        assert (found[name][member] - value).abs().max() < 1e-12, name


def pair(options):
    """Different settings of the two members as lists, and those of each alone; switches have one value."""
    lists = {name: [a, b] if not isinstance(a, bool) else a for name, (a, b) in options.items()}
    return lists, [{name: pair[member] for name, pair in options.items()} for member in range(2)]


def renamed(settings):
    return {"lr" if name == "learning_rate" else name: value for name, value in settings.items()}


ADAM = [
    {"learning_rate": (3e-3, 1e-2), "weight_decay": decay, "betas": betas, "eps": eps}
    for decay, betas, eps in itertools.product(
        [(0.0, 0.0), (0.1, 0.01)],
        [((0.9, 0.999), (0.9, 0.999)), ((0.0, 0.0), (0.9, 0.98)), ((0.5, 0.0), (0.0, 0.9))],
        [(1e-8, 1e-8), (1e-3, 1e-12)],
    )
]


@pytest.mark.parametrize("options", ADAM)
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_adam_and_adamw_are_those_of_torch(kind, options):
    lists, alone = pair(options)
    found = trained(kind(**lists))
    for member, settings in enumerate(alone):
        agree(
            found, member, of_torch(lambda p, s=settings: getattr(torch.optim, kind.__name__)(p, **renamed(s)), member)
        )


SGDS = [
    {"learning_rate": (3e-2, 1e-3), "weight_decay": decay, "momentum": momentum, "dampening": d, "nesterov": nesterov}
    for decay, momentum, d, nesterov in itertools.product(
        [(0.0, 0.0), (0.1, 1e-4)], [(0.0, 0.9), (0.5, 0.95)], [(0.0, 0.0), (0.4, 0.9)], [(False, False), (True, True)]
    )
    if not (nesterov[0] and (0.0 in momentum or d != (0.0, 0.0)))
]


@pytest.mark.parametrize("options", SGDS)
def test_sgd_is_that_of_torch(options):
    lists, alone = pair(options)
    found = trained(SGD(**lists))
    for member, settings in enumerate(alone):
        agree(found, member, of_torch(lambda p, s=settings: torch.optim.SGD(p, **renamed(s)), member))


MUONS = [
    {"learning_rate": (3e-2, 1e-3), "weight_decay": decay, "momentum": momentum, "nesterov": nesterov}
    for decay, momentum, nesterov in itertools.product(
        [(0.0, 0.1)], [(0.95, 0.5), (0.0, 0.9)], [(True, True), (False, False)]
    )
]
FIXED = [
    ({}, {}),
    ({"adjust": "match_rms_adamw"}, {"adjust_lr_fn": "match_rms_adamw"}),
    ({"iterations": 3, "coefficients": (2.0, -1.5, 0.5)}, {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5)}),
]


@pytest.mark.parametrize("precision", ["bfloat16", "weights"])
@pytest.mark.parametrize("fixed", FIXED)
@pytest.mark.parametrize("options", MUONS)
def test_muon_is_that_of_torch_for_matrices_and_adamw_for_everything_else(options, fixed, precision, monkeypatch):
    if precision == "weights":
        # torch rounds to 16 bits before it iterates; without that it computes what is computed here
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    lists, alone = pair(options)
    others = {"adamw_ratio": [0.1, 2.0], "adamw_weight_decay": 0.05, "betas": (0.8, 0.99), "eps": 1e-6}
    found = trained(Muon(**lists, **others, **fixed[0], precision=precision))
    matrices = ("blocks.0.W", "blocks.0.V")
    for member, settings in enumerate(alone):
        muon = lambda p, s=settings: torch.optim.Muon(p, **renamed(s), **fixed[1])  # noqa: E731
        agree(found, member, of_torch(muon, member, names=matrices, turned=True))
        adamw = lambda p, r=(3e-3, 2e-3)[member]: torch.optim.AdamW(p, r, (0.8, 0.99), 1e-6, 0.05)  # noqa: E731
        agree(found, member, of_torch(adamw, member, names=[name for name in SHAPES if name not in matrices]))


def test_with_betas_of_zero_adam_is_sign_descent():
    found = trained(Adam(1e-2, betas=(0.0, 0.0), eps=1e-30), steps=3)
    for name, shape in SHAPES.items():
        expected = start(name, shape) - 1e-2 * sum(gradients(step, name, shape).sign() for step in range(3))
        assert (found[name] - expected).abs().max() < 1e-12


def test_the_singular_values_of_a_step_of_muon_are_near_one():
    moved = trained(Muon(1.0, weight_decay=0.0), steps=1)["blocks.0.W"] - start("blocks.0.W", (3, 5))
    # outputs / inputs = 5 / 3
    values = torch.linalg.svdvals(moved) / (5 / 3) ** 0.5
    assert ((values > 0.6) & (values < 1.3)).all()


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (AdamW(1e-2), lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.0)),
        (SGD(1e-2, momentum=0.8), lambda p: torch.optim.SGD(p, 1e-2, momentum=0.8)),
    ],
)
def test_a_schedule_that_cycles_momentum_moves_it_as_in_torch(ours, torchs):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1, base_momentum=0.5)

    found = trained(ours, schedule)
    for member in range(2):
        agree(found, member, of_torch(torchs, member, schedule))


@pytest.mark.parametrize(
    ("kind", "settings", "name", "expected"),
    [
        (SGD, {"learning_rate": -1.0}, "learning_rate", "0 or more"),
        (SGD, {"momentum": 1.0}, "momentum", "0 or more and less than 1"),
        (SGD, {"momentum": [0.1, float("nan")]}, "momentum", "0 or more and less than 1"),
        (SGD, {"dampening": 1.5}, "dampening", "from 0 to 1"),
        (SGD, {"nesterov": True}, "momentum", "more than 0 beside nesterov"),
        (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening", "0 beside nesterov"),
        (Adam, {"betas": (0.9, 1.0)}, "betas", "two numbers of 0 or more and less than 1"),
        (AdamW, {"eps": 0.0}, "eps", "more than 0"),
        (AdamW, {"weight_decay": float("inf")}, "weight_decay", "0 or more"),
        (Muon, {"iterations": 100}, "iterations", "from 1 to 99"),
        (Muon, {"adjust": "none"}, "adjust", "'original' or 'match_rms_adamw'"),
        (Muon, {"precision": "float16"}, "precision", "'weights' or 'bfloat16'"),
        (Muon, {"coefficients": (1.0, float("nan"), 1.0)}, "coefficients", "three finite numbers"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_in_one_line(kind, settings, name, expected):
    from opsin.errors import ConfigError

    with pytest.raises(ConfigError) as refused:
        kind(**settings)
    assert (refused.value.field, refused.value.expected) == (f"{kind.__name__}.{name}", expected)


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, Muon])
def test_a_rate_of_zero_moves_nothing(kind):
    found = trained(kind(learning_rate=0.0), steps=2)
    assert all(torch.equal(found[name], start(name, shape)) for name, shape in SHAPES.items())
