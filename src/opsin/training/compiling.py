"""Whether the step is compiled, and how: one graph of the whole step, kept between starts."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from opsin.errors import ConfigError, log
from opsin.training.step import Step

COMPILE_FROM_STEPS = 5_000
"""Runs of at least this many optimizer steps repay the compiler's half minute."""

LONGEST_FAILURE = 160
"""Characters of what a compiler prints that a message shows."""


TRIAL_SOURCE = "#include <cmath>\n#include <omp.h>\n#include <Python.h>\nint main() { return 0; }\n"
"""What every compiled step includes; a compiler without these headers is of no use."""


@functools.cache
def compiler_problem() -> str | None:
    """Why torch.compile's C++ compiler cannot be used here, in one line; None where it compiles a small file."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions

    try:
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "trial.cpp"
            source.write_text(TRIAL_SOURCE)
            CppBuilder("trial", [str(source)], CppTorchOptions(), scratch).build()
    except Exception as error:
        return failure_line(error)
    return None


def has_compiler() -> bool:
    """Whether a C++ compiler that works, which torch.compile needs, is on the path."""
    return compiler_problem() is None


def failure_line(error: BaseException) -> str:
    """What stopped a compiler, in one line without its command."""
    cause = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(getattr(cause, "output", cause)).splitlines() if line.strip()]
    # a compiler prints the command, the places and the error, some of them many times
    found = next((line for line in lines if "error" in line.lower()), lines[0] if lines else type(cause).__name__)
    return found[:LONGEST_FAILURE]


def compile_step(step: Step) -> Callable[..., Tensor]:
    """The same step as one compiled graph; shapes are fixed, values are inputs."""
    # without this the gradient inside the step would break the graph
    torch._dynamo.config.trace_autograd_ops = True
    # every run of a process has a graph of its own, and the compiler counts them as one function's
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    return torch.compile(step.__call__, fullgraph=True, dynamic=False)


def keep_compiled(folder: Path | None) -> None:
    """Keep compiled kernels in ``folder``, so that the next start of the same recipe finds them.

    A folder the user has chosen through ``TORCHINDUCTOR_CACHE_DIR`` is left alone.

    Args:
        folder: folder of the kernels; None for the temporary one that the compiler chooses.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # the compiler, once imported, has put its own default there
    if folder is not None and os.environ.get("TORCHINDUCTOR_CACHE_DIR", "") in ("", default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def kernels_folder() -> Path | None:
    """Where kernels are kept between starts, made; None where there is no home, or none that can be written."""
    try:
        folder = Path.home() / ".cache" / "opsin" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):
        return None


class CompiledStep:
    """The same step as one compiled graph; says how long its first call took, which is where it is compiled.

    Args:
        step: the step that is compiled.
        or_eagerly: whether it runs eagerly where the compiler fails; else that ends the run.
    """

    def __init__(self, step: Step, or_eagerly: bool) -> None:
        self.step, self.or_eagerly = step, or_eagerly
        self._run: Callable[..., Tensor] = compile_step(step)
        self._waiting = True

    def __call__(self, *arguments: Any) -> Tensor:
        """One step of the same arguments; it has changed nothing where the compiler fails."""
        began = time.monotonic()
        try:
            result = self._run(*arguments)
        except (torch._dynamo.exc.TorchDynamoException, OSError, ImportError) as error:
            if not self.or_eagerly:
                expected = f"false, or a compiler that works ({failure_line(error)})"
                raise ConfigError("model.compile", True, expected) from error
            log.info(f"opsin: the step runs eagerly from here on (the compiler failed: {failure_line(error)})")
            self._run, self._waiting = self.step, False
            return self.step(*arguments)
        if self._waiting:
            self._waiting = False
            log.info(f"opsin: compiled in {time.monotonic() - began:.1f} s")
        return result


def choose_step(step: Step, setting: Literal["auto"] | bool, steps: int) -> Callable[..., Tensor]:
    """The step, compiled where that is asked for or, with ``auto``, where the run is long enough; says which."""
    wanted = steps >= COMPILE_FROM_STEPS if setting == "auto" else setting
    problem = compiler_problem() if wanted else None
    if not wanted or problem is not None:
        reason = f"the C++ compiler does not work: {problem}" if wanted else f"{steps:,} steps do not repay compiling"
        log.info(f"opsin: the step runs eagerly ({reason if setting == 'auto' else 'as set'})")
        return step
    reason = f"{steps:,} steps repay it" if setting == "auto" else "as set"
    log.info(f"opsin: compiling the step ({reason}); up to a minute the first time, seconds after that")
    keep_compiled(kernels_folder())
    return CompiledStep(step, or_eagerly=setting == "auto")
