"""Chunks of a population as processes: started, watched, and started again where they were killed.

A worker is an ordinary ``opsin fit`` on one thread. It ends when the process that started it does, so that a killed
population leaves nothing behind that writes into its folders.
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

WATCH = "OPSIN_END_WITH_STDIN"
"""Environment variable that makes a process end when whoever holds its standard input does."""

POLL_SECONDS = 0.2


@dataclass
class Job:
    """One chunk to be trained.

    Args:
        folder: of its run.
        arguments: of ``opsin``.
    """

    folder: Path
    arguments: Sequence[str]
    process: subprocess.Popen[bytes] | None = field(default=None, compare=False)

    def start(self) -> None:
        """Start the worker; what it says goes to ``log.txt`` in its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, WATCH: "1", "OMP_NUM_THREADS": "1"}
        with (self.folder / "log.txt").open("ab") as told:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "opsin", *self.arguments],
                stdin=subprocess.PIPE,
                stdout=told,
                stderr=told,
                env=environment,
            )

    def last_words(self) -> str:
        """The last line that the worker wrote."""
        lines = [line for line in (self.folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


def run_jobs(
    jobs: Sequence[Job], processes: int, ended: Callable[[Job, int], None], tick: Callable[[Sequence[Job]], None]
) -> list[Job]:
    """Run jobs, so many at once, in their order; one that fails leaves the others alone.

    Args:
        ended: is told of every job that ended, with its exit code.
        tick: is told a few times a second which jobs are running.

    Returns:
        Those that failed.
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
                ended(job, code)
            tick(running)
    finally:
        for job in running:
            _stop(job)
    return failed


def _code(job: Job) -> int | None:
    assert job.process is not None
    return job.process.poll()


def _stop(job: Job) -> None:
    """End a worker as Ctrl-C would, so that it writes what it holds."""
    assert job.process is not None
    job.process.send_signal(signal.SIGINT)
    try:
        job.process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        job.process.kill()
        job.process.wait()


def end_with_parent() -> None:
    """Where a fleet started this process: end it at once when the fleet's own process has ended."""
    if os.environ.pop(WATCH, None):
        threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    # the other end closes however that process ended, SIGKILL included; sys.stdin has a lock that an exit waits for
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
