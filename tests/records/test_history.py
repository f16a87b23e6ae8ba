"""Claims about the run folder: tidy, exact, and the same again after a resume."""

import hashlib
import io
import json

import numpy as np
import pandas as pd
import pytest
import torch

from opsin.errors import ConfigError
from opsin.records.folder import RunFolder, write_atomically
from opsin.records.history import History, Record
from opsin.records.schema import METRICS_COLUMNS
from opsin.records.table import history_from_table, tidy_rows


def recorded(final=20):
    """Two metrics of two members, one of them per head (2 layers, 3 heads)."""
    generator = torch.Generator().manual_seed(0)
    history = History(batch_size=32)
    history.declare("heads/induction", {"layer": 2, "head": 3})
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
    return "\n".join(tidy_rows(history.records(), history.batch_size))


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


def test_what_was_written_is_not_written_twice(tmp_path):
    history, folder = recorded(), RunFolder(tmp_path)
    history.keep_in(folder)
    written = folder.metrics.read_bytes()
    history.write_out()
    assert folder.metrics.read_bytes() == written
    history.record("train/loss", 30, torch.zeros(2))
    history.write_out()
    assert folder.metrics.read_bytes().removeprefix(written).count(b"\n30,") == 1
    assert folder.metrics.read_bytes().removeprefix(written).startswith(b"30,960,train/loss,0,,,0.0\n")


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
    folder.append_metrics(history.records(), history.batch_size)
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
    folder.append_metrics([Record(1, "loss", np.array([np.nan, np.inf, -np.inf], np.float32))], 1)
    assert pd.read_csv(folder.metrics).value.tolist() == pytest.approx([np.nan, np.inf, -np.inf], nan_ok=True)


def test_appending_goes_on_where_the_table_ends_and_starting_begins_anew(tmp_path):
    folder, history = RunFolder(tmp_path), recorded(final=10)
    folder.start_metrics()
    rows = history.records()
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


# ---- the history and its table ------------------------------------------------------------------------


def awkward():
    """Records that a table could lose: extreme numbers, twice one metric at one step, metrics of every shape."""
    history = History(batch_size=7)
    history.declare("a/head", {"layer": 3, "head": 5})
    history.declare("a/layer", {"layer": 3})
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 600, dtype=np.uint32).view(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4028235e38, 0.1, 1 / 3], np.float32)
    numbers = np.concatenate([special, bits[np.isfinite(bits)]])[:540]
    for step, part in enumerate(numbers.reshape(-1, 2, 3, 5)):
        history.record("a/head", step, part)
        history.record("a/member", step, part[:, 0, 0])
        history.record("a/member", step, part[:, 0, 1])
        history.record("a/layer", step, part[:, :, 0])
        history.record("feedback/Clamp[1]/0:1, twice", step, part[:1, 0, 0])
    return history


def test_a_history_comes_back_from_its_table_to_the_bit(tmp_path):
    history, folder = awkward(), RunFolder(tmp_path)
    history.keep_in(folder)
    mark = folder.mark()
    back = History(7)
    back.load_state_dict(history_from_table(folder.metrics, mark["bytes"], mark["sha256"]))
    assert same_records(history, back) and back.names() == history.names()


def same_records(history, other):
    """Whether two histories have the same numbers of the same axes, to the bit, in the same order."""
    for record, again in zip(history.records(), other.records(), strict=True):
        assert (record.step, record.metric, record.axes) == (again.step, again.metric, again.axes)
        assert np.array_equal(record.values, again.values, equal_nan=True)
        assert record.values.tobytes() == again.values.tobytes() or np.isnan(record.values).any()
    return True


@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b.replace(b"a/head", b"a/heap", 1), lambda b: b""])
def test_a_table_that_is_not_what_was_counted_on_gives_no_history(tmp_path, spoil):
    folder = RunFolder(tmp_path)
    awkward().keep_in(folder)
    mark = folder.mark()
    folder.metrics.write_bytes(spoil(folder.metrics.read_bytes()))
    assert history_from_table(folder.metrics, mark["bytes"], mark["sha256"]) is None
    folder.metrics.unlink()
    assert history_from_table(folder.metrics, mark["bytes"], mark["sha256"]) is None


