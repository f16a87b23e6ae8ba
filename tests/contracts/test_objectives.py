"""Claims about every objective there is, and about all code outside of them: nothing else knows what a loss is."""

from __future__ import annotations

import ast
import inspect
import re

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from opsin import objective as objectives
from opsin.callbacks import Clamp, ReferenceDistance
from opsin.errors import ConfigError
from opsin.interventions.schedules import Schedule
from opsin.model.transformer import Transformer
from opsin.objective import Objective
from opsin.training.compiling import compile_step
from opsin.training.module import OpsinModule
from tests.contracts.house import Module, modules, report
from tests.helpers.killers import KillAt, Killed
from tests.helpers.regression import OBJECTIVES, Pairs
from tests.helpers.toys import Training, train, weights

MODEL = Transformer(layers=1, width=8, heads=2, positions="learned", max_positions=6)

KINDS = {
    name
    for name, kind in vars(objectives).items()
    if isinstance(kind, type) and issubclass(kind, Objective) and not inspect.isabstract(kind)
}


def module(name: str, seeds: list[int], rates: list[float]) -> OpsinModule:
    small = {"steps_per_batch": 50, "log_every": 10, "probe_size": 8, "evaluation_size": 8, "compile": False}
    return OpsinModule(Pairs(name, weighted=True), MODEL, seeds, rates, **small)


def test_every_objective_is_tried():
    assert {type(item).__name__ for item in OBJECTIVES.values()} == KINDS


