"""Optogenetics for training dynamics: clamp activations of small transformers while they learn.

The names below are imported when they are first used, so that ``import opsin`` is quick; tasks are in ``opsin.tasks``
and callbacks in ``opsin.callbacks``. Deeper paths may move from one version to the next.
"""

from __future__ import annotations

import importlib

# not from typing: `python -m opsin` comes by here while the working folder, which may hold a typing.py, is searched
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from opsin.batch import Batch, Layout, Truth
    from opsin.callbacks.readers.base import ProbeReader, Reader
    from opsin.callbacks.writers.base import ActivationWriter
    from opsin.errors import ConfigError
    from opsin.interventions.intervention import Intervention, Overwrite, Value
    from opsin.interventions.schedules import Schedule
    from opsin.interventions.selection import Selection
    from opsin.model.associative_memory import AssociativeMemory
    from opsin.model.birth import BirthTransformer
    from opsin.model.clustering import ClusteringTransformer
    from opsin.model.context_or_weights import ReddyNetwork
    from opsin.model.mlp import MLP
    from opsin.model.parameters import Initial, Parameter, ParameterTable
    from opsin.model.protocol import Model
    from opsin.model.sites import SiteTable, site_table
    from opsin.model.transformer import Transformer
    from opsin.objective import BinaryCrossEntropy, CrossEntropy, LogCrossEntropy, Measure, Objective, SquaredError
    from opsin.optimizers.base import Optimizer
    from opsin.records.axes import Axes
    from opsin.records.history import History
    from opsin.task import Reference, Task
    from opsin.tasks.shared.next_token import NextToken
    from opsin.training.module import OpsinModule
    from opsin.training.observers import Observation

LAZY_NAMES = {
    "ActivationWriter": "opsin.callbacks.writers.base",
    "AssociativeMemory": "opsin.model.associative_memory",
    "Axes": "opsin.records.axes",
    "Batch": "opsin.batch",
    "BinaryCrossEntropy": "opsin.objective",
    "BirthTransformer": "opsin.model.birth",
    "ClusteringTransformer": "opsin.model.clustering",
    "ConfigError": "opsin.errors",
    "CrossEntropy": "opsin.objective",
    "History": "opsin.records.history",
    "Initial": "opsin.model.parameters",
    "Intervention": "opsin.interventions.intervention",
    "Layout": "opsin.batch",
    "LogCrossEntropy": "opsin.objective",
    "MLP": "opsin.model.mlp",
    "Measure": "opsin.objective",
    "Model": "opsin.model.protocol",
    "NextToken": "opsin.tasks.shared.next_token",
    "Objective": "opsin.objective",
    "Observation": "opsin.training.observers",
    "OpsinModule": "opsin.training.module",
    "Optimizer": "opsin.optimizers.base",
    "Overwrite": "opsin.interventions.intervention",
    "Parameter": "opsin.model.parameters",
    "ParameterTable": "opsin.model.parameters",
    "ProbeReader": "opsin.callbacks.readers.base",
    "Reader": "opsin.callbacks.readers.base",
    "ReddyNetwork": "opsin.model.context_or_weights",
    "Reference": "opsin.task",
    "Schedule": "opsin.interventions.schedules",
    "Selection": "opsin.interventions.selection",
    "SiteTable": "opsin.model.sites",
    "SquaredError": "opsin.objective",
    "Task": "opsin.task",
    "Transformer": "opsin.model.transformer",
    "Truth": "opsin.batch",
    "Value": "opsin.interventions.intervention",
    "site_table": "opsin.model.sites",
}
"""Where every name of ``from opsin import NAME`` is defined."""

__all__ = [
    "MLP",
    "ActivationWriter",
    "AssociativeMemory",
    "Axes",
    "Batch",
    "BinaryCrossEntropy",
    "BirthTransformer",
    "ClusteringTransformer",
    "ConfigError",
    "CrossEntropy",
    "History",
    "Initial",
    "Intervention",
    "Layout",
    "LogCrossEntropy",
    "Measure",
    "Model",
    "NextToken",
    "Objective",
    "Observation",
    "OpsinModule",
    "Optimizer",
    "Overwrite",
    "Parameter",
    "ParameterTable",
    "ProbeReader",
    "Reader",
    "ReddyNetwork",
    "Reference",
    "Schedule",
    "Selection",
    "SiteTable",
    "SquaredError",
    "Task",
    "Transformer",
    "Truth",
    "Value",
    "site_table",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from opsin.records.version import installed_version

        return installed_version()
    if name not in LAZY_NAMES:
        raise AttributeError(f"module 'opsin' has no attribute {name!r}")
    return getattr(importlib.import_module(LAZY_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
