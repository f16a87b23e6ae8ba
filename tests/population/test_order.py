"""Claims about what came first in a population: half ways and onsets over the seeds of a condition."""

from types import SimpleNamespace

import numpy as np
import pytest

from opsin.population.folder import TrainedMember
from opsin.population.order import order_rows
from opsin.records.schema import COMPLETE, UNFINISHED

X = np.arange(0, 1000, 10)


def population(statuses):
    """One condition; the loss of member m left its plateau at 100 (m + 1)."""
    members = []
    for index, status in enumerate(statuses):
        changes = {"loss": {"change": {"onset": {"value": 100.0 * (index + 1)}}}, "recall": {"change": None}}
        members.append(TrainedMember(index, "all", index, 0, index, status, {"changes": changes}))
    return SimpleNamespace(conditions=("all",), under=lambda condition: members)


def step_at(*times):
    return np.stack([(time <= X).astype(float) for time in times], 1)


def test_half_ways_and_onsets_are_means_over_the_members_that_have_them():
    curves = {"loss": (X, step_at(300, 500)), "recall": (X, step_at(700, 2000))}
    loss, recall = order_rows(population([COMPLETE, COMPLETE]), curves)
    assert loss["halfway"] == 400 and loss["changed"] == 2 and loss["halfway_low"] < 300
    assert loss["onset"] == 150 and loss["formed"] == 2
    assert (recall["halfway"], recall["changed"], recall["halfway_low"]) == (700, 1, None)
    assert (recall["onset"], recall["formed"]) == (None, 0)


def test_a_member_that_is_not_finished_does_not_count():
    curves = {"loss": (X, step_at(300, 500))}
    (row,) = order_rows(population([COMPLETE, UNFINISHED]), curves)
    assert (row["members"], row["changed"], row["halfway"]) == (1, 1, pytest.approx(300))
