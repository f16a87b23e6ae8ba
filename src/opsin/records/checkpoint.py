"""Checkpoints and snapshots: written whole or not at all, and read only if every bit is as it was written.

A file is a zip archive, as ``torch.save`` makes it and ``torch.load`` reads it. The comment at the end of the archive
is its seal: the SHA-256 of everything before. ``torch.load`` compares no checksums, so files are read through this
module.

A checkpoint that a run folder keeps does not hold the history. It holds its mark: where ``metrics.csv`` lies, how many
of its bytes the checkpoint counts on, and their SHA-256. Reading it rebuilds the history from these bytes.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from opsin.errors import ConfigError, log
from opsin.records.events import read_events
from opsin.records.folder import write_atomically
from opsin.records.history import axes_of_mark
from opsin.records.schema import (
    EVENTS_FILE,
    LAST_CHECKPOINT,
    METRICS_FILE,
    PREVIOUS_CHECKPOINT,
    SPARE_BYTES,
    SPARE_ROOM,
)
from opsin.records.table import history_from_table
from opsin.records.user_files import check_regular, reason

SEAL = b"opsin sha256 "
"""Begins the comment of a sealed archive; 64 hexadecimal digits follow and end the file."""

_DIGITS = 64
_SEALED = "sealed"
"""Key in a sealed file, so that one whose seal was damaged is not taken for one that never had any."""

EXPECTED_CHECKPOINT = "a checkpoint of a run: RUN/checkpoints/last.ckpt"


class DamagedError(ConfigError):
    """A file that is not what was written, or that no run has written.

    Args:
        field: name of the setting that holds the path, for the message.
        path: path of the file.
        reason: what is wrong with the file, a few words.
        changed: whether it is as long as it was and says something else, which no cut-off file does.
    """

    def __init__(self, field: str, path: Path, reason: str, changed: bool = False) -> None:
        super().__init__(field, str(path), f"{EXPECTED_CHECKPOINT} ({reason})")
        self.reason, self.changed = reason, changed


# ---- writing ----------------------------------------------------------------------------------------


def write_checkpoint(path: Path, content: Mapping[str, Any], previous: Path | None = None) -> Path:
    """Write a checkpoint or a snapshot with its seal, beside its place first; a reader sees the old one or the new one.

    Args:
        path: path of the file, in the file system that it stays in.
        content: plain tensors, numbers and texts, as ``torch.load`` reads them with ``weights_only=True``.
        previous: path under which the file that is replaced stays; None to let it go.
    """
    buffer = io.BytesIO()
    torch.save({**_with_relative_table(content, path), _SEALED: True}, buffer)
    return write_atomically(path, _sealed(buffer.getvalue()), previous)


def write_last(folder: Path, content: Mapping[str, Any], finished: bool = False) -> None:
    """Write the last checkpoint of a run; the one before it stays as ``checkpoints/previous.ckpt``.

    On a full disk the last takes the spare room of the run, and if need be that of the one before it, and the run ends.

    Args:
        folder: run folder, into which the file is written.
        content: checkpoint of the run, as ``write_checkpoint`` takes it.
        finished: whether it is the last of all, after which no room is kept.

    Raises:
        OSError: it could not be written, and the last is as it was; or it could, and the disk is full.
    """
    last, previous, spare = (folder / name for name in (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT, SPARE_ROOM))
    try:
        write_checkpoint(last, content, previous)
    except OSError as error:
        if not (_is_full(error) and last.exists()):
            raise
        spare.unlink(missing_ok=True)
        _write_in_room_of(previous, last, content)
        way_on = f"the run is saved up to step {content['global_step']:,}, and `opsin resume {folder}` continues"
        raise OSError(error.errno, f"{error.strerror}; {way_on}", str(folder)) from error
    if finished:
        spare.unlink(missing_ok=True)
    elif not spare.exists():
        _keep_room(spare)


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _write_in_room_of(previous: Path, last: Path, content: Mapping[str, Any]) -> None:
    try:
        write_checkpoint(last, content, previous)
    except OSError as error:
        if not (_is_full(error) and previous.exists()):
            raise
        previous.unlink()
        write_checkpoint(last, content)


def _keep_room(spare: Path) -> None:
    try:
        with spare.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, SPARE_BYTES)
    except OSError:
        # a disk with less has no room to spare
        spare.unlink(missing_ok=True)


def _sealed(archive: bytes) -> bytes:
    """The archive with its seal; its last two bytes are the length of a comment, 0 as yet."""
    length = (len(SEAL) + _DIGITS).to_bytes(2, "little")
    content = b"".join((memoryview(archive)[:-2], length, SEAL))
    return content + hashlib.sha256(content).hexdigest().encode()


def _with_relative_table(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The content with the way from the checkpoint to its table, so that a run folder can be moved."""
    opsin = content.get("opsin", {})
    if "metrics" not in opsin:
        return content
    way = os.path.relpath(os.path.abspath(opsin["metrics"]["path"]), os.path.abspath(path.parent))
    return {**content, "opsin": {**opsin, "metrics": {**opsin["metrics"], "path": way}}}


