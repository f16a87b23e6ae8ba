"""``opsin fork``: replay a run up to a step, and go on from there in branches."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger

from opsin.callbacks import KeepRun, WeightsAndBiases
from opsin.errors import ConfigError, log
from opsin.launch.branch import branch_recipe, branch_state, check_branch, state_of_member
from opsin.launch.population import default_arrangement, train_population
from opsin.launch.recipe import _built
from opsin.population.chunks import Member, document, recipe_of_member
from opsin.population.folder import chunk_folder
from opsin.population.settings import Condition, Population
from opsin.records.folder import load_saved, write_atomically
from opsin.training.module import callbacks_of

if TYPE_CHECKING:
    from opsin.launch.recipe import OpsinCLI

FORM = "RUN --at STEP [--config BRANCHES.yaml] [--run_folder OUT] [--member N]"
START = Path("checkpoints") / "fork.ckpt"

Open = Callable[[Sequence[str]], "OpsinCLI"]
"""Builds the run that arguments of ``opsin fit`` describe."""


@dataclass(frozen=True)
class Trunk:
    """The run that is forked.

    Args:
        folder: of the run.
        recipe: resolved.
        member: which of its members; 0 of a single run.
        members: how many there are.
        name: what its forks are called.
    """

    folder: Path
    recipe: Mapping[str, Any]
    member: int
    members: int
    name: str

    @property
    def seed(self) -> int:
        """Of the member."""
        seed = self.recipe["model"]["seed"]
        return seed if isinstance(seed, int) else seed[self.member]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError("opsin fork", message, FORM)


def fork_run(args: Sequence[str], open_run: Open) -> None:
    """Branch a run: one branch for each condition, each from the state that the run had after some step.

    Args:
        args: what follows the verb.
        open_run: builds a run.

    Raises:
        ConfigError: no such run, member or step; a condition that cannot be; or a folder that exists.
        PopulationError: a branch failed; the others were trained to their end.
    """
    asked = _parse(args)
    trunk = find_trunk(Path(asked.run), asked.member)
    _check_step(trunk, asked.at)
    branches = read_branches(asked.config)
    out = Path(asked.run_folder or Path(asked.run).parent / f"{trunk.name}-at-{asked.at}")
    if out.exists():
        raise ConfigError("run_folder", str(out), "a new folder")
    with tempfile.TemporaryDirectory() as scratch:
        states, exact = _branch_all(trunk, asked.at, branches, out, Path(scratch), open_run)
    about = {"run": str(trunk.folder), "member": trunk.member, "at": asked.at, "replay_equals_run": exact}
    write_fork(out, trunk, states, about)
    train_population(out)


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="opsin fork", allow_abbrev=False, add_help=False)
    parser.add_argument("run")
    parser.add_argument("--at", type=int, required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--run_folder")
    parser.add_argument("--member", type=int)
    return parser.parse_args(list(args))


# ---- what is asked ----------------------------------------------------------------------------------


def find_trunk(folder: Path, member: int | None) -> Trunk:
    """The run in a folder, or the chunk of a population that has the member.

    Raises:
        ConfigError: no run, or no such member.
    """
    run, name = folder, folder.resolve().name
    if (folder / "population.json").exists():
        rows = json.loads((folder / "population.json").read_text())["members"]
        _check_member(member, len(rows))
        row = next(row for row in rows if row["member"] == member)
        run, name, member = chunk_folder(folder, row["chunk"]), f"{name}-member-{member}", row["slot"]
    config = run / "config.yaml"
    if not config.exists():
        raise ConfigError("opsin fork", str(run), "a run folder with a config.yaml")
    recipe = yaml.safe_load(config.read_text())
    seed = recipe["model"]["seed"]
    members = 1 if isinstance(seed, int) else len(seed)
    if member is not None or members > 1:
        _check_member(member, members)
    if run == folder and members > 1:
        name = f"{name}-member-{member}"
    return Trunk(run, recipe, member or 0, members, name)


def _check_member(member: int | None, members: int) -> None:
    if member is None or not 0 <= member < members:
        raise ConfigError("--member", member, f"one of the members 0 to {members - 1}")


def _check_step(trunk: Trunk, at: int) -> None:
    every, steps = trunk.recipe["model"]["steps_per_batch"], trunk.recipe["trainer"]["max_steps"]
    if at < 1 or at % every or at >= steps:
        expected = f"a multiple of model.steps_per_batch = {every} from {every} on, below trainer.max_steps = {steps}"
        raise ConfigError("--at", at, expected)


def read_branches(path: Path | None) -> dict[str, dict[str, Any]]:
    """Settings of every branch by name; without a file one branch that changes nothing.

    Raises:
        ConfigError: no such file, or it is of another form.
    """
    if path is None:
        return {"same": {}}
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("--config", str(path), f"a YAML file ({' '.join(str(error).split())})") from error
    found = content.get("conditions") if isinstance(content, dict) and [*content] == ["conditions"] else None
    if not isinstance(found, dict) or not found or not all(isinstance(each, dict | None) for each in found.values()):
        raise ConfigError("--config", str(path), "conditions, and nothing else: settings of each branch by its name")
    branches = {str(name): dict(settings or {}) for name, settings in found.items()}
    # the names have to be fit for tables
    Population(conditions=dict.fromkeys(branches, Condition()))
    return branches


# ---- the branches -----------------------------------------------------------------------------------


def _branch_all(
    trunk: Trunk, at: int, branches: Mapping[str, Mapping[str, Any]], out: Path, scratch: Path, open_run: Open
) -> tuple[dict[str, tuple[dict[str, Any], dict[str, Any]]], bool]:
    """Recipe and first checkpoint of every branch, and whether the replay did what the run did.

    All is built and checked before the replay, which may take long.
    """
    nearest = _nearest_checkpoint(trunk, at)
    cli = _open_again(trunk, at, nearest, scratch, open_run)
    whole = _built(cli)
    recipe = recipe_of_member(_unplaced(trunk.recipe), trunk.member)
    single = whole if trunk.members == 1 else _built(open_run(_given(recipe, scratch / "member.yaml")))
    recipes, built = {}, {}
    for number, (name, settings) in enumerate(branches.items()):
        start = (chunk_folder(out, number) / START).absolute()
        recipes[name] = branch_recipe(recipe, name, settings, start)
        try:
            built[name] = _built(open_run(_given(recipes[name], scratch / "branch.yaml")))
            check_branch(built[name], single, at, recipes[name]["trainer"]["max_steps"])
        except ConfigError as error:
            raise ConfigError(f"conditions.{name}: {error.field}", error.value, error.expected) from error
    saved, exact = replay(trunk, at, nearest, cli)
    if trunk.member in (ended := saved["opsin"]["control"]["ended"]):
        stopped = ended[trunk.member]["stopped_at"]
        raise ConfigError("--at", at, f"a step before {stopped}, after which this member learned no more")
    if trunk.members > 1:
        saved = state_of_member(saved, whole, single, trunk.member)
    return {name: (recipes[name], branch_state(saved, single, built[name])) for name in branches}, exact


def _unplaced(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name not in ("run_folder", "ckpt_path", "population")}


def _written(recipe: Mapping[str, Any], path: Path) -> Path:
    return write_atomically(path, yaml.safe_dump(dict(recipe), sort_keys=False))


def _given(recipe: Mapping[str, Any], path: Path) -> list[str]:
    """Arguments of ``opsin fit`` for a recipe, which is written to a file."""
    return ["--config", str(_written(recipe, path))]


def write_fork(
    out: Path,
    trunk: Trunk,
    states: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]],
    about: Mapping[str, Any],
) -> None:
    """The folder of a fork whose branches have not been trained: a population of one member a chunk.

    Its ``config.yaml`` is that of the run that was forked.
    """
    members = [Member(number, name, trunk.seed, 0) for number, name in enumerate(states)]
    for number, (recipe, state) in enumerate(states.values()):
        start = chunk_folder(out, number) / START
        start.parent.mkdir(parents=True)
        torch.save(state, start)
        _written(recipe, chunk_folder(out, number) / "recipe.yaml")
    _written(recipe_of_member(_unplaced(trunk.recipe), trunk.member), out / "config.yaml")
    arrangement = default_arrangement({"members_per_process": 1}, 1)
    # last: a folder with this file is whole
    content = document([[member] for member in members], list(states), arrangement=arrangement, fork=dict(about))
    write_atomically(out / "population.json", json.dumps(content, indent=2) + "\n")


# ---- the replay -------------------------------------------------------------------------------------


class _Reached(Exception):
    """The run has come to the step of the fork."""


class _StopOnceKept(Callback):
    """Ends a run as soon as its keeper has saved it, before anything else is done."""

    def __init__(self, keeper: KeepRun) -> None:
        self.keeper = keeper

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._stop()

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.keeper.checkpoint.exists():
            raise _Reached


Nearest = tuple[int, Path | None]
"""A step, and the checkpoint that a run has of it; step 0 needs none."""


def _nearest_checkpoint(trunk: Trunk, at: int) -> Nearest:
    """The last of the run's checkpoints at or before a step.

    Raises:
        ConfigError: the run itself began from a later one.
    """
    origin = trunk.recipe.get("ckpt_path")
    found: list[tuple[int, Path]] = []
    for path in [trunk.folder / "checkpoints" / "last.ckpt", *([Path(origin)] if origin else [])]:
        saved = load_saved(path)
        if saved is not None and saved["global_step"] <= at:
            found.append((saved["global_step"], path))
    if not found and origin:
        raise ConfigError("--at", at, f"a step after that of {origin}, from which {trunk.folder} began")
    return max(found, default=(0, None), key=lambda each: each[0])


def _open_again(trunk: Trunk, at: int, nearest: Nearest, scratch: Path, open_run: Open) -> OpsinCLI:
    """The run as it was when it came by its nearest checkpoint, in another folder, to be kept first at that step."""
    begun, start = nearest
    about = {"run_folder": str(scratch / "replay"), "checkpoint_every": max(at - begun, 1)}
    from_there = [] if start is None else ["--ckpt_path", str(start)]
    return open_run([*_given(_unplaced(trunk.recipe) | about, scratch / "replay.yaml"), *from_there])


def replay(trunk: Trunk, at: int, nearest: Nearest, cli: OpsinCLI) -> tuple[dict[str, Any], bool]:
    """The state that a run had after a step: bit for bit, as a step is a function of configuration, seed and number.

    Returns:
        The checkpoint, and whether the replay recorded what the run did.

    Raises:
        ConfigError: the run ended before that step.
    """
    begun, start = nearest
    if start is not None and begun == at:
        saved = load_saved(start)
        assert saved is not None
        return saved, True
    log.info(f"opsin: the state of {trunk.folder} after step {at:,} is replayed from step {begun:,} on")
    _run_silently(cli)
    saved = load_saved(cli.keeper.checkpoint)
    if saved is None or saved["global_step"] != at:
        raise ConfigError("--at", at, f"a step that {trunk.folder} comes by; it ended after {cli.trainer.global_step}")
    differs = first_difference(cli.keeper.folder / "metrics.csv", trunk.folder / "metrics.csv")
    if differs is not None:
        log.warning(
            f"opsin: the replay of {trunk.folder} differs from its metrics.csv from step {differs} on (another machine "
            "or version?); the branches continue the replay"
        )
    return saved, differs is None


def _run_silently(cli: OpsinCLI) -> None:
    """Train until the keeper saves; nobody but the run's own folder is told."""
    trainer = cli.trainer
    outsiders = (WeightsAndBiases, Checkpoint, ProgressBar)
    kept = [callback for callback in callbacks_of(trainer) if not isinstance(callback, outsiders)]
    trainer.callbacks = [*kept, _StopOnceKept(cli.keeper)]  # type: ignore[attr-defined]
    # a logger that keeps nothing, since some callbacks want one
    trainer.loggers = [DummyLogger()] if trainer.loggers else []
    try:
        trainer.fit(cli.model, ckpt_path=cli.config.ckpt_path, weights_only=True)
    except _Reached:
        pass
    except SystemExit:
        # how Lightning answers Ctrl-C
        raise KeyboardInterrupt("interrupted before the branches began; nothing is left behind") from None


def first_difference(table: Path, other: Path) -> str | None:
    """The step of the first line of a table that the other has otherwise; None where the other begins so.

    A line that is missing at the end of the other is no difference: that run was killed before it.
    """
    if not other.exists():
        return None
    with table.open() as lines, other.open() as others:
        for line, seen in zip_longest(lines, others):
            # a process killed while it wrote leaves half a line
            if line is None or seen is None or not seen.endswith("\n"):
                return None
            if line != seen:
                return line.split(",", 1)[0]
    return None
