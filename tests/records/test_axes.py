"""Claims about records with any axes: every one comes back, from the table, from a checkpoint, and in pandas."""

import csv

import numpy as np
import pandas as pd
import pytest
import torch

from opsin.errors import ConfigError
from opsin.records.axes import (
    axes_of_header,
    find_number,
    is_wide,
    logged_numbers,
    number_names,
    split_number,
    table_axes,
    table_header,
)
from opsin.records.folder import RunFolder
from opsin.records.history import History
from opsin.records.schema import METRICS_COLUMNS
from opsin.records.table import history_from_table
from tests.records.test_history import recorded, same_records

KNOWN = ("layer", "head", "neuron", "position", "frequency", "feature", "class")


def random_axes(generator: np.random.Generator) -> dict[str, int]:
    """One to four axes in any order, of 1 to 4 entries each; one of them may be a user's."""
    chosen = generator.permutation([*KNOWN, "concept"])[: generator.integers(1, 5)].tolist()
    return {name: int(generator.integers(1, 5)) for name in chosen}


def with_random_axes(seed: int, records: int = 3) -> History:
    """Four metrics of random axes and one without any, recorded by turns."""
    generator = np.random.default_rng(seed)
    history = History(batch_size=8)
    metrics = {f"metric/{number}": random_axes(generator) for number in range(4)}
    for metric, axes in metrics.items():
        history.declare(metric, axes)
    members = int(generator.integers(1, 4))
    for step in range(records):
        history.record("train/loss", step, generator.normal(size=members))
        for metric, axes in metrics.items():
            history.record(metric, step, generator.normal(size=(members, *axes.values())))
    return history


def restored(folder: RunFolder, declared: History | None = None) -> History:
    """A history from the table of a folder, in which the metrics of another one may be declared beforehand."""
    mark, history = folder.mark(), History(8)
    for metric in declared.names() if declared else ():
        history.declare(metric, declared.axes(metric))
    state = history_from_table(folder.metrics, mark["bytes"], mark["sha256"], mark["axes"])
    history.restore({"history": state, "metrics": mark})
    return history


@pytest.mark.parametrize("seed", range(20))
def test_records_of_any_axes_come_back_from_their_table_to_the_bit(seed, tmp_path):
    history, folder = with_random_axes(seed), RunFolder(tmp_path)
    history.keep_in(folder)
    assert same_records(history, restored(folder, history))
    alone = restored(folder)  # nobody declares anything: axes of one entry may stand elsewhere, the rows are the same
    assert {metric: {**alone.axes(metric)} for metric in alone.names()} == {m: history.axes(m) for m in history.names()}
    alone.keep_in(RunFolder(tmp_path / "again"))
    assert (tmp_path / "again" / "metrics.csv").read_bytes() == folder.metrics.read_bytes()


@pytest.mark.parametrize("seed", range(5))
def test_records_of_any_axes_come_back_from_a_checkpoint(seed):
    history, again = with_random_axes(seed), History(8)
    again.load_state_dict(history.state_dict())
    assert same_records(history, again)


@pytest.mark.parametrize("seed", range(10))
def test_a_pivot_in_pandas_is_the_array(seed, tmp_path):
    history, folder = with_random_axes(seed), RunFolder(tmp_path)
    history.keep_in(folder)
    frame = pd.read_csv(folder.metrics)
    for metric in history.names():
        names = ["step", "member", *history.axes(metric)]
        rows = frame[frame.metric == metric]
        assert rows[[*{*frame.columns} - {*names, "sequences", "metric", "value"}]].isna().to_numpy().all()
        values = history[metric].arrays()[1]
        pivot = rows.set_index(names).value.sort_index()
        assert np.array_equal(pivot.to_numpy(np.float32).reshape(values.shape), values)


