"""Every test runs with the shapes in the package's signatures checked."""

import functools
import gc
import logging
import os
import signal
import sys
import warnings

import hypothesis
import pytest

from tests.helpers import shapes
from tests.helpers.paths import ROOT
from tests.helpers.processes import Ended

assert "opsin" not in sys.modules, "shapes can only be checked if the hook comes before the package"
shapes.install("opsin")

hypothesis.settings.register_profile("opsin", deadline=None)
hypothesis.settings.load_profile("opsin")


LONG = {"docs", "launch", "recipes", "training", "wandb"}
"""Folders whose files take longest: begun first, or else one core waits for the other at the end."""


def pytest_collection_modifyitems(items) -> None:
    """Import Lightning before any test, since its log goes for good to what stderr is then; put long files first."""
    import lightning.pytorch  # noqa: F401

    items.sort(key=lambda item: LONG.isdisjoint(item.path.relative_to(ROOT).parts))
    # nothing of the libraries is ever garbage, and looking through it again and again takes long
    gc.collect()
    gc.freeze()


@pytest.fixture
def opsin(tmp_path, monkeypatch, capsys):
    """The command line in an empty folder: its arguments -> exit code, what it printed, and on stderr with warnings."""
    import torch

    from opsin.cli import main
    from opsin.errors import log

    monkeypatch.chdir(tmp_path)
    loggers = [logging.getLogger("lightning.pytorch"), log]
    levels, threads, interrupt = [logger.level for logger in loggers], torch.get_num_threads(), signal.getsignal(2)

    def run(*arguments):
        with warnings.catch_warnings(record=True) as warned:
            # what a user would see, and not what pytest's own filters hide
            warnings.simplefilter("default")
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as stopped:
                code = stopped.code
        out, err = capsys.readouterr()
        return Ended(code, out, err + "".join(f"{each.message}\n" for each in warned))

    yield run
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, interrupt)


@pytest.fixture
def srun(tmp_path_factory, monkeypatch):
    """Put an executable named like SLURM's first on the path, and hand out its name."""
    stand_in = tmp_path_factory.mktemp("slurm") / "srun"
    stand_in.write_text("#!/bin/sh\nexit 1\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}")
    return stand_in.name


@pytest.fixture(params=["traced", pytest.param("compiled", marks=pytest.mark.slow)])
def graphs(request, monkeypatch):
    """Counts the graphs of runs with ``compile=True``: run as traced, and compiled to code among the slow tests."""
    import torch

    if request.param == "traced":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def tiny_task():
    """A few-shot task small enough for loops in Python."""
    from tests.helpers.toys import few_shot

    return few_shot()