class SealedFiles(TorchCheckpointIO):
    """How a Trainer writes and reads checkpoints in local files: whole, sealed, and never by way of ``$TMPDIR``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write one checkpoint; one that goes to a remote file system is left to Lightning."""
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_checkpoint(Path(path), checkpoint)

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one checkpoint onto the CPU.

        Raises:
            DamagedError: a file that is not what was written.
        """
        if _is_remote(path):
            return super().load_checkpoint(path, weights_only=weights_only)
        if weights_only is False:
            check_seal(Path(path), "ckpt_path")
            return super().load_checkpoint(path, weights_only=False)
        return read_saved(Path(path), "ckpt_path")


def _is_remote(path: Any) -> bool:
    return "://" in str(path)


# ---- reading ----------------------------------------------------------------------------------------


def check_seal(path: Path, field: str) -> bool:
    """Compare a file with its seal, or with the checksums of an archive that has no seal.

    Args:
        path: path of the file.
        field: name of the setting that holds the path, for messages.

    Returns:
        Whether it has a seal.

    Raises:
        DamagedError: a file that cannot be read, or not as it was written.
    """
    try:
        length = check_regular(path)
        with path.open("rb") as file:
            file.seek(max(0, length - _DIGITS - len(SEAL)))
            seal = file.read()
            if seal.startswith(SEAL):
                if _digest(file, length - _DIGITS).encode() != seal[len(SEAL) :]:
                    raise DamagedError(field, path, "damaged: its checksum differs", changed=True)
                return True
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (part := archive.testzip()) is not None:
                    raise DamagedError(field, path, f"damaged: the checksum of {part} differs", changed=True)
    except OSError as error:
        raise DamagedError(field, path, (error.strerror or reason(error)).lower()) from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(field, path, "damaged, or no checkpoint") from error
    return False


def _digest(file: io.BufferedReader, length: int) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0 and (part := file.read(min(length, 1 << 20))):
        digest.update(part)
        length -= len(part)
    return digest.hexdigest()


def read_saved(path: Path, field: str) -> dict[str, Any]:
    """A checkpoint or snapshot on the CPU, as it lies in the file.

    Args:
        path: path of the file.
        field: name of the setting that holds the path, for messages.

    Raises:
        DamagedError: a file that is not what was written, or that no run has written.
    """
    sealed = check_seal(path, field)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # whatever stands in the file: the unpickler fails in many ways on what is no pickle
        raise DamagedError(field, path, "damaged, or no checkpoint") from error
    if not isinstance(saved, dict):
        raise DamagedError(field, path, f"it holds one {type(saved).__name__}")
    if saved.pop(_SEALED, False) and not sealed:
        raise DamagedError(field, path, "damaged: its checksum is gone", changed=True)
    return saved


def load_saved(path: Path) -> dict[str, Any] | None:
    """A checkpoint or snapshot on the CPU; None where there is none that is whole."""
    try:
        return read_saved(path, "path")
    except DamagedError:
        return None


def read_checkpoint(path: Path, field: str = "ckpt_path", history: bool = False) -> dict[str, Any]:
    """The checkpoint of a run.

    Args:
        path: path of the file.
        field: name of the setting that holds the path, for messages.
        history: whether the records are needed, too; they are rebuilt from ``metrics.csv`` where the file has none.

    Raises:
        DamagedError: a file that is not what was written, one that is no checkpoint of a run, or records that are not
            those that it counts on.
    """
    saved = read_saved(path, field)
    opsin, weights = saved.get("opsin"), saved.get("state_dict")
    if not (isinstance(opsin, dict) and isinstance(weights, dict) and isinstance(saved.get("global_step"), int)):
        raise DamagedError(field, path, "another file")
    return with_history(saved, path, field) if history else saved


def with_history(saved: dict[str, Any], path: Path, field: str = "ckpt_path") -> dict[str, Any]:
    """A checkpoint with the records that it counts on.

    Args:
        saved: the checkpoint as it lies in the file.
        path: path of that file, beside which the table is found.
        field: name of the setting that holds the path, for messages.

    Raises:
        DamagedError: no table, or another one than the checkpoint counts on.
    """
    opsin = saved["opsin"]
    if "history" in opsin:
        return saved
    mark, folder = opsin["metrics"], path.absolute().parent
    nearby = [Path(os.path.normpath(folder / mark["path"])), folder.parent / METRICS_FILE, folder / METRICS_FILE]
    table = next((candidate for candidate in nearby if candidate.is_file()), nearby[0])
    history = history_from_table(table, mark["bytes"], mark["sha256"], axes_of_mark(mark))
    if history is None:
        found = "differs from what it counts on" if table.exists() else "is missing"
        raise DamagedError(field, path, f"its table {os.path.relpath(table)} {found}", changed=True)
    events = opsin.get("events", [])
    if isinstance(events, int):
        events = read_events(table.with_name(EVENTS_FILE), events)
        if events is None:
            where = os.path.relpath(table.with_name(EVENTS_FILE))
            raise DamagedError(
                field, path, f"{where} lacks some of the {opsin['events']} events that it counts on", changed=True
            )
    return {**saved, "opsin": {**opsin, "history": history, "events": events, "metrics": {**mark, "path": str(table)}}}


def last_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that a run folder has, the newest first."""
    return [path for name in (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT) if (path := folder / name).exists()]


