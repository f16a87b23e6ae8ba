"""Schedulers and launchers: what they tell a process about others changes nothing here, as a run is one process.

An allocation of four tasks trains four runs, each with its own ``run_folder``; of several tasks that name one folder
the first trains and the others are refused. Lightning's own SLURM machinery (a process group, a checkpoint in the
working folder at SIGUSR1 that every later run begins from) is left out: ``opsin resume`` and ``--continue`` go on with
a run that was ended, wherever its job is started again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only

from opsin.errors import ConfigError

RANK_VARIABLES = (
    *("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    *("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "LSB_DJOB_RANKFILE"),
)
"""Environment variables by which Lightning would take this process for one of several that train together."""


class OneProcess(LightningEnvironment):
    """The cluster environment of a run: one process, whatever started it."""

    @property
    def creates_processes_externally(self) -> bool:
        """Whether something else starts the processes of a run: nothing does."""
        return False

    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return 0

    def node_rank(self) -> int:
        """Number of this machine among those of the run."""
        return 0


def forget_other_processes() -> None:
    """Drop what a launcher says about other processes, and let this one log and save as the only one."""
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    rank_zero_only.rank = 0  # type: ignore[attr-defined]


def one_process(plugins: Any) -> list[Any]:
    """The Trainer's plugins with the cluster environment of one process.

    Args:
        plugins: setting ``trainer.plugins`` of the recipe, one plugin, a list, or None.

    Raises:
        ConfigError: the recipe has a cluster environment of its own.
    """
    found = [] if plugins is None else [*plugins] if isinstance(plugins, Sequence) else [plugins]
    for plugin in found:
        if isinstance(plugin, ClusterEnvironment):
            raise ConfigError("trainer.plugins", type(plugin).__name__, "no cluster environment: a run is one process")
    return [*found, OneProcess()]
