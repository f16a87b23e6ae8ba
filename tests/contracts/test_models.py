"""Claims about every model and every choice of the transformer, found by themselves.

A model is any subclass of ``Model`` in the package, a choice any value that a setting of the transformer names.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import MISSING, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from lightning.pytorch import Callback

import opsin.model
from opsin.callbacks import Clamp, KeepRun
from opsin.errors import ConfigError
from opsin.interventions.schedules import Schedule
from opsin.model.layers import GATES
from opsin.model.protocol import ADDED, Model, init_parameters
from opsin.model.saved import known_models, read_model, read_sizes, saved_model
from opsin.model.transformer import Transformer
from opsin.task import Task
from opsin.training.module import OpsinModule
from tests.contracts.house import modules
from tests.helpers.killers import KillAt, Killed
from tests.helpers.toys import ToySums, ToyTokens, Training, batch_of, few_shot, run, train, weights

for found in pkgutil.iter_modules(opsin.model.__path__):
    importlib.import_module(f"opsin.model.{found.name}")

MODELS = [kind for kind in known_models() if kind.__module__.startswith("opsin.")]
BASE = Transformer(layers=2, width=8, heads=2, mlp_ratio=1.5, max_positions=6)
SMALL_NUMBERS = {
    "width": 6,
    "neurons": 5,
    "position_width": 8,
    "token_width": 6,
    "max_positions": 6,
    "hidden_layers": 2,
}

EXAMPLES: dict[str, list[Any]] = {
    "mlp_layers": [(), (1,)],
    "attention_biases": ["qkvo", "k"],
    "mlp_ratio": [None],
    "embed_scale": [0.5],
    "position_scale": [2.0],
    "attention_scale": [0.5],
    "mlp_scale": [0.5],
    "unembed_scale": [0.5],
}
"""Values of settings whose type names none."""

NEEDS = {"position_scale": {"positions": "learned"}, "norm_bias": {"norm": "LayerNorm"}}
"""What else makes a setting matter."""

NUMBERS = ("layers", "width", "heads", "position_base", "max_positions", "init_scale")
"""Sizes, which are no choices."""


def values_of(hint: Any) -> list[Any]:
    """The values that a type names."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if hint is bool:
        return [True, False]
    return [value for inner in get_args(hint) for value in values_of(inner)]


def choices() -> dict[str, Transformer]:
    """A transformer with each value that a setting of it names, in turn."""
    hints, found = get_type_hints(Transformer), {"as it is": BASE}
    for item in fields(Transformer):
        for value in EXAMPLES.get(item.name, values_of(hints[item.name])):
            settings = {**NEEDS.get(item.name, {}), item.name: value}
            found[f"{item.name} {value}"] = replace(BASE, **settings)
    return found


def mixtures() -> dict[str, Transformer]:
    """Few transformers that have between them every activation, norm, code of positions and kind of attention."""
    hints, found = get_type_hints(Transformer), {}
    kinds = {name: values_of(hints[name]) for name in ("activation", "norm", "positions", "attention", "tied")}
    for number, activation in enumerate(kinds["activation"]):
        settings = {name: values[number % len(values)] for name, values in kinds.items()}
        settings["gated"] = activation in GATES and number % 2 == 1
        settings["attention_biases"] = ("", "qkvo")[number % 2]
        found[", ".join(map(str, settings.values()))] = replace(BASE, **settings)
    return found


def small(kind: type[Model]) -> Model:
    """A model of little width."""
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: size for name, size in SMALL_NUMBERS.items() if name in names})


def cases() -> dict[str, tuple[Model, Task]]:
    """Every model and every choice, on a task that it takes."""
    found: dict[str, tuple[Model, Task]] = {}
    for name, model in choices().items():
        tokens = model.tied or model.positions in ("learned", "relative")
        found[f"Transformer {name}"] = (model, ToyTokens() if tokens else few_shot())
    for kind in MODELS:
        if kind is not Transformer:
            model = small(kind)
            for task in (few_shot(), ToyTokens(), ToySums()):
                if fits(model, task):
                    found[f"{kind.__name__} on {type(task).__name__}"] = (model, task)
    return found


def fits(model: Model, task: Task) -> bool:
    """Whether a model takes a task."""
    try:
        model.sites(task)
    except ConfigError:
        return False
    return True


CASES = cases()
EVERY = pytest.mark.parametrize(("model", "task"), CASES.values(), ids=CASES)


