"""How many members one process should train at once, by a rule on the machine or by trying.

The rule: as many processes as cores, of one thread each, and members enough to fill them evenly, at most
``LARGEST_CHUNK`` and at most what fits into half of the memory. ``opsin fit --tune`` times some numbers of members on
the recipe itself instead, all processes at once, since they share memory and caches, and keeps the fastest.

Legend: M members.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from opsin.errors import PopulationError, log
from opsin.interventions.build_plan import Writer
from opsin.interventions.weights import WeightWriter
from opsin.model.sites import SiteTable
from opsin.model.transformer import Transformer
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


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def member_bytes(model: Transformer, task: Task) -> int:
    """Memory that one more member takes while a step runs, roughly: activations with gradients, weights, moments."""
    sites = model.sites(task)
    activations = sum(_product(site.shape(1, task.batch_size)) for site in sites)
    width = model.width
    weights = model.layers * width * (4 * width + 2 * (model.neurons or 0)) + width * (task.n_tokens + task.n_outputs)
    return 4 * (COPIES * activations + 5 * (weights + width * (task.n_features or 0)))


def _product(shape: Sequence[int]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


def memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def members_that_fit(module: OpsinModule, processes: int) -> int:
    """Members of one of so many processes that half of the memory holds; at least 1."""
    return max(1, memory() // 2 // processes // member_bytes(module.transformer, module.task))


# ---- trying ---------------------------------------------------------------------------------------


def fastest(recipe_of: Callable[[int], Mapping[str, Any]], processes: int, most: int) -> dict[int, float]:
    """Member-steps per second of all processes together, by members of each; the fastest comes first.

    Args:
        recipe_of: a run of so many members, as plain settings.
        processes: that train at once.
        most: members of one process at most.
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
        path = Path(scratch) / "recipe.yaml"
        path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
        command = [sys.executable, "-m", "opsin.launch.tune", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        workers = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(processes)
        ]
        told = [worker.communicate()[0] for worker in workers]
    codes = [worker.returncode for worker in workers if worker.returncode]
    if codes:
        raise PopulationError(f"--tune: a trial of {size} members ended with code {codes[0]}; what it said is above")
    return sum(size / json.loads(text.splitlines()[-1])["seconds_per_step"] for text in told)


class Stopwatch(Callback):
    """Seconds per optimizer step from the second Lightning batch on; ends the trial after ``BATCHES``.

    Args:
        recorded: what the recipe's readers, which a trial lacks, would record: schedules may follow it.
    """

    def __init__(self, recorded: Mapping[str, tuple[int, ...]]) -> None:
        self.recorded = dict(recorded)

    def records(self, sites: SiteTable) -> dict[str, tuple[int, ...]]:
        """Nothing of its own."""
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
    from opsin.launch.recipe import OpsinCLI

    cli = OpsinCLI(["--config", str(path), "--run_folder", str(path.parent / "run")])
    if cli.model.compile_setting == "auto":
        cli.model.compile_setting = cli.trainer.max_steps >= COMPILE_FROM_STEPS and has_compiler()
    cli.model.idle = "warn"
    callbacks, model = callbacks_of(cli.trainer), cli.model
    watch = Stopwatch(recorded_metrics(callbacks, model.sites, model.task, validates=True))
    writers = [callback for callback in callbacks if isinstance(callback, (Writer, WeightWriter))]
    trainer = Trainer(
        max_steps=cli.trainer.max_steps,
        callbacks=[*writers, watch],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(cli.model)
    return watch.seconds


if __name__ == "__main__":
    print(json.dumps({"seconds_per_step": time_recipe(Path(sys.argv[1]))}))
