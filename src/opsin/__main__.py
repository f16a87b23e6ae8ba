"""``opsin`` and ``python -m opsin``."""

from __future__ import annotations

import gc
import os
import sys

LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "JSM_NAMESPACE_RANK"),
)
"""Variables by which launchers number their processes, and which Lightning reads as soon as it is imported."""


def main() -> int:
    """Import the command line, quickly, and run it."""
    _forget_surroundings()
    import logging

    from opsin.launch.signals import end_on_signals

    end_on_signals()
    # the imports make objects that all live to the end; looking for garbage among them is a sixth of the start
    gc.disable()
    # without a home it says at length, while it is imported, that its fonts are looked up anew
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from opsin.cli import main as run

    gc.freeze()
    gc.enable()
    return run()


def _forget_surroundings() -> None:
    """Let neither the working folder nor the launcher of this process decide what is imported, and what it does.

    ``python -m`` puts the working folder before everything else, and a ``copy.py`` in it would be taken for Python's.
    """
    if _is_module_run() and not sys.flags.safe_path and sys.path[:1] == [_working_folder()]:
        del sys.path[0]
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)


def _is_module_run() -> bool:
    """Whether ``python -m`` started this process."""
    return __name__ == "__main__" and bool(__spec__)


def _working_folder() -> str:
    """The working folder; empty where it has been removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
