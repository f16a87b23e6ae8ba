"""Claims about who owns a run folder, and for how long."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from opsin.errors import ConfigError
from opsin.records.claim import Claim, claim_unless_held, claimed
from opsin.records.schema import CLAIM_FILE

HOLDER = """
import sys, time
from pathlib import Path
from opsin.records.claim import Claim
claim = Claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""
PARENT = """
import os, sys, time
from pathlib import Path
from opsin.records.claim import Claim
claim = Claim(Path(sys.argv[1]))
if os.fork() == 0:
    time.sleep(60)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "a"


@pytest.fixture
def holder(folder):
    """A process that has the folder, by the program it runs."""
    started = []

    def start(program=HOLDER):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, start_new_session=True
        )
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def refused(folder):
    with pytest.raises(ConfigError) as raised:
        Claim(folder, patience=0)
    return str(raised.value)


def test_a_folder_of_another_process_is_refused_in_one_line_that_names_it(folder, holder):
    process = holder()
    line = refused(folder)
    assert f"process {process.pid} on {os.uname().nodename}" in line and str(folder) in line and "\n" not in line
    assert (folder / CLAIM_FILE).exists()


def test_a_claim_dies_with_its_process_and_what_it_left_is_taken_over(folder, holder):
    process = holder()
    process.kill()
    process.wait()
    assert (folder / CLAIM_FILE).exists()
    with claimed(folder):
        assert str(os.getpid()) in (folder / CLAIM_FILE).read_text()
    assert not (folder / CLAIM_FILE).exists()


def test_a_claim_is_not_its_forked_childs(folder, holder):
    process = holder(PARENT)
    assert "process" in refused(folder)
    process.kill()
    process.wait()
    # the child lives and sleeps
    os.killpg(process.pid, 0)
    # which has let go as soon as it runs
    Claim(folder, patience=30).release()


def test_whoever_waits_gets_the_folder_when_it_is_free(folder, holder):
    process = holder()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    Claim(folder, patience=30).release()
    assert time.monotonic() - began < 20


def test_a_released_claim_leaves_nothing_that_it_made(folder, tmp_path):
    with claimed(folder):
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_released_claim_leaves_what_others_have_made(folder):
    with claimed(folder):
        (folder / "config.yaml").touch()
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_one_process_has_one_claim_however_often_it_asks(folder):
    with claimed(folder) as outer, claimed(folder) as inner:
        assert outer is not None and inner is None
        assert claim_unless_held(folder / ".." / "a") is None
    with claimed(folder) as again:
        assert again is not None


def test_a_claim_follows_a_folder_that_is_renamed(folder):
    claim = Claim(folder)
    (folder / "kept").touch()
    other = folder.rename(folder.with_name("b"))
    claim.move(other)
    assert claim_unless_held(other) is None
    claim.release()
    assert [path.name for path in other.iterdir()] == ["kept"]


def test_a_file_that_was_removed_meanwhile_is_no_claim(folder, monkeypatch):
    first, lock = [], fcntl.flock

    def removed_before_it_is_locked(descriptor, operation):
        if not first:
            first.append((folder / CLAIM_FILE).unlink())
        return lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before_it_is_locked)
    with claimed(folder):
        assert (folder / CLAIM_FILE).exists()
        monkeypatch.undo()
        # the one that was locked is the one that others find
        with (folder / CLAIM_FILE).open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_where_files_cannot_be_locked_a_living_process_of_this_machine_is_found(folder, holder, monkeypatch, caplog):
    process = holder()

    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert str(process.pid) in refused(folder)
    process.kill()
    process.wait()
    with claimed(folder):
        assert [record.message for record in caplog.records if "cannot be locked" in record.message]
