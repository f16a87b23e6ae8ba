"""A run folder has one owner at a time: the claim on a folder, which ends with the process that holds it.

The owner keeps a file in the folder locked (``flock``) as long as it writes there; the kernel drops the lock when the
process is gone, however it ended. The file says who holds it, for the message that others get, and is removed at the
end; one that a killed process left is taken over. Over NFS (version 4, or 3 with its lock service) Linux makes the lock
one of the server's, which other machines see; when the owner's *machine* dies the server drops it after its lease, some
90 seconds. A mount with ``nolock`` or ``local_lock=flock`` shows other machines nothing. Where a file system has no
locks at all one line says so; then only a process that lives on the same machine is found.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from opsin.errors import ConfigError, log
from opsin.records.schema import CHUNKS_FOLDER, CLAIM_FILE
from opsin.records.user_files import real_path

PATIENCE_SECONDS = 2.0
"""How long a folder must stay claimed before this process gives up."""

CHUNK_PATIENCE_SECONDS = 15.0
"""The same for a chunk: the worker of a killed population ends a moment after it."""

POLL_SECONDS_OF_CLAIM = 0.05

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems without locks answer."""

_held: dict[Path, Claim] = {}


class Claim:
    """The claim of this process on one folder.

    Args:
        folder: folder that is claimed, made if it does not exist.
        patience: seconds for which the folder may stay another process's before this one gives up.

    Raises:
        ConfigError: names the process that has the folder.
    """

    def __init__(self, folder: Path, patience: float | None = None) -> None:
        self.folder = folder.absolute()
        if patience is None:
            patience = CHUNK_PATIENCE_SECONDS if self.folder.parent.name == CHUNKS_FOLDER else PATIENCE_SECONDS
        self._made = _make(self.folder)
        self._descriptor = self._locked(time.monotonic() + patience)
        _held[real_path(self.folder)] = self
        content = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, (json.dumps(content) + "\n").encode(), 0)

    def _locked(self, until: float) -> int:
        path = self.folder / CLAIM_FILE
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                # whoever had the folder has just removed it
                self._made = [*_make(self.folder), *self._made]
                continue
            free = _try_lock(descriptor, path)
            if free and _is_file(descriptor, path):
                return descriptor
            os.close(descriptor)
            if not free and time.monotonic() > until:
                raise ConfigError("run_folder", str(self.folder), f"a folder that no process has: {_holder(path)}")
            time.sleep(0 if free else POLL_SECONDS_OF_CLAIM)

    def move(self, folder: Path) -> None:
        """Follow the folder, which was given another name.

        Args:
            folder: the path that the claimed folder has now.
        """
        self._forget()
        self.folder, self._made = folder.absolute(), []
        _held[real_path(self.folder)] = self

    def release(self) -> None:
        """Let others have the folder; one that this claim made and that is empty is removed."""
        self._forget()
        path = self.folder / CLAIM_FILE
        # before it is closed: afterwards the file may be another process's
        if _is_file(self._descriptor, path):
            path.unlink()
        os.close(self._descriptor)
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    def _forget(self) -> None:
        for path in [path for path, claim in _held.items() if claim is self]:
            del _held[path]

    def leave_to_parent(self) -> None:
        """In a forked process: the claim is that of the process which forked it."""
        with suppress(OSError):
            os.close(self._descriptor)


def claim_unless_held(folder: Path) -> Claim | None:
    """A claim on a folder; None where this process has one already."""
    return None if real_path(folder) in _held else Claim(folder)


@contextmanager
def claimed(folder: Path) -> Iterator[Claim | None]:
    """Claim a folder for this block, unless this process has it already.

    Args:
        folder: folder that is to be written into, made if it does not exist.

    Raises:
        ConfigError: names the process that has the folder.
    """
    claim = claim_unless_held(folder)
    try:
        yield claim
    finally:
        if claim is not None:
            claim.release()


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; which of them were made, the deepest first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _try_lock(descriptor: int, path: Path) -> bool:
    """Whether the file is locked for this process now, or cannot be and belongs to no process that is seen."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if _lives(_content(path)):
            return False
        log.warning(f"opsin: {path.parent} lies where files cannot be locked: let no other process train in it")
    return True


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this path: whoever held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _lives(content: dict[str, Any]) -> bool:
    """Whether a process that once wrote its name lives, as far as this machine can tell."""
    pid = content.get("pid")
    if content.get("host") != socket.gethostname() or not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _holder(path: Path) -> str:
    content = _content(path)
    if not content:
        return "another one has it"
    return f"process {content.get('pid')} on {content.get('host')} has had it since {content.get('since')}"


def _leave_all_to_parent() -> None:
    for claim in _held.values():
        claim.leave_to_parent()
    _held.clear()


os.register_at_fork(after_in_child=_leave_all_to_parent)
