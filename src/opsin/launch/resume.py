"""``opsin resume``: continue a killed run, or a population of which some chunks were killed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opsin.callbacks.readers.run_folder import is_finished
from opsin.errors import ConfigError
from opsin.launch.fit import fit_recipe
from opsin.launch.population import train_population
from opsin.population.folder import is_population
from opsin.records.checkpoint import load_saved, recover_last
from opsin.records.schema import CONFIG_FILE, LAST_CHECKPOINT, METRICS_FILE


def resume_run(folder: Path, allowed: Sequence[str] = ()) -> None:
    """Continue a run from its last checkpoint that is whole, or from its beginning where it has none.

    Args:
        folder: folder of the run, or of the population.
        allowed: names of settings that may differ from those that the run was begun with.

    Raises:
        ConfigError: the folder holds no run.
    """
    if is_population(folder):
        if allowed:
            raise ConfigError("--allow", " ".join(allowed), "none for a population; `opsin resume` of a chunk takes it")
        train_population(folder)
        return
    config, checkpoint = folder / CONFIG_FILE, folder / LAST_CHECKPOINT
    if not config.exists():
        raise ConfigError("opsin resume", str(folder), "a run folder with a config.yaml")
    args = ["--config", str(config), "--run_folder", str(folder)]
    last = load_saved(checkpoint)
    if last is not None and is_finished(last):
        print(f"{folder} is finished, after {last['global_step']:,} steps; there is nothing to resume")
        return
    if recover_last(folder) is not None:
        args += ["--ckpt_path", str(checkpoint), *(part for name in allowed for part in ("--allow", name))]
    else:
        (folder / METRICS_FILE).unlink(missing_ok=True)
    fit_recipe(args)
