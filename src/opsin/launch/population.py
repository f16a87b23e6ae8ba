"""``opsin fit`` and ``opsin resume`` of a population: chunks as processes, their folders, and the end.

``fit_population`` builds every condition once, cuts the members into chunks, and writes a folder from which
``train_population`` can go on at any time: each chunk is an ordinary run that trains in a process of its own.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from opsin.callbacks.readers.run_folder import is_finished
from opsin.callbacks.wandb.population import send_population
from opsin.errors import ConfigError, Interruption, PopulationError, log
from opsin.launch.conditions import ConditionBuilder, check_compared
from opsin.launch.recipe import OpsinCLI
from opsin.launch.signals import ended_by
from opsin.launch.tune import default_chunking, tuned_chunking
from opsin.launch.workers import Job, run_jobs
from opsin.population.chunks import (
    Chunking,
    Member,
    UntrainedPopulation,
    chunk_recipe,
    cut_into_chunks,
    expanded,
    members_of,
    population_document,
)
from opsin.population.folder import chunk_folder, read_document, read_population
from opsin.population.optimizers import PER_MEMBER, lists_of_members
from opsin.population.settings import Population
from opsin.records.checkpoint import load_saved
from opsin.records.folder import write_json, write_yaml
from opsin.records.recipe_text import parse_recipe
from opsin.records.schema import (
    CHUNKS_FOLDER,
    CONFIG_FILE,
    LAST_CHECKPOINT,
    METRICS_FILE,
    POPULATION_FILE,
    RECIPE_FILE,
)
from opsin.reports.population import finish_population, population_report
from opsin.training.module import OpsinModule, callbacks_of
from opsin.training.observers import recorded_metrics

REPORT_EVERY_SECONDS = 15.0


def fit_population(cli: OpsinCLI) -> None:
    """Train every seed in every condition, in as many processes as the machine has cores.

    Args:
        cli: the built recipe, which has a population.

    Raises:
        ConfigError: a setting that cannot work; nothing was started.
        PopulationError: the process of a chunk failed; the other chunks were trained to their end.
    """
    if cli.config.ckpt_path is not None:
        raise ConfigError("ckpt_path", cli.config.ckpt_path, "none beside a population; `opsin resume` continues one")
    if cli.trainer.max_steps < 1:
        raise ConfigError("trainer.max_steps", cli.trainer.max_steps, "the number of optimizer steps")
    callbacks, validates = callbacks_of(cli.trainer), bool(cli.trainer.limit_val_batches)
    check_population(cli.config.population, cli.model, callbacks, cli.trainer.max_steps, validates)
    folder = cli.keeper.folder
    recipe = parse_recipe(cli.resolved(), CONFIG_FILE)
    with tempfile.TemporaryDirectory() as scratch:
        population = build_population(recipe, Path(scratch))
    chunking = default_chunking(recipe["population"], population.fit)
    if cli.config.tune:
        chunking = tuned_chunking(population, chunking)
    write_population(population, chunking, folder)
    train_population(folder)


# ---- before training --------------------------------------------------------------------------------


def check_population(
    population: Population, module: OpsinModule, callbacks: Sequence[Callback], steps: int, validates: bool
) -> None:
    """Refuse metrics that cannot be compared, and windows that begin after the end.

    A metric can be compared that the runs record with one number a member.

    Args:
        population: section ``population`` of the recipe.
        module, callbacks: module and callbacks of the recipe without its conditions.
        steps: optimizer steps of a run.
        validates: whether a run evaluates the task's evaluation sets.

    Raises:
        ConfigError: names the metric, or the start of the window.
    """
    check_compared(population.compare, recorded_metrics(callbacks, module.sites, module.task, validates))
    if (windows := population.windows) is None:
        return
    length = steps * (module.task.batch_size if windows.unit == "sequences" else 1)
    for start in windows.starts:
        if not 0 <= start < length:
            expected = f"0 to below {length:,}, the {windows.unit} of the run"
            raise ConfigError("population.windows.starts", start, expected)


def build_population(recipe: Mapping[str, Any], scratch: Path) -> UntrainedPopulation:
    """Members and conditions of a resolved recipe; every condition is built, so that a wrong one stops here.

    Args:
        recipe: resolved recipe of the population, as plain settings.
        scratch: folder in which the recipes of the conditions are written for building them.

    Raises:
        ConfigError: names the condition and its setting.
    """
    _check_shared_settings(recipe["model"])
    settings, seed = recipe["population"], recipe["model"]["seed"]
    conditions = expanded(recipe)
    members = members_of(settings["seeds"], seed, list(conditions.settings), settings["paired"])
    by_condition: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        by_condition[member.condition].append(member)
    graphs, fit = ConditionBuilder(recipe, conditions, by_condition, scratch).build()
    return UntrainedPopulation(recipe, *conditions, members, graphs, fit)


def _check_shared_settings(model: Mapping[str, Any]) -> None:
    """Refuse settings of the model that a population chooses for each of its members."""
    if not isinstance(model["seed"], int):
        raise ConfigError("model.seed", model["seed"], "one seed beside a population, which chooses the others")
    for name in PER_MEMBER:
        if isinstance(value := model.get(name), list):
            raise ConfigError(f"model.{name}", value, f"one number beside a population; a condition has its own {name}")
    for name, value in lists_of_members(model.get("optimizer")).items():
        expected = "one value beside a population; a condition has an optimizer of its own"
        raise ConfigError(f"model.optimizer.init_args.{name}", value, expected)
    if model.get("initial"):
        expected = "none beside a population; a condition's `initial` says what its members start from"
        raise ConfigError("model.initial", model["initial"], expected)


def write_population(population: UntrainedPopulation, chunking: Chunking, folder: Path) -> None:
    """Write the folder of a population that has not been trained.

    Args:
        population: the population with its recipe.
        chunking: how its members are cut into chunks.
        folder: folder of the population.
    """
    chunks = cut_into_chunks(population.members, population.graphs, chunking)
    # first: it tells a folder whose process was killed before it was whole
    write_yaml(folder / CONFIG_FILE, population.recipe)
    # what such a process left; no chunk is trained before the folder is whole
    shutil.rmtree(folder / CHUNKS_FOLDER, ignore_errors=True)
    for number, chunk in enumerate(chunks):
        settings = chunk_recipe(population.recipe, population.conditions, chunk)
        write_yaml(chunk_folder(folder, number) / RECIPE_FILE, settings)
    settings = {"arrangement": chunking.as_settings(), "compare": population.recipe["population"]["compare"]}
    if population.windows:
        settings["grid"] = dict(population.windows)
    if population.crossed:
        settings["crossed"] = dict(population.crossed)
    # last: a folder with this file is whole
    write_json(folder / POPULATION_FILE, population_document(chunks, list(population.conditions), **settings))


# ---- training ---------------------------------------------------------------------------------------


def train_population(folder: Path) -> None:
    """Train every chunk that is not finished, then write and send the tables and figures, and print the report.

    Args:
        folder: folder of the population, as ``write_population`` or a fork has written it.

    Raises:
        PopulationError: the process of a chunk failed; the other chunks were trained to their end.
        Interruption: a signal ended it; every chunk that was running is saved.
    """
    try:
        _train_chunks(folder)
    except Interruption as stopped:
        message = f"{ended_by(stopped.signal)}; `opsin resume {folder}` continues"
        raise Interruption(stopped.signal, message) from None


def _train_chunks(folder: Path) -> None:
    content = read_document(folder)
    count = 1 + max(row["chunk"] for row in content["members"])
    jobs = [job for number in range(count) if (job := _job(chunk_folder(folder, number))) is not None]
    chunking = Chunking(**content["arrangement"])
    log.info(
        f"opsin: {len(content['members'])} members in {count} chunks of at most "
        f"{chunking.members_per_process} (by {chunking.chosen_by}), "
        f"{chunking.processes} processes of one thread"
        + (f"; {count - len(jobs)} chunks are finished" if len(jobs) < count else "")
    )
    reporter = ProgressReporter(count, count - len(jobs))
    failed = run_jobs(jobs, chunking.processes, reporter.report_end, reporter.report_steps)
    left = [job for job in jobs if _job(job.folder) is not None]
    # one whose members have all diverged ends with an error, and is whole
    failed = [job for job in failed if job in left]
    summary = finish_population(folder)
    send_population(folder, summary)
    print(population_report(summary, folder, read_population(folder).scale))
    if left and not failed:
        names = ", ".join(job.folder.name for job in left)
        print(f"unfinished    chunk {names}: ended by the Trainer; `opsin resume {folder}` continues")
    if failed:
        names = ", ".join(job.folder.name for job in failed)
        raise PopulationError(
            f"chunk {names} of {folder}: ended before it was finished; the others are whole "
            f"(`opsin resume {folder}` trains it again)"
        )


def _job(folder: Path) -> Job | None:
    """What remains to be done for one chunk."""
    if not (folder / CONFIG_FILE).exists():
        return Job(folder, ["fit", "--config", str(folder / RECIPE_FILE), "--run_folder", str(folder)])
    saved = load_saved(folder / LAST_CHECKPOINT)
    if saved is not None and is_finished(saved):
        return None
    return Job(folder, ["resume", str(folder)])


@dataclass
class ProgressReporter:
    """Reports how far the chunks of a population are, in the terminal.

    Args:
        count: number of chunks in the population.
        done: number of chunks that are finished.
    """

    count: int
    done: int
    _reported_at: float = field(default=0.0, init=False)

    def report_end(self, job: Job, code: int) -> None:
        """Report that the process of a chunk has ended.

        Args:
            job: the chunk whose process has ended.
            code: exit code of the process.
        """
        self.done += _job(job.folder) is None
        whole = "finished" if _job(job.folder) is None else "ended untrained"
        end = whole if code == 0 else f"ended with code {code}: {job.last_line()}"
        log.info(f"opsin: chunk {job.folder.name} {end} ({self.done} of {self.count} done)")

    def report_steps(self, running: Sequence[Job]) -> None:
        """Report the steps of the chunks that are running, every ``REPORT_EVERY_SECONDS``."""
        if time.monotonic() - self._reported_at < REPORT_EVERY_SECONDS:
            return
        self._reported_at = time.monotonic()
        steps = ", ".join(f"{job.folder.name} at step {_last_step(job.folder):,}" for job in running)
        if steps:
            log.info(f"opsin: chunk {steps}")


def _last_step(folder: Path) -> int:
    """The step of the last number in a chunk's table."""
    path = folder / METRICS_FILE
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 512))
        fields = file.read().decode(errors="replace").splitlines()[-1].split(",")
    return int(fields[0]) if fields[0].isdigit() else 0
