"""``opsin`` and ``python -m opsin``."""

from __future__ import annotations

import gc
import sys

from opsin.launch.signals import end_on_signals


def main() -> int:
    """Import the command line, quickly, and run it."""
    end_on_signals()
    # the imports make objects that all live to the end; looking for garbage among them is a sixth of the start
    gc.disable()
    from opsin.cli import main as run

    gc.freeze()
    gc.enable()
    return run()


if __name__ == "__main__":
    sys.exit(main())
