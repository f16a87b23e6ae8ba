"""The command line in processes of their own, forked from one that has imported the libraries, which takes seconds.

What a process is needed for stays: an exit code, a signal that ends it, memory that nobody shares. That a process which
imports everything itself does the same is claimed where the README's commands are run.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["opsin.cli", "matplotlib.backends.backend_agg", "wandb"])
PROGRAM = subprocess.Popen

RUNNING = ".running"
"""A file in a command's working directory that each of its processes keeps locked, for itself, until it has ended."""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Started:
    """A command that was started.

    Args:
        arguments: what follows ``opsin`` on the line.
        folder: working directory of the command.
        script: path of a Python file that runs in place of ``opsin``.
        environment: variables that it has beside those of this process.
    """

    def __init__(self, *arguments: object, folder: Path, script: Path | None = None, **environment: str) -> None:
        self.texts = [folder / f".{name}-{time.monotonic_ns()}" for name in ("out", "err")]
        line = [str(script or "opsin"), *(str(argument) for argument in arguments)]
        self.process = CONTEXT.Process(target=_command, args=(line, folder, {**os.environ, **environment}, self.texts))
        self.process.start()

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def poll(self) -> int | None:
        """Exit code, or minus the signal that ended the process; nothing while it runs."""
        return self.process.exitcode

    def wait(self) -> Ended:
        """Wait for the end."""
        self.process.join()
        assert self.process.exitcode is not None
        # a process that was killed at once has written nothing
        out, err = (path.read_text() if path.exists() else "" for path in self.texts)
        for path in self.texts:
            path.unlink(missing_ok=True)
        return Ended(self.process.exitcode, out, err)


def opsin(
    *arguments: object, folder: Path, script: Path | None = None, check: bool = True, **environment: str
) -> Ended:
    """Run a command to its end; the arguments are those of ``Started``.

    Args:
        check: whether an exit code other than 0 is a failure of the test.
    """
    ended = Started(*arguments, folder=folder, script=script, **environment).wait()
    assert not check or ended.code == 0, ended
    return ended


def kill_in_training(started: Started, folder: Path, run: str) -> None:
    """Kill a population once a chunk of it has a checkpoint, and wait until its workers have ended, a minute at most.

    Args:
        started: command that trains it.
        folder: working directory of the command.
        run: name of the population's folder in it.
    """
    while not list(folder.glob(f"{run}/chunks/*/checkpoints/last.ckpt")):
        assert started.poll() is None
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    until = time.monotonic() + 60
    while not all_have_ended(folder) and time.monotonic() < until:
        time.sleep(0.02)


def all_have_ended(folder: Path) -> bool:
    """Whether none of the processes that were started in a folder, workers included, is left."""
    with (folder / RUNNING).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _command(line: Sequence[str], folder: Path, environment: Mapping[str, str], texts: Sequence[Path]) -> None:
    """What a forked process does."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for path, number in zip(texts, (1, 2), strict=True):
        with path.open("wb") as written:
            os.dup2(written.fileno(), number)
    _lock()
    # those of a population fork again
    subprocess.Popen = _worker_or_program  # type: ignore[assignment,misc]
    _run(line)


def _run(line: Sequence[str]) -> None:
    """Run a command line, of which the first part is ``opsin`` or a Python file."""
    sys.argv = [*line]
    if line[0] == "opsin":
        runpy.run_module("opsin", run_name="__main__")
    else:
        sys.path.insert(0, str(Path(line[0]).parent))
        runpy.run_path(line[0], run_name="__main__")


def _lock() -> None:
    """Lock the file that tells of this process; the system unlocks it when the process is gone, however it ends."""
    fcntl.flock(os.open(RUNNING, os.O_CREAT | os.O_RDWR), fcntl.LOCK_SH)


def _worker_or_program(command: Any, *arguments: Any, **settings: Any) -> Any:
    """What stands for ``subprocess.Popen``: forks a worker of a population, and starts any other program as ever."""
    if [*command[:3]] == [sys.executable, "-m", "opsin"]:
        return ForkedWorker(command, *arguments, **settings)
    return PROGRAM(command, *arguments, **settings)


class ForkedWorker:
    """What ``subprocess.Popen`` is to a population, of a worker forked from the process that starts it."""

    def __init__(self, command: Sequence[str], *, stdin: int, stdout: Any, stderr: Any, env: Mapping[str, str]) -> None:
        assert stdin == subprocess.PIPE
        self.returncode: int | None = None
        read, self.stdin = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _become_worker(command[2:], env, (read, stdout.fileno(), stderr.fileno()))
        os.close(read)

    def poll(self) -> int | None:
        """Exit code, or minus the signal that ended the worker; nothing while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        """Wait for the end."""
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to the worker."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _become_worker(line: Sequence[str], environment: Mapping[str, str], standard: Sequence[int]) -> NoReturn:
    """Run a worker's command in a process that was just forked, and end it."""
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
    # the other workers' standard input among them, which must close when the population ends
    os.closerange(3, 4096)
    _lock()
    os.environ.clear()
    os.environ.update(environment)
    try:
        _run(line)
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
