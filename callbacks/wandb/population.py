"""The W&B run of a whole population: its tables and figures beside the runs of its members, in their group."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsin.callbacks.wandb.callback import WeightsAndBiases
from opsin.callbacks.wandb.start import Ledger, WandbMode, default_mode, finish, open_ledgers, start, unharmed
from opsin.errors import log
from opsin.population.chunks import listed
from opsin.population.tables import Row, with_intervals
from opsin.records.recipe_text import read_recipe
from opsin.records.schema import CHUNKS_FOLDER, CONFIG_FILE

SummaryTables = Mapping[str, Sequence[Row]]

FIGURES = ("population", "comparison", "critical_period", "grid", "scaling")
LEDGER = "wandb_summary.json"


def send_population(folder: Path, summary: SummaryTables) -> None:
    """Send what a population found as one run of job type ``summary``; nothing if its recipe has no WeightsAndBiases.

    The run holds the tables ``members`` (with every onset), ``conditions`` (means with 95 % intervals) and
    ``differences`` (with paired bootstrap intervals), the figures, and in its summary the numbers of the last two.
    Sent again, after a resume, it is the same run, one step on; the same summary is not sent twice.

    Args:
        folder: folder of the population, which ``finish_population`` has written.
        summary: tables that ``finish_population`` has returned, rows by the name of the table.
    """
    recipe = read_recipe(folder / CONFIG_FILE)
    settings = callback_settings(recipe)
    callback = None if settings is None else WeightsAndBiases(**settings)
    if callback is None:
        return
    with unharmed(unharmed_part="the population is whole"):
        mode = callback.mode or default_mode()
        if mode != "disabled":
            _send(folder.absolute(), summary, callback, mode, recipe)


def _send(
    folder: Path, summary: SummaryTables, callback: WeightsAndBiases, mode: WandbMode, recipe: Mapping[str, Any]
) -> None:
    content, path = hashlib.sha256(json.dumps(summary).encode()).hexdigest()[:16], folder / LEDGER
    if path.exists() and (old := Ledger.read(path)).finished and old.fingerprint == content:
        return
    files = Path(callback.folder or folder).absolute()
    (ledger,) = open_ledgers([path], files, [content], from_checkpoint=True)
    about = {
        "project": callback.project,
        "name": f"{callback.name or folder.name} summary",
        "group": callback.group or folder.name,
        "tags": [*(callback.tags or []), "summary"],
        "job_type": "summary",
        "config": recipe,
        "id": ledger.id,
    }
    for run in start(mode, files, [about]):
        ledger.logged_until += 1
        ledger.note_start(run)
        run.log(pictures(folder) | tables(summary), step=ledger.logged_until)
        run.summary.update(numbers(summary))
        finish(run)
        ledger.finished = True
        ledger.save()
        if run.offline:
            members = (files if callback.folder else folder / CHUNKS_FOLDER / "*") / "wandb" / "offline-run-*"
            log.info(f"opsin: W&B runs of the members: offline, `wandb sync {members}` uploads them")


def callback_settings(recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """Settings of the WeightsAndBiases of a resolved recipe."""
    for callback in listed(recipe["trainer"].get("callbacks")):
        if callback["class_path"].rpartition(".")[2] == WeightsAndBiases.__name__:
            return callback.get("init_args") or {}
    return None


def tables(summary: SummaryTables) -> dict[str, Any]:
    """The tables that have rows, as W&B's."""
    from wandb import Table

    return {
        name: Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        for name, rows in summary.items()
        if rows
    }


def pictures(folder: Path) -> dict[str, Any]:
    """The figures that the population has."""
    from wandb import Image

    paths = {name: folder / f"{name}.png" for name in FIGURES}
    return {name: Image(str(path)) for name, path in paths.items() if path.exists()}


def numbers(summary: SummaryTables) -> dict[str, float]:
    """Means and differences that exist: ``none/onset``, ``none/onset_low``, ``clamped - none/onset``, ..."""
    found: dict[str, float | None] = {}
    for row in summary["conditions"]:
        for name in with_intervals(row):
            found |= {f"{row['condition']}/{key}": row[key] for key in (name, f"{name}_low", f"{name}_high")}
    for row in summary["differences"]:
        key = f"{row['condition']} - {row['against']}/{row['quantity']}"
        found |= {key: row["difference"], f"{key}_low": row["low"], f"{key}_high": row["high"]}
    return {key: value for key, value in found.items() if value is not None}
