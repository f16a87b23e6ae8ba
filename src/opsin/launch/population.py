"""``opsin fit`` and ``opsin resume`` of a population: chunks as processes, their folders, and the end."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback

from opsin.callbacks.readers.run_folder import is_finished
from opsin.callbacks.wandb.population import send_population
from opsin.errors import ConfigError, PopulationError, log
from opsin.interventions.plan import Plan
from opsin.launch.recipe import OpsinCLI
from opsin.launch.tune import LARGEST_CHUNK, cores, fastest, members_that_fit
from opsin.launch.workers import Job, run_jobs
from opsin.population.chunks import PER_MEMBER, Member, arrange, chunk_recipe, document, expanded, members_of
from opsin.population.folder import chunk_folder
from opsin.population.settings import Population
from opsin.records.folder import load_saved, write_atomically
from opsin.reports.population import finish_population, population_report
from opsin.training.module import OpsinModule, callbacks_of
from opsin.training.observers import recorded_metrics


def fit_population(cli: OpsinCLI) -> None:
    """Train every seed in every condition, in as many processes as the machine has cores."""

    def build(path: Path) -> Plan:
        one = OpsinCLI(["--config", str(path)])
        return one.model.plan_for(callbacks_of(one.trainer), one.trainer.max_steps)

    if cli.config.ckpt_path is not None:
        raise ConfigError("ckpt_path", cli.config.ckpt_path, "none beside a population; `opsin resume` continues one")
    if cli.trainer.max_steps < 1:
        raise ConfigError("trainer.max_steps", cli.trainer.max_steps, "the number of optimizer steps")
    callbacks, validates = callbacks_of(cli.trainer), bool(cli.trainer.limit_val_batches)
    check_population(cli.config.population, cli.model, callbacks, cli.trainer.max_steps, validates)
    folder = cli.keeper.folder
    if (folder / "population.json").exists():
        raise ConfigError("run_folder", str(folder), f"a new folder, or `opsin resume {folder}` to continue it")
    recipe = yaml.safe_load(cli._resolved())
    with tempfile.TemporaryDirectory() as scratch:
        layout = lay_out(recipe, Path(scratch), build)
    fit = members_that_fit(cli.model, recipe["population"].get("processes") or cores())
    arrangement = default_arrangement(recipe["population"], fit)
    if cli.config.tune:
        arrangement = tuned_arrangement(layout, arrangement, fit)
    write_population(layout, folder, arranged(layout, arrangement), arrangement)
    train_population(folder)


TELL_EVERY_SECONDS = 15.0

Build = Callable[[Path], Plan]
"""The plan of a recipe, without training it."""


@dataclass(frozen=True)
class Layout:
    """A population before it is trained.

    Args:
        recipe: resolved, as plain settings.
        conditions: settings of each, by name.
        grid: window of each condition, where they are windows.
        members: all of them.
        graphs: of each condition; those with equal ones may train together.
    """

    recipe: Mapping[str, Any]
    conditions: Mapping[str, Mapping[str, Any]]
    grid: Mapping[str, Mapping[str, int] | None]
    members: Sequence[Member]
    graphs: Mapping[str, Hashable]


def check_population(
    population: Population, module: OpsinModule, callbacks: Sequence[Callback], steps: int, validates: bool
) -> None:
    """What it compares is recorded by its runs, one number a member, and its windows begin before these end.

    Args:
        module, callbacks, steps, validates: of the recipe without its conditions.

    Raises:
        ConfigError: names the metric, or the window.
    """
    found = recorded_metrics(callbacks, module.sites, module.task, validates)
    numbers = [name for name, shape in found.items() if not shape]
    for name in population.compare:
        if name not in numbers:
            raise ConfigError("population.compare", name, f"any of {', '.join(numbers)}")
    if (windows := population.windows) is None:
        return
    length = steps * (module.task.batch_size if windows.unit == "sequences" else 1)
    for start in windows.starts:
        if not 0 <= start < length:
            expected = f"0 to below {length:,}, the {windows.unit} of the run"
            raise ConfigError("population.windows.starts", start, expected)


def lay_out(recipe: Mapping[str, Any], folder: Path, build: Build) -> Layout:
    """Members and conditions of a resolved recipe; every condition is built once, so that a wrong one stops here.

    Args:
        folder: where a condition's recipe is written for ``build``.
    """
    settings, seed = recipe["population"], recipe["model"]["seed"]
    if not isinstance(seed, int):
        raise ConfigError("model.seed", seed, "one seed beside a population, which chooses the others")
    for name in PER_MEMBER:
        if isinstance(value := recipe["model"].get(name), list):
            raise ConfigError(f"model.{name}", value, f"one number beside a population; a condition has its own {name}")
    if recipe["model"].get("initial"):
        expected = "none beside a population; a condition's `initial` says what its members start from"
        raise ConfigError("model.initial", recipe["model"]["initial"], expected)
    conditions, grid = expanded(recipe)
    members = members_of(settings["seeds"], seed, list(conditions), settings["paired"])
    graphs: dict[str, Hashable] = {}
    windows = [name for name in conditions if grid.get(name) is not None]
    for name in conditions:
        # windows differ by their schedule alone
        if name in windows[1:]:
            graphs[name] = graphs[windows[0]]
            continue
        own = [member for member in members if member.condition == name]
        seeds = [member.seed for member in own]
        for seed in (conditions[name] or {}).get("by_seed") or {}:
            if int(seed) not in seeds:
                expected = f"a seed of it: {', '.join(map(str, seeds))}"
                raise ConfigError(f"population.conditions.{name}.by_seed", int(seed), expected)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(chunk_recipe(recipe, conditions, own), sort_keys=False))
        try:
            plan = build(path)
        except ConfigError as error:
            raise ConfigError(f"population.conditions.{name}: {error.field}", error.value, error.expected) from error
        graphs[name] = (json.dumps(conditions[name].get("task") or {}, sort_keys=True), *plan.other_passes())
    return Layout(recipe, conditions, grid, members, graphs)


def write_population(layout: Layout, folder: Path, chunks: Sequence[Sequence[Member]], arrangement: Mapping) -> None:
    """The folder of a population that has not been trained."""
    write_atomically(folder / "config.yaml", yaml.safe_dump(dict(layout.recipe), sort_keys=False))
    for number, chunk in enumerate(chunks):
        settings = chunk_recipe(layout.recipe, layout.conditions, chunk)
        write_atomically(chunk_folder(folder, number) / "recipe.yaml", yaml.safe_dump(settings, sort_keys=False))
    about: dict[str, Any] = {"arrangement": dict(arrangement), "compare": layout.recipe["population"]["compare"]}
    if layout.grid:
        about["grid"] = dict(layout.grid)
    # last: a folder with this file is whole
    content = document(chunks, list(layout.conditions), **about)
    write_atomically(folder / "population.json", json.dumps(content, indent=2) + "\n")


def default_arrangement(settings: Mapping[str, Any], fit: int) -> dict[str, Any]:
    """Processes and members of one: as the recipe says, or by a rule on the machine.

    Args:
        settings: of the population.
        fit: members that fit into the memory of one process.
    """
    given = settings.get("members_per_process")
    return {
        "processes": settings.get("processes") or cores(),
        "members_per_process": given or min(LARGEST_CHUNK, fit),
        "chosen_by": "rule" if given is None else "recipe",
    }


def tuned_arrangement(layout: Layout, arrangement: Mapping[str, Any], fit: int) -> dict[str, Any]:
    """The same processes with the number of members that is the fastest here, timed on the largest graph."""
    graphs = Counter(layout.graphs[member.condition] for member in layout.members)
    graph = max(graphs, key=lambda each: graphs[each])
    own = [member for member in layout.members if layout.graphs[member.condition] == graph]
    processes = arrangement["processes"]
    most = min(fit, -(-len(own) // processes))
    rates = fastest(lambda size: chunk_recipe(layout.recipe, layout.conditions, own[:size]), processes, most)
    for size, rate in rates.items():
        log.info(f"opsin: {processes} processes of {size} members: {rate:,.0f} member-steps per second")
    tried = {str(size): round(rate, 1) for size, rate in rates.items()}
    return {**arrangement, "members_per_process": next(iter(rates)), "chosen_by": "timing", "tried": tried}


def arranged(layout: Layout, arrangement: Mapping[str, Any]) -> list[list[Member]]:
    """The chunks of an arrangement."""
    return arrange(layout.members, layout.graphs, arrangement["processes"], arrangement["members_per_process"])


def train_population(folder: Path) -> None:
    """Train every chunk that is not finished, then write and send the tables and figures, and print the report.

    Raises:
        PopulationError: a worker failed; the others were trained to their end.
    """
    content = json.loads((folder / "population.json").read_text())
    count = 1 + max(row["chunk"] for row in content["members"])
    jobs = [job for number in range(count) if (job := _job(chunk_folder(folder, number))) is not None]
    arrangement = content["arrangement"]
    log.info(
        f"opsin: {len(content['members'])} members in {count} chunks of at most "
        f"{arrangement['members_per_process']} (by {arrangement['chosen_by']}), "
        f"{arrangement['processes']} processes of one thread"
        + (f"; {count - len(jobs)} chunks are finished" if len(jobs) < count else "")
    )
    teller = _Teller(folder, count, count - len(jobs))
    try:
        failed = run_jobs(jobs, arrangement["processes"], teller.ended, teller.tick)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; `opsin resume {folder}` continues") from None
    # one whose members have all diverged ends with an error, and is whole
    failed = [job for job in failed if _job(job.folder) is not None]
    summary = finish_population(folder)
    send_population(folder, summary)
    print(population_report(summary, folder))
    if failed:
        names = ", ".join(job.folder.name for job in failed)
        raise PopulationError(
            f"chunk {names} of {folder}: ended before it was finished; the others are whole "
            f"(`opsin resume {folder}` trains it again)"
        )


def _job(folder: Path) -> Job | None:
    """What remains to be done for one chunk."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not (folder / "config.yaml").exists():
        return Job(folder, ["fit", "--config", str(folder / "recipe.yaml"), "--run_folder", str(folder)])
    saved = load_saved(checkpoint)
    if saved is not None and is_finished(saved):
        return None
    return Job(folder, ["resume", str(folder)])


@dataclass
class _Teller:
    """Says how far a population is.

    Args:
        folder: of the population.
        count: of its chunks.
        done: chunks that are finished.
    """

    folder: Path
    count: int
    done: int
    _told: float = 0.0

    def ended(self, job: Job, code: int) -> None:
        """A worker ended."""
        self.done += _job(job.folder) is None
        what = "finished" if code == 0 else f"ended with code {code}: {job.last_words()}"
        log.info(f"opsin: chunk {job.folder.name} {what} ({self.done} of {self.count} done)")

    def tick(self, running: Sequence[Job]) -> None:
        """A moment has passed."""
        if time.monotonic() - self._told < TELL_EVERY_SECONDS:
            return
        self._told = time.monotonic()
        steps = ", ".join(f"{job.folder.name} at step {_last_step(job.folder):,}" for job in running)
        if steps:
            log.info(f"opsin: chunk {steps}")


def _last_step(folder: Path) -> int:
    """The step of the last number in a chunk's table."""
    path = folder / "metrics.csv"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 512))
        fields = file.read().decode(errors="replace").splitlines()[-1].split(",")
    return int(fields[0]) if fields[0].isdigit() else 0
