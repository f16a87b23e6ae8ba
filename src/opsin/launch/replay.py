"""The run that is forked, and its state after a step: found, and replayed from the nearest checkpoint."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, Timer
from lightning.pytorch.loggers.logger import DummyLogger

from opsin.callbacks import KeepRun, WeightsAndBiases
from opsin.errors import ConfigError, Interruption, log
from opsin.launch.recipe import BuiltRun, OpsinCLI
from opsin.launch.signals import ended_by
from opsin.population.folder import chunk_folder, is_population, read_document
from opsin.records.checkpoint import DamagedError, last_checkpoints, load_saved, read_checkpoint
from opsin.records.folder import write_yaml
from opsin.records.recipe_text import read_recipe
from opsin.records.schema import CONFIG_FILE, METRICS_FILE
from opsin.records.table import axes_of_table, rows_of_table
from opsin.records.user_files import UNREADABLE, real_path, reason
from opsin.training.module import callbacks_of
from opsin.training.same_run import check_same_run

# ---- the run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trunk:
    """The run that is forked.

    Args:
        folder: run folder, that of the chunk where the run is part of a population.
        recipe: resolved recipe of the run, as plain settings.
        member: index of the member that is forked among the members of the run; 0 of a single run.
        members: number of members that the run has.
        name: name of the run, with which the names of its forks begin.
    """

    folder: Path
    recipe: Mapping[str, Any]
    member: int
    members: int
    name: str

    @property
    def seed(self) -> int:
        """Seed of the member that is forked."""
        seed = self.recipe["model"]["seed"]
        return seed if isinstance(seed, int) else seed[self.member]


def find_trunk(folder: Path, member: int | None) -> Trunk:
    """The run in a folder, or the chunk of a population that has the member.

    Args:
        folder: folder of a run, or of a population.
        member: number of the member in the run or population; None for a single run.

    Raises:
        ConfigError: no run, or no such member.
    """
    run, name = folder, real_path(folder).name
    if is_population(folder):
        rows = read_document(folder)["members"]
        _check_member(member, len(rows))
        row = next(row for row in rows if row["member"] == member)
        run, name, member = chunk_folder(folder, row["chunk"]), f"{name}-member-{member}", row["slot"]
    config = run / CONFIG_FILE
    if not config.exists():
        raise ConfigError("opsin fork", str(run), "a run folder with a config.yaml")
    recipe = _read_recipe(config)
    seed = recipe["model"]["seed"]
    members = 1 if isinstance(seed, int) else len(seed)
    if member is not None or members > 1:
        _check_member(member, members)
    if run == folder and members > 1:
        name = f"{name}-member-{member}"
    return Trunk(run, recipe, member or 0, members, name)


def _read_recipe(config: Path) -> dict[str, Any]:
    """The configuration of a run, which says what the fork needs to know of it."""
    try:
        recipe = read_recipe(config, "opsin fork")
        seed, model, trainer = recipe["model"]["seed"], recipe["model"], recipe["trainer"]
        numbers = [model["steps_per_batch"], trainer["max_steps"], *([seed] if isinstance(seed, int) else seed)]
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError("seed, steps_per_batch and max_steps are whole numbers")
    except UNREADABLE as error:
        expected = f"the configuration that a run has written ({type(error).__name__}: {reason(error)})"
        raise ConfigError("opsin fork", str(config), expected) from error
    return recipe


def _check_member(member: int | None, members: int) -> None:
    if member is None or not 0 <= member < members:
        raise ConfigError("--member", member, f"one of the members 0 to {members - 1}")


def check_trunk(trunk: Trunk, run: BuiltRun) -> None:
    """Refuse a run whose configuration is no longer that of its checkpoints, also of those after the fork's step.

    Args:
        trunk: the run that is forked.
        run: the run as its configuration builds it now.

    Raises:
        ConfigError: names the setting that differs.
    """
    for path in last_checkpoints(trunk.folder):
        saved = load_saved(path)
        if saved is not None and "run" in saved.get("opsin", {}):
            try:
                check_same_run(saved["opsin"]["run"]["settings"], run.settings, (), saved["global_step"])
            except ConfigError as error:
                way_out = f"{trunk.folder / CONFIG_FILE} says otherwise (the conditions of a fork change settings)"
                raise ConfigError(error.field, error.value, f"{error.expected.split('; ')[0]}; {way_out}") from error


# ---- its replay -------------------------------------------------------------------------------------


class _Reached(Exception):
    """The run has come to the step of the fork."""


class _StopOnceKept(Callback):
    """Ends a run as soon as its keeper has saved it, before another step is made."""

    def __init__(self, keeper: KeepRun) -> None:
        self._keeper = keeper

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._stop()

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self._stop()

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._keeper.checkpoint.exists():
            raise _Reached


Nearest = tuple[int, Path | None]
"""A step, and the checkpoint that a run has of that step; step 0 needs none."""


def nearest_checkpoint(trunk: Trunk, at: int) -> Nearest:
    """The last of the run's checkpoints at or before a step.

    Args:
        trunk: the run that is forked.
        at: number of optimizer steps after which it is forked.

    Raises:
        ConfigError: the run itself began from a later one.
    """
    origin = trunk.recipe.get("ckpt_path")
    found: list[tuple[int, Path]] = []
    for path in [*last_checkpoints(trunk.folder), *([Path(origin)] if origin else [])]:
        try:
            saved = read_checkpoint(path, history=True)
        except DamagedError as error:
            log.warning(f"opsin: {path}: {error.reason}; the fork does without it")
            continue
        if saved["global_step"] <= at:
            found.append((saved["global_step"], path))
    if not found and origin:
        raise ConfigError("--at", at, f"a step after that of {origin}, from which {trunk.folder} began")
    return max(found, default=(0, None), key=lambda step_and_path: step_and_path[0])


def open_replay(trunk: Trunk, at: int, nearest: Nearest, scratch: Path) -> OpsinCLI:
    """The run as it was when it came by its nearest checkpoint, in another folder, to be kept first at that step.

    Args:
        trunk: the run that is forked.
        at: number of optimizer steps after which it is forked.
        nearest: checkpoint that the replay starts from, and its step.
        scratch: folder in which the replay keeps its files.
    """
    begun, start = nearest
    changes = {"run_folder": str(scratch / "replay"), "checkpoint_every": max(at - begun, 1)}
    path = write_yaml(scratch / "replay.yaml", bare_recipe(trunk.recipe) | changes)
    return OpsinCLI(["--config", str(path), *([] if start is None else ["--ckpt_path", str(start)])])


def bare_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe without what says where the run is, what it starts from, and what it is part of."""
    # recipes of before may hold Lightning's seed, which has never had an effect
    left_out = ("run_folder", "ckpt_path", "population", "seed_everything")
    return {name: value for name, value in recipe.items() if name not in left_out}