def recover_last(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint of a run that is whole, as ``checkpoints/last.ckpt`` from then on; None if there is none.

    Where the last is damaged the one before takes its place; the damaged one is kept as ``checkpoints/damaged.ckpt``.
    A file that is cut off is what a power cut leaves, and the run goes on. One that says something else than was
    written is what a disk does that cannot be trusted: this is said before anything is trained.

    Args:
        folder: run folder, which belongs to this process.

    Raises:
        ConfigError: there are checkpoints, and all are damaged; or the last says something else than was written, and
            the one before has taken its place.
    """
    last, damaged = folder / LAST_CHECKPOINT, list[DamagedError]()
    for path in last_checkpoints(folder):
        try:
            saved = read_checkpoint(path, history=True)
        except DamagedError as error:
            damaged.append(error)
            continue
        if path != last:
            _replace_damaged(path, last, damaged, f"step {saved['global_step']:,}", folder)
        return saved
    if damaged:
        found = "; ".join(f"{error.value}: {error.reason}" for error in damaged)
        way_out = f"remove {last.parent}, and `opsin resume {folder}` starts again and comes to the same numbers"
        raise ConfigError("opsin resume", found, f"a checkpoint that is whole, and none is left: {way_out}")
    return None


def _replace_damaged(path: Path, last: Path, damaged: Sequence[DamagedError], step: str, folder: Path) -> None:
    """Put the checkpoint before in the place of the last, and say so."""
    if damaged:
        os.replace(last, last.with_name("damaged.ckpt"))
    os.replace(path, last)
    if not damaged:
        log.warning(f"opsin: {last} is missing; {folder} goes on from the checkpoint before it, of {step}")
    elif not damaged[0].changed:
        kept = f"{last} ({damaged[0].reason}) is kept as damaged.ckpt"
        log.warning(f"opsin: {kept}; {folder} goes on from the checkpoint before it, of {step}")
    else:
        way_on = f"the one before it, of {step}, has taken its place, and `opsin resume {folder}` again goes on from it"
        raise ConfigError("opsin resume", f"{last}: {damaged[0].reason}", f"what was written; {way_on}")
