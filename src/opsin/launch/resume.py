"""``opsin resume``, and ``opsin fit --continue``: go on with a run or a population that was ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsin.callbacks.readers.run_folder import is_finished
from opsin.errors import ConfigError
from opsin.launch.fit import fit_built, fit_recipe, split_allowed
from opsin.launch.population import fit_population, train_population
from opsin.launch.recipe import OpsinCLI
from opsin.records.checkpoint import load_saved, recover_last
from opsin.records.claim import claimed
from opsin.records.folder import FolderContent, content_of
from opsin.records.recipe_text import parse_recipe, read_recipe
from opsin.records.schema import CONFIG_FILE, LAST_CHECKPOINT

CONTINUE = "--continue"

FREE_SETTINGS = (
    *("run_folder", "ckpt_path", "checkpoint_every", "tune", "config", "model.threads", "model.compile"),
    *("population.processes", "population.members_per_process"),
    *("trainer.max_time", "trainer.max_steps", "trainer.logger", "trainer.log_every_n_steps"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.default_root_dir", "trainer.profiler"),
)
"""Settings in which a recipe may differ from that of the run that ``--continue`` finds."""


def resume_run(folder: Path, allowed: Sequence[str] = ()) -> None:
    """Continue a run from its last checkpoint that is whole, or from its beginning where it has none.

    A population goes on with the chunks that are not finished; one that was ended before it was whole is built again.

    Args:
        folder: folder of the run, or of the population.
        allowed: names of settings that may differ from those that the run was begun with.

    Raises:
        ConfigError: the folder holds no run, a part of a fork, or a run that another process trains.
    """
    _check_resumable(folder)
    with claimed(folder):
        content = content_of(folder)
        if allowed and content != FolderContent.RUN:
            raise ConfigError("--allow", " ".join(allowed), "none for a population; `opsin resume` of a chunk takes it")
        if content == FolderContent.POPULATION:
            train_population(folder)
        elif content == FolderContent.PART_OF_POPULATION:
            fit_population(OpsinCLI(["--config", str(folder / CONFIG_FILE), "--run_folder", str(folder)]))
        else:
            _resume_single_run(folder, ["--config", str(folder / CONFIG_FILE), "--run_folder", str(folder)], allowed)


def _check_resumable(folder: Path) -> None:
    if content_of(folder) == FolderContent.PART_OF_FORK:
        expected = f"a whole run: this is {FolderContent.PART_OF_FORK.value}, remove it and fork again"
        raise ConfigError("opsin resume", str(folder), expected)
    if not (folder / CONFIG_FILE).exists():
        raise ConfigError("opsin resume", str(folder), "a run folder with a config.yaml")


def _resume_single_run(folder: Path, args: Sequence[str], allowed: Sequence[str]) -> None:
    """Go on from the last checkpoint that is whole, in a folder that this process has claimed."""
    checkpoint = folder / LAST_CHECKPOINT
    last = load_saved(checkpoint)
    if last is not None and is_finished(last):
        print(f"{folder} is finished, after {last['global_step']:,} steps; there is nothing to resume")
    elif recover_last(folder) is None:
        # nothing was saved, and the run begins again as the settings are now
        fit_recipe(args, goes_on=True)
    else:
        allow = [part for name in allowed for part in ("--allow", name)]
        fit_recipe([*args, "--ckpt_path", str(checkpoint), *allow])


# ---- the verb of job scripts ------------------------------------------------------------------------


def fit_or_continue(args: Sequence[str]) -> None:
    """Start a run in a new folder, continue the one that the folder has, and do nothing where it is finished.

    Args:
        args: what follows ``opsin fit`` on the line, without ``--continue``; what ``--allow`` names may differ from
            the run that the folder has.

    Raises:
        ConfigError: no run folder, or one whose run has another recipe.
        Interruption: a signal ended the run; the same line continues it.
    """
    allowed, settings = split_allowed(args)
    cli = OpsinCLI(settings)
    if cli.config.run_folder is None:
        raise ConfigError(CONTINUE, None, "a run_folder with it, the same whenever the job starts")
    if cli.config.ckpt_path is not None:
        raise ConfigError("ckpt_path", cli.config.ckpt_path, f"none with {CONTINUE}, which finds the checkpoint")
    folder = cli.keeper.folder
    content = content_of(folder)
    if content == FolderContent.NEW:
        fit_built(cli)
        return
    _check_resumable(folder)
    _check_same_recipe(folder, parse_recipe(cli.resolved(), CONFIG_FILE), allowed)
    if content == FolderContent.RUN:
        with claimed(folder):
            _resume_single_run(folder, settings, allowed)
    else:
        resume_run(folder, allowed)


def _check_same_recipe(folder: Path, recipe: Mapping[str, Any], allowed: Sequence[str]) -> None:
    saved = read_recipe(folder / CONFIG_FILE)
    found = _first_difference(saved, recipe, allowed)
    if found is not None:
        name, before, now = found
        raise ConfigError(name, now, f"{before!r} as in {folder / CONFIG_FILE}: {CONTINUE} goes on with the same run")


def _first_difference(saved: Any, given: Any, allowed: Sequence[str], name: str = "") -> tuple[str, Any, Any] | None:
    """The first setting that two resolved recipes do not share and that is not free; a missing one is null."""
    if name in FREE_SETTINGS or saved == given or _is_allowed(name, allowed):
        return None
    if not (isinstance(saved, Mapping) and isinstance(given, Mapping)):
        return name, saved, given
    for key in [*saved, *(key for key in given if key not in saved)]:
        found = _first_difference(saved.get(key), given.get(key), allowed, f"{name}.{key}" if name else str(key))
        if found is not None:
            return found
    return None


def _is_allowed(name: str, allowed: Sequence[str]) -> bool:
    """Whether ``--allow`` names a setting of a recipe, which has the settings of a class under ``init_args``."""
    plain = name.replace(".init_args", "")
    return any(plain == setting or plain.startswith(f"{setting}.") for setting in allowed)
