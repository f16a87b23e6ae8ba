"""``opsin resume``: continue a killed run, or a population of which some chunks were killed."""

from __future__ import annotations

from pathlib import Path

from opsin.callbacks.readers.run_folder import is_finished
from opsin.errors import ConfigError
from opsin.launch.fit import fit_recipe, load_checkpoint
from opsin.launch.population import train_population
from opsin.population.folder import is_population
from opsin.records.schema import CONFIG_FILE, LAST_CHECKPOINT, METRICS_FILE


def resume_run(folder: Path) -> None:
    """Continue a run from its last checkpoint, or from its beginning where it has none.

    Args:
        folder: folder of the run, or of the population.

    Raises:
        ConfigError: the folder holds no run.
    """
    if is_population(folder):
        train_population(folder)
        return
    config, checkpoint = folder / CONFIG_FILE, folder / LAST_CHECKPOINT
    if not config.exists():
        raise ConfigError("opsin resume", str(folder), "a run folder with a config.yaml")
    args = ["--config", str(config), "--run_folder", str(folder)]
    if checkpoint.exists():
        saved = load_checkpoint(checkpoint)
        if is_finished(saved):
            print(f"{folder} is finished, after {saved['global_step']:,} steps; there is nothing to resume")
            return
        args += ["--ckpt_path", str(checkpoint)]
    else:
        (folder / METRICS_FILE).unlink(missing_ok=True)
    fit_recipe(args)
