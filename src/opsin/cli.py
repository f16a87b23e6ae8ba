"""The command line: ``opsin fit``, ``opsin resume``, ``opsin fork`` and ``opsin sites``."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from opsin.callbacks import KeepRun, Progress
from opsin.callbacks.run_folder import is_finished
from opsin.cli_fork import fork_run
from opsin.cli_population import (
    arranged,
    check_population,
    default_arrangement,
    lay_out,
    train_population,
    tuned_arrangement,
    write_population,
)
from opsin.errors import ConfigError, DivergedError, IdleError, PopulationError, log
from opsin.fleet import end_with_parent
from opsin.module import OpsinModule, callbacks_of
from opsin.plan import Plan
from opsin.population import Population
from opsin.report import final_report, sites_report
from opsin.runs import load_saved
from opsin.task import Task
from opsin.tune import cores, members_that_fit

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

TRAINER_DEFAULTS: dict[str, Any] = {
    "devices": 1,
    "logger": False,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    # validation counts Lightning batches across epochs
    "check_val_every_n_epoch": None,
    "val_check_interval": 20,
    "log_every_n_steps": 1,
}


LAST = Path("checkpoints") / "last.ckpt"
"""In a run folder, what a resume continues from."""


class OneLineParser(LightningArgumentParser):
    """Says in one line what is wrong with a setting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        found = _config_error(ex)
        print(f"opsin: {found or ' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


class OpsinCLI(LightningCLI):
    """LightningCLI with the task and the seed at the top level of a recipe, and a run folder."""

    def __init__(self, args: Sequence[str]) -> None:
        try:
            super().__init__(
                OpsinModule,
                save_config_callback=None,
                seed_everything_default=False,
                trainer_defaults=TRAINER_DEFAULTS,
                auto_configure_optimizers=False,
                parser_class=OneLineParser,
                # or else a misspelled setting that begins like another one is taken for it
                parser_kwargs={"allow_abbrev": False},
                args=list(args),
                run=False,
            )
        except ValueError as error:
            # of the Trainer, or of a callback that is not ours
            raise _config_error(error) or MisconfigurationException(str(error)) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_subclass_arguments(Task, "task", help="what is learned", required=True)
        parser.link_arguments("task", "model.task", apply_on="instantiate")
        parser.add_argument("--population", type=Population | None, default=None)
        parser.add_argument(
            "--run_folder", type=str | None, default=None, help="default: runs/RECIPE-DATE-TIME-PROCESS"
        )
        parser.add_argument("--checkpoint_every", type=int, default=1_000, help="optimizer steps between checkpoints")
        parser.add_argument(
            "--tune", action="store_true", help="time some numbers of members of one process, and keep the fastest"
        )
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to continue from")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init.get("trainer")
        callbacks = settings.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if settings.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks = [*callbacks, Progress()]
        self.keeper = KeepRun(self._folder(), self._resolved(), self.config_init.checkpoint_every)
        settings.callbacks = [*callbacks, self.keeper]
        if settings.enable_checkpointing is None and not any(isinstance(c, Checkpoint) for c in callbacks):
            settings.enable_checkpointing = False
        return super().instantiate_trainer(**kwargs)

    def _folder(self) -> Path:
        recipe = Path(str(self.config.config[0])).stem if self.config.config else "run"
        # the process tells apart the runs of a sweep that start in one second
        unnamed = f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        folder = Path(self.config.run_folder or unnamed)
        if folder.exists() and not folder.is_dir():
            raise ConfigError("run_folder", str(folder), "a folder")
        if (folder / "metrics.csv").exists() and self.config.ckpt_path is None:
            raise ConfigError("run_folder", str(folder), f"a new folder, or `opsin resume {folder}` to continue it")
        return folder

    def _resolved(self) -> str:
        config, folder, start = self.config, self.config.run_folder, self.config.ckpt_path
        if folder and start and Path(start) == Path(folder) / LAST and (Path(folder) / "config.yaml").exists():
            # of a resumed run it says what it began from, not where it was killed
            config = config.clone()
            config.ckpt_path = yaml.safe_load((Path(folder) / "config.yaml").read_text()).get("ckpt_path")
        return self.parser.dump(config)


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


def fit_population(cli: OpsinCLI) -> None:
    """Train every seed in every condition, in as many processes as the machine has cores."""

    def build(path: Path) -> Plan:
        one = OpsinCLI(["--config", str(path)])
        return one.model.plan_for(callbacks_of(one.trainer), one.trainer.max_steps)

    if cli.config.ckpt_path is not None:
        raise ConfigError("ckpt_path", cli.config.ckpt_path, "none beside a population; `opsin resume` continues one")
    if cli.trainer.max_steps < 1:
        raise ConfigError("trainer.max_steps", cli.trainer.max_steps, "the number of optimizer steps")
    callbacks, validates = callbacks_of(cli.trainer), bool(cli.trainer.limit_val_batches)
    check_population(cli.config.population, cli.model, callbacks, cli.trainer.max_steps, validates)
    folder = cli.keeper.folder
    if (folder / "population.json").exists():
        raise ConfigError("run_folder", str(folder), f"a new folder, or `opsin resume {folder}` to continue it")
    recipe = yaml.safe_load(cli._resolved())
    with tempfile.TemporaryDirectory() as scratch:
        layout = lay_out(recipe, Path(scratch), build)
    fit = members_that_fit(cli.model, recipe["population"].get("processes") or cores())
    arrangement = default_arrangement(recipe["population"], fit)
    if cli.config.tune:
        arrangement = tuned_arrangement(layout, arrangement, fit)
    write_population(layout, folder, arranged(layout, arrangement), arrangement)
    train_population(folder)


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


def _config_error(error: BaseException | None) -> ConfigError | None:
    """The ConfigError behind an error, which the parser may have wrapped."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


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
