"""Callbacks of a run: writers change what the model computes, readers measure it, W&B receives what they measure."""

from opsin.callbacks.readers.activation_sparsity import ActivationSparsity
from opsin.callbacks.readers.attention_sinks import AttentionSinks
from opsin.callbacks.readers.calibration import Calibration
from opsin.callbacks.readers.clustering_head import ClusteringHead
from opsin.callbacks.readers.confidence_study import ConfidenceStudy
from opsin.callbacks.readers.delay import Delay
from opsin.callbacks.readers.early_stopping import StopWhen
from opsin.callbacks.readers.feature_variance import FeatureVariance
from opsin.callbacks.readers.fourier_structure import FourierStructure
from opsin.callbacks.readers.gradient_norms import GradientNorms
from opsin.callbacks.readers.heads import AnswerHeads, InductionHeads, PreviousTokenHeads
from opsin.callbacks.readers.in_context_algorithm import InContextAlgorithm
from opsin.callbacks.readers.memories import MemoryRecall
from opsin.callbacks.readers.neurons import EntropyNeurons, TokenFrequencyNeurons
from opsin.callbacks.readers.phase_change import PhaseChange
from opsin.callbacks.readers.progress_bar import Progress
from opsin.callbacks.readers.progress_measures import ProgressMeasures
from opsin.callbacks.readers.reference_distance import ReferenceDistance
from opsin.callbacks.readers.run_folder import KeepRun
from opsin.callbacks.readers.snapshots import Snapshots
from opsin.callbacks.readers.sparse_probes import SparseProbes
from opsin.callbacks.readers.weight_norms import WeightNorms
from opsin.callbacks.wandb.callback import WeightsAndBiases
from opsin.callbacks.writers.ablate import Ablate
from opsin.callbacks.writers.clamp import Clamp
from opsin.callbacks.writers.clip import Clip
from opsin.callbacks.writers.copy_from_pattern import CopyFromPattern
from opsin.callbacks.writers.disallow import Disallow
from opsin.callbacks.writers.freeze import Freeze
from opsin.callbacks.writers.graft import Graft
from opsin.callbacks.writers.head_temperature import HeadTemperature
from opsin.callbacks.writers.path_patch import PathPatch
from opsin.callbacks.writers.perfect_previous_input import PerfectPreviousInput
from opsin.callbacks.writers.preserve import Preserve
from opsin.callbacks.writers.project import Project
from opsin.callbacks.writers.reinitialise import Reinitialise
from opsin.callbacks.writers.remove_frequencies import RemoveFrequencies

__all__ = [
    "Ablate",
    "ActivationSparsity",
    "AnswerHeads",
    "AttentionSinks",
    "Calibration",
    "Clamp",
    "Clip",
    "ClusteringHead",
    "ConfidenceStudy",
    "CopyFromPattern",
    "Delay",
    "Disallow",
    "EntropyNeurons",
    "FeatureVariance",
    "FourierStructure",
    "Freeze",
    "GradientNorms",
    "Graft",
    "HeadTemperature",
    "InContextAlgorithm",
    "InductionHeads",
    "KeepRun",
    "MemoryRecall",
    "PathPatch",
    "PerfectPreviousInput",
    "PhaseChange",
    "Preserve",
    "PreviousTokenHeads",
    "Progress",
    "ProgressMeasures",
    "Project",
    "ReferenceDistance",
    "Reinitialise",
    "RemoveFrequencies",
    "Snapshots",
    "SparseProbes",
    "StopWhen",
    "TokenFrequencyNeurons",
    "WeightNorms",
    "WeightsAndBiases",
]
