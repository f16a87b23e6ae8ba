"""The words that a run writes: names of its files, columns of metrics.csv, names of metrics, ways a member ends.

Whoever writes or reads a run folder or the folder of a population takes these words from here. The file imports
nothing, so that every wing may import it.
"""

from __future__ import annotations

# ---- files of a run folder ------------------------------------------------------------------------

CONFIG_FILE = "config.yaml"
"""The resolved configuration of a run, or of a population."""

METRICS_FILE = "metrics.csv"
"""One row a number, with ``METRICS_COLUMNS``."""

EVENTS_FILE = "events.csv"
"""One row an event, with ``EVENTS_COLUMNS``; absent until the first."""

EVENTS_COLUMNS = ("step", "member", "kind", "message")
"""The header of ``events.csv``."""

SUMMARY_FILE = "summary.json"
"""What a run or a population found; written at its end."""

SUMMARY_PICTURE = "summary.png"
"""The picture of one run; drawn at its end."""

LAST_CHECKPOINT = "checkpoints/last.ckpt"
"""What a resume continues from."""

PREVIOUS_CHECKPOINT = "checkpoints/previous.ckpt"
"""The one before it, in case that the last is damaged."""

SPARE_ROOM = "checkpoints/spare"
"""A file of ``SPARE_BYTES`` that holds nothing: room for the last words of a run whose disk is full."""

SPARE_BYTES = 1 << 20
"""Bytes that an unfinished run keeps free for itself."""

LOG_FILE = "log.txt"
"""What the process of a chunk printed."""

CLAIM_FILE = ".claim"
"""Locked by the process that writes into the folder, and gone when none does."""

# ---- files of a population's folder ---------------------------------------------------------------

POPULATION_FILE = "population.json"
"""Members, conditions and chunks; written last, so that a folder with this file is whole."""

CHUNKS_FOLDER = "chunks"
"""Holds the run folders of the chunks, ``00``, ``01``, ..."""

RECIPE_FILE = "recipe.yaml"
"""In the folder of a chunk: the recipe that it is trained by."""

FORK_CHECKPOINT = "checkpoints/fork.ckpt"
"""In the folder of a branch: the state that it starts from."""

# ---- metrics --------------------------------------------------------------------------------------

ROW_AXES = ("member", "layer", "head")
"""Columns that say which of a metric's values a row holds; those that a metric does not have are empty."""

FURTHER_AXES = ("neuron", "position", "frequency", "feature", "class")
"""Columns that follow them, in this order, where something that the run records has such an axis."""

METRICS_COLUMNS = ("step", "sequences", "metric", *ROW_AXES, "value")
"""The header of ``metrics.csv`` of a run whose numbers have no further axes; those stand before the value."""

TRAIN_LOSS = "train/loss"
"""Name of the training loss, a mean over the steps since the last record."""

GRADIENT_NORM = "train/grad_norm"
"""Name of the gradient norm of what may move, a mean over the steps since the last record."""

BASE_LINE = "none"
"""Name of the set of progress measures without interventions."""

# ---- how a member ends ----------------------------------------------------------------------------

COMPLETE = "complete"
"""Trained to the last step; not written, since a summary without a status means it."""

FINISHED_EARLY = "finished early"
"""Ended by ``StopWhen`` before the last step."""

DIVERGED = "diverged"
"""Ended where its loss or gradient was no finite number."""

UNFINISHED = "unfinished"
"""Its chunk has no summary yet."""

STATUSES = (COMPLETE, FINISHED_EARLY, DIVERGED, UNFINISHED)
"""All ways in which a member of a population can stand at its end."""


def number_name(metric: str, index: tuple[int, ...]) -> str:
    """Name of one number: ``METRIC``, ``METRIC/LAYER:HEAD`` of a head, ``METRIC/I:J:...`` by the metric's axes.

    Args:
        metric: name of the metric, as in ``metrics.csv``.
        index: index of the number along the metric's axes; empty for a metric with one number a member.
    """
    return f"{metric}/{':'.join(map(str, index))}" if index else metric
