"""The command line: ``opsin fit``, ``opsin resume``, ``opsin fork`` and ``opsin sites``."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from opsin.errors import ConfigError, DivergedError, IdleError, PopulationError, config_error_behind, log
from opsin.launch.fit import fit_recipe, split_allowed
from opsin.launch.fork import fork_run
from opsin.launch.recipe import OpsinCLI
from opsin.launch.resume import resume_run
from opsin.launch.workers import end_with_parent
from opsin.reports.sites import sites_report
from opsin.training.module import callbacks_of

USAGE = """usage: opsin VERB ...

  opsin fit --config RECIPE.yaml [--trainer.max_steps N] [--trainer.callbacks+=CLASS ...]
                             train; every setting of the recipe can be given on the line
  opsin resume RUN [--allow SETTING ...]
                             continue a killed run from its last checkpoint; a setting that differs from what the run
                             was begun with is refused unless it is allowed
  opsin fork RUN --at STEP [--config BRANCHES.yaml] [--run_folder OUT] [--member N]
                             go on from a step of a run, once for each condition of the file
  opsin sites --config RECIPE.yaml
                             every site, its shape, what may be done to it, and the recipe's plan
  opsin fit --help           all settings
"""


def fit(args: Sequence[str]) -> None:
    """Train as the recipe says, and say where the phase change happened."""
    fit_recipe(args)


def resume(args: Sequence[str]) -> None:
    """Continue a killed run."""
    allowed, folders = split_allowed(args)
    if len(folders) != 1:
        raise ConfigError("opsin resume", " ".join(folders), "one run folder")
    resume_run(Path(folders[0]), allowed)


def fork(args: Sequence[str]) -> None:
    """Go on from a step of a run in branches."""
    fork_run(args)


def sites(args: Sequence[str]) -> None:
    """Print every site of the recipe's model and what the recipe does to them."""
    cli = OpsinCLI(args)
    module = cli.model
    plan = module.plan_for(callbacks_of(cli.trainer), max(cli.trainer.max_steps, 1))
    print(sites_report(module.sites, module.n_members, module.task.batch_size, plan))


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
        found = config_error_behind(error)
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
