"""From a recipe (YAML and settings on the line) to a run that is built and not yet trained."""

from __future__ import annotations

import copy
import functools
import operator
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from opsin.callbacks import KeepRun, Progress
from opsin.callbacks.readers.base import refuse_repeated
from opsin.errors import ConfigError, config_error_behind, log
from opsin.interventions.plan import Plan
from opsin.launch.cluster import one_process
from opsin.launch.recipe_parser import RecipeParser, ShortHelp, check_recipe, recipe_files, use_recipe_yaml
from opsin.launch.recipe_paths import RecipePaths
from opsin.population.settings import Population
from opsin.records.recipe_text import read_recipe
from opsin.records.schema import CONFIG_FILE, LAST_CHECKPOINT
from opsin.records.user_files import real_path
from opsin.task import Task
from opsin.training.module import OpsinModule, callbacks_of
from opsin.training.run_settings import run_settings
from opsin.training.trainer_settings import check_recipe_settings, check_trainer

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


class OpsinCLI(LightningCLI):
    """LightningCLI with the task and the seed at the top level of a recipe, and a run folder.

    Args:
        args: what follows ``opsin fit`` on the line, settings and files of settings.

    Raises:
        ConfigError: a setting that cannot work.
    """

    def __init__(self, args: Sequence[str]) -> None:
        use_recipe_yaml()
        try:
            super().__init__(
                OpsinModule,
                save_config_callback=None,
                seed_everything_default=False,
                trainer_defaults=TRAINER_DEFAULTS,
                auto_configure_optimizers=False,
                parser_class=RecipeParser,
                # or else a misspelled setting that begins like another one is taken for it
                parser_kwargs={"allow_abbrev": False, "formatter_class": ShortHelp},
                args=list(args),
                run=False,
            )
        except ValueError as error:
            # raised by the Trainer, or by a callback that is not Opsin's
            raise config_error_behind(error) or MisconfigurationException(str(error)) from error

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of ``model`` and ``trainer``; of those that are a number or a share, 1 is a number."""
        super().add_core_arguments_to_parser(parser)
        actions: list[Any] = parser._actions
        for action in actions:
            kinds = get_args(getattr(action, "_typehint", None))
            if int in kinds and float in kinds:
                # Python holds unions of the same types in any order for one, and remembers the first that it saw
                action._typehint = functools.reduce(operator.or_, sorted(kinds, key=lambda kind: kind is not int))

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
        assert isinstance(parser, RecipeParser)
        self.files = recipe_files(args)
        for path in self.files:
            check_recipe(path, parser)
        self.config = parser.parse_args(args)
        RecipePaths(self.files).fix(self.config)
        self._refuse_global_seed()

    def _refuse_global_seed(self) -> None:
        """Refuse Lightning's seed, which seeds nothing here; a run of before that had one goes on."""
        seed = self.config.seed_everything
        if seed is False or seed is None:
            return
        expected = f"none; model.seed, {self.config.model.seed} here, seeds initialisation and data"
        if not self._is_in_run_folder():
            raise ConfigError("seed_everything", seed, expected)
        log.info(f"opsin: seed_everything: {seed} changes nothing; expected {expected}")
        self.config.seed_everything = False

    def _is_in_run_folder(self) -> bool:
        """Whether the recipe is one that lies in the run folder, which has been made before."""
        paths, folder = self.config.config or [], self.config.run_folder
        return folder is not None and any(real_path(str(path)).parent == real_path(folder) for path in paths)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, with a progress bar unless it is switched off, and with the keeper of the run folder."""
        settings = self.config_init.get("trainer")
        check_recipe_settings(settings)
        callbacks = settings.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if settings.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks = [*callbacks, Progress()]
        refuse_repeated(callbacks)
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
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ImportError, TypeError, RuntimeError) as error:
            raise MisconfigurationException(f"trainer: {error}") from error
        check_trainer(trainer)
        return trainer

    def _folder(self) -> Path:
        recipe = Path(str(self.config.config[0])).stem if self.config.config else "run"
        # the process tells apart the runs of a sweep that start in one second
        unnamed = f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        folder = Path(self.config.run_folder or unnamed)
        if os.path.lexists(folder) and not folder.is_dir():
            raise ConfigError("run_folder", str(folder), "a folder")
        return folder

    def resolved(self) -> str:
        """The recipe with every setting that it leaves open, as YAML: the ``config.yaml`` of the run."""
        config, folder, start = copy.deepcopy(self.config), self.config.run_folder, self.config.ckpt_path
        config.pop("data", None)
        RecipePaths(self.files, absolute=True).fix(config)
        if folder and start and Path(start).absolute() == (Path(folder) / LAST_CHECKPOINT).absolute():
            saved = Path(folder) / CONFIG_FILE
            if saved.exists():
                # a resumed run says what it began from, not where it was killed
                config.ckpt_path = read_recipe(saved).get("ckpt_path")
        return self.parser.dump(config, skip_unset=False)


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
