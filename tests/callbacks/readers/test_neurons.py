"""Claims about the neuron trackers: what they record is what the metrics say, and training does not notice."""

from __future__ import annotations

import json
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from opsin.callbacks import (
    Ablate,
    ActivationSparsity,
    Calibration,
    EntropyNeurons,
    KeepRun,
    StopWhen,
    TokenFrequencyNeurons,
    WeightsAndBiases,
)
from opsin.callbacks.readers import last_layer
from opsin.callbacks.readers.neurons import NeuronMeasurement
from opsin.callbacks.wandb import callback as wandb
from opsin.errors import ConfigError
from opsin.metrics.mean_ablation import mean_ablation_effects
from opsin.metrics.neuron_weights import ReadOut, logit_var, null_share, weight_norm
from opsin.model.transformer import Transformer
from opsin.training.module import OpsinModule
from opsin.training.observers import recorded_metrics
from tests.helpers.toys import ToyTokens, train

pytestmark = pytest.mark.usefixtures("elsewhere")
MODEL = Transformer(layers=2, width=8, heads=2, mlp_ratio=2.0)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Where runs without KeepRun leave their tables."""
    monkeypatch.chdir(tmp_path)


class Skewed(ToyTokens):
    """Says of itself that some outputs are rarer, one of them absent."""

    def unigram(self):
        return torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]) / 21


def module(seed=1, task=None, model=MODEL, **settings) -> OpsinModule:
    small = {"steps_per_batch": 10, "log_every": 5, "probe_size": 16, "learning_rate": 0.02, "compile": False}
    return OpsinModule(task or Skewed(), model, seed, **{**small, **settings})


def both(**settings):
    return [EntropyNeurons(**settings), TokenFrequencyNeurons(**settings)]


def neurons(folder, step, name="entropy_neurons") -> pd.DataFrame:
    """What the table of a run says of every neuron after a step: a row a member and neuron, a column a quantity."""
    frame = pd.read_csv(folder / "metrics.csv")
    frame = frame[frame.metric.str.startswith(f"{name}/neuron/") & (frame.step == step)]
    found = frame.assign(metric=frame.metric.str.removeprefix(f"{name}/neuron/"))
    return found.pivot(index=["member", "neuron"], columns="metric", values="value")


def test_the_table_holds_what_the_metrics_say_of_the_weights_at_that_step(tmp_path):
    model = train(module([1, 2]), 20, *both(every=10), KeepRun(tmp_path), Ablate(neurons=["0:3"]))
    sites = ["blocks.1.hook_resid_post", "blocks.1.mlp.hook_post"]
    scored = list(model.task.layout.scored)
    seen = model.observe(model.probe, sites)
    resid, post = (seen[site][:, :, scored] for site in sites)
    values = model.parameters_by_name()
    w_out, read_out = values["blocks.1.mlp.W_out"].detach(), ReadOut.of(values)
    effects = mean_ablation_effects(read_out, resid, post, w_out, targets=model.probe.targets)
    found = neurons(tmp_path, 20)
    assert [*found.index] == [(m, n) for m in range(2) for n in range(MODEL.neurons)]
    expected = {
        "weight_norm": weight_norm(w_out),
        "logit_var": logit_var(w_out, read_out),
        "rho": null_share(w_out, read_out).rho,
        "entropy_total": effects["entropy"].total,
        "entropy_mediated": effects["entropy"].mediated,
        "loss_direct": effects["loss"].direct,
        "loss_total_signed": effects["loss"].total_signed,
    }
    for name, column in expected.items():
        np.testing.assert_allclose(found[name], column.flatten(), rtol=1e-4, atol=1e-7, err_msg=name)
    assert model.history["entropy_neurons/total"].values[-1] == pytest.approx(effects["entropy"].total.amax(-1).numpy())


def test_a_neuron_that_is_held_at_its_overall_mean_has_no_effect_left(tmp_path):
    held = Ablate(neurons=["1:3", "1:7"], value="overall_mean")
    train(module([1, 2]), 20, EntropyNeurons(every=10, tables=0), held, KeepRun(tmp_path))
    total = neurons(tmp_path, 20)["entropy_total"].to_numpy().reshape(2, -1)
    assert (total[:, [3, 7]] < 1e-5).all() and (np.delete(total, [3, 7], 1) > 1e-4).mean() > 0.9


@pytest.mark.parametrize("rate", [1e20, 1e30])
def test_a_member_that_diverges_leaves_the_others_numbers_and_has_none(rate, tmp_path):
    both_of = {}
    for name, rates in (("alone", [1e-2, 1e-2]), ("beside", [1e-2, rate])):
        readers = [
            *both(every=5),
            Calibration(every=5, fit=["temperature", "vector"], fit_every=5),
            ActivationSparsity(),
        ]
        model = train(module([1, 2], learning_rate=rates), 20, *readers, KeepRun(tmp_path / name))
        both_of[name] = {metric: model.history[metric].values[-1] for metric in model.history.names()}
    for metric, values in both_of["beside"].items():
        assert np.array_equal(values[0], both_of["alone"][metric][0], equal_nan=True), metric
        if metric.startswith((*NAMES, "calibration/", "neurons/")) and not metric.endswith(OF_THE_WEIGHTS):
            assert np.isnan(values[1]).all(), metric


def test_the_control_is_put_through_the_same_rule(monkeypatch):
    model = module([1, 2])

    def one_that_the_unembedding_does_not_see(w_out, seed):
        left, _, _ = torch.linalg.svd(ReadOut.of(model.parameters_by_name()).effective().double())
        unseen = left[..., 6:] - left[..., 6:].mean(1, keepdim=True)  # of 8 directions, 6 differences of logits
        small = 1e-3 * w_out
        small[:, 0] = 3 * unseen[..., 0] + 3 * unseen[..., 1]
        return small

    train(model, 5, EntropyNeurons())
    assert model.history["entropy_neurons/control_candidates"].values[-1].tolist() == [0, 0]
    monkeypatch.setattr(last_layer, "random_outputs", one_that_the_unembedding_does_not_see)
    train(model := module([1, 2]), 5, EntropyNeurons())
    assert model.history["entropy_neurons/control_candidates"].values[-1].tolist() == [1, 1]


def test_tables_are_written_at_the_measurements_that_reach_log_spaced_steps_and_at_the_end(tmp_path):
    train(module(), 45, EntropyNeurons(every=4, tables=1), TokenFrequencyNeurons(every=30, tables=0), KeepRun(tmp_path))
    frame = pd.read_csv(tmp_path / "metrics.csv")
    written = {name: frame[frame.metric == f"{name}/neuron/rho"].step.unique().tolist() for name in NAMES}
    # log-spaced are 0, 1 and 10
    assert written == {"entropy_neurons": [0, 4, 12, 45], "token_frequency_neurons": [45]}


def test_a_run_that_ends_early_leaves_the_table_of_its_last_step(tmp_path):
    ends = StopWhen(below=99.0, in_a_row=4)
    model = train(module(), 500, EntropyNeurons(every=7, tables=0), ends, KeepRun(tmp_path))
    assert model.steps_done < 500
    assert [*model.history["entropy_neurons/neuron/rho"].steps] == [model.steps_done]
    assert len(neurons(tmp_path, model.steps_done)) == MODEL.neurons


NAMES = ("entropy_neurons", "token_frequency_neurons")
OF_THE_WEIGHTS = ("exact_entropy", "neuron/weight_norm", "neuron/logit_var", "neuron/rho")
"""Numbers that a diverged member may have, too."""


def test_a_member_s_state_is_that_of_its_single_run(tmp_path):
    callback = EntropyNeurons(every=5)
    train(module([1, 2]), 20, callback, KeepRun(tmp_path))
    part = callback.member_state(callback.state_dict(), 1)
    assert part["watches"] == [callback.state_dict()["watches"][1]]
    for which in ("columns", "numbers"):
        for name, values in callback.state_dict()["last"][which].items():
            assert torch.equal(part["last"][which][name], values[1:])


def replay(counts, every=10, members=1, last=None):
    """A run in which the measurements found so many candidates ``[n][members]``."""
    model, callback = module(list(range(members))), EntropyNeurons(every=every)
    callback.setup(SimpleNamespace(callbacks=[]), model, "fit")
    callback._module, callback._layer = model, 1
    for index, each in enumerate(counts):
        model.history.record("entropy_neurons/candidates", index * every, np.array(each))
        for member, count in enumerate(each):
            callback._update(member, index * every, count)
    return model, callback


def test_the_onset_is_the_first_of_lasting_measurements_with_a_candidate_and_is_announced_once():
    counts = [[0, 0]] * 4 + [[1, 0]] + [[0, 0]] * 3 + [[2, 0]] * 6 + [[0, 1], [0, 0], [0, 1]]
    model, callback = replay(counts, members=2)
    (event,) = model.events
    assert (event.kind, event.member, event.step) == ("entropy neurons", 0, 100)
    assert "in member 0: a candidate lasts since 320 sequences (noticed at 400)" in event.message
    assert callback._onset(0) == {"value": 8 * 40.0, "low": 7 * 40.0, "high": 8 * 40.0}
    assert callback._onset(1) is None


def test_a_candidate_from_the_first_measurement_on_has_no_earlier_bound():
    assert replay([[1]] * 3)[1]._onset(0) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_the_summary_names_the_candidates_strongest_first_as_ablate_takes_them():
    _, callback = replay([[2]] * 3)
    row = {"weight_norm": 1.0, "logit_var": 0.1, "rho": 0.9, "entropy_direct": 0.0, "entropy_mediated": 1.0}
    columns = {name: torch.full((1, 4), value) for name, value in row.items()}
    columns["candidate"] = torch.tensor([[False, True, False, True]])
    columns["entropy_total"] = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    numbers = {f"control_{name}": torch.tensor([0.5]) for name in ("candidates", "total")}
    numbers["control_mediated"] = torch.tensor([torch.nan])
    found = callback._member_summary(NeuronMeasurement(20, columns, numbers), 0)
    assert [each["neuron"] for each in found["candidates"]] == ["1:3", "1:1"]
    assert found["candidates"][0]["total"] == 2.0 and found["control_mediated"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_is_recorded_is_what_is_said_to_be():
    callbacks = both(every=5)
    model = train(module(), 5, *callbacks)
    said = recorded_metrics(callbacks, model.sites, model.task, validates=False)
    found = {name for name in model.history.names() if name.startswith(NAMES)}
    assert found == {name for name in said if name.startswith(NAMES)} and len(found) == 8 + 6 + 2 * 19


def test_a_run_that_goes_on_with_the_tracker_keeps_its_numbers_and_gains_a_column(tmp_path):
    train(module(), 10, KeepRun(tmp_path))
    before = pd.read_csv(tmp_path / "metrics.csv")
    checkpoint = str(tmp_path / "checkpoints" / "last.ckpt")
    model = train(module(), 20, EntropyNeurons(every=10), KeepRun(tmp_path), resume=checkpoint)
    after = pd.read_csv(tmp_path / "metrics.csv")
    assert [*after.columns] == [*before.columns[:-1], "neuron", "value"]
    pd.testing.assert_frame_equal(after[before.columns].head(len(before)), before, check_dtype=False)
    assert len(neurons(tmp_path, 20)) == MODEL.neurons and model.history["train/loss"].steps[-1] == 20


def test_without_a_unigram_entropy_neurons_leave_the_divergence_out_and_the_others_refuse(tmp_path):
    train(module(task=ToyTokens()), 5, EntropyNeurons(every=5), KeepRun(tmp_path / "plain"))
    train(module(), 5, EntropyNeurons(every=5), KeepRun(tmp_path / "skewed"))
    plain, skewed = (neurons(tmp_path / name, 5) for name in ("plain", "skewed"))
    assert not any(name.startswith("kl") for name in plain)
    assert np.isfinite(skewed[["kl_total", "kl_direct"]]).to_numpy().all()
    with pytest.raises(
        ConfigError, match="TokenFrequencyNeurons: got 'ToyTokens, all of whose outputs are as frequent'"
    ):
        train(module(task=ToyTokens()), 5, TokenFrequencyNeurons())


@pytest.mark.parametrize("bias", [True, False])
def test_a_read_out_with_and_without_a_bias_is_measured(bias, tmp_path):
    model = Transformer(**{**vars(MODEL), "unembed_bias": bias})
    train(module(model=model), 5, *both(every=5), KeepRun(tmp_path))
    assert len(neurons(tmp_path, 5)) == MODEL.neurons


def test_the_figure_has_a_panel_for_each_of_the_first_members(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = []
    for seeds in ([1], [1, 2], [1, 2, 3, 4, 5]):
        train(module(seeds), 1, EntropyNeurons(tables=0))
        with Image.open("entropy_neurons.png") as image:
            assert len(image.getcolors(1 << 20)) > 20
            sizes.append(image.width)
    panel = sizes[1] - sizes[0]
    assert panel > 0 and abs(sizes[2] - sizes[0] - 3 * panel) <= 3


class Sent:
    """A W&B run that keeps what it is sent."""

    def __init__(self, about) -> None:
        self.id, self.rows, self.summary, self.offline, self.dir = about["id"], [], {}, False, "files"

    def define_metric(self, *_, **__):
        pass

    def log(self, row, step, commit):
        self.rows.append(row)

    def finish(self, exit_code):
        self.exit_code = exit_code


def test_weights_and_biases_receives_the_newest_picture_of_every_member(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(wandb, "start", lambda mode, files, about: runs.extend(map(Sent, about)) or runs)
    watcher = WeightsAndBiases(mode="offline", pictures=1)
    train(module([1, 2]), 20, *both(every=5), KeepRun(tmp_path), watcher)
    assert [run.exit_code for run in runs] == [0, 0]
    for name, run in product(NAMES, runs):
        pictures = {row["step"]: row[name] for row in run.rows if name in row}
        assert sorted(pictures) == [10, 20]
        assert all(type(picture).__name__ == "Image" for picture in pictures.values())


@pytest.mark.parametrize(
    ("make", "model", "message"),
    [
        (lambda: EntropyNeurons(every=0), MODEL, "EntropyNeurons.every: got 0"),
        (lambda: TokenFrequencyNeurons(tables=-1), MODEL, "TokenFrequencyNeurons.tables: got -1"),
        (lambda: EntropyNeurons(null_dimensions=8), MODEL, "EntropyNeurons.null_dimensions: got 8, expected 0 to 7"),
        (EntropyNeurons, Transformer(width=8, heads=2), "EntropyNeurons: got 'a model without MLPs'"),
        (
            TokenFrequencyNeurons,
            Transformer(width=8, heads=2, mlp_ratio=2.0, norm=False),
            "TokenFrequencyNeurons: got 'a model without LayerNorm'",
        ),
    ],
)
def test_what_cannot_be_measured_stops_the_run_before_it_starts(make, model, message):
    with pytest.raises(ConfigError, match=message):
        train(module(model=model), 5, make())
