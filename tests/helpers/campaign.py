"""A campaign of kills: runs, populations and forks that are killed at random moments, resumed, and compared to the bit.

Every kill is SIGKILL, some time after the start of a process that a run of its kind would take to its end: while it is
built, trains, saves, validates, draws or ends. A folder is killed several times, comes to its end, and is compared with
that of a run nobody killed. Half of the folders have their temporary files on another file system.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.helpers.processes import Started, all_have_ended, opsin
from tests.helpers.wandb_files import history, offline_runs, read

OTHER_FILE_SYSTEM = Path("/dev/shm")
PER_FOLDER = 5
"""Kills of one folder before it may come to its end."""

TIMES = ("_runtime", "_timestamp")
"""What W&B adds to a row, different in every process."""

STEPS = 200
RECIPE = f"""
task:
  class_path: opsin.tasks.FewShot
  init_args:
    batch_size: 4
    train_classes: 8
    exemplars: {{class_path: opsin.tasks.GaussianClusters, init_args: {{classes: 12, exemplars: 2, features: 8}}}}
model:
  transformer: {{width: 8, heads: 2}}
  seed: 3
  learning_rate: 0.01
  steps_per_batch: 10
  log_every: 5
  probe_size: 8
  evaluation_size: 8
  compile: false
trainer:
  max_steps: {STEPS}
  val_check_interval: 3
  enable_progress_bar: false
  callbacks:
    - class_path: opsin.callbacks.Clamp
      init_args: {{heads: ["0:1"], pattern: previous_token, schedule: {{start: 20, stop: 170, period: 30}}}}
    - class_path: opsin.callbacks.InductionHeads
      init_args: {{every: 7}}
    - class_path: opsin.callbacks.PhaseChange
    - class_path: opsin.callbacks.Snapshots
checkpoint_every: 20
"""
WANDB = "    - class_path: opsin.callbacks.WeightsAndBiases\n      init_args: {mode: offline, pictures: 0}\n"
POPULATION = """
population:
  seeds: 2
  processes: 2
  members_per_process: 1
  conditions:
    none: {}
    fast: {learning_rate: 0.02}