def replay(trunk: Trunk, at: int, nearest: Nearest, cli: OpsinCLI) -> tuple[dict[str, Any], bool]:
    """The state that a run had after a step: bit for bit, as a step is a function of configuration, seed and number.

    Args:
        trunk: the run that is forked.
        at: number of optimizer steps after which it is forked.
        nearest: checkpoint that the replay starts from, and its step.
        cli: the run as ``open_replay`` has built it.

    Returns:
        The checkpoint, and whether the replay recorded what the run did.

    Raises:
        ConfigError: the run ended before that step.
    """
    begun, start = nearest
    if start is not None and begun == at:
        return read_checkpoint(start, history=True), True
    log.info(f"opsin: the state of {trunk.folder} after step {at:,} is replayed from step {begun:,} on")
    _run_silently(cli)
    kept = cli.keeper.checkpoint
    saved = read_checkpoint(kept, history=True) if kept.exists() else None
    if saved is None or saved["global_step"] != at:
        raise ConfigError("--at", at, f"a step that {trunk.folder} comes by; it ended after {cli.trainer.global_step}")
    differs = first_difference(cli.keeper.folder / METRICS_FILE, trunk.folder / METRICS_FILE)
    if differs is not None:
        log.warning(
            f"opsin: the replay of {trunk.folder} differs from its metrics.csv from step {differs} on (another machine "
            "or version?); the branches continue the replay"
        )
    return saved, differs is None


def _run_silently(cli: OpsinCLI) -> None:
    """Train until the keeper saves; nothing is sent to loggers or to the terminal."""
    trainer = cli.trainer
    # neither does a limit of time of the run end it
    outsiders = (WeightsAndBiases, Checkpoint, ProgressBar, Timer)
    kept = [callback for callback in callbacks_of(trainer) if not isinstance(callback, outsiders)]
    trainer.callbacks = [*kept, _StopOnceKept(cli.keeper)]  # type: ignore[attr-defined]
    # a logger that keeps nothing, since some callbacks want one
    trainer.loggers = [DummyLogger()] if trainer.loggers else []
    try:
        trainer.fit(cli.model, ckpt_path=cli.config.ckpt_path, weights_only=True)
    except _Reached:
        pass
    except Interruption as stopped:
        message = f"{ended_by(stopped.signal)} before the branches began; nothing is left behind"
        raise Interruption(stopped.signal, message) from None


def first_difference(replayed: Path, original: Path) -> str | None:
    """The step of the first row in which two tables differ; None where there is none.

    A row that is missing at the end of the original is no difference: that run was killed before it. Neither is a
    metric that the original lacks, which an earlier version did not record, nor a column that one of them has.

    Args:
        replayed: ``metrics.csv`` of the replay.
        original: ``metrics.csv`` of the run, which may not exist.
    """
    if not original.exists():
        return None
    known = {row.metric for row in rows_of_table(original)}
    for row, expected in zip_longest(_indexed_rows(replayed, known), _indexed_rows(original, known)):
        if row is None or expected is None:
            return None
        if row != expected:
            return min((about.split(",", 1)[0] for about in (row[0], expected[0])), key=int)
    return None


def _indexed_rows(table: Path, metrics: Container[str]) -> Iterator[tuple[str, dict[str, str], str]]:
    """Rows of some metrics with the index of each by the names of its axes, whatever columns the table has."""
    axes = axes_of_table(table)
    for row in rows_of_table(table):
        if row.metric in metrics:
            yield row.about, {name: cell for name, cell in zip(axes, row.cells, strict=True) if cell}, row.value
