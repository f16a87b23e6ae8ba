"""Populations in member-steps per second: workers that train when they are told to, and how many of them.

Every loop is a process of its own that waits without work until its turn comes, so that all of them take turns in one
run and several processes are measured as they are used: at once.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from opsin.interventions.apply import constants_of
from opsin.interventions.build_plan import build_plan
from opsin.model.parameters import Members
from opsin.model.protocol import init_parameters
from opsin.model.transformer import Transformer
from opsin.optimizers import AdamW
from opsin.tasks import FewShot
from opsin.training.optimizers import member_optimizer
from opsin.training.step import Step
from opsin.training.step_inputs import StepCounts, StepGates

SIZES = {"cpu": (1, 4, 16, 64), "cuda": (1, 16, 64, 256, 1024)}
"""Members of one process, by device."""

SPLIT = 16
"""Members that are trained in one, two and four processes on the CPU."""

MATMUL = {"cpu": 1024, "cuda": 8192}
"""Rows of a matrix that keeps the device busy."""

TURN_SECONDS = 1.0


@dataclass(frozen=True)
class Processes:
    """Some processes that train at once.

    Args:
        processes: number of processes that train at once.
        members: members of every process; 0 for the plain eager PyTorch loop.
        threads: number of threads of every process.
    """

    processes: int
    members: int
    threads: int

    @property
    def name(self) -> str:
        """As in the figures."""
        if not self.members:
            return f"eager_{self.threads}_thread{'s' * (self.threads > 1)}"
        return f"{self.processes}x{self.members}_members_{self.threads}_thread{'s' * (self.threads > 1)}"


def compared_processes(device: str) -> list[Processes]:
    """The eager loops, one process of every size, and on the CPU the ways to train ``SPLIT`` members."""
    eager = [Processes(1, 0, 1), Processes(1, 0, 2)]
    single = [Processes(1, members, 1) for members in SIZES[device]]
    if device == "cuda":
        return [*eager, *single]
    split = [Processes(1, SPLIT, 2), Processes(2, SPLIT // 2, 1), Processes(4, SPLIT // 4, 1)]
    return [*eager, *single, *split, Processes(2, 64, 1)]


@dataclass
class Worker:
    """One process that trains when it is told to."""

    members: int
    threads: int
    device: str
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        command = [sys.executable, __file__, str(self.members), str(self.threads), self.device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, steps: int) -> None:
        """Train so many steps; 0 ends it."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, float]:
        """What it says once it has."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


def turn(workers: Sequence[Worker], steps: int) -> float:
    """Seconds in which all of them train so many steps at once."""
    began = time.perf_counter()
    for worker in workers:
        worker.tell(steps)
    for worker in workers:
        worker.hear()
    return time.perf_counter() - began


def matmul_rate(threads: int, device: str) -> float:
    """Floating-point operations per second of a float32 matrix product, there where the members train."""
    torch.set_num_threads(threads)
    size = MATMUL[device]
    a, b = torch.randn(2, size, size, device=device)
    # the first starts the library
    _wait_for(a @ b)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < TURN_SECONDS / 2:
        _wait_for(a @ b)
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - began)


def _wait_for(product: torch.Tensor) -> None:
    if product.is_cuda:
        torch.cuda.synchronize()


def operations(model: Transformer, task: FewShot) -> int:
    """Floating-point operations of one member's step: its matrix products, forward and backward, as they are run."""
    values = Members(init_parameters(model, task, [0]))
    optimizer = member_optimizer(values.named_parameters(), AdamW())
    plan = build_plan([], model.sites(task), 1, 1, task.batch_size)
    constants = constants_of(plan, task.bank(), model.position_table(task.layout.positions), 1, torch.float32)
    draw = {name: tensor[0] for name, tensor in task.draw([0], 0, 1).items()}
    empty = torch.zeros(0, 1)
    gates = StepGates(empty, torch.zeros(1, 2, dtype=torch.int64))
    counts = StepCounts(empty.long(), torch.ones(1, dtype=torch.bool))
    step = Step(model, task, plan, optimizer.rule)
    with FlopCounterMode(display=False) as counter:
        step(optimizer.members_state(), optimizer.hyper(), constants, draw, gates, counts)
    return counter.get_total_flops()


