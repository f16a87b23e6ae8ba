"""``opsin fit``: train the run or the population that a recipe describes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from opsin.errors import ConfigError
from opsin.launch.population import fit_population
from opsin.launch.recipe import OpsinCLI
from opsin.records.checkpoint import read_checkpoint
from opsin.records.schema import CONFIG_FILE
from opsin.reports.run import final_report
from opsin.training.module import OpsinModule


def fit_recipe(args: Sequence[str]) -> None:
    """Train as the recipe says, and say where the phase change happened.

    Args:
        args: what follows ``opsin fit`` on the line.

    Raises:
        ConfigError: a setting that cannot work, or a checkpoint of another model.
        KeyboardInterrupt: the run was interrupted; its message says how to go on.
    """
    allowed, settings = split_allowed(args)
    cli = OpsinCLI(settings)
    cli.model.allow = allowed
    if allowed and cli.config.ckpt_path is None:
        raise ConfigError("--allow", " ".join(allowed), "a checkpoint to go on from: --ckpt_path, or `opsin resume`")
    if cli.config.population is not None:
        fit_population(cli)
        return
    if cli.config.tune:
        raise ConfigError("--tune", True, "a recipe with a population")
    if cli.config.ckpt_path is not None:
        check_fits(Path(cli.config.ckpt_path), cli.model)
    try:
        cli.trainer.fit(cli.model, ckpt_path=cli.config.ckpt_path, weights_only=True)
    except SystemExit:
        # how Lightning answers Ctrl-C, after its callbacks have written what they hold
        if not (cli.trainer.interrupted and (cli.keeper.folder / CONFIG_FILE).exists()):
            raise
        stop = f"interrupted at step {cli.trainer.global_step}"
        raise KeyboardInterrupt(f"{stop}; `opsin resume {cli.keeper.folder}` continues") from None
    print(final_report(cli.model.summary, cli.keeper.folder))


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
    saved = {name: tuple(tensor.shape) for name, tensor in read_checkpoint(checkpoint)["state_dict"].items()}
    built = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in sorted(built.keys() | saved.keys()):
        if saved.get(name) != built.get(name):
            expected = f"{name} of shape {built.get(name)} as in this model; it has {saved.get(name)}"
            raise ConfigError("ckpt_path", str(checkpoint), expected)
