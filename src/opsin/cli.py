"""The command line: ``opsin fit``, ``opsin resume``, ``opsin fork`` and ``opsin sites``."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from opsin.callbacks.readers.run_folder import is_finished
from opsin.errors import ConfigError, DivergedError, IdleError, PopulationError, log
from opsin.launch.fork import fork_run
from opsin.launch.population import fit_population, train_population
from opsin.launch.recipe import LAST, OpsinCLI, _config_error
from opsin.launch.workers import end_with_parent
from opsin.records.folder import load_saved
from opsin.reports.run import final_report
from opsin.reports.sites import sites_report
from opsin.training.module import OpsinModule, callbacks_of

USAGE = """usage: opsin VERB ...

  opsin fit --config RECIPE.yaml [--trainer.max_steps N] [--trainer.callbacks+=CLASS ...]
                             train; every setting of the recipe can be given on the line
  opsin resume RUN           continue a killed run from its last checkpoint
  opsin fork RUN --at STEP [--config BRANCHES.yaml] [--run_folder OUT] [--member N]
                             go on from a step of a run, once for each condition of the file
  opsin sites --config RECIPE.yaml
                             every site, its shape, what may be done to it, and the recipe's plan
  opsin fit --help           all settings
"""


def fit(args: Sequence[str]) -> None:
    """Train as the recipe says, and say where the phase change happened."""
    cli = OpsinCLI(args)
    if cli.config.population is not None:
        fit_population(cli)
        return
    if cli.config.tune:
        raise ConfigError("--tune", True, "a recipe with a population")
    if cli.config.ckpt_path is not None:
        _check_fits(Path(cli.config.ckpt_path), cli.model)
    try:
        cli.trainer.fit(cli.model, ckpt_path=cli.config.ckpt_path, weights_only=True)
    except SystemExit:
        # how Lightning answers Ctrl-C, after its callbacks have written what they hold
        if not (cli.trainer.interrupted and (cli.keeper.folder / "config.yaml").exists()):
            raise
        where = f"interrupted at step {cli.trainer.global_step}"
        raise KeyboardInterrupt(f"{where}; `opsin resume {cli.keeper.folder}` continues") from None
    print(final_report(cli.model.summary, cli.keeper.folder))


def resume(args: Sequence[str]) -> None:
    """Continue a killed run."""
    if len(args) != 1:
        raise ConfigError("opsin resume", " ".join(args), "one run folder")
    folder = Path(args[0])
    if (folder / "population.json").exists():
        train_population(folder)
        return
    config, checkpoint = folder / "config.yaml", folder / LAST
    if not config.exists():
        raise ConfigError("opsin resume", str(folder), "a run folder with a config.yaml")
    again = ["--config", str(config), "--run_folder", str(folder)]
    if checkpoint.exists():
        saved = _load(checkpoint)
        if is_finished(saved):
            print(f"{folder} is finished, after {saved['global_step']:,} steps; there is nothing to resume")
            return
        again += ["--ckpt_path", str(checkpoint)]
    else:
        (folder / "metrics.csv").unlink(missing_ok=True)
    fit(again)


def _load(checkpoint: Path) -> dict[str, Any]:
    """What a run has saved.

    Raises:
        ConfigError: there is nothing that a run has saved.
    """
    saved = load_saved(checkpoint)
    if saved is None or "opsin" not in saved:
        raise ConfigError("ckpt_path", str(checkpoint), "a checkpoint of a run: RUN/checkpoints/last.ckpt")
    return saved


def _check_fits(checkpoint: Path, module: OpsinModule) -> None:
    """Refuse the checkpoint of another model."""
    saved = {name: tuple(tensor.shape) for name, tensor in _load(checkpoint)["state_dict"].items()}
    here = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in sorted(here.keys() | saved.keys()):
        if saved.get(name) != here.get(name):
            expected = f"{name} of shape {here.get(name)} as in this model; it has {saved.get(name)}"
            raise ConfigError("ckpt_path", str(checkpoint), expected)


def sites(args: Sequence[str]) -> None:
    """Print every site of the recipe's model and what the recipe does to them."""
    cli = OpsinCLI(args)
    module = cli.model
    plan = module.plan_for(callbacks_of(cli.trainer), max(cli.trainer.max_steps, 1))
    print(sites_report(module.sites, module.n_members, module.task.batch_size, plan))


def fork(args: Sequence[str]) -> None:
    """Go on from a step of a run in branches."""
    fork_run(args, OpsinCLI)


VERBS = {"fit": fit, "resume": resume, "fork": fork, "sites": sites}
HELP = {"-h", "--help"}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 done, 1 the run failed, 2 a setting is wrong (nothing was started), 130 interrupted."""
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if verb in HELP or (verb in ("resume", "fork") and HELP & {*rest}):
        print(USAGE, end="")
        return 0
    _quieten()
    end_with_parent()
    try:
        if verb not in VERBS:
            raise ConfigError("verb", verb, f"one of {', '.join(VERBS)} (`opsin --help`)")
        VERBS[verb](rest)
    except KeyboardInterrupt as stopped:
        print(f"opsin: {str(stopped) or 'interrupted before training began'}", file=sys.stderr)
        return 130
    except (DivergedError, IdleError, PopulationError, OSError) as error:
        print(f"opsin: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        found = _config_error(error)
        if found is None and not isinstance(error, MisconfigurationException):
            raise
        print(f"opsin: {found or ' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _quieten() -> None:
    """Hide the libraries' advice that does not apply to models of this size; what Opsin says stays."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*ModelCheckpoint with manual optimization.*")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    # steps end a run here, and a run without a number of steps is refused
    warnings.filterwarnings("ignore", message=".*`max_epochs` was not set.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
