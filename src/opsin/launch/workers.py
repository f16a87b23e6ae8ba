"""Worker processes: how each is started, and how the chunks of a population are run, so many at once.

A worker is a Python module, run on one thread: ``opsin`` for a chunk, ``opsin.launch.tune`` for a trial. It ends when
the process that started it does, so that a killed population leaves nothing behind that writes into its folders.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from opsin.errors import Interruption
from opsin.records.schema import LOG_FILE

END_WITH_STDIN = "OPSIN_END_WITH_STDIN"
"""Environment variable that makes a process end when the one that holds its standard input does."""

AGENT_VARIABLES = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")
"""Environment variables by which W&B gives a process its run: that of a population, and not of every chunk."""

POLL_SECONDS = 0.2

SAVING_SECONDS = 120.0
"""How long workers that were asked to end may take for their running step, which is compiled if it is the first."""


# ---- one process ------------------------------------------------------------------------------------


def start_worker(
    module: str, arguments: Sequence[str], output: BinaryIO | int, errors: BinaryIO | int | None = None
) -> subprocess.Popen[bytes]:
    """Start ``python -m MODULE ARGUMENTS`` on one thread; it ends when this process does.

    That holds for a module that calls ``end_with_parent``, as long as nobody closes the pipe to its standard input.

    Args:
        module: name of the module that is run.
        arguments: arguments of the module, as on a command line.
        output: where its standard output goes, a file or ``subprocess.PIPE``.
        errors: where its standard error goes; this process's own when None.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=errors,
        env=worker_environment(),
    )


def worker_environment() -> dict[str, str]:
    """Environment of a worker: one thread, its modules not from the working folder, and no run of a sweep's agent."""
    shared = {name: value for name, value in os.environ.items() if name not in AGENT_VARIABLES}
    return {**shared, END_WITH_STDIN: "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}


def end_with_parent() -> None:
    """In a worker: end this process at once when the process that started it has ended."""
    if os.environ.pop(END_WITH_STDIN, None):
        threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    # the other end closes however that process ended, SIGKILL included; sys.stdin has a lock that an exit waits for
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


# ---- the chunks of a population ---------------------------------------------------------------------


@dataclass
class Job:
    """One chunk to be trained.

    Args:
        folder: run folder of the chunk.
        arguments: verb and arguments of ``opsin`` that train it.
        process: the worker that trains it, once it has been started.
    """

    folder: Path
    arguments: Sequence[str]
    process: subprocess.Popen[bytes] | None = field(default=None, compare=False)

    def start(self) -> None:
        """Start the worker; what it prints goes to ``log.txt`` in its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOG_FILE).open("ab") as log:
            self.process = start_worker("opsin", self.arguments, output=log, errors=log)

    def last_line(self) -> str:
        """The last line that the worker printed."""
        lines = [line for line in (self.folder / LOG_FILE).read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


def run_jobs(
    jobs: Sequence[Job], processes: int, on_end: Callable[[Job, int], None], on_poll: Callable[[Sequence[Job]], None]
) -> list[Job]:
    """Run jobs in their order, some at once; one that fails leaves the rest alone.

    Args:
        jobs: chunks that are to be trained.
        processes: number of jobs that run at once.
        on_end: called with every job that has ended and its exit code.
        on_poll: called a few times a second with the jobs that are running.

    Returns:
        The jobs that ended with an exit code other than 0.
    """
    waiting, running, failed = list(jobs), list[Job](), list[Job]()
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                job.start()
                running.append(job)
            time.sleep(POLL_SECONDS)
            for job in [job for job in running if _code(job) is not None]:
                running.remove(job)
                code = _code(job)
                assert code is not None
                if code:
                    failed.append(job)
                on_end(job, code)
            on_poll(running)
    except Interruption as stopped:
        _stop(running, stopped.signal)
        raise
    finally:
        _stop(running, signal.SIGTERM)
    return failed


def _code(job: Job) -> int | None:
    assert job.process is not None
    return job.process.poll()


def _stop(jobs: Sequence[Job], number: int) -> None:
    """End workers by a signal, all at once, so that each saves its run."""
    workers = [job.process for job in jobs if job.process is not None and job.process.poll() is None]
    for worker in workers:
        worker.send_signal(number)
    until = time.monotonic() + SAVING_SECONDS
    for worker in workers:
        try:
            worker.wait(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
