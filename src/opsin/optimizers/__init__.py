"""Optimizers: one file each. A recipe chooses one as ``model: {optimizer: {class_path: opsin.optimizers.SGD}}``."""

from opsin.optimizers.adam import Adam, AdamW
from opsin.optimizers.base import Optimizer
from opsin.optimizers.muon import Muon
from opsin.optimizers.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Muon", "Optimizer"]
