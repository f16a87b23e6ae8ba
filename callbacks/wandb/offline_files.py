"""What the files of offline W&B runs hold, and whether a process still writes into them.

The service of wandb is a process that buffers what it is handed and writes it about once a second. When the process
that started it is gone it ends within a tenth of a second, and its buffer is lost: only the file says what was logged.

A file begins with seven bytes and is a log as LevelDB writes it: blocks of 32 KiB, filled with chunks. A chunk has a
CRC-32, a length, a kind and its data; a record is one whole chunk, or a first one, middle ones and a last one. Its
bytes are a ``Record`` of wandb's protocol.
"""

from __future__ import annotations

import os
import signal
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from glob import escape
from pathlib import Path

IDENTITY = b":W&B"
IDENTITY_BYTES = 7
"""The identity, with a number and a version after it."""

BLOCK_BYTES = 1 << 15
CHUNK = struct.Struct("<IHB")
"""CRC-32 of kind and data, length of the data, and kind; the data follow."""

DAMAGED, WHOLE, FIRST, LAST = 0, 1, 2, 4

PROCESSES = Path("/proc")
"""Where Linux tells of processes; nowhere on other systems."""

WRITING_SECONDS = 10.0
"""Longest time for which a service is waited for."""

SETTLED_SECONDS = 2.0
"""Longer than the interval in which a service writes."""


def offline_files(folder: Path, run_id: str) -> list[Path]:
    """The files of all processes that have kept a run offline.

    Args:
        folder: folder that holds ``wandb/offline-run-*``.
        run_id: id of the run.
    """
    return sorted(folder.glob(f"wandb/offline-run-*/run-{escape(run_id)}.wandb"))


# ---- what a file holds ------------------------------------------------------------------------------


def last_step(path: Path) -> int:
    """The last step with a row in a file; -1 where it has none.

    Args:
        path: path of the file, which may be empty, or cut off anywhere.

    Raises:
        OSError: it cannot be read.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    last = -1
    for content in records(path):
        with suppress(DecodeError):
            record = Record.FromString(content)
            if record.HasField("history"):
                last = max(last, record.history.step.num)
    return last


def records(path: Path) -> Iterator[bytes]:
    """The whole records of a file, as ``wandb sync`` finds them: what is damaged costs the rest of its block.

    Args:
        path: path of the file, which may be empty, or cut off anywhere.

    Raises:
        OSError: it cannot be read.
    """
    parts: list[bytes] | None = None
    with path.open("rb") as file:
        if not file.read(IDENTITY_BYTES).startswith(IDENTITY):
            return
        while block := file.read(BLOCK_BYTES - file.tell() % BLOCK_BYTES):
            for kind, data in _chunks(block):
                parts = [] if kind in (WHOLE, FIRST) else parts
                if parts is None:
                    continue
                parts.append(data)
                if kind in (WHOLE, LAST):
                    yield b"".join(parts)
                if kind in (WHOLE, LAST, DAMAGED):
                    parts = None


def _chunks(block: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and data of the chunks of a block, up to one that is damaged."""
    start = 0
    while start + CHUNK.size <= len(block):
        checksum, length, kind = CHUNK.unpack_from(block, start)
        data, end = start + CHUNK.size, start + CHUNK.size + length
        if end > len(block) or zlib.crc32(block[data - 1 : end]) != checksum:
            yield DAMAGED, b""
            return
        yield kind, block[data:end]
        start = end


# ---- who writes it ----------------------------------------------------------------------------------


def wait_until_written(paths: Iterable[Path], seconds: float = WRITING_SECONDS) -> None:
    """Wait until no process writes into files any more; the service of a process that is gone is ended if it lasts.

    Args:
        paths: paths of the files.
        seconds: longest time to wait, in seconds.
    """
    waited, until = [*paths], time.monotonic() + seconds
    while (busy := _are_written(waited)) and time.monotonic() < until:
        time.sleep(0.02)
    for process in _writers(waited) if busy else ():
        with suppress(OSError, ValueError):
            if _is_orphan(process):
                os.kill(process, signal.SIGKILL)


def _are_written(paths: Iterable[Path]) -> bool:
    if PROCESSES.exists():
        return bool(_writers(paths))
    return any(time.time() - path.stat().st_mtime < SETTLED_SECONDS for path in paths)


def _writers(paths: Iterable[Path]) -> list[int]:
    """Processes of this user that have one of some files open for writing."""
    names = {os.path.realpath(path) for path in paths}
    return [int(folder.name) for folder in PROCESSES.glob("[0-9]*") if names and not names.isdisjoint(_written(folder))]


def _written(process: Path) -> Iterator[str]:
    """Paths of the files that a process has open for writing."""
    # it may end meanwhile, or belong to another user
    with suppress(OSError):
        for link in (process / "fd").iterdir():
            with suppress(OSError):
                name, details = os.readlink(link), (process / "fdinfo" / link.name).read_text()
                if int(_value(details, "flags"), 8) & os.O_ACCMODE != os.O_RDONLY:
                    yield name


def _is_orphan(process: int) -> bool:
    """Whether it is a service whose process is gone; it ends by itself, unless a disk or a signal stops it."""
    folder = PROCESSES / str(process)
    arguments = (folder / "cmdline").read_text().split("\0")
    return arguments[arguments.index("--pid") + 1] != _value((folder / "status").read_text(), "PPid")


def _value(text: str, name: str) -> str:
    """The value in a line ``NAME: VALUE`` of a text; 0 without such a line."""
    return next((line.split()[1] for line in text.splitlines() if line.startswith(f"{name}:")), "0")
