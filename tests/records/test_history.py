"""Claims about the run folder: tidy, exact, and the same again after a resume."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import torch

from opsin.records.folder import RunFolder, write_atomically
from opsin.records.history import History, tidy_rows
from opsin.records.schema import METRICS_COLUMNS


def recorded(final=20):
    """Two metrics of two members, one of them per head (2 layers, 3 heads)."""
    generator = torch.Generator().manual_seed(0)
    history = History(batch_size=32)
    for step in range(10, final + 1, 10):
        history.record("train/loss", step, torch.rand(2, generator=generator))
        history.record("heads/induction", step, torch.rand(2, 2, 3, generator=generator).numpy())
    return history


def through_a_checkpoint(history):
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    restored = History(history.batch_size)
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    return restored


def table(history):
    """The bytes of metrics.csv."""
    return "\n".join(tidy_rows(history.take_unwritten(), history.batch_size))


def test_a_history_comes_back_from_a_checkpoint():
    history = recorded()
    restored = through_a_checkpoint(history)
    assert restored.names() == history.names() == ["train/loss", "heads/induction"]
    for name in history.names():
        (steps, values), (again, same) = history[name].arrays(), restored[name].arrays()
        assert steps.tolist() == again.tolist() == [10, 20]
        assert values.dtype == same.dtype == np.float32 and np.array_equal(values, same)
    assert restored["heads/induction"].arrays()[1].shape == (2, 2, 2, 3)


def test_a_restored_history_goes_on():
    restored = through_a_checkpoint(recorded())
    restored.record("train/loss", 30, torch.tensor([1.0, 2.0]))
    assert restored["train/loss"].arrays()[0].tolist() == [10, 20, 30]


def test_after_a_resume_the_same_bytes_are_written_again():
    history = recorded()
    assert table(through_a_checkpoint(history)) == table(history) != ""


def test_after_a_resume_a_tracker_that_measured_step_zero_keeps_its_order():
    history = History(batch_size=32)
    history.record("heads/induction", 0, torch.zeros(1))  # before training; from then on after the loss
    for metric in ("train/loss", "heads/induction"):
        history.record(metric, 10, torch.ones(1))
    assert table(through_a_checkpoint(history)) == table(history)


def test_what_was_written_is_not_written_twice():
    history = recorded()
    assert len(history.take_unwritten()) == 4
    assert history.take_unwritten() == []
    history.record("train/loss", 30, torch.zeros(2))
    assert [row[:2] for row in history.take_unwritten()] == [(30, "train/loss")]


def test_what_was_recorded_does_not_change_with_the_tensor_it_came_from():
    history, running = History(batch_size=1), torch.zeros(1)
    history.record("train/loss", 1, running)
    running.add_(1)
    assert history["train/loss"].values[0].tolist() == [0.0]


def test_an_unknown_metric_is_a_key_error():
    history = recorded()
    assert "train/loss" in history and "val/loss" not in history
    with pytest.raises(KeyError):
        history["val/loss"]


def test_positions_are_also_stated_in_sequences():
    assert recorded().sequences(np.array([10, 20])).tolist() == [320, 640]


def test_pandas_reads_the_table_in_one_line_with_exact_values(tmp_path):
    history, folder = recorded(), RunFolder(tmp_path / "new" / "run")
    folder.start_metrics()
    folder.append_metrics(history.take_unwritten(), history.batch_size)
    frame = pd.read_csv(folder.metrics)
    assert tuple(frame.columns) == METRICS_COLUMNS and len(frame) == 2 * (2 + 12)
    assert (frame.sequences == frame.step * 32).all()
    loss = frame[frame.metric == "train/loss"]
    assert loss.value.to_numpy(np.float32).tolist() == history["train/loss"].arrays()[1].ravel().tolist()
    assert loss[["layer", "head"]].isna().to_numpy().all()
    heads = frame[(frame.metric == "heads/induction") & (frame.step == 20)]
    values = history["heads/induction"].values[1]
    for row in heads.itertuples():
        assert np.float32(row.value) == values[row.member, int(row.layer), int(row.head)]


def test_numbers_that_are_none_are_written_as_such(tmp_path):
    folder = RunFolder(tmp_path)
    folder.start_metrics()
    folder.append_metrics([(1, "loss", np.array([np.nan, np.inf, -np.inf], np.float32))], 1)
    assert pd.read_csv(folder.metrics).value.tolist() == pytest.approx([np.nan, np.inf, -np.inf], nan_ok=True)


def test_appending_goes_on_where_the_table_ends_and_starting_begins_anew(tmp_path):
    folder, history = RunFolder(tmp_path), recorded(final=10)
    folder.start_metrics()
    rows = history.take_unwritten()
    for part in (rows[:1], [], rows[1:]):
        folder.append_metrics(part, 32)
    lines = folder.metrics.read_text().splitlines()
    assert lines == [",".join(METRICS_COLUMNS), *tidy_rows(rows, 32)]
    folder.start_metrics()
    assert folder.metrics.read_text() == "step,sequences,metric,member,layer,head,value\n"


def test_a_document_is_written_whole_and_leaves_nothing_beside_it(tmp_path):
    folder = RunFolder(tmp_path)
    path = folder.write_json("summary.json", {"onset": [1, None]})
    assert json.loads(path.read_text()) == {"onset": [1, None]}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("content", "written"),
    [("text ö", "text ö".encode()), (b"\x00bytes", b"\x00bytes"), (lambda file: file.write(b"rows"), b"rows")],
    ids=["text", "bytes", "a function"],
)
def test_text_bytes_and_what_a_function_writes_replace_a_file_in_a_new_folder(tmp_path, content, written):
    path = tmp_path / "deep" / "file"
    for _ in range(2):
        assert write_atomically(path, content) == path and path.read_bytes() == written
    assert list(path.parent.iterdir()) == [path]


def _fail_half_way(file):
    file.write(b"half")
    raise OSError("disk is full")


@pytest.mark.parametrize(("content", "error"), [("new \udc80", UnicodeEncodeError), (_fail_half_way, OSError)])
def test_a_write_that_fails_keeps_the_old_content(tmp_path, content, error):
    path = write_atomically(tmp_path / "file", "old")
    with pytest.raises(error):
        write_atomically(path, content)
    assert path.read_text() == "old"
