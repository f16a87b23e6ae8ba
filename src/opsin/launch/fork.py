"""``opsin fork``: replay a run up to a step, and go on from there in branches.

What a branch takes over of the run is in ``launch/branch.py``, the run and its replay are in ``launch/replay.py``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from opsin.errors import ConfigError
from opsin.launch.branch import branch_recipe, branch_state, check_branch, state_of_member
from opsin.launch.population import train_population
from opsin.launch.recipe import BuiltRun, OpsinCLI, build_run
from opsin.launch.recipe_parser import check_structure
from opsin.launch.recipe_paths import RecipePaths
from opsin.launch.replay import Trunk, bare_recipe, check_trunk, find_trunk, nearest_checkpoint, open_replay, replay
from opsin.launch.tune import default_chunking
from opsin.population.chunks import Member, population_document, recipe_of_member
from opsin.population.folder import chunk_folder
from opsin.population.settings import Condition, Population
from opsin.records.checkpoint import write_checkpoint
from opsin.records.claim import claimed
from opsin.records.folder import PART_SUFFIX, FolderContent, content_of, write_json, write_yaml
from opsin.records.recipe_text import read_recipe
from opsin.records.schema import CLAIM_FILE, CONFIG_FILE, FORK_CHECKPOINT, POPULATION_FILE, RECIPE_FILE

FORK_ARGUMENTS = "RUN --at STEP [--config BRANCHES.yaml] [--run_folder OUT] [--member N]"

BranchStart = tuple[Mapping[str, Any], Mapping[str, Any]]
"""Recipe and first checkpoint of a branch."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError("opsin fork", message, FORK_ARGUMENTS)


def fork_run(args: Sequence[str]) -> None:
    """Branch a run: one branch for each condition, each from the state that the run had after some step.

    Args:
        args: what follows ``opsin fork`` on the line.

    Raises:
        ConfigError: no such run, member or step; a condition that cannot be; or a folder that exists.
        PopulationError: the process of a branch failed; the other branches were trained to their end.
    """
    parsed = _parse(args)
    trunk = find_trunk(Path(parsed.run), parsed.member)
    _check_step(trunk, parsed.at)
    branches = read_branches(parsed.config)
    out = Path(parsed.run_folder or Path(parsed.run).parent / f"{trunk.name}-at-{parsed.at}")
    _check_new(out)
    part = out.with_name(f".{out.name}{PART_SUFFIX}")
    with claimed(part) as claim:
        _check_new(out)
        with _removed_unless_whole(part), tempfile.TemporaryDirectory() as scratch:
            starts, exact = _start_branches(trunk, parsed.at, branches, out, Path(scratch))
            origin = {"run": str(trunk.folder), "member": trunk.member, "at": parsed.at, "replay_equals_run": exact}
            write_fork(part, trunk, starts, origin)
            # a fork is there whole or not at all
            part.rename(out)
        if claim is not None:
            claim.move(out)
        train_population(out)


def _check_new(out: Path) -> None:
    if out.exists():
        content = content_of(out)
        found = "" if content == FolderContent.NEW else f": this one has {content.value}"
        raise ConfigError("run_folder", str(out), f"a new folder{found}")


@contextmanager
def _removed_unless_whole(part: Path) -> Iterator[None]:
    """Begin a fork's folder without what a killed process left in it, and leave nothing of one that failed."""
    _empty(part)
    try:
        yield
    finally:
        if part.exists():
            _empty(part)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != CLAIM_FILE:
            path.unlink()


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="opsin fork", allow_abbrev=False, add_help=False)
    parser.add_argument("run")
    parser.add_argument("--at", type=int, required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--run_folder")
    parser.add_argument("--member", type=int)
    return parser.parse_args(list(args))


def _check_step(trunk: Trunk, at: int) -> None:
    every, steps = trunk.recipe["model"]["steps_per_batch"], trunk.recipe["trainer"]["max_steps"]
    if at < 1 or at % every or at >= steps:
        expected = f"a multiple of model.steps_per_batch = {every} from {every} on, below trainer.max_steps = {steps}"
        raise ConfigError("--at", at, expected)


def read_branches(path: Path | None) -> dict[str, dict[str, Any]]:
    """Settings of every branch by name; without a file one branch that changes nothing.

    Args:
        path: YAML file with the section ``conditions``, or None.

    Raises:
        ConfigError: no such file, or one of another form.
    """
    if path is None:
        return {"same": {}}
    content = read_recipe(path, expected="conditions: settings of each branch by its name")
    check_structure(content.get("conditions"), "conditions")
    RecipePaths([path], absolute=True).fix_classes(content)
    found = content["conditions"] if [*content] == ["conditions"] else None
    if not (isinstance(found, dict) and found and all(isinstance(value, dict | None) for value in found.values())):
        raise ConfigError("--config", str(path), "conditions, and nothing else: settings of each branch by its name")
    branches = {str(name): dict(settings or {}) for name, settings in found.items()}
    # the names have to be fit for tables
    Population(conditions=dict.fromkeys(branches, Condition()))
    return branches


# ---- the branches -----------------------------------------------------------------------------------


def _start_branches(
    trunk: Trunk, at: int, branches: Mapping[str, Mapping[str, Any]], out: Path, scratch: Path
) -> tuple[dict[str, BranchStart], bool]:
    """Recipe and first checkpoint of every branch, and whether the replay did what the run did.

    Everything is built and checked before the replay, which may take long.
    """
    nearest = nearest_checkpoint(trunk, at)
    cli = open_replay(trunk, at, nearest, scratch)
    whole = build_run(cli)
    check_trunk(trunk, whole)
    recipe = recipe_of_member(bare_recipe(trunk.recipe), trunk.member)
    single = whole if trunk.members == 1 else _build(recipe, scratch / "member.yaml")
    recipes, built = {}, {}
    for number, (name, settings) in enumerate(branches.items()):
        start = (chunk_folder(out, number) / FORK_CHECKPOINT).absolute()
        recipes[name] = branch_recipe(recipe, name, settings, start)
        try:
            built[name] = _build(recipes[name], scratch / "branch.yaml")
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


def _build(recipe: Mapping[str, Any], path: Path) -> BuiltRun:
    """The run of a recipe, which is written to a file."""
    return build_run(OpsinCLI(["--config", str(write_yaml(path, recipe))]))


def write_fork(out: Path, trunk: Trunk, starts: Mapping[str, BranchStart], origin: Mapping[str, Any]) -> None:
    """Write the folder of a fork whose branches have not been trained: a population of one member a chunk.

    Its ``config.yaml`` is that of the run that was forked.

    Args:
        out: folder of the fork, which is made.
        trunk: the run that was forked.
        starts: recipe and first checkpoint of every branch, by name.
        origin: run, member and step that the branches start from, and whether the replay equals the run.
    """
    members = [Member(number, name, trunk.seed, 0) for number, name in enumerate(starts)]
    for number, (recipe, state) in enumerate(starts.values()):
        folder = chunk_folder(out, number)
        write_checkpoint(folder / FORK_CHECKPOINT, state)
        write_yaml(folder / RECIPE_FILE, recipe)
    write_yaml(out / CONFIG_FILE, recipe_of_member(bare_recipe(trunk.recipe), trunk.member))
    chunking = default_chunking({"members_per_process": 1}, 1).as_settings()
    # last: a folder with this file is whole
    content = population_document(
        [[member] for member in members], list(starts), arrangement=chunking, fork=dict(origin)
    )
    write_json(out / POPULATION_FILE, content)
