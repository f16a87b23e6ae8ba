"""What is learned: one file per task."""

from opsin.tasks.bigrams import TriggerBigrams
from opsin.tasks.exemplars import ArrayFile, Exemplars, GaussianClusters, Omniglot
from opsin.tasks.fewshot import FewShot, Kind
from opsin.tasks.repeats import Repeats
from opsin.tasks.text import Characters

__all__ = [
    "ArrayFile",
    "Characters",
    "Exemplars",
    "FewShot",
    "GaussianClusters",
    "Kind",
    "Omniglot",
    "Repeats",
    "TriggerBigrams",
]
