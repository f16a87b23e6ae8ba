"""Claims about the files of offline W&B runs: what they hold decides what a resumed run sends, wherever they end."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib

import pytest
from wandb.proto.wandb_internal_pb2 import HistoryRecord, HistoryStep, Record

from opsin.callbacks.wandb import offline_files as files
from opsin.callbacks.wandb.offline_files import BLOCK_BYTES, CHUNK, last_step, records, wait_until_written
from opsin.callbacks.wandb.start import open_ledgers
from tests.helpers.wandb_files import read, steps_of

IDENTITY = b":W&B\xe1\xbe\x00"
OPENER = "import sys, time\nfile = open(sys.argv[1], sys.argv[2])\nprint(flush=True)\ntime.sleep(60)"


def row(step, size=0):
    """One row as W&B records it, with so many bytes to spare."""
    record = Record(history=HistoryRecord(step=HistoryStep(num=step)))
    record.history.item.add(key="_step", value_json=str(step))
    record.history.item.add(key="x", value_json=f'"{"x" * size}"')
    return record.SerializeToString()


def log_of(contents):
    """Records as LevelDB writes them, after the identity of a W&B file."""
    log = IDENTITY
    for content in contents:
        begun = False
        while not begun or content:
            room = BLOCK_BYTES - len(log) % BLOCK_BYTES
            if room < CHUNK.size:
                log += bytes(room)
                continue
            data, content = content[: room - CHUNK.size], content[room - CHUNK.size :]
            kind = bytes([(4 if begun else 1) if not content else (3 if begun else 2)])
            log += CHUNK.pack(zlib.crc32(kind + data), len(data), kind[0]) + data
            begun = True
    return log


def offline_file(folder, run_id="abc", second=1, content=b""):
    path = folder / "wandb" / f"offline-run-{second}-{run_id}" / f"run-{run_id}.wandb"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    os.utime(path, (second, second))
    return path


def steps_after_kill(folder, **ledger):
    """The step after which a resumed process goes on, given the ledger of the killed one."""
    path = folder / "wandb_run.json"
    path.write_text(json.dumps({"id": "abc", "fingerprint": "same", **ledger}))
    (opened,) = open_ledgers([path], folder, ["same"], from_checkpoint=True)
    assert json.loads(path.read_text())["logged_until"] == opened.logged_until == opened.logged_before
    return opened.logged_until


# --- what a file holds -------------------------------------------------------------------------

ROWS = [row(step, size) for step, size in enumerate([10, 40_000, 10, 70_000, 10])]
LOG = log_of(ROWS)
CUTS = [0, 3, 7, 10, 20, *(BLOCK_BYTES * block + beyond for block in (1, 2, 3) for beyond in (-1, 0, 1, 8)), len(LOG)]


@pytest.mark.parametrize("end", CUTS)
def test_a_file_that_is_cut_off_holds_what_wandb_itself_reads_of_it(tmp_path, end):
    path = offline_file(tmp_path, content=LOG[:end])
    assert len([*records(path)]) == len(read(path))
    assert last_step(path) == max(steps_of([path]), default=-1)


def test_records_are_whole_or_not_there_wherever_a_file_ends(tmp_path):
    path, whole, short = tmp_path / "run", ROWS[:2], log_of(ROWS[:2])
    ends = [len(log_of(whole[:count])) for count in range(3)]
    for end in [*range(60), *range(len(short) - 60, len(short) + 1)]:
        path.write_bytes(short[:end])
        assert [*records(path)] == whole[: sum(end >= other for other in ends[1:])]


def test_a_damaged_byte_costs_the_rest_of_its_block(tmp_path):
    rows = [row(step, 10_000) for step in range(8)]
    content = bytearray(log_of(rows))
    content[20_000] ^= 1
    # the first block ends in the fourth row
    assert [*records(offline_file(tmp_path, content=content))] == [rows[0], *rows[4:]]


def test_what_is_no_file_of_wandb_holds_no_step(tmp_path):
    assert last_step(offline_file(tmp_path, content=b"another" + log_of([row(1)])[7:])) == -1


# --- what a resumed run sends ------------------------------------------------------------------


def test_what_the_service_of_a_killed_process_did_not_write_is_sent_again(tmp_path):
    content = log_of([row(10), row(20), row(30)])
    offline_file(tmp_path, content=content[:-5])
    assert steps_after_kill(tmp_path, logged_until=200) == 20


@pytest.mark.parametrize("content", [b"", b":W&", b"x" * 90, log_of([])], ids=["empty", "cut", "foreign", "no rows"])
def test_a_file_without_a_step_does_not_make_its_ledger_true(tmp_path, content):
    offline_file(tmp_path, content=content)
    assert steps_after_kill(tmp_path, logged_until=200) == -1


def test_a_file_without_a_step_leaves_what_the_files_before_it_hold(tmp_path):
    offline_file(tmp_path, second=1, content=log_of([row(10), row(20)]))
    offline_file(tmp_path, second=2, content=b"")
    assert steps_after_kill(tmp_path, logged_until=200, logged_before=20) == 20


def test_a_file_that_is_ahead_of_its_ledger_is_not_repeated(tmp_path):
    offline_file(tmp_path, content=log_of([row(10), row(20)]))
    assert steps_after_kill(tmp_path, logged_until=10) == 20


def test_a_folder_with_a_suffix_and_an_id_with_a_bracket_are_found(tmp_path):
    path = offline_file(tmp_path, content=log_of([row(10)]))
    path.parent.rename(path.parent.with_name(path.parent.name + "-1"))
    assert steps_after_kill(tmp_path, logged_until=200) == 10
    offline_file(tmp_path, run_id="a[b]", content=log_of([row(30)]))
    assert steps_after_kill(tmp_path, id="a[b]", logged_until=200) == 30


def test_steps_that_are_on_the_server_are_not_sent_again(tmp_path):
    # files that were uploaded and removed, or a run that was online
    assert steps_after_kill(tmp_path, logged_until=200) == 200
    offline_file(tmp_path, content=log_of([row(10)]))
    assert steps_after_kill(tmp_path, logged_until=200, offline=False) == 200
    # offline since a step, in a process that was killed before it wrote one
    assert steps_after_kill(tmp_path, logged_until=220, logged_before=200) == 200


# --- who writes a file -------------------------------------------------------------------------


@pytest.fixture
def opener():
    """Starts a process that keeps a file open, with what else stands in its command line."""
    begun = []

    def start(path, mode, *words):
        command = [sys.executable, "-c", OPENER, str(path), mode, *words]
        begun.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        begun[-1].stdout.readline()
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()
        process.stdout.close()


linux = pytest.mark.skipif(not files.PROCESSES.exists(), reason="no /proc tells who has a file open")


@linux
def test_a_file_is_waited_for_while_a_process_writes_it(tmp_path, opener):
    path = offline_file(tmp_path)
    process, began = opener(path, "ab"), time.monotonic()
    wait_until_written([path], seconds=0.1)
    assert time.monotonic() - began >= 0.1 and process.poll() is None
    process.kill()
    process.wait()
    wait_until_written([path], seconds=60)
    opener(path, "rb")
    wait_until_written([path], seconds=60)
    assert time.monotonic() - began < 30


@linux
def test_a_service_whose_process_is_gone_is_ended_if_it_does_not_end(tmp_path, opener):
    path = offline_file(tmp_path)
    orphan, alive = opener(path, "ab", "--pid", "0"), opener(path, "ab", "--pid", str(os.getpid()))
    wait_until_written([path], seconds=0.1)
    assert orphan.wait(timeout=10) == -signal.SIGKILL and alive.poll() is None


def test_without_such_a_system_a_file_is_left_alone_until_it_is_at_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PROCESSES", tmp_path / "nowhere")
    monkeypatch.setattr(files, "SETTLED_SECONDS", 0.3)
    path, began = offline_file(tmp_path), time.monotonic()
    path.write_bytes(b"new")
    wait_until_written([path])
    assert 0.2 < time.monotonic() - began < 5
