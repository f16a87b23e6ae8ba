"""Who may touch or watch a run."""

from opsin.callbacks.activity import ActivationSparsity, AttentionSinks
from opsin.callbacks.calibration import Calibration
from opsin.callbacks.confidence import ConfidenceStudy
from opsin.callbacks.grafts import Graft
from opsin.callbacks.measures import ProgressMeasures
from opsin.callbacks.neurons import EntropyNeurons, TokenFrequencyNeurons
from opsin.callbacks.optogenetics import Ablate, Clamp, Clip, Disallow
from opsin.callbacks.passes import CopyFromPattern, HeadTemperature, PerfectPreviousInput, Preserve
from opsin.callbacks.paths import PathPatch
from opsin.callbacks.phase import PhaseChange
from opsin.callbacks.progress import Progress
from opsin.callbacks.run_folder import KeepRun
from opsin.callbacks.snapshots import Snapshots
from opsin.callbacks.stopping import StopWhen
from opsin.callbacks.subspaces import Project
from opsin.callbacks.trackers import InductionHeads, PreviousTokenHeads
from opsin.callbacks.wandb import WeightsAndBiases
from opsin.callbacks.weights import Freeze, Reinitialise

__all__ = [
    "Ablate",
    "ActivationSparsity",
    "AttentionSinks",
    "Calibration",
    "Clamp",
    "Clip",
    "ConfidenceStudy",
    "CopyFromPattern",
    "Disallow",
    "EntropyNeurons",
    "Freeze",
    "Graft",
    "HeadTemperature",
    "InductionHeads",
    "KeepRun",
    "PathPatch",
    "PerfectPreviousInput",
    "PhaseChange",
    "Preserve",
    "PreviousTokenHeads",
    "Progress",
    "ProgressMeasures",
    "Project",
    "Reinitialise",
    "Snapshots",
    "StopWhen",
    "TokenFrequencyNeurons",
    "WeightsAndBiases",
]
