"""Who may touch or watch a run."""

from opsin.callbacks.grafts import Graft
from opsin.callbacks.optogenetics import Ablate, Clamp, Disallow
from opsin.callbacks.passes import CopyFromPattern, HeadTemperature, PerfectPreviousInput, Preserve
from opsin.callbacks.phase import PhaseChange
from opsin.callbacks.progress import Progress
from opsin.callbacks.run_folder import KeepRun
from opsin.callbacks.snapshots import Snapshots
from opsin.callbacks.trackers import InductionHeads, PreviousTokenHeads
from opsin.callbacks.wandb import WeightsAndBiases

__all__ = [
    "Ablate",
    "Clamp",
    "CopyFromPattern",
    "Disallow",
    "Graft",
    "HeadTemperature",
    "InductionHeads",
    "KeepRun",
    "PerfectPreviousInput",
    "PhaseChange",
    "Preserve",
    "PreviousTokenHeads",
    "Progress",
    "Snapshots",
    "WeightsAndBiases",
]
