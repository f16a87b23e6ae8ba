"""Every writer there is, as the documents show it, on the model and the task that the documents speak of."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from opsin import callbacks
from opsin.interventions.build_plan import Writer
from opsin.interventions.weights import WeightWriter
from opsin.model.protocol import init_parameters
from opsin.model.transformer import Transformer
from opsin.tasks import FewShot, GaussianClusters
from tests.contracts.examples import Settings, built, rows, short

MODEL = Transformer(layers=2, width=64, heads=8, mlp_ratio=4)
"""The model that docs/interventions.md speaks of: eight heads, and MLPs for the rows that name neurons."""


@cache
def task() -> FewShot:
    """Sequences of two pairs, in small batches."""
    return FewShot(GaussianClusters(classes=12, exemplars=2, features=16), batch_size=4, train_classes=8)


WRITERS: dict[str, type[Callback]] = {
    name: kind
    for name in callbacks.__all__
    if isinstance(kind := getattr(callbacks, name), type) and issubclass(kind, (Writer, WeightWriter))
}


def save_donor(path: Path) -> Path:
    """A snapshot of an untrained model, of a seed that no run of these tests has."""
    values = init_parameters(MODEL, task(), [9])
    torch.save({"step": 0, "sequences": 0, "transformer": vars(MODEL).copy(), "parameters": values}, path)
    return path


def writer_rows(donor: Path) -> list[tuple[Settings, ...]]:
    """Rows of the documents without the callbacks that write nothing, for a short run; only those with a writer."""
    found = []
    for _, row in rows():
        kept = tuple(short(deepcopy(item), donor) for item in row if name_of(item) in WRITERS)
        found += [kept] if kept else []
    return found


def rows_of(name: str, donor: Path) -> list[tuple[Settings, ...]]:
    """Rows with one writer, which comes first in each."""
    found = []
    for row in writer_rows(donor):
        for index, item in enumerate(row):
            if name_of(item) == name:
                found.append((item, *row[:index], *row[index + 1 :]))
                break
    return found


def name_of(settings: Settings) -> str:
    """The class of a callback as users call it."""
    return settings["class_path"].rpartition(".")[2]


def made(row: tuple[Settings, ...], **changes: Any) -> list[Callback]:
    """The callbacks of one row, each with these settings changed."""
    return [built({**item, "init_args": {**item["init_args"], **changes}}) for item in row]
