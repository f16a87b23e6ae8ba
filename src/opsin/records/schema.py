"""The words that a run writes: columns of metrics.csv, names of metrics, ways a member ends."""

from __future__ import annotations

EARLY, DIVERGED = "finished early", "diverged"
"""How members end that learn no more."""

BASE_LINE = "none"
"""Name of the set without interventions."""

COLUMNS = ("step", "sequences", "metric", "member", "layer", "head", "value")
ROW_AXES = ("member", "layer", "head")

STEP_METRICS = ("train/loss", "train/accuracy", "train/grad_norm")


def number_name(metric: str, index: tuple[int, ...]) -> str:
    """Name under which loggers receive one number: ``METRIC``, and ``METRIC/LAYER:HEAD`` of a head.

    Args:
        metric: name of the metric, as in ``metrics.csv``.
        index: layer and head of the number; empty for a metric with one number a member.
    """
    return f"{metric}/{':'.join(map(str, index))}" if index else metric
