"""Claims about the case study: what it draws is what the model does, and training does not notice."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from opsin.callbacks import Ablate, ConfidenceStudy, EntropyNeurons, KeepRun, WeightsAndBiases
from opsin.callbacks.readers.confidence_study import _halves
from opsin.callbacks.wandb import callback as wandb
from opsin.errors import ConfigError
from opsin.figures.confidence import confidence_figure
from opsin.model.transformer import Transformer
from opsin.tasks import Characters, Repeats
from opsin.training.module import OpsinModule
from tests.callbacks.readers.test_neurons import Sent
from tests.helpers.toys import ToyTokens, train

MODEL = Transformer(layers=2, width=12, heads=2, mlp_ratio=2.0)
N = MODEL.neurons
POST = "blocks.1.mlp.hook_post"


def task():
    return Repeats(vocabulary=5, positions=12, batch_size=4, segments=1, shortest=2, longest=5)


def module(seed=1, data=None, model=MODEL, **settings) -> OpsinModule:
    small = {"steps_per_batch": 10, "log_every": 5, "probe_size": 16, "evaluation_size": 16, "learning_rate": 0.02}
    return OpsinModule(data or task(), model, seed, **{**small, "compile": False, **settings})


def with_entropy_neurons(*neurons) -> OpsinModule:
    """Weak neurons, but for some that write where the unembedding does not see and the residual stream already is."""
    # of so many neurons one in a hundred is more than the few that are planted
    model = module(model=Transformer(**{**vars(MODEL), "mlp_ratio": 40.0}), learning_rate=1e-9)
    values = dict(model.members.named_parameters())
    seen = torch.cat([values["unembed.W_U"][0], torch.ones(12, 1)], 1)
    unseen = torch.linalg.svd(seen, full_matrices=True)[0][:, -1]
    with torch.no_grad():
        values["unembed.W_U"].mul_(6)
        values["blocks.1.mlp.W_out"].mul_(0.05)
        values["blocks.1.mlp.b_out"].copy_(6 * unseen)
        values["blocks.1.mlp.W_out"][0, list(neurons)] = 3 * unseen
    return model


def table(folder, metric):
    """One quantity of the study as the table of the run has it: an array with an axis of members first."""
    frame = pd.read_csv(folder / "metrics.csv").query(f"metric == 'confidence/{metric}'")
    axes = ["member", *(name for name in ("neuron", "position") if frame[name].notna().any())]
    sizes = [int(frame[name].max()) + 1 for name in axes]
    return frame.sort_values(axes).value.to_numpy().reshape(sizes)


def plain(model, change=lambda name, x: x):
    """Logits and the last neurons' activations on the evaluation set, by a pass of the current weights."""
    seen = {}

    def tap(name, x):
        seen[name] = change(name, x)
        return seen[name]

    with torch.no_grad():
        values = model.parameters_by_name()
        logits = model.network.forward(values, model.constants.table, model.evaluation_set("repeated"), tap)
    return logits, seen


