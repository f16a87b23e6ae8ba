"""Claims about when a replay differs from its run: by what both recorded, whatever columns there are."""

import numpy as np
import pytest

from opsin.launch.replay import first_difference
from opsin.records.folder import RunFolder
from opsin.records.history import History


def kept(folder, *, neurons=False, last=3, changed=None):
    """The table of a run that records its loss, and norms of neurons where it has any."""
    history = History(4)
    if neurons:
        history.declare("norm", {"neuron": 2})
    for step in range(last + 1):
        history.record("train/loss", step, np.array([-1.0 if step == changed else step]))
        if neurons:
            history.record("norm", step, np.zeros((1, 2)))
    table = RunFolder(folder)
    history.keep_in(table)
    return table.metrics


@pytest.mark.parametrize("neurons", [(False, False), (True, True), (True, False), (False, True)])
def test_what_only_one_version_records_is_no_difference(neurons, tmp_path):
    replayed, original = (kept(tmp_path / str(i), neurons=has) for i, has in enumerate(neurons))
    # a run that recorded more than its replay does is another run from its first such record on
    assert first_difference(replayed, original) == ("0" if neurons == (False, True) else None)


def test_a_number_that_differs_is_named_by_its_step_whatever_the_columns(tmp_path):
    replayed, original = kept(tmp_path / "a", neurons=True), kept(tmp_path / "b", changed=2)
    assert first_difference(replayed, original) == "2"
    assert first_difference(original, kept(tmp_path / "c", changed=2)) is None


def test_a_run_that_was_killed_earlier_or_left_half_a_line_does_not_differ(tmp_path):
    replayed, original = kept(tmp_path / "a"), kept(tmp_path / "b", last=1)
    with original.open("a") as file:
        file.write("2,8,train/lo")
    assert first_difference(replayed, original) is None
    assert first_difference(replayed, tmp_path / "none" / "metrics.csv") is None
