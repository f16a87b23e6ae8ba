"""Whether the step is compiled, and how: one graph of the whole step, kept between starts."""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from opsin.errors import log
from opsin.training.step import Step

COMPILE_FROM_STEPS = 5_000
"""Runs of at least this many optimizer steps repay the compiler's half minute."""


@functools.cache
def has_compiler() -> bool:
    """Whether a C++ compiler, which torch.compile needs on the CPU, is on the path."""
    return any(shutil.which(name) for name in ("g++", "clang++"))


def compile_step(step: Step) -> Callable[..., Tensor]:
    """The same step as one compiled graph; shapes are fixed, values are inputs."""
    # without this the gradient inside the step would break the graph
    torch._dynamo.config.trace_autograd_ops = True
    # every run of a process has a graph of its own, and the compiler counts them as one function's
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    return torch.compile(step.__call__, fullgraph=True, dynamic=False)


def keep_compiled(folder: Path) -> None:
    """Keep compiled kernels in ``folder``, so that the next start of the same recipe finds them.

    A folder the user has chosen through ``TORCHINDUCTOR_CACHE_DIR`` is left alone.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # the compiler, once imported, has put its own default there
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", "") in ("", default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def timed_first(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same step; says how long its first call took, which is where it is compiled."""
    waiting = True

    def timed(*arguments: Any) -> Tensor:
        nonlocal waiting
        if not waiting:
            return step(*arguments)
        waiting, began = False, time.monotonic()
        result = step(*arguments)
        log.info(f"opsin: compiled in {time.monotonic() - began:.1f} s")
        return result

    return timed


def choose_step(step: Step, setting: Literal["auto"] | bool, steps: int) -> Callable[..., Tensor]:
    """The step, compiled where that is asked for or, with ``auto``, where the run is long enough; says which."""
    wanted = steps >= COMPILE_FROM_STEPS if setting == "auto" else setting
    if not (wanted and has_compiler()):
        reason = "no C++ compiler on the path" if wanted else f"{steps:,} steps do not repay compiling"
        log.info(f"opsin: the step runs eagerly ({reason if setting == 'auto' else 'as set'})")
        return step
    reason = f"{steps:,} steps repay it" if setting == "auto" else "as set"
    log.info(f"opsin: compiling the step ({reason}); up to a minute the first time, seconds after that")
    keep_compiled(Path.home() / ".cache" / "opsin" / "kernels")
    return timed_first(compile_step(step))
