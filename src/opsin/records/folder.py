"""The files of a run folder: written whole or not at all, read without running code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from opsin.records.history import tidy_rows
from opsin.records.schema import COLUMNS


class RunFolder:
    """Writer of a run folder.

    Args:
        path: made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)

    @property
    def metrics(self) -> Path:
        """The tidy table of numbers."""
        return self.path / "metrics.csv"

    def start_metrics(self) -> None:
        """Begin the table anew: a resumed run writes again what its checkpoint holds, and nothing after it."""
        write_atomically(self.metrics, ",".join(COLUMNS) + "\n")

    def append_metrics(self, records: list[tuple[int, str, np.ndarray]], batch_size: int) -> None:
        """Append records and hand them to the operating system, so that a killed process loses none."""
        if records:
            with self.metrics.open("a") as file:
                file.write("".join(line + "\n" for line in tidy_rows(records, batch_size)))

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write one JSON document."""
        return write_atomically(self.path / name, json.dumps(content, indent=2) + "\n")


def load_saved(path: Path) -> dict[str, Any] | None:
    """A checkpoint or snapshot on the CPU; None where there is none that can be read."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError):
        return None
    return saved if isinstance(saved, dict) else None


def write_atomically(path: Path, text: str) -> Path:
    """Write so that a reader sees the old text or the new, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)
    return path
