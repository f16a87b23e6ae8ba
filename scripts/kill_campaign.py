#!/usr/bin/env python3
"""Kills runs, populations and forks at random moments, and compares what they come to with what nobody killed.

./scripts/kill [--runs N] [--populations N] [--forks N] [--seed N] [--no-wandb] [--folder F]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.campaign import Campaign


def main() -> int:
    """Run the campaign, print what it found, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="kills of single runs")
    parser.add_argument("--populations", type=int, default=50, help="kills of populations")
    parser.add_argument("--forks", type=int, default=20, help="kills of forks")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--wandb", action=argparse.BooleanOptionalAction, default=True, help="send to W&B, offline")
    parser.add_argument("--folder", type=Path, help="new folder for the files, which stay; a temporary one by default")
    settings, faults = parser.parse_args(), 0
    for kind in ("runs", "populations", "forks"):
        kills = getattr(settings, kind)
        if kills:
            began = time.monotonic()
            with _folder(settings.folder, kind) as folder:
                result = getattr(Campaign(folder, settings.seed, settings.wandb), kind)(kills)
            print(f"{result}\n{'':<11} {time.monotonic() - began:.0f} s", flush=True)
            faults += len(result.faults)
    return int(faults > 0)


@contextmanager
def _folder(wanted: Path | None, kind: str) -> Iterator[Path]:
    """An empty folder for the kills of one kind: in the one that is wanted, or one that is removed afterwards."""
    if wanted is not None:
        (wanted / kind).mkdir(parents=True)
        yield wanted.absolute() / kind
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


if __name__ == "__main__":
    sys.exit(main())
