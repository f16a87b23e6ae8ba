"""What training does with a task's objective: the rows that are scored, the names of what is recorded, and a check.

Legend: M members, B batch, L positions, Q scored positions, V outputs.
"""

from __future__ import annotations

import re

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.objective import Measure
from opsin.records.schema import GRADIENT_NORM, TRAIN_LOSS
from opsin.task import Batch, Task

NAME = re.compile(r"[\w-]+")
"""What names of measures and references are made of."""

LEAST_SEQUENCES = 2
"""Sequences on which an objective is tried before a run."""


def scored_logits(logits: Float[Tensor, "M B L V"], batch: Batch) -> Float[Tensor, "M B Q V"]:
    """Outputs at the positions that enter the loss; a pass that computed these alone has them already."""
    if logits.shape[2] < batch.layout.positions:
        return logits
    return logits[:, :, list(batch.layout.scored)]


def step_metrics(task: Task) -> tuple[str, ...]:
    """Metrics that every run records of its training steps: the loss, the objective's measures, the gradient norm."""
    measures = task.objective.measures_of(task.batch(0, 0, "train", 1), while_training=True)
    return (TRAIN_LOSS, *(f"train/{measure.name}" for measure in measures), GRADIENT_NORM)


def evaluation_metrics(task: Task, name: str) -> tuple[str, ...]:
    """Metrics that a validation records of one of the task's evaluation sets.

    Args:
        task: task with its objective.
        name: evaluation set of the task; its first sequence says which measures it has.
    """
    measures = task.objective.measures_of(task.batch(0, 0, f"eval/{name}", 1))
    return (f"val/{name}/loss", *(f"val/{name}/{measure.name}" for measure in measures))


def check_objective(task: Task) -> None:
    """Try a task's objective on a few sequences, so that what could not be trained is refused before it is.

    Args:
        task: task with its objective and references.

    Raises:
        ConfigError: losses, measures or weights that are not what they must be, or a name that no metric can have.
    """
    objective, batch = task.objective, task.batch(0, 0, "train", LEAST_SEQUENCES)
    title, shape = type(objective).__name__, (1, LEAST_SEQUENCES, len(task.layout.scored))
    _check_weights(f"{type(task).__name__}.weights", batch, shape)
    outputs = torch.zeros(*shape, task.n_outputs, requires_grad=True)
    try:
        losses = objective.loss(outputs, batch)
    except (RuntimeError, IndexError, TypeError) as error:
        shown = f"targets {list(batch.targets.shape)} and outputs {list(outputs.shape)}"
        problem = str(error).splitlines()[0]
        raise ConfigError(f"{title}.loss", shown, f"shapes and types that it can take ({problem})") from error
    if losses.shape != shape:
        expected = f"{list(shape)}, one loss for every member, sequence and scored position"
        raise ConfigError(f"{title}.loss", f"losses of shape {list(losses.shape)}", expected)
    if not losses.requires_grad:
        raise ConfigError(f"{title}.loss", "losses without gradient", "a loss that depends on the outputs")
    for measure in objective.measures_of(batch):
        _check_measure(title, measure, outputs, batch)
    for name in task.references():
        if not NAME.fullmatch(name):
            raise ConfigError(f"{type(task).__name__}.references", name, "names of letters, digits, '_' and '-'")


def _check_weights(field: str, batch: Batch, shape: tuple[int, ...]) -> None:
    if (weights := batch.weights) is None:
        return
    if weights.shape != shape:
        expected = f"{list(shape)}, one for every member, sequence and scored position"
        raise ConfigError(field, f"shape {list(weights.shape)}", expected)
    if not (weights.isfinite() & (weights >= 0)).all():
        raise ConfigError(field, float(weights.min()), "finite weights of 0 or more")


def _check_measure(title: str, measure: Measure, outputs: Float[Tensor, "M B Q V"], batch: Batch) -> None:
    if not NAME.fullmatch(measure.name) or measure.name in ("loss", "grad_norm"):
        raise ConfigError(f"{title}.measures", measure.name, "names of letters, digits, '_' and '-' other than loss")
    found = measure.of(outputs, batch).shape
    if found not in ((1,), outputs.shape[:-1]):
        expected = "one number for every member, or one for every scored entry, [M, B, Q]"
        raise ConfigError(f"{title}.measures.{measure.name}", f"shape {list(found)}", expected)