def test_pandas_reads_indices_as_whole_numbers_where_it_is_told_to(tmp_path):
    history, folder = with_random_axes(3), RunFolder(tmp_path)
    history.keep_in(folder)
    names = ["layer", "head", *KNOWN[2:], "concept"]  # also those that the table does not have
    frame = pd.read_csv(folder.metrics, dtype=dict.fromkeys(names, "Int64"))
    present = [name for name in names if name in frame]
    assert {str(frame[name].dtype) for name in present} == {"Int64"} and frame[present].isna().any(axis=None)


def test_a_run_without_further_axes_writes_what_it_always_wrote(tmp_path):
    folder = RunFolder(tmp_path)
    recorded(final=10).keep_in(folder)
    with folder.metrics.open() as file:
        rows = [*csv.reader(file)]
    assert rows[0] == [*METRICS_COLUMNS] == ["step", "sequences", "metric", "member", "layer", "head", "value"]
    assert [row[:-1] for row in rows[1:4]] == [
        ["10", "320", "train/loss", "0", "", ""],
        ["10", "320", "train/loss", "1", "", ""],
        ["10", "320", "heads/induction", "0", "0", "0"],
    ]
    assert len(rows) == 1 + 2 + 2 * 2 * 3


def test_known_axes_have_the_order_of_the_schema_and_others_that_of_their_declaration():
    assert table_axes(()) == ("member", "layer", "head")
    found = table_axes(["colour", "class", "neuron", "shape", "colour", "layer", "position"])
    assert found == ("member", "layer", "head", "neuron", "position", "class", "colour", "shape")
    assert axes_of_header(table_header(found)) == found
    history = History(1)
    history.declare("a", {"shape": 2})
    history.declare("b", {"colour": 2, "position": 3})
    assert history._table_axes() == ("member", "layer", "head", "position", "shape", "colour")


@pytest.mark.parametrize("header", ["", "step", "step,sequences,metric,member,value", "a,b,c,member,layer,head,value"])
def test_a_line_that_is_no_header_of_a_table_has_no_axes(header):
    assert axes_of_header(header) is None


def test_cells_of_axes_that_a_metric_does_not_have_are_empty(tmp_path):
    history, folder = History(4), RunFolder(tmp_path)
    history.declare("norm", {"neuron": 2, "concept": 1})
    history.record("norm", 5, np.array([[[1.0], [2.5]]]))
    history.record("train/loss", 5, np.array([0.5]))
    history.keep_in(folder)
    assert folder.metrics.read_text().splitlines() == [
        "step,sequences,metric,member,layer,head,neuron,concept,value",
        "5,20,norm,0,,,0,0,1.0",
        "5,20,norm,0,,,1,0,2.5",
        "5,20,train/loss,0,,,,,0.5",
    ]


# ---- a table that lacks a column --------------------------------------------------------------------


def begun(tmp_path) -> tuple[RunFolder, dict]:
    """A run of two members with heads that is killed after its checkpoint, and the mark of that checkpoint."""
    folder, history = RunFolder(tmp_path), recorded()
    history.keep_in(folder)
    mark = history.for_checkpoint()["metrics"]
    history.record("train/loss", 30, torch.ones(2))
    history.write_out()
    with folder.metrics.open("a") as file:
        file.write("30,960,heads/induc")  # half a line
    return folder, mark


def resumed(folder: RunFolder, mark: dict) -> History:
    """The run as it goes on with a reader of neurons."""
    history = History(32)
    history.declare("heads/induction", {"layer": 2, "head": 3})
    history.declare("norm", {"neuron": 4})
    state = history_from_table(folder.metrics, mark["bytes"], mark["sha256"], mark["axes"])
    assert state is not None
    history.restore({"history": state, "metrics": mark})
    history.keep_in(RunFolder(folder.path))
    return history


