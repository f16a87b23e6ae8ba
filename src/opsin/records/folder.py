"""The files of a run folder: written whole or not at all, read without running code.

Legend: M members.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from opsin.records.axes import axes_of_header, table_header
from opsin.records.history import Records
from opsin.records.recipe_text import dump_recipe
from opsin.records.schema import (
    CHUNKS_FOLDER,
    CONFIG_FILE,
    LAST_CHECKPOINT,
    METRICS_FILE,
    POPULATION_FILE,
    ROW_AXES,
    SUMMARY_FILE,
)
from opsin.records.table import tidy_rows

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
        self._bytes, self._digest = 0, hashlib.sha256()
        self.axes: tuple[str, ...] = ROW_AXES

    @property
    def metrics(self) -> Path:
        """The tidy table of numbers."""
        return self.path / METRICS_FILE

    def start_metrics(self, records: Records = (), batch_size: int = 1, axes: Sequence[str] = ROW_AXES) -> None:
        """Begin the table anew, with what has been recorded so far; a reader sees the old one or the new one.

        Args:
            records: records in the order in which they were made.
            batch_size: sequences of a training step, which turn steps into sequences.
            axes: names of the axes that the table has columns for, in their order.
        """
        lines = (table_header(axes), *tidy_rows(records, batch_size, axes))
        content = "".join(line + "\n" for line in lines).encode()
        write_atomically(self.metrics, content)
        self.axes = tuple(axes)
        self._bytes, self._digest = len(content), hashlib.sha256(content)

    def continue_metrics(self, length: int) -> None:
        """Go on with the table after its first bytes; what a killed process wrote after them is cut off.

        Args:
            length: number of bytes that a checkpoint counts on.
        """
        os.truncate(self.metrics, length)
        self._bytes, self._digest = length, hashlib.sha256()
        with self.metrics.open("rb") as file:
            self.axes = axes_of_header(file.readline().decode()) or ROW_AXES
            file.seek(0)
            while part := file.read(1 << 20):
                self._digest.update(part)

    def append_metrics(self, records: Records, batch_size: int) -> None:
        """Append records and hand them to the operating system, so that a killed process loses none.

        Args:
            records: records in the order in which they were made, of axes that the table has columns for.
            batch_size: sequences of a training step, which turn steps into sequences.

        Raises:
            OSError: the disk is full; the table is as it was before.
        """
        content = "".join(line + "\n" for line in tidy_rows(records, batch_size, self.axes)).encode()
        if not content:
            return
        try:
            with self.metrics.open("ab") as file:
                file.write(content)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.metrics, self._bytes)
            raise
        self._bytes += len(content)
        self._digest.update(content)

    def mark(self) -> dict[str, Any]:
        """Path, axes, length and SHA-256 of the table, which is on the disk when this returns."""
        with self.metrics.open("rb") as file:
            os.fsync(file.fileno())
        mark = {"path": str(self.metrics.absolute()), "axes": list(self.axes)}
        return {**mark, "bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write one JSON document into the folder."""
        return write_json(self.path / name, content)


def write_atomically(
    path: Path, content: str | bytes | Callable[[BinaryIO], object], previous: Path | None = None
) -> Path:
    """Write a file so that a reader sees the old one or the new one, never half of it, and a power cut leaves one.

    Args:
        path: the file; folders on the way to it are made.
        content: text, bytes, or a function that writes into the open binary file it is given.
        previous: path under which the file that is replaced stays; None to let it go.

    Returns:
        The path of the file.

    Raises:
        OSError: it could not be written; the old one is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        with part.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(part, path)
    except BaseException:
        # what is half written takes room that a full disk lacks
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return path


def _keep(path: Path, previous: Path) -> None:
    """Give a file that is about to be replaced a second name."""
    part = previous.with_name(previous.name + PART_SUFFIX)
    try:
        part.unlink(missing_ok=True)
        os.link(path, part)
        os.replace(part, previous)
    except OSError:
        # a file system without second names: for a moment there is the one before alone
        os.replace(path, previous)


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder onto the disk, where the file system lets that be asked for."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a JSON document for people and programs, atomically."""
    return write_atomically(path, json.dumps(content, indent=2) + "\n")


def write_yaml(path: Path, settings: Mapping[str, Any]) -> Path:
    """Write plain settings as YAML in their order, atomically."""
    return write_atomically(path, dump_recipe(settings))
