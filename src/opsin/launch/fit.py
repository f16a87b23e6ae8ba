"""``opsin fit``: train the run or the population that a recipe describes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from opsin.errors import ConfigError, Interruption
from opsin.launch.check_checkpoint import check_contents
from opsin.launch.population import fit_population
from opsin.launch.recipe import OpsinCLI
from opsin.launch.signals import PROCESS_SIGNALS, ended_by
from opsin.records.checkpoint import read_checkpoint
from opsin.records.claim import claimed
from opsin.records.folder import FolderContent, content_of
from opsin.records.schema import CONFIG_FILE
from opsin.records.user_files import real_path
from opsin.reports.run import final_report
from opsin.training.module import OpsinModule


def fit_recipe(args: Sequence[str], goes_on: bool = False) -> None:
    """Train as the recipe says, and say where the phase change happened.

    Args:
        args: what follows ``opsin fit`` on the line.
        goes_on: whether the folder's run is this one, and was ended before its first checkpoint.

    Raises:
        ConfigError: a setting that cannot work, a checkpoint of another model, or a folder that has a run.
        Interruption: a signal ended the run; its message says how to go on.
    """
    allowed, settings = split_allowed(args)
    cli = OpsinCLI(settings)
    cli.model.allow = allowed
    if allowed and cli.config.ckpt_path is None:
        raise ConfigError("--allow", " ".join(allowed), "a checkpoint to go on from: --ckpt_path, or `opsin resume`")
    fit_built(cli, goes_on)


def fit_built(cli: OpsinCLI, goes_on: bool = False) -> None:
    """Train what a recipe has been built into, as ``fit_recipe`` does.

    Args:
        cli: the recipe that has been built, with its run folder.
        goes_on: whether the folder's run is this one, and was ended before its first checkpoint.
    """
    folder = cli.keeper.folder
    if not goes_on:
        check_free(folder, cli.config.ckpt_path)
    with claimed(folder):
        # once more: another process may have had the folder until now
        if not goes_on:
            check_free(folder, cli.config.ckpt_path)
        if cli.config.population is not None:
            fit_population(cli)
            return
        if cli.config.tune:
            raise ConfigError("--tune", True, "a recipe with a population")
        if cli.config.ckpt_path is not None:
            check_fits(Path(cli.config.ckpt_path), cli.model)
        cli.keeper.goes_on = goes_on
        _train(cli)


def _train(cli: OpsinCLI) -> None:
    """Train a run until it is trained, or until it is saved before that because somebody ends it."""
    keeper, trainer = cli.keeper, cli.trainer
    keeper.end_requests = PROCESS_SIGNALS
    go_on = f"`opsin resume {keeper.folder}` continues"
    try:
        with PROCESS_SIGNALS.waiting_for_run():
            trainer.fit(cli.model, ckpt_path=cli.config.ckpt_path, weights_only=True)
    except Interruption as stopped:
        if not (keeper.folder / CONFIG_FILE).exists():
            raise
        step = f" at step {trainer.global_step}"
        raise Interruption(stopped.signal, f"{ended_by(stopped.signal)}{step}; {go_on}") from None
    if keeper.ended_at is None:
        print(final_report(cli.model.summary, keeper.folder))
    elif PROCESS_SIGNALS.received is not None:
        number = PROCESS_SIGNALS.received
        raise Interruption(number, f"{ended_by(number)} at step {keeper.ended_at}; {go_on}")
    else:
        print(f"unfinished    ended by the Trainer after step {keeper.ended_at:,} of {trainer.max_steps:,}; {go_on}")


# ---- a folder that has something --------------------------------------------------------------------


def check_free(folder: Path, start: str | None) -> None:
    """Refuse a folder that has a run, unless the new one goes on from a checkpoint in it.

    Args:
        folder: run folder that the recipe, or the line, names.
        start: checkpoint that the run starts from; None for the beginning.

    Raises:
        ConfigError: says what the folder has, and what can be done with it.
    """
    content = content_of(folder)
    inside = start is not None and real_path(start).is_relative_to(real_path(folder))
    if content == FolderContent.NEW or (content == FolderContent.RUN and inside):
        return
    ways = {
        FolderContent.PART_OF_POPULATION: f", or `opsin resume {folder}` to finish it; this one has {content.value}",
        FolderContent.PART_OF_FORK: f"; this one has {content.value}, remove it and fork again",
    }
    raise ConfigError(
        "run_folder", str(folder), "a new folder" + ways.get(content, f", or `opsin resume {folder}` to continue it")
    )


# ---- checkpoints ------------------------------------------------------------------------------------


def split_allowed(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names that ``--allow`` gives, and the arguments without them.

    They are no setting of the run: a later resume is not allowed them again.

    Args:
        args: what follows a verb on the line.
    """
    parser = argparse.ArgumentParser(prog="opsin", allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--allow", action="append", default=[])
    try:
        parsed, settings = parser.parse_known_args(list(args))
    except argparse.ArgumentError as error:
        raise ConfigError("--allow", None, "the name of a setting that may differ") from error
    return parsed.allow, settings


def check_fits(checkpoint: Path, module: OpsinModule) -> None:
    """Refuse the checkpoint of another model.

    Args:
        checkpoint: file from which the run is to go on.
        module: module of the run that is to go on.

    Raises:
        ConfigError: names the first tensor that has another shape.
    """
    check_contents(str(checkpoint), read_checkpoint(checkpoint), module)