def test_a_resumed_run_with_a_new_axis_begins_its_table_anew_and_loses_nothing(tmp_path):
    folder, mark = begun(tmp_path)
    history = resumed(folder, mark)
    assert same_records(recorded(), history)
    lines = folder.metrics.read_text().splitlines()
    assert lines[0] == "step,sequences,metric,member,layer,head,neuron,value" and len(lines) == 1 + 2 * (2 + 12)
    history.record("norm", 30, torch.ones(2, 4))
    new_mark = history.for_checkpoint()["metrics"]
    assert new_mark["axes"] == ["member", "layer", "head", "neuron"]
    assert same_records(history, resumed(folder, new_mark))


def test_a_checkpoint_of_before_the_new_axis_still_knows_its_records(tmp_path):
    folder, mark = begun(tmp_path)
    history = resumed(folder, mark)
    history.record("norm", 30, torch.ones(2, 4))
    history.write_out()
    # killed before another checkpoint: the one from before counts on a table that had no such column
    assert same_records(recorded(), resumed(folder, mark))
    old = {name: value for name, value in mark.items() if name != "axes"}
    state = history_from_table(folder.metrics, old["bytes"], old["sha256"])
    assert state is not None and [*state] == ["train/loss", "heads/induction"]
    folder.metrics.write_text(folder.metrics.read_text().replace("0,,,", "1,,,", 1))
    assert history_from_table(folder.metrics, old["bytes"], old["sha256"]) is None


def test_an_axis_that_is_declared_late_gets_its_column(tmp_path):
    folder, history = RunFolder(tmp_path), recorded(final=10)
    history.keep_in(folder)
    history.declare("late", {"neuron": 2})
    history.record("late", 10, torch.ones(2, 2))
    history.write_out()
    assert pd.read_csv(folder.metrics).neuron.max() == 1
    assert same_records(history, restored(folder, history))


def test_a_checkpoint_of_an_earlier_version_has_layers_and_heads():
    state = recorded().state_dict()
    for entry in state.values():
        del entry["axes"]
    history = History(32)
    history.load_state_dict(state)
    assert same_records(recorded(), history) and history.axes("heads/induction") == {"layer": 2, "head": 3}


def test_a_restored_metric_that_is_declared_otherwise_is_refused_in_one_line():
    history = History(32)
    history.declare("heads/induction", {"layer": 2, "head": 8})
    with pytest.raises(ConfigError, match=r"^axes of metric heads/induction: got 'layer \(2\), head \(3\)', expected"):
        history.load_state_dict(recorded().state_dict())


# ---- one number of many -----------------------------------------------------------------------------

RECORDED = {"train/loss": {}, "heads": {"layer": 2, "head": 3}, "norm": {"neuron": 65}, "odd/1": {}}


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("train/loss", ("train/loss", ())),
        ("heads/1:2", ("heads", (1, 2))),
        ("norm/64", ("norm", (64,))),
        ("odd/1", ("odd/1", ())),
        ("heads", None),
        ("heads/2:0", None),
        ("heads/1", None),
        ("norm/65", None),
        ("train/loss/0", None),
        ("nothing/0", None),
    ],
)
def test_one_number_of_a_metric_is_named_by_its_indices(name, number):
    assert find_number(name, RECORDED) == number


def test_a_name_is_split_where_indices_end_it():
    assert split_number("a/b/1:2:30") == ("a/b", (1, 2, 30))
    assert split_number("a/b") == ("a/b", ()) and split_number("7") == ("7", ())


def test_names_for_messages_are_few_where_there_are_many_numbers():
    heads = [f"heads/{layer}:{head}" for layer in range(2) for head in range(3)]
    assert number_names(RECORDED) == ["train/loss", *heads, "norm/0", "odd/1"]


def test_many_numbers_that_are_no_heads_reach_loggers_as_two():
    assert is_wide({"neuron": 65}) and not is_wide({"neuron": 64}) and not is_wide({"layer": 12, "head": 12})
    assert logged_numbers("norm", {"neuron": 66}, np.full(66, np.nan)) == {}
    values = np.ones((2, 3))
    assert len(logged_numbers("h", {"layer": 2, "head": 3}, values)) == 6
