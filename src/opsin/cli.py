"""The command line: ``opsin fit``, ``opsin resume``, ``opsin fork`` and ``opsin sites``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from opsin.errors import (
    ConfigError,
    DivergedError,
    IdleError,
    Interruption,
    PopulationError,
    config_error_behind,
)
from opsin.launch.advice import hide_advice
from opsin.launch.cluster import forget_other_processes
from opsin.launch.fit import fit_recipe, split_allowed
from opsin.launch.fork import fork_run
from opsin.launch.recipe import OpsinCLI
from opsin.launch.resume import CONTINUE, fit_or_continue, resume_run
from opsin.launch.signals import PROCESS_SIGNALS, exit_code
from opsin.launch.workers import end_with_parent
from opsin.records.version import installed_version
from opsin.reports.sites import sites_report
from opsin.training.module import callbacks_of

USAGE = """usage: opsin VERB ...

  opsin fit --config RECIPE.yaml [--trainer.max_steps N] [--trainer.callbacks+=CLASS ...]
                             train; every setting of the recipe can be given on the line
  opsin fit --config RECIPE.yaml --run_folder RUN --continue
                             for job scripts: start RUN, continue it where it was ended, exit 0 where it is finished
  opsin resume RUN [--allow SETTING ...]
                             continue a run or population that was ended, from its last checkpoint; a setting that
                             differs from what the run was begun with is refused unless it is allowed
  opsin fork RUN --at STEP [--config BRANCHES.yaml] [--run_folder OUT] [--member N]
                             go on from a step of a run, once for each condition of the file
  opsin sites --config RECIPE.yaml
                             every site, its shape, what may be done to it, and the recipe's plan
  opsin fit --help           all settings
  opsin --version            the version that is installed

  HUP, INT, TERM, USR1 and USR2 end a run before its next step: it is saved, and the exit code is 128 + the signal.
"""


def fit(args: Sequence[str]) -> None:
    """Train as the recipe says, and say where the phase change happened."""
    if CONTINUE in args:
        fit_or_continue([argument for argument in args if argument != CONTINUE])
    else:
        fit_recipe(args)


def resume(args: Sequence[str]) -> None:
    """Continue a run or a population that was ended."""
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
    """Entry point; 0 done, 1 the run failed, 2 a setting is wrong (nothing was started), 128 + signal: ended by it."""
    with PROCESS_SIGNALS.handled():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if verb in HELP or (verb in ("resume", "fork") and HELP & {*rest}):
        print(USAGE, end="")
        return 0
    if verb == "--version":
        print(f"opsin {installed_version()}")
        return 0
    hide_advice()
    forget_other_processes()
    end_with_parent()
    try:
        if verb not in VERBS:
            raise ConfigError("verb", verb, f"one of {', '.join(VERBS)} (`opsin --help`)")
        VERBS[verb](rest)
    except Interruption as stopped:
        print(f"opsin: {stopped}", file=sys.stderr)
        return exit_code(stopped.signal)
    except KeyboardInterrupt as stopped:
        print(f"opsin: {str(stopped) or 'interrupted before training began'}", file=sys.stderr)
        return 130
    except (DivergedError, IdleError, PopulationError, OSError) as error:
        print(f"opsin: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        found = config_error_behind(error)
        # a callback, logger or profiler of Lightning may need a package that is not installed
        if found is None and not isinstance(error, (MisconfigurationException, ModuleNotFoundError)):
            raise
        print(f"opsin: {found or ' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
