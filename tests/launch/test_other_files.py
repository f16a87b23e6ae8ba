"""Claims about files that are no checkpoint, snapshot or run folder, given where one is wanted.

Each is refused in one line that names the setting and the file, and nothing in them is run.
"""

import gzip
import io
import os
import pickle
import tarfile
import warnings
import zipfile
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.callbacks import Graft
from opsin.errors import ConfigError
from opsin.interventions.donors import Start
from opsin.launch.fit import check_fits
from opsin.model.protocol import init_parameters
from opsin.model.transformer import Transformer
from opsin.records.checkpoint import read_checkpoint
from opsin.tasks import ArrayFile, Omniglot
from opsin.training.module import OpsinModule
from tests.helpers.toys import SMALL, few_shot

RECIPE = """
task:
  class_path: opsin.tasks.FewShot
  init_args:
    batch_size: 4
    train_classes: 8
    exemplars: {class_path: opsin.tasks.GaussianClusters, init_args: {classes: 12, exemplars: 2, features: 8}}
model: {transformer: {width: 8, heads: 2}, steps_per_batch: 5, log_every: 5, probe_size: 4, evaluation_size: 4}
trainer: {max_steps: 10, limit_val_batches: 0, enable_progress_bar: false}
"""


class RunsWhenUnpickled:
    """Ends the process of whoever unpickles it."""

    def __reduce__(self):
        return os._exit, (13,)


def picture(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, kind)
    return buffer.getvalue()


