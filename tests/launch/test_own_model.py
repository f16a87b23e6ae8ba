"""A model of the user's own, in one file outside the package, does from YAML what the package's models do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml

from opsin.cli import main
from opsin.interventions.donors import read_donor
from tests.launch.test_fork import TASK

MODULE = '''
from dataclasses import dataclass

import torch

from opsin import Initial, Intervention, Model, Parameter, ParameterTable, ProbeReader, SiteTable, site_table


@dataclass(frozen=True)
class Bag(Model):
    """Adds up what stands before a position, channel by channel."""

    width: int = 6

    def parameters(self, task):
        normal = Initial("normal", 0.3)
        return ParameterTable((
            Parameter("embed.W_E", (task.n_tokens, self.width), normal, "embed", "TD"),
            Parameter("embed.W_F", (task.n_features, self.width), normal, "embed", "FD", trained=False),
            Parameter("unembed.W_U", (self.width, task.n_outputs), normal, "unembed", "DV"),
        ))

    def sites(self, task):
        rows = [("hook_embed", "MBLD", "vectors"), ("bag.hook_sum", "MBLD", "their sum")]
        rows.append(("hook_logits", "MBLV", "logits"))
        sizes = {"L": task.layout.positions, "D": self.width, "V": task.n_outputs}
        return site_table(rows, sizes, self.parameters(task))

    def forward(self, parameters, table, batch, tap=lambda name, x: x):
        member = torch.arange(len(batch.tokens))[:, None, None]
        tokens = parameters["embed.W_E"][member, batch.tokens]
        features = torch.einsum("mblf,mfd->mbld", batch.features, parameters["embed.W_F"])
        order = [(*batch.layout.features, *batch.layout.tokens).index(p) for p in range(batch.layout.positions)]
        x = tap("hook_embed", torch.cat([features, tokens], 2)[:, :, order])
        x = tap("bag.hook_sum", x.cumsum(2))
        return tap("hook_logits", torch.einsum("mbld,mdv->mblv", x, parameters["unembed.W_U"]))


class SizeOfSum(ProbeReader):
    """Records the largest entry of the sum."""

    def __init__(self, every: int = 5) -> None:
        super().__init__(every)

    def sites(self, table):
        return ["bag.hook_sum"]

    def records(self, sites):
        return {"size_of_sum": {}}

    def measure(self, seen):
        size = seen.activations["bag.hook_sum"].abs().flatten(1).amax(1)
        self._module.record(seen.step, {"size_of_sum": size})
'''

CLAMP = {
    "class_path": "opsin.callbacks.Clamp",
    "init_args": {"site": "bag.hook_sum", "value": 0.5, "positions": [1], "schedule": {"start": 5, "stop": 15}},
}
STAY = {"class_path": "opsin.callbacks.Freeze", "init_args": {"weights": ["unembed.W_U"], "schedule": {"start": 10}}}


def recipe(**model):
    settings = {"steps_per_batch": 5, "log_every": 5, "probe_size": 8, "evaluation_size": 8, "compile": False}
    callbacks = [{"class_path": "own_bag.SizeOfSum"}, {"class_path": "opsin.callbacks.Snapshots"}, CLAMP, STAY]
    return {
        "task": TASK,
        "model": {"network": {"class_path": "own_bag.Bag", "init_args": {"width": 4}}, **settings, **model},
        "trainer": {"max_steps": 20, "val_check_interval": 2, "enable_progress_bar": False, "callbacks": callbacks},
        "checkpoint_every": 10,
    }


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a recipe and returns the arguments that train it."""
    (tmp_path / "own_bag.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    # a fork trains in processes of its own
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def arguments(**model):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(**model)))
        return ["--config", str(tmp_path / "recipe.yaml")]

    return arguments


def test_it_trains_and_is_clamped_watched_frozen_and_written_down(own, tmp_path):
    folder = tmp_path / "run"
    assert main(["fit", *own(seed=[3, 5]), "--run_folder", str(folder)]) == 0
    assert (folder / "metrics.csv").read_text().count("size_of_sum") == 2 * 5
    shots = {path.name: torch.load(path, weights_only=True) for path in (folder / "snapshots").iterdir()}
    first, last = shots["step_0000000.pt"], shots["step_0000020.pt"]
    assert last["network"] == {"class_path": "own_bag.Bag", "init_args": {"width": 4}}
    assert torch.equal(first["parameters"]["embed.W_F"], last["parameters"]["embed.W_F"])
    assert not torch.equal(first["parameters"]["embed.W_E"], last["parameters"]["embed.W_E"])
    donor = read_donor("Graft", folder, member=1)
    assert donor.sizes.n_outputs == last["parameters"]["unembed.W_U"].shape[-1]
    np.testing.assert_array_equal(donor.parameters["embed.W_E"][0], last["parameters"]["embed.W_E"][1])


def test_it_is_resumed_and_forked(own, tmp_path):
    folder, branch = tmp_path / "run", tmp_path / "branch"
    assert main(["fit", *own(), "--run_folder", str(folder)]) == 0
    assert main(["fork", str(folder), "--at", "10", "--run_folder", str(branch)]) == 0
    ended = [torch.load(next(path.rglob("last.ckpt")), weights_only=True) for path in (folder, branch)]
    assert ended[0]["opsin"]["network"] == ended[1]["opsin"]["network"]
    for name, x in ended[0]["state_dict"].items():
        assert torch.equal(x, ended[1]["state_dict"][name]), name


def test_its_parameters_stand_beside_its_sites(own, capsys):
    assert main(["sites", *own()]) == 0
    text = capsys.readouterr().out
    assert "bag.hook_sum" in text and "embed.W_F" in text and " no" in text.split("embed.W_F")[1].splitlines()[0]


@pytest.mark.parametrize(
    ("callback", "line"),
    [
        ({"class_path": "opsin.callbacks.InductionHeads"}, "InductionHeads: got 'a model without blocks.0.attn.hook"),
        ({"class_path": "opsin.callbacks.Ablate", "init_args": {"heads": ["0:0"]}}, "this model has no heads"),
        ({"class_path": "opsin.callbacks.Clamp", "init_args": {"site": "bag.hook_summ", "value": 0}}, "bag.hook_sum"),
        ({"class_path": "opsin.callbacks.Freeze", "init_args": {"weights": ["embed.W_F"]}}, "a weight that is trained"),
    ],
)
def test_what_it_does_not_have_is_refused_by_name(own, tmp_path, capsys, callback, line):
    arguments = own()
    settings = recipe()
    settings["trainer"]["callbacks"] = [callback]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", *arguments, "--run_folder", str(tmp_path / "run")]) == 2
    assert line in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_two_models_are_refused(own, tmp_path, capsys):
    assert main(["fit", *own(transformer={"layers": 3}), "--run_folder", str(tmp_path / "run")]) == 2
    assert "model.transformer" in capsys.readouterr().err
