"""What the Trainer counts of Lightning batches, and what it counted before the batch that is running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _StartedTracker


def validation_follows(trainer: Trainer) -> bool:
    """Whether the Trainer validates after the batch that just ended."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


@contextmanager
def as_before_batch(trainer: Trainer) -> Iterator[None]:
    """Show the running batch as one that has not begun, to a checkpoint that is saved within it.

    A resume then begins the batch again, of which the module makes the steps that remain.
    """
    loop = trainer.fit_loop.epoch_loop
    progress, stepped = loop.batch_progress, loop._batches_that_stepped
    last, counts = progress.is_last_batch, (progress.total, progress.current)
    for count in counts:
        assert isinstance(count, _StartedTracker)
        count.ready -= 1
        count.started -= 1
    progress.is_last_batch = False
    # on resuming, the Trainer skips the validation that was due before this batch, and counts a batch for it
    loop._batches_that_stepped -= validation_follows(trainer)
    try:
        yield
    finally:
        for count in counts:
            assert isinstance(count, _StartedTracker)
            count.ready += 1
            count.started += 1
        progress.is_last_batch, loop._batches_that_stepped = last, stepped