def zipped(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name, content in files.items():
            out.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def tarred():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        out.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    return buffer.getvalue()


def torch_file(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def scripted():
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def numpy_file(save, *arrays, **options):
    buffer = io.BytesIO()
    save(buffer, *arrays, **options)
    return buffer.getvalue()


WEIGHTS = init_parameters(SMALL, few_shot(), [1])
SNAPSHOT = {"step": 0, "sequences": 0, "transformer": asdict(SMALL), "parameters": WEIGHTS}
WHOLE = torch_file(SNAPSHOT)
CONTENTS = {
    "empty": b"",
    "one_byte": b"\x80",
    "nuls": b"\0" * 4096,
    "noise": np.random.default_rng(0).bytes(4096),
    "text": b"once upon a time\n" * 40,
    "utf_16": ("once upon a time\n" * 40).encode("utf-16"),
    "yaml": RECIPE.encode(),
    "json": b'{"transformer": {}, "parameters": {}, "opsin": {}}',
    "csv": b"step,sequences,metric,member,layer,head,value\n0,0,train/loss,0,,,1.0\n",
    "python": b"import os\nos._exit(13)\n",
    "shell": b"#!/bin/sh\nexit 13\n",
    "html": b"<!doctype html><title>404</title>" * 20,
    "git_lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "jpeg": picture("JPEG"),
    "png": picture("PNG"),
    "gif": picture("GIF"),
    "pdf": b"%PDF-1.7\n" + b"\0" * 99,
    "elf": b"\x7fELF" + b"\0" * 99,
    "gzip": gzip.compress(WHOLE),
    "tar": tarred(),
    "zip_of_nothing": zipped(),
    "zip_of_text": zipped(readme=b"once upon a time"),
    "zip_of_a_broken_pickle": zipped(
        archive__data=b"", **{"archive__data.pkl": b"\x80\x02}q", "archive__version": b"3"}
    ),
    "zip_of_code": zipped(**{"archive__data.pkl": pickle.dumps(RunsWhenUnpickled(), 2), "archive__version": b"3\n"}),
    "safetensors": (2).to_bytes(8, "little") + b"{}",
    "npy": numpy_file(np.save, np.ones((2, 2))),
    "npy_of_code": numpy_file(np.save, np.array([RunsWhenUnpickled()], object), allow_pickle=True),
    "npz": numpy_file(np.savez, np.ones((2, 2))),
    "h5": b"\x89HDF\r\n\x1a\n" + b"\xff" * 99,
    "pickled_dict": pickle.dumps({"transformer": {}, "parameters": {}, "opsin": {}}),
    "pickled_code_0": pickle.dumps(RunsWhenUnpickled(), 0),
    "pickled_code_2": pickle.dumps(RunsWhenUnpickled(), 2),
    "pickled_code_5": pickle.dumps(RunsWhenUnpickled(), 5),
    "torch_code": torch_file({"opsin": RunsWhenUnpickled(), "transformer": {}, "parameters": {}}),
    "torch_code_of_old": torch_file([RunsWhenUnpickled()], _use_new_zipfile_serialization=False),
    "torch_module": torch_file(torch.nn.Linear(2, 2)),
    "torch_script": scripted(),
    "torch_tensor": torch_file(torch.ones(3)),
    "torch_list": torch_file([SNAPSHOT]),
    "torch_number": torch_file(3),
    "torch_none": torch_file(None),
    "torch_empty": torch_file({}),
    "torch_weights": torch_file(WEIGHTS),
    "torch_of_old": torch_file(WEIGHTS, _use_new_zipfile_serialization=False),
    "lightning": torch_file(
        {"state_dict": WEIGHTS, "global_step": 3, "epoch": 0, "pytorch-lightning_version": "2.6.6"}
    ),
    "tuple_keys": torch_file({("opsin",): 1, 3: 4}),
    "opsin_is_a_list": torch_file({"opsin": ["transformer"], "state_dict": []}),
    "opsin_is_empty": torch_file({"opsin": {}, "state_dict": {}, "global_step": 0}),
    "first_quarter": WHOLE[: len(WHOLE) // 4],
    "half": WHOLE[: len(WHOLE) // 2],
    "all_but_a_byte": WHOLE[:-1],
    "last_half": WHOLE[len(WHOLE) // 2 :],
}
PLACES = {
    "folder": os.mkdir,
    "missing": lambda path: None,
    "pipe": os.mkfifo,
    "device": lambda path: os.symlink("/dev/zero", path),
    "circle": lambda path: os.symlink(path, path),
}
NAMES = [*CONTENTS, *PLACES]


def test_there_are_at_least_fifty_of_them():
    assert len(NAMES) >= 50


def put(name, path):
    if name in CONTENTS:
        path.write_bytes(CONTENTS[name])
    else:
        PLACES[name](path)
    return path


def line(caught):
    text = str(caught.value)
    assert "\n" not in text and len(text) < 900, text
    return text


def refused(field, path, build):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError) as caught:
            build(str(path))
    assert line(caught).startswith(f"{field}: got ") and path.name in line(caught)


def initial(path):
    return OpsinModule(few_shot(), SMALL, initial=[Start(path)])


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_no_checkpoint_or_snapshot_is_no_donor_and_no_start(name, tmp_path):
    path = put(name, tmp_path / "other.pt")
    refused("Graft.donor", path, lambda path: Graft(path, 0))
    refused("model.initial.donor", path, initial)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_no_checkpoint_does_not_begin_a_run(name, tmp_path, opsin):
    put(name, tmp_path / "other.ckpt")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    before = sorted(os.listdir(tmp_path))
    ended = opsin("fit", "--config", "tiny.yaml", "--run_folder", "run", "--ckpt_path", "other.ckpt")
    assert ended.code == 2 and ended.out == ""
    assert ended.err.startswith("opsin: ckpt_path: got 'other.ckpt', expected ") and ended.err.count("\n") == 1, (
        ended.err
    )
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", ["zip", "npz", "h5"])
def test_a_file_that_is_no_archive_is_no_exemplars(name, suffix, tmp_path):
    path = put(name, tmp_path / f"other.{suffix}")
    if (name, suffix) in {("npz", "npz")}:
        refused("ArrayFile.dataset", path, lambda path: ArrayFile(path).load())
        return
    field = "Omniglot.archives" if suffix == "zip" else "ArrayFile."
    with pytest.raises(ConfigError, match=rf"^{field}.*got .*other\.{suffix}") as caught:
        Omniglot([str(path)]).load() if suffix == "zip" else ArrayFile(str(path)).load()
    line(caught)


# ---- files that begin like one ----------------------------------------------------------------------


def changed(**entries):
    """A snapshot with some entries changed; a function gets what was there."""
    snapshot = deepcopy(SNAPSHOT)
    for name, entry in entries.items():
        snapshot[name] = entry(snapshot[name]) if callable(entry) else entry
    return snapshot


def weights(**parameters):
    """A snapshot with some parameters changed; None takes one away."""
    values = dict(WEIGHTS)
    for name, value in parameters.items():
        name = name.replace("__", ".")
        values[name] = value(values[name]) if callable(value) else value
        if value is None:
            del values[name]
    return changed(parameters=values)


def shaped(**settings):
    return changed(transformer=lambda shape: shape | settings)


SNAPSHOTS = {
    "no_transformer": {name: entry for name, entry in SNAPSHOT.items() if name != "transformer"},
    "no_parameters": {name: entry for name, entry in SNAPSHOT.items() if name != "parameters"},
    "parameters_are_none": changed(parameters=None),
    "parameters_are_a_list": changed(parameters=[WEIGHTS]),
    "parameters_are_one_tensor": changed(parameters=torch.ones(3)),
    "parameters_are_empty": changed(parameters={}),
    "transformer_is_none": changed(transformer=None),
    "transformer_is_text": changed(transformer="small"),
    "unknown_setting": shaped(depth=2),
    "number_as_text": shaped(layers="2"),
    "number_as_list": shaped(width=[8]),
    "number_as_nothing": shaped(heads=None),
    "flag_as_text": shaped(norm="yes"),
    "ratio_as_text": shaped(mlp_ratio="4"),
    "ratio_not_a_number": shaped(mlp_ratio=float("nan")),
    "ratio_infinite": shaped(mlp_ratio=float("inf")),
    "unknown_positions": shaped(positions="alibi"),
    "heads_do_not_divide": shaped(heads=3),
    "more_blocks": shaped(layers=3),
    "very_many_blocks": shaped(layers=10**15),
    "very_wide": shaped(width=2 * 10**15),
    "many_neurons": shaped(mlp_ratio=1e12),
    "fewer_blocks": shaped(layers=1),
    "no_blocks": shaped(layers=0),
    "learned_positions": shaped(positions="learned"),
    "one_missing": weights(ln_final__w=None),
    "embedding_missing": weights(embed__W_E=None),
    "read_out_missing": weights(unembed__W_U=None),
    "one_more": weights(more=torch.ones(1, 2)),
    "other_shape": weights(ln_final__w=lambda x: x[:, :-1]),
    "no_axes": weights(unembed__W_U=torch.tensor(1.0)),
    "other_members": weights(ln_final__w=lambda x: x.expand(2, -1)),
    "no_members": changed(parameters=lambda values: {name: x[:0] for name, x in values.items()}),
    "whole_numbers": weights(ln_final__w=lambda x: x.long()),
    "complex": weights(ln_final__w=lambda x: x + 0j),
    "eight_bits": weights(ln_final__w=lambda x: x.to(torch.float8_e4m3fn)),
    "half_of_brains": changed(parameters=lambda values: {name: x.bfloat16() for name, x in values.items()}),
    "sparse": weights(embed__W_E=lambda x: x.to_sparse()),
    "nowhere": weights(embed__W_E=lambda x: x.to("meta")),
    "one_number_for_many": weights(embed__W_E=torch.ones(1).expand(1, 2**40, 8)),
    "number_for_tensor": weights(ln_final__w=1.0),
    "list_for_tensor": weights(ln_final__w=[1.0]),
    "not_a_number": weights(ln_final__w=lambda x: x * torch.nan),
    "infinite": weights(ln_final__b=lambda x: x + torch.inf),
    "another_vocabulary": weights(embed__W_E=lambda x: torch.cat([x, x], 1)),
    "another_feature": weights(embed__W_F=lambda x: x[:, :-1]),
    "other_outputs": weights(unembed__W_U=lambda x: x[..., :-1], unembed__b_U=lambda x: x[..., :-1]),
}


def planned(path):
    """A run with a donor that fits its own file, and not the task, is refused when its plan is built."""
    OpsinModule(few_shot(), SMALL).plan_for([Graft(path, 0)], 10)


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_a_snapshot_that_no_run_has_written_is_no_donor_and_no_start(name, tmp_path):
    path = tmp_path / "step.pt"
    torch.save(SNAPSHOTS[name], path)
    refused("Graft.donor", path, planned)
    with pytest.raises(ConfigError, match=r"^model\.initial\.donor: got .*step\.pt") as caught:
        initial(str(path))
    line(caught)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_another_precision_are_weights(dtype, tmp_path):
    torch.save(changed(parameters={name: x.to(dtype) for name, x in WEIGHTS.items()}), tmp_path / "step.pt")
    planned(str(tmp_path / "step.pt"))
    started = initial(str(tmp_path / "step.pt")).parameters_by_name()
    assert all(torch.equal(started[name], x.to(dtype).float()) for name, x in WEIGHTS.items())


@pytest.mark.parametrize(
    "shape",
    [SMALL, Transformer(1, 8, 2, 4.0, positions="learned", unembed_bias=False), Transformer(3, 8, 2, norm=False)],
)
def test_a_snapshot_of_every_shape_of_model_is_a_start(shape, tmp_path):
    values = init_parameters(shape, few_shot(), [3, 4])
    torch.save({"transformer": asdict(shape), "parameters": values}, tmp_path / "step.pt")
    module = OpsinModule(few_shot(), shape, initial=[Start(str(tmp_path / "step.pt"), 1)])
    assert all(torch.equal(x, values[name][1:]) for name, x in module.parameters_by_name().items())


# ---- checkpoints that no run has written ------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The checkpoint of a finished run."""
    from opsin.cli import main

    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(RECIPE)
    assert main(["fit", "--config", str(folder / "tiny.yaml"), "--run_folder", str(folder / "run")]) == 0
    return read_checkpoint(folder / "run/checkpoints/last.ckpt", history=True)


def at(content, way):
    for key in way[:-1]:
        content = content[key]
    return content, way[-1]


WAYS = [
    ("epoch",),
    ("global_step",),
    ("state_dict",),
    ("state_dict", "members.ln_final.w"),
    ("loops",),
    ("loops", "fit_loop"),
    ("loops", "fit_loop", "epoch_loop.batch_progress"),
    ("callbacks",),
    ("optimizer_states",),
    ("optimizer_states", 0),
    ("optimizer_states", 0, "state"),
    ("optimizer_states", 0, "state", 3),
    ("optimizer_states", 0, "state", 3, "exp_avg"),
    ("optimizer_states", 0, "param_groups"),
    ("lr_schedulers",),
    ("opsin",),
    ("opsin", "events"),
    ("opsin", "plan"),
    ("opsin", "control"),
    ("opsin", "control", "fired"),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
@pytest.mark.parametrize("how", ["missing", "nothing", "text", "wrong_tensor"])
def test_a_checkpoint_with_a_part_that_is_none_is_refused_before_anything_is_made(way, how, checkpoint, tmp_path):
    spoilt = deepcopy(checkpoint)
    parent, key = at(spoilt, way)
    if how == "missing":
        del parent[key]
    else:
        parent[key] = {"nothing": None, "text": "text", "wrong_tensor": torch.ones(3, dtype=torch.int64)}[how]
    if way == ("opsin", "plan") and how == "text":
        pytest.skip("a plan is a text: that of another plan is refused where plans are compared")
    if way == ("opsin", "control", "fired") and how == "wrong_tensor":
        pytest.skip("counts are a tensor: those of another plan are refused where plans are compared")
    torch.save(spoilt, tmp_path / "last.ckpt")
    module = OpsinModule(few_shot(batch_size=4, train_classes=8), SMALL)
    refused("ckpt_path", tmp_path / "last.ckpt", lambda path: check_fits(Path(path), module))


def test_the_checkpoint_of_another_model_is_refused_by_its_first_tensor(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "last.ckpt")
    check_fits(tmp_path / "last.ckpt", OpsinModule(few_shot(), SMALL))
    with pytest.raises(ConfigError, match=r"blocks\.2\.attn\.W_O of shape \(1, 8, 8\) as in this model; it has None"):
        check_fits(tmp_path / "last.ckpt", OpsinModule(few_shot(), Transformer(3, 8, 2)))


@pytest.mark.parametrize("name", ["circle", "pipe", "device", "missing"])
@pytest.mark.parametrize(
    "verb",
    [
        ["resume", "other"],
        ["fork", "other", "--at", "5"],
        ["fork", "run", "--at", "5", "--config", "other"],
        ["fit", "--config", "other"],
        ["fit", "--config", "tiny.yaml", "--run_folder", "other"],
    ],
    ids=" ".join,
)
def test_what_is_no_file_or_folder_is_refused_in_one_line_by_every_verb(name, verb, tmp_path, opsin):
    if name == "missing" and verb[-2] == "--run_folder":
        pytest.skip("a run folder that is missing is made")
    put(name, tmp_path / "other")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(RECIPE.replace("steps_per_batch", "seed: 0, steps_per_batch"))
    before = sorted(os.listdir(tmp_path))
    ended = opsin(*verb)
    assert ended.code == 2 and ended.err.startswith("opsin: ") and ended.err.count("\n") == 1, ended
    assert "other" in ended.err
    assert sorted(os.listdir(tmp_path)) == before