def test_a_table_goes_on_where_its_checkpoint_was_saved_and_elsewhere_begins_whole(tmp_path):
    history, folder = recorded(), RunFolder(tmp_path / "run")
    history.keep_in(folder)
    saved = history.for_checkpoint()["metrics"]
    counted = folder.metrics.read_bytes()
    history.record("train/loss", 30, torch.ones(2))
    history.write_out()
    for name in ("run", "other"):
        restored = History(32)
        state = history_from_table(folder.metrics, saved["bytes"], saved["sha256"])
        restored.restore({"history": state, "metrics": saved})
        restored.keep_in(RunFolder(tmp_path / name))
        assert (tmp_path / name / "metrics.csv").read_bytes() == counted
        restored.record("train/loss", 30, torch.ones(2))
        mark = restored.for_checkpoint()["metrics"]
        whole = (tmp_path / name / "metrics.csv").read_bytes()
        assert (mark["bytes"], mark["sha256"]) == (len(whole), hashlib.sha256(whole).hexdigest())
        assert whole.startswith(counted) and len(whole) > len(counted)


def test_a_history_without_a_table_is_in_the_checkpoint():
    assert recorded().for_checkpoint().keys() == {"history"}


def test_a_table_on_a_full_disk_stays_as_long_as_it_was(tmp_path, monkeypatch):
    history, folder = recorded(), RunFolder(tmp_path)
    history.keep_in(folder)
    before = folder.metrics.read_bytes()
    history.record("train/loss", 30, torch.ones(2))

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[:5])
            self.file.flush()
            raise OSError(28, "No space left on device")

    opened = type(folder.metrics).open
    with monkeypatch.context() as patched:
        patched.setattr(type(folder.metrics), "open", lambda path, mode: Full(opened(path, mode)))
        with pytest.raises(OSError, match="No space"):
            history.write_out()
    assert folder.metrics.read_bytes() == before
    history.write_out()
    assert folder.metrics.read_bytes().startswith(before + b"30,")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), "an axis of the members, and those declared: neuron (4), position (3)"),
        ((2, 4, 3, 5), "an axis of the members, and those declared: neuron (4), position (3)"),
        ((2, 4), "an axis of the members, and those declared: neuron (4), position (3)"),
        ((2, 3, 4), "an axis of the members, and those declared: neuron (4), position (3)"),
        ((0, 4, 3), "an axis of the members, and those declared: neuron (4), position (3)"),
    ],
)
def test_values_of_another_shape_than_was_declared_are_refused_in_one_line(shape, expected):
    history = History(batch_size=32)
    history.declare("norm", {"neuron": 4, "position": 3})
    with pytest.raises(ConfigError) as refused:
        history.record("norm", 10, np.zeros(shape))
    assert str(refused.value) == f"metric norm: got 'values of shape {shape}', expected {expected}"
    assert history.names() == []


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 8), (2, 1, 1, 1, 1)])
def test_axes_that_nobody_declared_are_refused_in_one_line(shape):
    history = History(batch_size=32)
    with pytest.raises(
        ConfigError, match=r"^metric x: got 'values of shape .*', expected one number a member, \(M,\): "
    ):
        history.record("x", 10, np.zeros(shape))
    history.record("x", 10, np.zeros(2))
    assert history.axes("x") == {}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ((2, 8), "axes of metric x: got (2, 8), expected sizes by name, as in {'layer': 2, 'head': 8}, {} for none"),
        ({"Layer": 2}, "metric x, name of an axis: got 'Layer', expected lower-case letters, digits and underscores"),
        ({"a,b": 2}, "metric x, name of an axis: got 'a,b'"),
        ({"member": 2}, "metric x, name of an axis: got 'member'"),
        ({"value": 2}, "metric x, name of an axis: got 'value'"),
        ({"neuron": 0}, "metric x, size of axis neuron: got 0, expected a whole number from 1 on"),
        ({"neuron": 1.5}, "metric x, size of axis neuron: got 1.5"),
    ],
)
def test_axes_that_could_not_be_columns_are_refused_in_one_line(axes, message):
    with pytest.raises(ConfigError) as refused:
        History(batch_size=32).declare("x", axes)
    assert str(refused.value).startswith(message) and len(str(refused.value).splitlines()) == 1


def test_a_metric_keeps_the_axes_that_it_was_declared_with():
    history = recorded()
    history.declare("heads/induction", {"layer": 2, "head": 3})
    for axes in ({"head": 3, "layer": 2}, {"layer": 2, "head": 4}, {"neuron": 6}, {}):
        with pytest.raises(
            ConfigError, match=r"^axes of metric heads/induction: .* expected layer \(2\), head \(3\), as"
        ):
            history.declare("heads/induction", axes)


def test_a_metric_keeps_the_shape_of_its_first_record():
    history = recorded()
    with pytest.raises(ConfigError, match=r"metric train/loss: got 'values of shape \(2, 1\)', expected \(2,\), the"):
        history.record("train/loss", 30, np.zeros((2, 1)))
    assert table(history) == table(recorded())
