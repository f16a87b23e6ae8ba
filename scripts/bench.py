#!/usr/bin/env python3
"""Training steps per second, interleaved in one process, as ratios.

    python scripts/bench.py [--interventions | --population | --neurons] [--json FILE] [--rounds N]

Several loops train the reference configuration (2 layers, width 64, 8 heads, 5 positions, 512
features, batch 32): a plain eager PyTorch loop, Opsin bare through the Trainer, and Opsin with what
``VARIANTS`` names, each thing at its default cadence. They take turns, a few hundred steps each, so that
a machine whose speed drifts slows all of them alike; ratios are medians over the rounds.

With ``--interventions`` the loops are Opsin bare and Opsin with each of its manipulations, and the ratios are
of times: how many times as long a training step takes under it, in many short turns. Half of them are pulsed, so that
schedules switch all the while; ``recompilations`` counts the graphs made after every loop has had its first turn.

With ``--population`` they are processes with 1 to 64 members (on a GPU to 1,024) and several of them at once, in
member-steps per second, and the memory of a member (``bench_population.py``).

With ``--neurons`` they are a forward pass on a probe and the causal effects of all neurons of a layer on it
(``bench_neurons.py``).
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from bench_loops import REFERENCE, STEPS_PER_TURN, EagerLoop, OpsinLoop
from bench_neurons import measure_neurons
from bench_population import measure_population

from opsin.callbacks import (
    Ablate,
    Clamp,
    CopyFromPattern,
    Disallow,
    Freeze,
    Graft,
    HeadTemperature,
    InductionHeads,
    KeepRun,
    PathPatch,
    PerfectPreviousInput,
    PhaseChange,
    Preserve,
    PreviousTokenHeads,
    ProgressMeasures,
    Project,
    Snapshots,
)
from opsin.errors import ConfigError
from opsin.interventions.donors import Donor, donor_from
from opsin.interventions.feedback import Feedback
from opsin.interventions.schedules import Schedule
from opsin.model.protocol import init_parameters
from opsin.tasks import FewShot


def instruments(folder: Path) -> list[pl.Callback]:
    """Three clamps and every tracker, at default cadence."""
    return [
        Clamp(heads=["0:2"], pattern="previous_token"),
        Clamp(heads=["1:3"], pattern="induction", strength=0.8),
        Clamp(heads=["1:5"], pattern="match"),
        InductionHeads(),
        PreviousTokenHeads(),
        PhaseChange(),
        Snapshots(),
        KeepRun(folder),
    ]


def progress_measures(_: Path) -> list[pl.Callback]:
    """Four sets, one of which takes its value from another pass: twice five times the probe every 100 steps."""
    sets: dict[str, list[pl.Callback]] = {
        "previous": [Clamp(heads=["0:2"], pattern="previous_token")],
        "match": [Clamp(heads=["1:5"], pattern="match")],
        "copy": [CopyFromPattern("1:5")],
        "without": [Ablate(heads=["1:5"])],
    }
    return [ProgressMeasures(sets)]


VARIANTS: dict[str, Callable[[Path], list[pl.Callback]]] = {
    "bare": lambda _: [],
    "clamps_and_trackers": instruments,
    "progress_measures": progress_measures,
}
"""Opsin's loops: the callbacks of each, made anew for a folder of its own."""


PULSED = Schedule(period=20, duty=0.5)
REST = [f"1:{head}" for head in range(8) if head != 3]

MANIPULATIONS: dict[str, Callable[[], list[pl.Callback]]] = {
    "previous_token": lambda: [Clamp(["0:2"], "previous_token", schedule=PULSED)],
    "induction": lambda: [Clamp(["1:3"], "induction", schedule=PULSED)],
    "match": lambda: [Clamp(["1:3"], "match", schedule=PULSED)],
    "disallow": lambda: [Disallow(["0:2"], "previous_token", schedule=PULSED)],
    "silence_non_labels": lambda: [Disallow(["1:3"], "non_labels")],
    "ablate_heads": lambda: [Ablate(REST, schedule=PULSED)],
    "ablate_mean": lambda: [Ablate(["1:3"], value="mean")],
    "ablate_resample": lambda: [Ablate(["1:3"], value="resample")],
    "ablate_noise": lambda: [Ablate(["1:3"], value="noise")],
    "ablate_embedding": lambda: [Ablate(sites=["hook_embed"], schedule=PULSED)],
    "number": lambda: [Clamp(site="blocks.0.hook_attn_out", value=0.5, schedule=PULSED)],
    "project": lambda: [Project("blocks.0.hook_resid_post", directions=[[1.0] * 64], schedule=PULSED)],
    "path_patch": lambda: [PathPatch(["0:2"], ["1:3.k"], schedule=PULSED)],
    "freeze": lambda: [Freeze(["0:2"], parts=["W_Q", "W_K"], schedule=PULSED)],
    "feedback": lambda: [
        Ablate(["1:3"], schedule=Schedule(feedback=Feedback("train/loss", below=1e3))),
    ],
    "ten": lambda: [
        *(Clamp([f"0:{head}"], "previous_token", schedule=PULSED) for head in range(5)),
        *(Clamp([f"1:{head}"], "induction", schedule=PULSED) for head in range(4)),
        Ablate(["1:7"], schedule=PULSED),
    ],
    "preserve": lambda: [Preserve(["patterns"]), Ablate(["0:2"], schedule=PULSED)],
    "temperature": lambda: [HeadTemperature({"1:3": 0.5}, schedule=PULSED)],
    "copy": lambda: [CopyFromPattern("1:3", schedule=PULSED)],
    "perfect_input": lambda: [PerfectPreviousInput(schedule=PULSED)],
    "graft_lower": lambda: [Graft(donor(), 0, "lower", schedule=PULSED)],
    "graft_upper": lambda: [Graft(donor(), 0, "upper", schedule=PULSED)],
}
"""The manipulations by themselves; from ``preserve`` on they run further passes, ``perfect_input`` two."""


