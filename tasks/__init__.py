"""What is learned: one file per task."""

from opsin.tasks.associations import Associations
from opsin.tasks.characters import Characters
from opsin.tasks.fewshot import FewShot, Kind
from opsin.tasks.repeats import Repeats
from opsin.tasks.shared.exemplars import ArrayFile, Exemplars, GaussianClusters, Omniglot
from opsin.tasks.trigger_bigrams import TriggerBigrams

__all__ = [
    "ArrayFile",
    "Associations",
    "Characters",
    "Exemplars",
    "FewShot",
    "GaussianClusters",
    "Kind",
    "Omniglot",
    "Repeats",
    "TriggerBigrams",
]
