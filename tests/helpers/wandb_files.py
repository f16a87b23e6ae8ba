"""What offline runs of W&B hold, as wandb's own reader prints it."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import wandb

NAMES = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_DIR")
"""Environment variables that could make a run go online, or elsewhere."""


@functools.cache
def read(path: Path) -> list[dict[str, Any]]:
    """Records of one offline run, as ``wandb leet inspect --json`` prints them."""
    # what that calls; the command line itself takes seconds to import
    core = Path(wandb.__file__).parent / "bin" / "wandb-core"
    command = [core, "leet", "inspect", "--json", "--no-observability", "--run-file", path, path.parent.parent]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    return [json.loads(line) for line in lines.splitlines()]


def offline_runs(folder: Path) -> list[Path]:
    """Offline runs of a folder in order of writing."""
    return sorted((Path(folder) / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def of_type(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """What the records of one kind say."""
    return [record[kind] for record in records if record["type"] == kind]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that were logged."""
    return [row["item"] for row in of_type(records, "history")]


def steps_of(paths: list[Path]) -> list[int]:
    """Steps of all rows, file by file."""
    return [row["_step"] for path in paths for row in history(read(path))]


def about(path: Path) -> dict[str, Any]:
    """What the run is called, its group, tags and configuration."""
    return of_type(read(path), "run")[0]


def run_id(path: Path) -> str:
    """The id under which it is uploaded."""
    return about(path)["run_id"]


def summary(path: Path) -> dict[str, Any]:
    """The summary at the end of the file."""
    found: dict[str, Any] = {}
    for record in of_type(read(path), "summary"):
        found |= record["update"]
    return found
