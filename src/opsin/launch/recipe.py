"""From a recipe (YAML and settings on the line) to a run that is built and not yet trained."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from opsin.callbacks import KeepRun, Progress
from opsin.errors import ConfigError, config_error_behind
from opsin.interventions.plan import Plan
from opsin.launch.cluster import one_process
from opsin.population.settings import Population
from opsin.records.schema import CONFIG_FILE, LAST_CHECKPOINT
from opsin.task import Task
from opsin.training.module import OpsinModule, callbacks_of
from opsin.training.run_settings import run_settings

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


LAST_OF_LIGHTNING = "last_of_lightning"
"""Name, without its ending, of the file that ``ModelCheckpoint`` with ``save_last`` keeps."""


# ---- the recipe -------------------------------------------------------------------------------------


class OneLineParser(LightningArgumentParser):
    """Says in one line what is wrong with a setting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and end the process with code 2."""
        found = config_error_behind(ex)
        print(f"opsin: {found or ' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


class OpsinCLI(LightningCLI):
    """LightningCLI with the task and the seed at the top level of a recipe, and a run folder.

    Args:
        args: what follows ``opsin fit`` on the line, settings and files of settings.

    Raises:
        ConfigError: a setting that cannot work.
    """

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
            # raised by the Trainer, or by a callback that is not Opsin's
            raise config_error_behind(error) or MisconfigurationException(str(error)) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings that a recipe has beside ``model`` and ``trainer``."""
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
        """Parse the given arguments, without a warning where the process has arguments of its own."""
        self.config = parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, with a progress bar unless it is switched off, and with the keeper of the run folder."""
        settings = self.config_init.get("trainer")
        callbacks = settings.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if settings.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks = [*callbacks, Progress()]
        self.keeper = KeepRun(self._folder(), self.resolved(), self.config_init.checkpoint_every)
        settings.callbacks = [*callbacks, self.keeper]
        settings.plugins = one_process(settings.plugins)
        if settings.default_root_dir is None:
            settings.default_root_dir = str(self.keeper.folder)
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint):
                # ``last.ckpt`` is what a resume starts from
                callback.CHECKPOINT_NAME_LAST = LAST_OF_LIGHTNING
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
        return folder

    def resolved(self) -> str:
        """The recipe with every setting that it leaves open, as YAML: the ``config.yaml`` of the run."""
        config, folder, start = self.config, self.config.run_folder, self.config.ckpt_path
        if folder and start and Path(start) == Path(folder) / LAST_CHECKPOINT:
            saved = Path(folder) / CONFIG_FILE
            if saved.exists():
                # a resumed run says what it began from, not where it was killed
                config = config.clone()
                config.ckpt_path = yaml.safe_load(saved.read_text()).get("ckpt_path")
        return self.parser.dump(config)


# ---- the run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuiltRun:
    """A run that is built and not trained.

    Args:
        module: the Lightning module of the run, which holds task and model.
        plan: what the writers of the run do.
        callbacks: all callbacks of the run, each under its key in a checkpoint.
        settings: named settings that determine the numbers of the run.
    """

    module: OpsinModule
    plan: Plan
    callbacks: Mapping[str, Any]
    settings: Mapping[str, Any]


def build_run(cli: OpsinCLI) -> BuiltRun:
    """The run of a recipe with the plan of its writers, which is checked on the way.

    Raises:
        ConfigError: a writer that cannot do what it should.
    """
    callbacks = callbacks_of(cli.trainer)
    plan = cli.model.plan_for(callbacks, cli.trainer.max_steps)
    by_key = {callback.state_key: callback for callback in callbacks}
    return BuiltRun(cli.model, plan, by_key, run_settings(cli.model, plan, cli.trainer))
