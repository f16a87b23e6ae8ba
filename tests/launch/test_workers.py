"""Claims about the processes that train chunks and trials."""

import signal
import subprocess

from opsin.launch.workers import start_worker

MODULE = """
import os, sys, time
from opsin.launch.workers import end_with_parent

end_with_parent()
print(*sys.argv[1:], os.environ["OMP_NUM_THREADS"], "OPSIN_END_WITH_STDIN" in os.environ, flush=True)
time.sleep(60)
"""


def test_a_worker_has_one_thread_and_ends_with_the_process_that_started_it(tmp_path, monkeypatch):
    (tmp_path / "waiting.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = start_worker("waiting", ["argument"], output=subprocess.PIPE)
    # the variable is not handed on: processes that a worker starts are not workers
    assert worker.stdout.readline().split() == [b"argument", b"1", b"False"]
    worker.stdin.close()
    assert worker.wait(timeout=30) == -signal.SIGKILL
    worker.stdout.close()
