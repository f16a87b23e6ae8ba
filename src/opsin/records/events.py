"""The events of a run as lines of events.csv, one an event: step, member, kind, message."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opsin.records.folder import RunFolder, write_atomically
from opsin.records.schema import EVENTS_COLUMNS, EVENTS_FILE

Entry = Mapping[str, Any]
"""Step, member, kind and message of one event."""


class EventTable:
    """Mirrors the events of a run in a file, so that a checkpoint holds their number alone.

    Args:
        folder: run folder that has the file; none is made before the first event.
        entries: events of the run until now, which the file holds from then on.
    """

    def __init__(self, folder: RunFolder, entries: Iterable[Entry]) -> None:
        self.path = folder.path / EVENTS_FILE
        lines = _lines(entries)
        if lines or self.path.exists():
            write_atomically(self.path, _lines([dict(zip(EVENTS_COLUMNS, EVENTS_COLUMNS, strict=True))]) + lines)

    def append(self, entry: Entry) -> None:
        """Add one event, and hand it to the operating system."""
        if not self.path.exists():
            self.path.write_text(_lines([dict(zip(EVENTS_COLUMNS, EVENTS_COLUMNS, strict=True))]))
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_lines([entry]))

    def sync(self) -> None:
        """Bring what was added onto the disk."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


def _lines(entries: Iterable[Entry]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([entry[name] for name in EVENTS_COLUMNS] for entry in entries)
    return text.getvalue()


def read_events(path: Path, count: int) -> list[dict[str, Any]] | None:
    """The first events of a file; None where it does not hold so many.

    Args:
        path: path of the file ``events.csv``.
        count: number of events that are wanted.
    """
    if count == 0:
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row, _ in zip(csv.DictReader(file), range(count), strict=False)]
        found = [{**row, "step": int(row["step"]), "member": int(row["member"])} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return None
    return found if len(found) == count and all(row["message"] is not None for row in found) else None
