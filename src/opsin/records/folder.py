"""The files of a run folder: written whole or not at all, read without running code.

Legend: M members.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import yaml

from opsin.records.history import tidy_rows
from opsin.records.recipe_text import dump_recipe
from opsin.records.schema import (
    CHUNKS_FOLDER,
    CONFIG_FILE,
    LAST_CHECKPOINT,
    METRICS_COLUMNS,
    METRICS_FILE,
    POPULATION_FILE,
    SUMMARY_FILE,
)
from opsin.records.user_files import UNREADABLE, check_regular

PART_SUFFIX = ".part"
"""Ends the name of a file that is being written; one that is left over is the half of a killed process."""


class FolderContent(Enum):
    """What a folder has; the value is how messages call it."""

    NEW = "no run"
    RUN = "a run"
    POPULATION = "a population"
    PART_OF_POPULATION = "a population that was ended before it was whole"
    PART_OF_FORK = "a fork that was ended before it was whole"


def content_of(folder: Path) -> FolderContent:
    """What a folder has, by its files; other files than those of a run do not count."""
    if (folder / POPULATION_FILE).exists():
        return FolderContent.POPULATION
    if is_population_recipe(folder / CONFIG_FILE):
        return FolderContent.PART_OF_POPULATION
    if (folder / CHUNKS_FOLDER).is_dir():
        return FolderContent.PART_OF_FORK
    files = (CONFIG_FILE, METRICS_FILE, LAST_CHECKPOINT, SUMMARY_FILE)
    return FolderContent.RUN if any((folder / name).exists() for name in files) else FolderContent.NEW


def is_population_recipe(path: Path) -> bool:
    """Whether a file is a resolved recipe with a population."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and bool(content.get("population"))


class RunFolder:
    """Writer of a run folder.

    Args:
        path: the run folder, made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)

    @property
    def metrics(self) -> Path:
        """The tidy table of numbers."""
        return self.path / METRICS_FILE

    def start_metrics(self) -> None:
        """Begin the table anew: a resumed run writes again what its checkpoint holds, and nothing after it."""
        write_atomically(self.metrics, ",".join(METRICS_COLUMNS) + "\n")

    def append_metrics(self, records: list[tuple[int, str, np.ndarray]], batch_size: int) -> None:
        """Append records and hand them to the operating system, so that a killed process loses none.

        Args:
            records: step, name of the metric, and its values ``[M, ...]`` of each record.
            batch_size: sequences of a training step, which turn steps into sequences.
        """
        if records:
            with self.metrics.open("a") as file:
                file.write("".join(line + "\n" for line in tidy_rows(records, batch_size)))

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write one JSON document into the folder."""
        return write_json(self.path / name, content)


def load_saved(path: Path) -> dict[str, Any] | None:
    """A checkpoint or snapshot on the CPU; None where there is none that can be read."""
    try:
        check_regular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE:
        return None
    return saved if isinstance(saved, dict) else None


def write_atomically(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> Path:
    """Write a file so that a reader sees the old one or the new one, never half of it.

    Args:
        path: the file; folders on the way to it are made.
        content: text, bytes, or a function that writes into the open binary file it is given.

    Returns:
        The path of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART_SUFFIX)
    if isinstance(content, str):
        part.write_text(content)
    elif isinstance(content, bytes):
        part.write_bytes(content)
    else:
        with part.open("wb") as file:
            content(file)
    os.replace(part, path)
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a JSON document for people and programs, atomically."""
    return write_atomically(path, json.dumps(content, indent=2) + "\n")


def write_yaml(path: Path, settings: Mapping[str, Any]) -> Path:
    """Write plain settings as YAML in their order, atomically."""
    return write_atomically(path, dump_recipe(settings))