def measure_population(rounds: int, model: Transformer, task: FewShot) -> dict[str, object]:
    """Member-steps per second of all compared processes, interleaved, their ratios, memory and share of the machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = {processes.name: processes for processes in compared_processes(device)}
    workers: dict[str, list[Worker]] = {}
    for name, kind in kinds.items():
        workers[name] = [Worker(kind.members, kind.threads, device) for _ in range(kind.processes)]
        # one after the other, so that no more than one kind compiles at a time
        for worker in workers[name]:
            worker.hear()
    steps = {name: _steps(turn(worker, 100), 100) for name, worker in workers.items()}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    peak: list[float] = []
    for _ in range(rounds):
        for name, worker in workers.items():
            seconds = turn(worker, steps[name])
            rates[name].append(kinds[name].processes * max(kinds[name].members, 1) * steps[name] / seconds)
        peak.append(matmul_rate(2, device))
    memory = {name: _end(worker) for name, worker in workers.items()}
    return _summary(rates, kinds, device, peak, memory, operations(model, task))


def _steps(seconds: float, steps: int) -> int:
    """Steps of a turn of about ``TURN_SECONDS``, in whole Lightning batches."""
    return max(50, round(steps * TURN_SECONDS / seconds / 50) * 50)


def _end(workers: Sequence[Worker]) -> float:
    """End some workers; the first one's memory in bytes, at its peak while it trained."""
    peaks = []
    for worker in workers:
        worker.tell(0)
        peaks.append(worker.hear()["bytes"])
        worker.process.wait()
    return peaks[0]


def _summary(
    rates: Mapping[str, Sequence[float]],
    kinds: Mapping[str, Processes],
    device: str,
    peak: Sequence[float],
    memory: Mapping[str, float],
    operations: int,
) -> dict[str, object]:
    def ratio(name: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[name], rates[base], strict=True))

    speeds = {name: statistics.median(values) for name, values in rates.items()}
    alone = {kind.members: name for name, kind in kinds.items() if kind.processes == kind.threads == 1 and kind.members}
    first, largest = alone[1], alone[max(alone)]
    opsin_names = [name for name in kinds if kinds[name].members]
    best = max(opsin_names, key=speeds.__getitem__)
    found: dict[str, object] = {f"member_steps_per_second_{name}": speed for name, speed in speeds.items()}
    found |= {f"ratio_{name}_to_eager_2_threads": ratio(name, "eager_2_threads") for name in opsin_names}
    found |= {f"ratio_{name}_to_{first}": ratio(name, first) for name in alone.values() if name != first}
    found["device"], found["best"] = device, best
    found["operations_per_member_step"] = operations
    found["matmul_rate"] = statistics.median(peak)
    found["share_of_matmul_rate"] = operations * speeds[best] / statistics.median(peak)
    extra = (memory[largest] - memory[first]) / (kinds[largest].members - 1)
    found["bytes_per_extra_member"], found["rounds"] = extra, len(peak)
    return found


# ---- the worker -----------------------------------------------------------------------------------


def _serve(members: int, threads: int, device: str) -> None:
    from bench_loops import REFERENCE, EagerLoop, OpsinLoop

    loop = EagerLoop(FewShot(), threads) if not members else OpsinLoop(FewShot(), [], 10**9, members, threads, device)
    loop.turn(50)
    print(json.dumps({"ready": REFERENCE.layers}), flush=True)
    for line in sys.stdin:
        if not int(line):
            break
        loop.turn(int(line))
        print(json.dumps({"done": int(line)}), flush=True)
    # Linux counts in KiB
    print(json.dumps({"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