@pytest.mark.parametrize("steps", [60, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_member_among_others_is_the_run_of_its_own(name, steps):
    seeds, rates, slot = [3, 4, 3], [0.003, 0.002, 0.001], 1
    blink = {"site": "blocks.0.hook_attn_out", "value": 0.1, "schedule": Schedule(period=40, ramp=5)}
    together = train(module(name, seeds, rates).double(), steps, Clamp(**blink))
    alone = train(module(name, seeds[slot : slot + 1], rates[slot : slot + 1]).double(), steps, Clamp(**blink))
    for parameter, values in together.parameters_by_name().items():
        single = alone.parameters_by_name()[parameter][0]
        assert (values[slot] - single).abs().max() <= 1e-12 * single.abs().max().clamp(min=1), parameter
    for metric in alone.step_metrics:
        several, one = (model.history[metric].values.block for model in (together, alone))
        np.testing.assert_allclose(several[:, slot], one[:, 0], rtol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_its_loss_falls_and_its_measures_are_recorded_wherever_a_run_measures(name, tmp_path):
    model = module(name, [1, 2], [0.01, 0.01])
    trainer = pl.Trainer(
        max_steps=150,
        callbacks=[ReferenceDistance(every=50)],
        accelerator="cpu",
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=1,
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False),
    )
    trainer.fit(model)
    losses = model.history["train/loss"].values.block
    assert (losses[-3:].mean(0) < losses[:3].mean(0)).all()
    measured = [measure.name for measure in model.task.objective.measures if measure.needs is None]
    for metric in ("loss", *measured):
        assert np.isfinite(model.history[f"val/far/{metric}"].values.block).all()
    distance = model.task.objective.distance_name
    for reference in model.task.references():
        values = model.history[f"reference/{reference}/{distance}"].values.block
        assert values.shape == (4, 2) and np.isfinite(values).all() and (values >= -1e-6).all()


@pytest.mark.parametrize("name", ["log cross-entropy", "summed squared error"])
def test_a_run_that_is_killed_and_resumed_ends_with_the_bits_of_one_left_alone(name, tmp_path):
    def keeping():
        return pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=50, save_top_k=0)

    whole, killed = module(name, [1], [0.01]), module(name, [1], [0.01])
    train(whole, 150)
    with pytest.raises(Killed):
        train(killed, 150, keeping(), KillAt(100))
    again = train(module(name, [1], [0.01]), 150, resume=str(tmp_path / "last.ckpt"))
    for parameter, values in whole.parameters_by_name().items():
        assert torch.equal(values, again.parameters_by_name()[parameter]), parameter


def test_a_run_under_another_objective_is_another_run(tmp_path):
    def keeping():
        return pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=50, save_top_k=0)

    train(module("squared error", [1], [0.01]), 50, keeping())
    changed = module("squared error", [1], [0.01])
    changed.task.objective = OBJECTIVES["summed squared error"]
    with pytest.raises(ConfigError, match=r"task.objective.over_outputs: got 'sum', expected 'mean'"):
        train(changed, 100, resume=str(tmp_path / "last.ckpt"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_step_is_one_graph_whatever_is_minimised(name, graphs):
    start = weights(MODEL, Pairs(name), dtype=torch.float32)
    eager, traced = (Training(MODEL, Pairs(name, weighted=True), start) for _ in range(2))
    traced.call = compile_step(traced.step)
    for k in range(3):
        # by tracing a product may be fused with a sum
        torch.testing.assert_close(eager.update(k), traced.update(k), rtol=1e-4, atol=1e-5)
    assert graphs() == 1


# ---- nobody else knows ------------------------------------------------------------------------------

LOSS_WORDS = re.compile(r"\bnats\b|\baccuracy\b|\bcross_entropy\b|log_softmax|\.targets\b|\bplausible\b")
"""What only an objective should speak of."""

ONE_KIND = {
    "opsin.figures.fourier": "names the measures of operations modulo p",
    "opsin.figures.memories": "names the measures of memories, one of which is a divergence",
    "opsin.figures.sparse_probes": "draws how often a probe is right, whatever is minimised",
    "opsin.metrics.memories": "which token a memory holds",
    "opsin.task": "hands the right answer out to probes, whatever its type",
    "opsin.callbacks.readers.clustering_head": "needs classes, and a task that says which positions decide",
    "opsin.callbacks.readers.delay": "follows two metrics, by default accuracies, and refuses what nobody records",
    "opsin.callbacks.readers.fourier_structure": "needs a table of an operation modulo p",
    "opsin.callbacks.readers.in_context_algorithm": "needs in-context regression",
    "opsin.callbacks.readers.memories": "needs the memories of BirthTransformer",
    "opsin.figures.confidence": "draws entropies, which are in nats whatever is minimised",
    "opsin.interventions.values.nullspace": "fits a classifier of its own, and reads what it can of it",
    "opsin.metrics.calibration": "whether confidence is right, of classes",
    "opsin.metrics.mean_ablation": "entropy and divergence of classes",
    "opsin.callbacks.readers.calibration": "needs classes",
    "opsin.callbacks.readers.neurons": "needs classes",
    "opsin.callbacks.writers.project": "refuses the right answer as a label where there are no classes",
}
"""Modules that work on one kind of task, and why they may; a run of another refuses them."""

OWNERS = ("opsin.objective", "opsin.batch", "opsin.tasks")


def spoken(module: Module) -> list[str]:
    """Lines of code, without docstrings and comments, that speak of what only an objective should know."""
    tree = ast.parse(module.text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [item for item in body if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))]
            node.body = kept or [ast.Pass()]
    return [line.strip() for line in ast.unparse(tree).splitlines() if LOSS_WORDS.search(line)]


def test_nothing_outside_of_an_objective_knows_what_a_loss_is_made_of():
    offences = [
        f"{module.shown}: {line}"
        for module in modules()
        if not (module.name.startswith(OWNERS) or module.name in ONE_KIND)
        for line in spoken(module)
    ]
    # what a check says of targets that a loss cannot take
    offences = [line for line in offences if "targets {list(batch.targets.shape)}" not in line]
    report("knowledge of a loss outside of the objective", offences)


def test_every_exception_is_one():
    known = {module.name: module for module in modules()}
    assert not [name for name in ONE_KIND if name not in known or not spoken(known[name])]


def test_every_reader_of_one_kind_says_so():
    readers = [name for name in ONE_KIND if name.startswith("opsin.callbacks.readers.")]
    texts = {module.name: module.text for module in modules()}
    assert all(re.search("needs_classes|needs_read_out|Requirement|ConfigError", texts[name]) for name in readers)
