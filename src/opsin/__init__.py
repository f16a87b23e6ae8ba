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

    from opsin.errors import ConfigError
    from opsin.interventions.schedules import Schedule
    from opsin.model.transformer import Transformer
    from opsin.task import Batch, Layout, Task, Truth
    from opsin.training.module import OpsinModule

LAZY_NAMES = {
    "Batch": "opsin.task",
    "ConfigError": "opsin.errors",
    "Layout": "opsin.task",
    "OpsinModule": "opsin.training.module",
    "Schedule": "opsin.interventions.schedules",
    "Task": "opsin.task",
    "Transformer": "opsin.model.transformer",
    "Truth": "opsin.task",
}
"""Where every name of ``from opsin import NAME`` is defined."""

__all__ = ["Batch", "ConfigError", "Layout", "OpsinModule", "Schedule", "Task", "Transformer", "Truth"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from opsin.records.version import installed_version

        return installed_version()
    if name not in LAZY_NAMES:
        raise AttributeError(f"module 'opsin' has no attribute {name!r}")
    return getattr(importlib.import_module(LAZY_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
