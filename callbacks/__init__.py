"""Who may touch or watch a run."""

from opsin.callbacks.optogenetics import Ablate, Clamp
from opsin.callbacks.progress import Progress
from opsin.callbacks.run_folder import KeepRun
from opsin.callbacks.trackers import InductionHeads, PreviousTokenHeads

__all__ = ["Ablate", "Clamp", "InductionHeads", "KeepRun", "PreviousTokenHeads", "Progress"]