def donor() -> Donor:
    """A model like the one that is trained, of another seed."""
    return donor_from("bench", REFERENCE, init_parameters(REFERENCE, FewShot(), [9]))


def loops_of(kind: str, rounds: int, folder: Path) -> tuple[dict[str, OpsinLoop], dict[str, EagerLoop]]:
    """The loops of a bench, Opsin's and others, by name."""
    task = FewShot()
    if kind == "interventions":
        made: dict[str, list[pl.Callback]] = {"none": [], **{name: make() for name, make in MANIPULATIONS.items()}}
        steps = (rounds + 1) * STEPS_PER_TURN["interventions"]
        return {name: OpsinLoop(task, callbacks, steps) for name, callbacks in made.items()}, {}
    steps = (rounds + 1) * STEPS_PER_TURN["opsin"]
    fits = {name: OpsinLoop(task, callbacks(folder / name), steps) for name, callbacks in VARIANTS.items()}
    return fits, {"eager": EagerLoop(task, threads=1), "eager_two_threads": EagerLoop(task, threads=2)}


def measure(kind: str, rounds: int, folder: Path) -> tuple[dict[str, list[float]], int]:
    """Steps per second of every loop in every round, after a first round that is thrown away; and recompilations."""
    fits, plain_loops = loops_of(kind, rounds, folder)
    steps = STEPS_PER_TURN["interventions" if kind == "interventions" else "opsin"]
    loops: dict[str, Callable[[], float]] = {name: loop.turn for name, loop in plain_loops.items()}
    loops |= {name: partial(loop.turn, steps) for name, loop in fits.items()}
    for loop in loops.values():
        loop()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            speeds[name].append(loop())
    for fit in fits.values():
        fit.thread.join()
    return speeds, torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs


def summarise_interventions(speeds: dict[str, list[float]], recompilations: int) -> dict[str, float]:
    """How many times as long a step takes under each manipulation: medians of the ratios within a round."""

    def times(name: str) -> float:
        return statistics.median(none / with_it for none, with_it in zip(speeds["none"], speeds[name], strict=True))

    return {
        "steps_per_second_none": statistics.median(speeds["none"]),
        **{f"time_{name}_to_none": times(name) for name in speeds if name != "none"},
        "recompilations": recompilations,
        "rounds": len(speeds["none"]),
    }


def summarise(speeds: dict[str, list[float]]) -> dict[str, float]:
    """Median speeds (steps per second) and medians of the ratios within a round."""

    def ratio(name: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(speeds[name], speeds[base], strict=True))

    variants = [name for name in speeds if name in VARIANTS and name != "bare"]
    return {
        **{f"steps_per_second_{name}": statistics.median(values) for name, values in speeds.items()},
        "ratio_bare_to_eager": ratio("bare", "eager"),
        "ratio_bare_to_eager_two_threads": ratio("bare", "eager_two_threads"),
        **{f"ratio_{name}_to_bare": ratio(name, "bare") for name in variants},
        "rounds": len(speeds["bare"]),
    }


def figures_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for."""
    if arguments.population:
        return measure_population(arguments.rounds, REFERENCE, FewShot())
    if arguments.neurons:
        return measure_neurons(arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        kind = "interventions" if arguments.interventions else "loops"
        speeds, recompilations = measure(kind, arguments.rounds, Path(folder))
    return summarise_interventions(speeds, recompilations) if arguments.interventions else summarise(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--rounds", type=int, default=12)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--interventions", action="store_true", help="compare manipulations with none")
    which.add_argument("--population", action="store_true", help="compare numbers of members and of processes")
    which.add_argument("--neurons", action="store_true", help="compare the effects of all neurons with a forward pass")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        raise ConfigError("--rounds", arguments.rounds, "at least 1")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    figures: dict[str, Any] = figures_of(arguments)
    for name, value in figures.items():
        print(f"{name:60s} " + (f"{value:10.4g}" if isinstance(value, (int, float)) else str(value)))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
