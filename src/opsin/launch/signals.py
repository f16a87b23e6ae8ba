"""Signals that ask a process to end: a hang-up, Ctrl-C, a scheduler's notice, a time limit.

Until training begins, and in the process that watches the chunks of a population, a signal ends what is being done at
once. While a run trains it is noted only: the run saves itself before its next optimizer step (``KeepRun``) and ends.
The file imports nothing but the standard library, as it is imported before anything else.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from opsin.errors import Interruption

ENDING_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What terminals, people and schedulers send to a process that is to end."""

IMPATIENT_AFTER_SECONDS = 1.0
"""A second Ctrl-C within this time is one that was sent twice: to a process, and to the group it is in."""


def exit_code(number: int) -> int:
    """The exit code of a process that a signal ended, as shells count it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


def ended_by(number: int) -> str:
    """How people call the end by a signal: ``interrupted`` by Ctrl-C, ``ended by SIGTERM``."""
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def end_on_signals() -> None:
    """Let the ending signals end this process with one line: for the seconds in which libraries are imported."""
    for number in _handled_signals():
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    # no exception: what is interrupted in an import may swallow it
    print(f"opsin: {ended_by(number)} before training began", file=sys.stderr, flush=True)
    os._exit(exit_code(number))


def _handled_signals() -> list[signal.Signals]:
    """The ending signals, without a hang-up that whoever started this process lets it ignore (``nohup``)."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in ENDING_SIGNALS if not (ignored and number == signal.SIGHUP)]


class EndingSignals:
    """Notes the first ending signal, and ends at once what is being done, or leaves that to a run that trains."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at, self._waits = 0.0, False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the ending signals in this block, as far as this thread may; afterwards they do what they did."""
        self.received, self._waits = None, False
        before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
        self.take()
        try:
            yield
        finally:
            if _may_handle():
                for number, handler in before.items():
                    signal.signal(number, handler)

    def take(self) -> None:
        """Become the handler of the ending signals: libraries put their own in between."""
        if _may_handle():
            for number in _handled_signals():
                signal.signal(number, self._receive)

    @contextmanager
    def waiting_for_run(self) -> Iterator[None]:
        """From ``begin`` to the end of this block a signal is noted only, for a run to end by itself."""
        try:
            yield
        finally:
            self._waits = False

    def begin(self) -> None:
        """Note signals from now on: the run trains."""
        self.take()
        self._waits = True

    def requested(self) -> bool:
        """Whether a signal asks the run to end."""
        return self.received is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first = self.received is None
        if first:
            self.received, self._received_at = number, time.monotonic()
        waited = time.monotonic() - self._received_at > IMPATIENT_AFTER_SECONDS
        impatient = self._waits and number == self.received == signal.SIGINT and waited
        if impatient or (first and not self._waits):
            raise Interruption(number, f"{ended_by(number)} before training began")


def _may_handle() -> bool:
    return threading.current_thread() is threading.main_thread()


PROCESS_SIGNALS = EndingSignals()
"""The signals of this process."""