"""
BRANCHES = "conditions: {same: {}, slow: {learning_rate: 0.005}}\n"


@dataclass
class Result:
    """What the kills of one kind have done.

    Args:
        kind: what was killed, for people.
        kills: number of SIGKILLs that ended a process before it had come to its end.
        late: number of those that came after the end.
        folders: number of folders that were compared with one that nobody killed.
        rows: number of rows that W&B should have of all folders; 0 where nothing is sent.
        missing: number of those that it lacks; ``metrics.csv`` has them.
        faults: what was found wrong, a line each.
    """

    kind: str
    kills: int = 0
    late: int = 0
    folders: int = 0
    rows: int = 0
    missing: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = (
            f"{self.kills} kills ({self.late} more came after the end), {self.folders} folders, "
            f"{self.missing} of {self.rows} rows of W&B missing, none twice, {len(self.faults)} faults"
        )
        return "\n".join([f"{self.kind:<11} {counts}", *self.faults])


class Campaign:
    """Kills of processes in one folder.

    Args:
        folder: empty folder for all files.
        seed: seed of the moments, to repeat a campaign as far as a machine's speed allows.
        wandb: whether the runs send to W&B, offline.
    """

    def __init__(self, folder: Path, seed: int = 0, wandb: bool = True) -> None:
        self.folder, self.chance, self.wandb = folder, random.Random(seed), wandb
        recipe = RECIPE.replace("checkpoint_every", f"{WANDB}checkpoint_every") if wandb else RECIPE
        (folder / "run.yaml").write_text(recipe)
        (folder / "population.yaml").write_text(recipe + POPULATION)
        (folder / "branches.yaml").write_text(BRANCHES)
        self.temporary = [folder / "tmp"]
        if OTHER_FILE_SYSTEM.is_dir():
            self._elsewhere = tempfile.TemporaryDirectory(dir=OTHER_FILE_SYSTEM)
            self.temporary.append(Path(self._elsewhere.name))
        self.temporary[0].mkdir()

    def runs(self, kills: int) -> Result:
        """Kill single runs, so many times."""
        return self._campaign("runs", kills, "run", lambda name: ["fit", "--config", "run.yaml", *_in(name)], _kill)

    def populations(self, kills: int) -> Result:
        """Kill populations, so many times: the process that watches the chunks, a worker, or both."""
        ways = itertools.cycle([_kill, _kill_worker, _kill_both])
        return self._campaign(
            "populations",
            kills,
            "population",
            lambda name: ["fit", "--config", "population.yaml", *_in(name)],
            lambda process: next(ways)(process),
        )

    def forks(self, kills: int) -> Result:
        """Kill forks, so many times: while they replay, write their folder, or train their branches."""
        if not (self.folder / "trunk").exists():
            opsin("fit", "--config", "run.yaml", *_in("trunk"), folder=self.folder)
        line = ["fork", "trunk", "--at", 150, "--config", "branches.yaml"]
        return self._campaign("forks", kills, "fork", lambda name: [*line, *_in(name)], _kill)

    def _campaign(
        self,
        kind: str,
        kills: int,
        name: str,
        line: Callable[[str], Sequence[object]],
        kill: Callable[[Started], None],
    ) -> Result:
        # the first process starts the one that all are forked from
        opsin("--help", folder=self.folder)
        result, began = Result(kind), time.monotonic()
        opsin(*line(f"{name}-whole"), folder=self.folder)
        seconds = time.monotonic() - began
        for number in itertools.count():
            if result.kills >= kills:
                return result
            killed = f"{name}-{number}"
            environment = {"TMPDIR": str(self.temporary[number % len(self.temporary)])}
            for _ in range(min(PER_FOLDER, kills - result.kills)):
                late = self._one_kill(result, self._line(killed, line), kill, seconds, environment)
                # what is resumed has less to do, and the machine may be busier or less busy by now
                seconds *= 0.7 if late else 1.1
            ended = opsin(*self._line(killed, line), folder=self.folder, check=False, **environment)
            if ended.code:
                result.faults.append(f"{killed}: ended with code {ended.code}: {ended.err.strip()[-300:]}")
            result.folders += 1
            whole = self.folder / f"{name}-whole"
            result.faults += differences(whole, self.folder / killed)
            if self.wandb:
                self._compare_rows(result, whole, self.folder / killed)
        raise AssertionError

    def _compare_rows(self, result: Result, whole: Path, killed: Path) -> None:
        for run in sorted(path.parent for path in whole.rglob("wandb_run.json")):
            other = killed / run.relative_to(whole)
            rows, expected = _rows(other), _rows(run)
            steps, missing = [step for step, _ in rows], dict(expected).keys() - dict(rows)
            result.rows += len(expected)
            result.missing += len(missing)
            if missing:
                result.faults.append(f"{killed.name}: W&B lacks the rows of steps {sorted(missing)} ({other.name})")
            different = [step for step, numbers in rows if numbers != dict(expected).get(step)]
            if different:
                result.faults.append(f"{killed.name}: other numbers in W&B at steps {different} ({other.name})")
            if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
                result.faults.append(f"{killed.name}: a row of W&B was sent twice, or goes back ({other.name})")

    def _line(self, name: str, line: Callable[[str], Sequence[object]]) -> Sequence[object]:
        """The command that begins a folder, or the one that goes on with it."""
        begun = (self.folder / name / "config.yaml").exists()
        return ["resume", name] if begun else line(name)

    def _one_kill(
        self,
        result: Result,
        line: Sequence[object],
        kill: Callable[[Started], None],
        seconds: float,
        environment: dict[str, str],
    ) -> bool:
        """Whether the process had ended before it was killed."""
        process = Started(*line, folder=self.folder, **environment)
        time.sleep(self.chance.uniform(0.05, seconds))
        late = process.poll() is not None
        with suppress(ProcessLookupError):
            kill(process)
        ended = process.wait()
        if late:
            result.late += 1
        else:
            result.kills += 1
        if ended.code not in (0, 1, -signal.SIGKILL):
            result.faults.append(f"{' '.join(map(str, line))}: code {ended.code}: {ended.err.strip()[-300:]}")
        until = time.monotonic() + 60
        while not all_have_ended(self.folder) and time.monotonic() < until:
            time.sleep(0.01)
        if not all_have_ended(self.folder):
            result.faults.append(f"{' '.join(map(str, line))}: left a process behind")
        return late


def _rows(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """Step and numbers of all rows that W&B has of a run, file by file, without the times at which they were sent."""
    rows = [row for path in offline_runs(folder) for row in history(read(path))]
    return [(row["_step"], {name: row[name] for name in row if name not in TIMES}) for row in rows]


def _in(name: str) -> list[str]:
    return ["--run_folder", name]


def _kill(process: Started) -> None:
    process.send_signal(signal.SIGKILL)


def _kill_worker(process: Started) -> None:
    workers = _children(process)
    if workers:
        os.kill(workers[-1], signal.SIGKILL)
    else:
        _kill(process)


def _kill_both(process: Started) -> None:
    workers = _children(process)
    _kill(process)
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def _children(process: Started) -> list[int]:
    pid = process.process.pid
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def differences(whole: Path, killed: Path) -> list[str]:
    """In what a folder that was killed differs from one that was not, a line each.

    Args:
        whole: folder of the run, population or fork that nobody killed.
        killed: folder of the one that was killed and has come to its end.
    """
    found = []
    for path in sorted(whole.rglob("*")):
        name = path.relative_to(whole)
        if path.is_dir() or "wandb" in str(name) or path.suffix == ".png" or name.name in ("log.txt", "config.yaml"):
            continue
        other = killed / name
        if not other.exists():
            found.append(f"{killed.name}: {name} is missing")
        elif path.suffix == ".csv" and path.read_bytes() != other.read_bytes():
            found.append(f"{killed.name}: {name} differs")
        elif path.name == "last.ckpt" or path.suffix == ".pt":
            found += [f"{killed.name}: {name}: {key} differs" for key in _different_tensors(path, other)]
    return found


def _different_tensors(path: Path, other: Path) -> list[str]:
    contents = [torch.load(each, weights_only=True) for each in (path, other)]
    tensors = [content.get("state_dict") or content["parameters"] for content in contents]
    one, two = tensors
    return [name for name in one if name not in two or not torch.equal(one[name], two[name])]
