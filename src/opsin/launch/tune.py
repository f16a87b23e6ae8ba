"""How many members one process should train at once, by a rule on the machine or by trying.

The rule: as many processes as cores, of one thread each, and members enough to fill them evenly, at most
``LARGEST_CHUNK`` and at most what fits into half of the memory. ``opsin fit --tune`` times some numbers of members on
the recipe itself instead, all processes at once, since they share memory and caches, and keeps the fastest.

Legend: M members.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from opsin.errors import PopulationError, log
from opsin.interventions.build_plan import Writer
from opsin.interventions.weights import WeightWriter
from opsin.launch.advice import hide_advice
from opsin.launch.recipe import OpsinCLI
from opsin.launch.workers import end_with_parent, start_worker
from opsin.model.memory import available_bytes, kept_numbers, parameter_count
from opsin.model.protocol import Model
from opsin.model.sites import SiteTable
from opsin.optimizers.base import Optimizer
from opsin.population.chunks import Chunking, UntrainedPopulation, chunk_recipe
from opsin.records.axes import Axes
from opsin.records.folder import write_yaml
from opsin.records.schema import RECIPE_FILE
from opsin.task import Task
from opsin.training.compiling import COMPILE_FROM_STEPS, has_compiler
from opsin.training.module import OpsinModule, callbacks_of, opsin_module
from opsin.training.observers import recorded_metrics

LARGEST_CHUNK = 16
"""Members of one process at most: more gain no speed on a CPU, and lose more when the process is killed."""

CANDIDATES = (1, 2, 4, 8, 16, 32)
"""Numbers of members that are tried, as far as there are so many for every process."""

BATCHES = 4
"""Lightning batches of a trial; the first, in which the step is compiled, is not timed."""

COPIES = 6
"""How often a member's activations are counted: kept for the gradient, their gradients, and the compiler's buffers."""


# ---- the rule -------------------------------------------------------------------------------------


def default_chunking(settings: Mapping[str, Any], fit: int) -> Chunking:
    """Processes and members of one: as the recipe says, or by a rule on the machine.

    Args:
        settings: section ``population`` of the recipe.
        fit: number of members that fit into the memory of one process.
    """
    members = settings.get("members_per_process")
    return Chunking(
        processes=settings.get("processes") or cores(),
        members_per_process=members or min(LARGEST_CHUNK, fit),
        chosen_by="rule" if members is None else "recipe",
    )


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def member_bytes(model: Model, task: Task, optimizer: Optimizer) -> int:
    """Memory in bytes that one more member takes while a step runs, roughly.

    Counted are activations with their gradients, weights with their gradients and clipped gradients, and what the
    optimizer keeps of them.

    Args:
        model: settings of the model.
        task: the task, which has the size of a batch and of the vocabularies.
        optimizer: the optimizer, which says what it keeps of every weight.
    """
    activations = sum(math.prod(site.shape(1, task.batch_size)) for site in model.sites(task))
    return 4 * (COPIES * activations + 3 * parameter_count(model, task) + kept_numbers(model, task, optimizer))


def members_that_fit(module: OpsinModule, processes: int) -> int:
    """Largest number of members in one process for which half of the machine's memory suffices; at least 1.

    Args:
        module: module of a run of the population.
        processes: number of processes that train at once.
    """
    return max(1, available_bytes() // 2 // processes // member_bytes(module.network, module.task, module.optimizer))


# ---- trying ---------------------------------------------------------------------------------------


def tuned_chunking(population: UntrainedPopulation, chunking: Chunking) -> Chunking:
    """As many processes, with the number of members that is the fastest here, timed on the largest graph.

    Args:
        population: the population that is to be trained.
        chunking: how it would be cut by the rule.
    """
    graphs = Counter(population.graphs[member.condition] for member in population.members)
    largest = max(graphs, key=lambda graph: graphs[graph])
    members = [member for member in population.members if population.graphs[member.condition] == largest]
    processes = chunking.processes
    most = min(population.fit, -(-len(members) // processes))
    rates = fastest(
        lambda size: chunk_recipe(population.recipe, population.conditions, members[:size]), processes, most
    )
    for size, rate in rates.items():
        log.info(f"opsin: {processes} processes of {size} members: {rate:,.0f} member-steps per second")
    tried = {str(size): round(rate, 1) for size, rate in rates.items()}
    return Chunking(processes, next(iter(rates)), "timing", tried)


def fastest(recipe_of: Callable[[int], Mapping[str, Any]], processes: int, most: int) -> dict[int, float]:
    """Member-steps per second of all processes together, by members of each; the fastest comes first.

    Args:
        recipe_of: from a number of members to the recipe of a run of so many, as plain settings.
        processes: number of processes that train at once.
        most: largest number of members in one process.
    """
    sizes = [size for size in CANDIDATES if size <= most] or [1]
    if most < CANDIDATES[-1] and most not in sizes:
        sizes.append(most)
    found = {}
    for size in sizes:
        log.info(f"opsin: timing {processes} processes of {size} members")
        found[size] = _rate(recipe_of(size), size, processes)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _rate(recipe: Mapping[str, Any], size: int, processes: int) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        path = write_yaml(Path(scratch) / RECIPE_FILE, recipe)
        trials = [start_worker("opsin.launch.tune", [str(path)], output=subprocess.PIPE) for _ in range(processes)]
        printed = [_output(trial) for trial in trials]
    codes = [trial.returncode for trial in trials if trial.returncode]
    if codes:
        raise PopulationError(f"--tune: a trial of {size} members ended with code {codes[0]}; what it said is above")
    return sum(size / json.loads(text.splitlines()[-1])["seconds_per_step"] for text in printed)


def _output(trial: subprocess.Popen[bytes]) -> str:
    """What a trial prints until it ends; ``communicate`` would close its standard input, which ends it."""
    assert trial.stdout is not None
    with trial.stdout as output:
        text = output.read().decode()
    trial.wait()
    return text


class StepTimer(Callback):
    """Seconds per optimizer step from the second Lightning batch on; ends the trial after ``BATCHES``.

    Args:
        recorded: names and axes of the metrics that the recipe's readers, which a trial lacks, would record:
            schedules may follow them.
    """

    def __init__(self, recorded: Mapping[str, Axes]) -> None:
        self.recorded = dict(recorded)

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        """Metrics that schedules of the trial may follow; none is recorded."""
        return self.recorded

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        done = opsin_module(pl_module).steps_done
        if not hasattr(self, "_began"):
            self._began, self._first, self._batches = time.perf_counter(), done, 1
        elif done > self._first:
            self.seconds = (time.perf_counter() - self._began) / (done - self._first)
            self._batches += 1
            trainer.should_stop = self._batches >= BATCHES


def time_recipe(path: Path) -> float:
    """Seconds per optimizer step of a recipe, compiled where its run would be, with its writers and nothing else."""
    cli = OpsinCLI(["--config", str(path), "--run_folder", str(path.parent / "run")])
    if cli.model.compile_setting == "auto":
        cli.model.compile_setting = cli.trainer.max_steps >= COMPILE_FROM_STEPS and has_compiler()
    cli.model.idle = "warn"
    callbacks, model = callbacks_of(cli.trainer), cli.model
    timer = StepTimer(recorded_metrics(callbacks, model.sites, model.task, validates=True))
    writers = [callback for callback in callbacks if isinstance(callback, (Writer, WeightWriter))]
    trainer = Trainer(
        max_steps=cli.trainer.max_steps,
        callbacks=[*writers, timer],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(cli.model)
    return timer.seconds


if __name__ == "__main__":
    hide_advice()
    end_with_parent()
    print(json.dumps({"seconds_per_step": time_recipe(Path(sys.argv[1]))}))
