"""Claims about files of checkpoints: never half, never accepted with another bit, as small at the end as before."""

from __future__ import annotations

import io
import os
import random
import shutil
import zipfile
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from opsin.callbacks import KeepRun, Snapshots
from opsin.errors import ConfigError
from opsin.interventions.donors import read_donor
from opsin.records.checkpoint import (
    DamagedError,
    load_saved,
    read_checkpoint,
    read_saved,
    recover_last,
    write_checkpoint,
    write_last,
)
from opsin.records.folder import RunFolder
from opsin.records.history import History
from opsin.training.module import OpsinModule
from tests.helpers.toys import SMALL, few_shot, train

FAST_FLIPS, ALL_FLIPS = 40, 400


def module(**settings):
    """A small module whose run has records of every few steps."""
    usual = {"learning_rate": 1e-2, "steps_per_batch": 10, "log_every": 5, "probe_size": 8, "evaluation_size": 8}
    return OpsinModule(**{"task": few_shot(), "transformer": SMALL} | usual | settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with a last checkpoint of step 60, the end, and a previous one of step 40."""
    folder = tmp_path_factory.mktemp("run")
    train(module(), 60, Snapshots(per_decade=2, ring=2, every=20), KeepRun(folder, checkpoint_every=20))
    return folder


def plain(saved):
    """Content that equal checkpoints have equal, however their archives are laid out."""
    if isinstance(saved, torch.Tensor):
        return saved.numpy().tobytes(), saved.dtype, tuple(saved.shape)
    if isinstance(saved, dict):
        return {key: plain(value) for key, value in saved.items()}
    if isinstance(saved, (list, tuple)):
        return [plain(value) for value in saved]
    return repr(saved)


def accepted_with_other_numbers(folder: Path, name: str, flips: int) -> int:
    """How many files with one flipped bit are read, and say something else."""
    path, chance, wrong = folder / name, random.Random(0), 0
    content = path.read_bytes()
    right = plain(read_checkpoint(path, history=True))
    for _ in range(flips):
        spoiled, bit = bytearray(content), chance.randrange(8 * len(content))
        spoiled[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(spoiled)
        try:
            wrong += plain(read_checkpoint(path, history=True)) != right
        except ConfigError as error:
            assert "\n" not in str(error) and str(path) in str(error)
    path.write_bytes(content)
    return wrong


def test_no_flipped_bit_of_a_checkpoint_is_accepted(run):
    assert accepted_with_other_numbers(run, "checkpoints/last.ckpt", FAST_FLIPS) == 0


@pytest.mark.slow
def test_no_flipped_bit_of_four_hundred_is_accepted(run):
    assert accepted_with_other_numbers(run, "checkpoints/last.ckpt", ALL_FLIPS) == 0


def test_no_flipped_bit_of_the_table_that_a_checkpoint_counts_on_is_accepted(run):
    assert accepted_with_other_numbers_of_table(run) == 0


def accepted_with_other_numbers_of_table(folder: Path) -> int:
    table, chance, wrong = folder / "metrics.csv", random.Random(1), 0
    content = table.read_bytes()
    for _ in range(FAST_FLIPS):
        spoiled, bit = bytearray(content), chance.randrange(8 * len(content))
        spoiled[bit // 8] ^= 1 << (bit % 8)
        table.write_bytes(spoiled)
        try:
            read_checkpoint(folder / "checkpoints/last.ckpt", history=True)
            wrong += 1
        except DamagedError:
            pass
    table.write_bytes(content)
    return wrong


def test_every_byte_of_a_seal_counts(tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt", {"x": torch.arange(3.0)})
    content = path.read_bytes()
    for index in range(len(content) - 90, len(content)):
        path.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
        with pytest.raises(DamagedError):
            read_saved(path, "path")


def test_a_sealed_file_is_one_that_torch_and_zip_tools_read(tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt", {"x": torch.arange(3.0), "n": 1})
    assert torch.load(path, weights_only=True)["x"].tolist() == [0, 1, 2]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"opsin sha256 ")


def test_a_file_of_before_without_a_seal_is_held_to_the_checksums_of_its_archive(tmp_path):
    path = tmp_path / "old.ckpt"
    torch.save({"x": torch.arange(1000.0)}, path)
    assert load_saved(path)["x"].sum() == 499500
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["x"].sum() != 499500
    assert load_saved(path) is None


def no_checkpoints():
    """Contents of files that no run has written, by name."""

    def saved(content, **options):
        buffer = io.BytesIO()
        torch.save(content, buffer, **options)
        return buffer.getvalue()

    whole, chance = saved({"x": torch.arange(9.0)}), np.random.default_rng(0)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("a.txt", "text")
    odd = [3, None, [1], {}, {"opsin": 3}, {"opsin": {}, "state_dict": {}}, {"state_dict": {}}, torch.zeros(2)]
    found = {f"saved {number}": saved(content) for number, content in enumerate(odd)}
    found |= {f"cut at {part}%": whole[: len(whole) * part // 100] for part in range(0, 100, 10)}
    found |= {f"noise {size}": chance.bytes(size) for size in (1, 2, 10, 100, 1000, 100_000)}
    found |= {f"zeros {size}": bytes(size) for size in (1, 22, 64, 4096)}
    texts = ["", "text", "PK", "PK\x03\x04", "{}", "\x80\x02}q\x00.", "opsin sha256 " + "0" * 64, "a: 1\n", "<html>"]
    found |= {f"text {number}": text.encode("latin-1") for number, text in enumerate(texts)}
    found |= {f"head of {size}": whole[:size] + chance.bytes(200) for size in (4, 30, 60, 100, 200, 400)}
    found |= {f"tail of {size}": chance.bytes(200) + whole[-size:] for size in (22, 60, 100, 200)}
    found["a zip archive"] = archive.getvalue()
    found["the old format"] = saved({"x": torch.arange(9.0)}, _use_new_zipfile_serialization=False)
    found["seal alone"] = b"opsin sha256 " + b"0" * 64
    found["a pickle that would run code"] = b"cos\nsystem\n(S'echo oops'\ntR."
    return found


def test_there_are_fifty_files_that_are_no_checkpoints():
    assert len(no_checkpoints()) >= 50


@pytest.mark.parametrize("name", no_checkpoints())
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, name):
    path = tmp_path / "other.ckpt"
    path.write_bytes(no_checkpoints()[name])
    for read in (read_checkpoint, lambda path: read_donor("Graft", path)):
        with pytest.raises(ConfigError) as refused:
            read(path)
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
    for path in (tmp_path / "none.ckpt", tmp_path):
        with pytest.raises(DamagedError, match=r"no such file|a folder"):
            read_checkpoint(path)


# ---- writing ------------------------------------------------------------------------------------------


def test_a_checkpoint_is_written_beside_its_place_and_never_by_way_of_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    monkeypatch.setattr("tempfile.tempdir", None)
    callbacks = [
        KeepRun(tmp_path / "run", checkpoint_every=20),
        pl.callbacks.ModelCheckpoint(tmp_path / "best", every_n_train_steps=20, save_top_k=-1),
    ]
    renamed = []
    monkeypatch.setattr("os.replace", lambda a, b, replace=os.replace: (renamed.append((a, b)), replace(a, b)))
    train(module(), 40, *callbacks)
    assert {Path(a).parent == Path(b).parent for a, b in renamed} == {True}
    assert len([*(tmp_path / "best").iterdir()]) == 2
    assert not [*tmp_path.rglob("*.part")]


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("os.fsync", lambda number, fsync=os.fsync: (calls.append("sync"), fsync(number)))
    monkeypatch.setattr("os.replace", lambda a, b, replace=os.replace: (calls.append("replace"), replace(a, b)))
    write_checkpoint(tmp_path / "a.ckpt", {"x": 1})
    assert calls == ["sync", "replace", "sync"]


def test_the_one_before_is_kept_and_at_every_moment_there_is_a_last(tmp_path, monkeypatch):
    last, seen = tmp_path / "checkpoints/last.ckpt", []

    def replace(a, b, replace=os.replace):
        seen.append(last.exists())
        replace(a, b)

    for step in (1, 2, 3):
        write_last(tmp_path, {"global_step": step})
        monkeypatch.setattr("os.replace", replace)
    assert all(seen) and len(seen) == 4
    assert [load_saved(tmp_path / f"checkpoints/{name}.ckpt")["global_step"] for name in ("last", "previous")] == [3, 2]


def test_a_file_system_without_second_names_keeps_the_one_before_too(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    for step in (1, 2, 3):
        write_last(tmp_path, {"global_step": step})
    assert [load_saved(tmp_path / f"checkpoints/{name}.ckpt")["global_step"] for name in ("last", "previous")] == [3, 2]


@pytest.mark.parametrize("writes_that_fail", [1, 2, 3])
def test_on_a_full_disk_the_last_checkpoint_takes_spare_room_or_stays_as_it_was(
    tmp_path, monkeypatch, writes_that_fail
):
    for step in (1, 2):
        write_last(tmp_path, {"global_step": step})
    assert (tmp_path / "checkpoints/spare").stat().st_size == 1 << 20
    left = [writes_that_fail]

    def fsync(number, fsync=os.fsync):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match="No space left") as failed:
        write_last(tmp_path, {"global_step": 3})
    steps = {path.name: load_saved(path)["global_step"] for path in (tmp_path / "checkpoints").glob("*.ckpt")}
    assert steps == [{"last.ckpt": 3, "previous.ckpt": 2}, {"last.ckpt": 3}, {"last.ckpt": 2}][writes_that_fail - 1]
    assert ("saved up to step 3" in str(failed.value)) == (writes_that_fail < 3)
    assert not [*tmp_path.rglob("*.part")]


# ---- what a run has -----------------------------------------------------------------------------------


def test_a_finished_run_keeps_the_one_before_and_no_spare_room(run):
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert load_saved(run / "checkpoints/previous.ckpt")["global_step"] == 40


def test_a_checkpoint_holds_no_history_and_comes_with_it_when_read(run):
    path = run / "checkpoints/last.ckpt"
    assert "history" not in load_saved(path)["opsin"]
    history = read_checkpoint(path, history=True)["opsin"]["history"]
    assert history["train/loss"]["steps"].tolist() == [*range(5, 61, 5)]


def test_a_run_folder_can_be_moved(run, tmp_path):
    shutil.copytree(run, tmp_path / "moved")
    there = read_checkpoint(tmp_path / "moved/checkpoints/last.ckpt", history=True)["opsin"]
    assert Path(there["metrics"]["path"]) == tmp_path / "moved/metrics.csv"


def test_every_checkpoint_and_snapshot_knows_its_run_its_step_and_its_members(run):
    checkpoint = load_saved(run / "checkpoints/last.ckpt")
    digest = checkpoint["opsin"]["run"]["digest"]
    assert checkpoint["opsin"]["seeds"] == [0] and checkpoint["global_step"] == 60
    for path in (run / "snapshots").iterdir():
        snapshot = read_saved(path, "path")
        assert snapshot["run_digest"] == digest and snapshot["seeds"] == [0]
        assert path.name == f"step_{snapshot['step']:07d}.pt"


def test_the_size_of_a_checkpoint_does_not_grow_over_twenty_thousand_recorded_steps(tmp_path):
    history, sizes = History(4), {}
    history.declare("heads", {"layer": 2, "head": 2})
    history.keep_in(RunFolder(tmp_path))
    for step in range(1, 20_001):
        history.record("train/loss", step, np.full(2, step, np.float32))
        history.record("heads", step, np.ones((2, 2, 2), np.float32))
        if step in (10, 1_000, 20_000):
            content = {"global_step": step, "state_dict": {}, "opsin": history.for_checkpoint()}
            sizes[step] = write_checkpoint(tmp_path / "checkpoints/last.ckpt", content).stat().st_size
    assert max(sizes.values()) - min(sizes.values()) <= 64
    back = read_checkpoint(tmp_path / "checkpoints/last.ckpt", history=True)["opsin"]["history"]
    assert back["heads"]["values"].shape == (20_000, 2, 2, 2)


# ---- the one before -----------------------------------------------------------------------------------


def half(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_last_that_is_cut_off_is_named_and_the_one_before_takes_its_place(run, tmp_path, caplog):
    folder = shutil.copytree(run, tmp_path / "run")
    half(folder / "checkpoints/last.ckpt")
    assert recover_last(folder)["global_step"] == 40
    (line,) = [record.getMessage() for record in caplog.records]
    assert "last.ckpt" in line and "damaged" in line and "of step 40" in line
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "damaged.ckpt"}


def test_a_last_that_says_something_else_is_refused_once_and_the_one_before_takes_its_place(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    flip(folder / "checkpoints/last.ckpt")
    with pytest.raises(ConfigError, match=r"last.ckpt: damaged: its checksum differs.*the one before it, of step 40"):
        recover_last(folder)
    assert recover_last(folder)["global_step"] == 40


def test_a_last_that_is_missing_is_said_and_the_one_before_takes_its_place(run, tmp_path, caplog):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "checkpoints/last.ckpt").unlink()
    assert recover_last(folder)["global_step"] == 40 and "is missing" in caplog.text


@pytest.mark.parametrize("spoil", [half, flip])
def test_where_none_is_left_one_line_says_what_to_do(run, tmp_path, spoil):
    folder = shutil.copytree(run, tmp_path / "run")
    spoil(folder / "checkpoints/last.ckpt"), spoil(folder / "checkpoints/previous.ckpt")
    with pytest.raises(ConfigError, match=r"none is left: remove .*checkpoints, and `opsin resume .*` starts again"):
        recover_last(folder)


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert recover_last(tmp_path) is None


# ---- Lightning's own ways -----------------------------------------------------------------------------


def test_what_lightnings_model_checkpoint_writes_is_sealed_small_and_goes_on(tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "best", filename="{step}", every_n_train_steps=20, save_top_k=-1)
    train(module(), 40, KeepRun(tmp_path / "run"), saver)
    whole = train(module(), 60, KeepRun(tmp_path / "whole"))
    path = tmp_path / "best/step=20.ckpt"
    assert "history" not in read_checkpoint(path)["opsin"]
    resumed = train(module(), 60, KeepRun(tmp_path / "other"), resume=path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert (tmp_path / "other/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()


def test_without_a_run_folder_lightnings_checkpoints_hold_the_history_and_go_on(tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=20, save_top_k=-1)
    train(module(), 40, saver)
    resumed, whole = train(module(), 60, resume=tmp_path / "step=20.ckpt"), train(module(), 60)
    for name in whole.history.names():
        for one, other in zip(whole.history[name].arrays(), resumed.history[name].arrays(), strict=True):
            assert np.array_equal(one, other)


def test_a_damaged_checkpoint_stops_a_resume_in_python_too(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    flip(folder / "checkpoints/last.ckpt")
    with pytest.raises(DamagedError, match="its checksum differs"):
        train(module(), 80, resume=folder / "checkpoints/last.ckpt")
    with pytest.raises(DamagedError, match="its checksum differs"):
        OpsinModule.load_from_checkpoint(folder / "checkpoints/last.ckpt", task=few_shot())


def test_a_module_is_loaded_with_the_weights_shape_and_seeds_of_its_checkpoint(tmp_path):
    trained = train(module(seed=[3, 4]), 20, KeepRun(tmp_path))
    loaded = OpsinModule.load_from_checkpoint(tmp_path / "checkpoints/last.ckpt", task=few_shot())
    assert loaded.seeds == [3, 4] and loaded.network == SMALL
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), loaded.parameters(), strict=True))