def test_every_setting_of_the_transformer_is_tried():
    tried = {name.partition(" ")[0] for name in choices()}
    assert {item.name for item in fields(Transformer)} - set(NUMBERS) <= tried
    assert all(any(name.startswith(kind.__name__) for name in CASES) for kind in MODELS)


def test_nobody_but_the_file_of_a_model_knows_how_it_packs_its_weights():
    offences = [m.name for m in modules() if "W_QKV" in m.text and not m.name.startswith("opsin.model.")]
    assert not offences


@EVERY
def test_every_site_is_tapped_once_with_the_shape_that_the_table_says(model, task):
    _, seen = run(model, weights(model, task), batch_of(task))
    table = [(site.name, site.shape(members=2, batch=4)) for site in model.sites(task)]
    assert [(name, tuple(activation.shape)) for name, activation in seen.items()] == table


@EVERY
def test_what_the_tap_returns_goes_on_at_every_site(model, task):
    values, batch = weights(model, task), batch_of(task)
    plain, _ = run(model, values, batch)
    for site in model.sites(task):

        def other(name, x, changed=site.name):
            generator = torch.Generator().manual_seed(0)
            return x + torch.randn(x.shape, generator=generator, dtype=x.dtype) if name == changed else x

        # what is masked is finite and weighs nothing, so noise there may hide nothing else
        assert not torch.equal(run(model, values, batch, other)[0], plain), site.name


@EVERY
def test_every_parameter_is_used_and_has_the_shape_that_the_table_says(model, task):
    table = model.parameters(task)
    values = {name: x.requires_grad_() for name, x in weights(model, task).items()}
    assert {name: tuple(x.shape[1:]) for name, x in values.items()} == table.shapes
    logits, _ = run(model, values, batch_of(task))
    gradients = torch.autograd.grad(logits.square().sum(), list(values.values()), allow_unused=True)
    assert [name for name, gradient in zip(values, gradients, strict=True) if gradient is None] == []
    for name, named in table.weights.items():
        assert named.read(values).shape == (2, *named.shape), name


@EVERY
def test_it_is_read_again_from_what_a_file_says_of_it(model, task):
    said = saved_model(model, task)
    assert read_model(said) == model
    assert model.parameters(read_sizes(said, {})).shapes == model.parameters(task).shapes


LEARNING = {f"Transformer {name}": (model, ToyTokens()) for name, model in mixtures().items()}
LEARNING |= {name: case for name, case in CASES.items() if not isinstance(case[0], Transformer)}


@pytest.mark.parametrize("steps", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("model", "task"), LEARNING.values(), ids=LEARNING)
def test_a_member_is_the_run_of_its_own_seed(model, task, steps):
    def final(seeds):
        values = {name: x.double() for name, x in init_parameters(model, task, seeds).items()}
        training = Training(model, task, values, rate=1e-3, seeds=seeds, steps=steps)
        for step in range(steps):
            training.update(step)
        return training.values

    together, alone = final([3, 5, 8]), final([5])
    for name, values in together.items():
        torch.testing.assert_close(
            values[1], alone[name][0], rtol=0, atol=1e-12, msg=lambda text, n=name: f"{n} {text}"
        )


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_a_killed_run_of_every_model_goes_on_to_the_same_bits(kind, tmp_path):
    model = BASE if kind is Transformer else small(kind)
    task = next(task for task in (few_shot(), ToyTokens(), ToySums()) if fits(model, task))
    site = [site.name for site in model.sites(task)][-2]

    def module() -> OpsinModule:
        return OpsinModule(task, seed=[1, 2], network=model, steps_per_batch=4, log_every=2, compile=False)

    def callbacks(folder) -> list[Callback]:
        return [Clamp(site=site, value=0.25, schedule=Schedule(start=4, stop=20)), KeepRun(folder, checkpoint_every=8)]

    whole = train(module(), 24, *callbacks(tmp_path / "whole"))
    with pytest.raises(Killed):
        train(module(), 24, *callbacks(tmp_path / "cut"), KillAt(20))
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    resumed = train(module(), 24, *callbacks(tmp_path / "cut"), resume=str(last))
    for (name, one), other in zip(whole.members.named_parameters(), resumed.members.parameters(), strict=True):
        assert torch.equal(one, other), name
    start = init_parameters(model, task, [1, 2])
    moved = [n for n, x in whole.members.named_parameters() if not torch.equal(x, start[n])]
    assert not set(moved) & set(model.parameters(task).untrained) and moved


def test_settings_that_are_new_have_the_defaults_that_old_runs_had():
    assert all(item.default is not MISSING for item in fields(Transformer) if item.metadata == ADDED)
