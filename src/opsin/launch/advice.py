"""What the libraries advise and a command of Opsin does not print."""

from __future__ import annotations

import logging
import warnings

from opsin.errors import log


def hide_advice() -> None:
    """Hide the libraries' advice that does not apply to models of this size; what Opsin says stays."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*ModelCheckpoint with manual optimization.*")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    # steps end a run here, and a run without a number of steps is refused
    warnings.filterwarnings("ignore", message=".*`max_epochs` was not set.*")
    # of a machine where SLURM is installed; a run is one process, with or without it
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # whoever asks for a profiler wants its report
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)
    log.setLevel(logging.INFO)
