"""``opsin fit``: train the run or the population that a recipe describes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opsin.errors import ConfigError
from opsin.launch.check_checkpoint import check_contents
from opsin.launch.population import fit_population
from opsin.launch.recipe import OpsinCLI
from opsin.records.folder import load_saved
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
    cli = OpsinCLI(args)
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


def load_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """What a run has saved.

    Raises:
        ConfigError: the file is no checkpoint of a run.
    """
    saved = load_saved(checkpoint)
    if saved is None or "opsin" not in saved:
        raise ConfigError("ckpt_path", str(checkpoint), "a checkpoint of a run: RUN/checkpoints/last.ckpt")
    return saved


def check_fits(checkpoint: Path, module: OpsinModule) -> None:
    """Refuse the checkpoint of another model.

    Args:
        checkpoint: file from which the run is to go on.
        module: module of the run that is to go on.

    Raises:
        ConfigError: names the first tensor that has another shape.
    """
    check_contents(str(checkpoint), load_checkpoint(checkpoint), module)
