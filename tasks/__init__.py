"""What is learned: one file per task."""

from opsin.tasks.exemplars import ArrayFile, Exemplars, GaussianClusters, Omniglot
from opsin.tasks.fewshot import FewShot, Kind

__all__ = ["ArrayFile", "Exemplars", "FewShot", "GaussianClusters", "Kind", "Omniglot"]