def entropies(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


def test_loss_entropy_and_activations_are_those_of_a_plain_pass_at_every_position(tmp_path):
    model = train(module([1, 2]), 20, ConfidenceStudy(top=N, draws=1), KeepRun(tmp_path))
    logits, seen = plain(model)
    targets = model.evaluation_set("repeated").targets
    loss = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert table(tmp_path, "loss") == pytest.approx(loss.mean(1).numpy(), abs=1e-5)
    assert table(tmp_path, "entropy") == pytest.approx(entropies(logits).mean(1).numpy(), abs=1e-5)
    assert table(tmp_path, "activation") == pytest.approx(seen[POST].mean(1).mT.numpy(), abs=1e-5)


def test_a_change_is_that_of_the_repeated_half_when_neurons_are_held_at_their_mean_of_the_first(tmp_path):
    study = ConfidenceStudy(top=3, draws=2)
    model = train(module([1, 2]), 20, study, KeepRun(tmp_path))
    each, together = table(tmp_path, "total_value"), table(tmp_path, "all/total_value")
    before = entropies(plain(model)[0])
    for m in range(2):
        neurons = study._studies[m].neurons
        assert len(neurons) == 3 and {*np.flatnonzero(np.isfinite(each[m])).tolist()} == {*neurons}
        for found, group in [(each[m, n], [n]) for n in neurons] + [(together[m], list(neurons))]:

            def held(site, x, group=group):
                if site == POST:
                    x = x.clone()
                    x[..., group] = x[:, :, :6, group].mean((1, 2), keepdim=True)
                return x

            change = (entropies(plain(model, held)[0]) - before)[m, :, 6:].mean().item()
            assert found == pytest.approx(change, abs=1e-5)


def test_activations_are_those_under_the_interventions_in_force(tmp_path):
    train(module(), 10, ConfidenceStudy(top=N, draws=1), KeepRun(tmp_path), Ablate(neurons=["1:3"]))
    assert np.flatnonzero((table(tmp_path, "activation")[0] == 0).any(1)).tolist() == [3]


def test_candidates_are_those_of_the_entropy_tracker_and_all_are_ablated_together(tmp_path):
    model = train(with_entropy_neurons(4, 9), 1, EntropyNeurons(), ConfidenceStudy(top=1, draws=3), KeepRun(tmp_path))
    tracked = [row["neuron"] for row in model.summary["entropy_neurons"]["candidates"]]
    assert set(tracked[:2]) == {"1:4", "1:9"}
    summary = model.summary["confidence"]
    assert summary["candidates"] is True
    changes = {row["neurons"]: row for row in summary["entropy_change"]}
    assert list(changes) == [*tracked, "all"]
    for name in ("1:4", "1:9"):
        assert abs(changes[name]["direct"]["value"]) < 1e-5 < 1e-4 < abs(changes[name]["total"]["value"])
    chosen = [int(name.removeprefix("1:")) for name in tracked]
    assert np.flatnonzero(table(tmp_path, "candidate")[0]).tolist() == sorted(chosen)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_without_candidates_the_nearest_are_shown_and_called_so(tmp_path):
    study = ConfidenceStudy(top=2, draws=3)
    model = train(module(learning_rate=1e-9), 1, EntropyNeurons(), study, KeepRun(tmp_path))
    assert model.summary["entropy_neurons"]["candidates"] == []
    assert model.summary["confidence"]["candidates"] is False
    assert [len(change.neurons) for change in study._studies[0].changes] == [1, 1, 2]
    assert not table(tmp_path, "candidate").any()
    titles = [axes.get_title(loc="left") for axes in confidence_figure(study._studies, [""], 1, "").axes]
    assert titles[1] == "Not candidates: mean activation"


def test_a_callback_that_trains_a_second_model_studies_that_one(tmp_path):
    study = ConfidenceStudy(draws=2)
    first = train(module(1), 10, study, KeepRun(tmp_path / "first")).summary["confidence"]
    second = train(module(2), 10, study, KeepRun(tmp_path / "second")).summary["confidence"]
    alone = train(module(2), 10, ConfidenceStudy(draws=2), KeepRun(tmp_path / "alone")).summary["confidence"]
    assert second == alone != first


@pytest.mark.parametrize("first", ["study", "watcher"])
def test_weights_and_biases_receives_one_picture_of_every_member_at_the_end(tmp_path, monkeypatch, first):
    runs = []
    monkeypatch.setattr(wandb, "start", lambda mode, files, about: runs.extend(map(Sent, about)) or runs)
    callbacks = [ConfidenceStudy(draws=2), WeightsAndBiases(mode="offline", pictures=1)]
    train(module([1, 2]), 20, *(callbacks if first == "study" else callbacks[::-1]), KeepRun(tmp_path))
    for run in runs:
        assert [row["step"] for row in run.rows if "confidence" in row] == [20]
    assert len(runs) == 2


def test_the_figure_has_a_row_for_each_of_the_first_members(tmp_path):
    heights = []
    for seeds in ([1], [1, 2], [1, 2, 3, 4, 5]):
        train(module(seeds), 1, ConfidenceStudy(draws=1, top=8), KeepRun(tmp_path / str(len(seeds))))
        with Image.open(tmp_path / str(len(seeds)) / "confidence.png") as image:
            assert len(image.getcolors(1 << 20)) > 20
            heights.append(image.height)
    row = heights[1] - heights[0]
    assert row > 0 and abs(heights[2] - heights[0] - 3 * row) <= 3


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: ConfidenceStudy(top=0), {}, "ConfidenceStudy.top: got 0, expected at least 1"),
        (lambda: ConfidenceStudy(draws=0), {}, "ConfidenceStudy.draws: got 0"),
        (lambda: ConfidenceStudy(top=25), {}, "ConfidenceStudy.top: got 25, expected at most the model's 24"),
        (ConfidenceStudy, {"data": ToyTokens()}, "ConfidenceStudy: got 'ToyTokens with train', expected .*'repeated'"),
        (ConfidenceStudy, {"model": Transformer(width=8, heads=2)}, "ConfidenceStudy: got 'a model without MLPs'"),
        (
            ConfidenceStudy,
            {"model": Transformer(width=8, heads=2, mlp_ratio=2.0, norm=False)},
            "ConfidenceStudy: got 'a model without LayerNorm'",
        ),
    ],
)
def test_what_cannot_be_studied_stops_the_run_before_it_starts(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        train(module(**settings), 5, make())


def test_sequences_too_short_to_be_recognised_stop_the_run_before_it_starts(tmp_path):
    (tmp_path / "text.txt").write_text("abcabdabe" * 20)
    short = Characters(str(tmp_path / "text.txt"), positions=4, heldout=0.0)
    message = "^ConfidenceStudy: got 'Characters of 4 positions', expected more of them: in 'repeated' none is foreseen"
    with pytest.raises(ConfigError, match=message):
        train(module(data=short), 5, ConfidenceStudy(top=1))


def test_the_first_half_alone_says_what_a_neuron_is_held_at(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 9)
    text = Characters(str(tmp_path / "text.txt"), positions=20, heldout=0.0)
    first, repeated = _halves(text.batch(0, 0, "eval/repeated"))
    # three characters tell where a copy is, and the first two of the second half are not enough
    assert first.tolist() == [True] * 10 + [False] * 10
    assert repeated.tolist() == [False] * 12 + [True] * 8
