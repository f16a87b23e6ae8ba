"""What the causal effects of all neurons of a layer cost, in forward passes.

Both work on the same probe in turns, so that a machine whose speed drifts slows both alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from opsin.metrics.mean_ablation import finite_unigram, mean_ablation_effects
from opsin.metrics.neuron_weights import ReadOut
from opsin.model.protocol import init_parameters
from opsin.model.transformer import Transformer
from opsin.task import Task
from opsin.tasks import Repeats

SHAPE = Transformer(
    layers=2, width=128, heads=4, mlp_ratio=4, positions="learned", max_positions=48, unembed_bias=False
)
SEQUENCES = 32
PER = 64
"""Neurons that the ratio is stated for."""


def measure_neurons(rounds: int, model: Transformer = SHAPE, task: Task | None = None) -> dict[str, object]:
    """Seconds of a forward pass and of all neurons' effects on the output, and their ratio."""
    torch.set_num_threads(1)
    turns = contestants(model, Repeats(vocabulary=48, positions=48) if task is None else task)
    for run in turns.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, run in turns.items():
            seconds[name].append(_seconds(run))
    assert model.neurons is not None
    return summarise_neurons(seconds["forward"], seconds["effects"], model.neurons)


def contestants(model: Transformer, task: Task) -> dict[str, Callable[[], object]]:
    """What takes turns: a forward pass on the probe, and the effects of the last layer's neurons on it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = {name: value.to(device) for name, value in init_parameters(model, task, [0]).items()}
    draw = {name: tensor[0].to(device) for name, tensor in task.draw([0], 0, 1, "eval/train", SEQUENCES).items()}
    batch = task.assemble({name: tensor.to(device) for name, tensor in task.bank().items()}, draw)
    table = model.position_table(batch.layout.positions).to(device)
    seen: dict[str, torch.Tensor] = {}

    def tap(name: str, activation: torch.Tensor) -> torch.Tensor:
        seen[name] = activation
        return activation

    # inference_mode, so that neither keeps what a gradient would need
    once = torch.inference_mode()(partial(model.forward, values, table, batch))
    once(tap)
    last, scored = f"blocks.{model.layers - 1}.", list(batch.layout.scored)
    resid, post = (seen[last + site][:, :, scored] for site in ("hook_resid_post", "mlp.hook_post"))
    unigram = task.unigram()
    # what a tracker asks for
    targets = {"targets": batch.targets, "unigram": None if unigram is None else finite_unigram(unigram).to(resid)}
    read_out, weight = ReadOut.of(values), values[last + "mlp.W_out"]
    effects = partial(mean_ablation_effects, read_out, resid, post, weight, **targets)
    return {"forward": once, "effects": effects}


def summarise_neurons(forward: Sequence[float], effects: Sequence[float], neurons: int) -> dict[str, object]:
    """Medians of the seconds of every round, and of the ratios within a round for every ``PER`` neurons."""
    ratio = statistics.median(b / a for a, b in zip(forward, effects, strict=True))
    return {
        "seconds_forward": statistics.median(forward),
        "seconds_effects": statistics.median(effects),
        "neurons": neurons,
        f"forward_passes_per_{PER}_neurons": ratio * PER / neurons,
        "rounds": len(forward),
    }


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
