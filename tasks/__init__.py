"""What is learned: one file per task."""

from opsin.tasks.associations import Associations
from opsin.tasks.binary_features import BinaryFeatures
from opsin.tasks.characters import Characters
from opsin.tasks.context_or_weights import ContextOrWeights
from opsin.tasks.fewshot import FewShot, Kind
from opsin.tasks.linear_regression import LinearRegression
from opsin.tasks.modular_arithmetic import ModularArithmetic, PermutationTable
from opsin.tasks.repeats import Repeats
from opsin.tasks.shared.exemplars import ArrayFile, Exemplars, GaussianClusters, Omniglot
from opsin.tasks.sparse_modular_addition import SparseModularAddition
from opsin.tasks.trigger_bigrams import TriggerBigrams

__all__ = [
    "ArrayFile",
    "Associations",
    "BinaryFeatures",
    "Characters",
    "ContextOrWeights",
    "Exemplars",
    "FewShot",
    "GaussianClusters",
    "Kind",
    "LinearRegression",
    "ModularArithmetic",
    "Omniglot",
    "PermutationTable",
    "Repeats",
    "SparseModularAddition",
    "TriggerBigrams",
]
