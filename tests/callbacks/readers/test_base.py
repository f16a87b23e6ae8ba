"""Claims about what readers share: what they state about a run is checked when it is built, each in one line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opsin import callbacks
from opsin.callbacks.readers.base import ProbeReader, Reader, Requirement, check_count, log_spaced
from opsin.errors import ConfigError
from opsin.model.associative_memory import AssociativeMemory
from opsin.model.transformer import Transformer
from opsin.training.module import OpsinModule
from tests.helpers.toys import SMALL, ToyTokens, few_shot, train


class Wanting(ProbeReader):
    """A reader of any activations, whatever else it needs."""

    def __init__(self, *sites: str, needs: tuple[Requirement, ...] = (), every: int = 5) -> None:
        super().__init__(every)
        self.wanted, self.needs, self.shown = sites, needs, []

    def sites(self, table):
        return [*self.wanted]

    def requirements(self):
        return [*self.needs]

    def measure(self, seen):
        self.shown.append((seen.step, *seen.activations))


def module(task=None, model: Transformer = SMALL) -> OpsinModule:
    small = {"steps_per_batch": 5, "log_every": 5, "probe_size": 8, "compile": False}
    return OpsinModule(task or few_shot(), model, **small)


def test_a_reader_is_shown_the_activations_it_names_at_its_cadence():
    reader = Wanting("blocks.0.attn.hook_pattern", "hook_logits", every=10)
    train(module(), 15, reader)
    assert reader.shown == [(step, "blocks.0.attn.hook_pattern", "hook_logits") for step in (0, 10, 15)]


def test_an_activation_that_the_model_lacks_stops_the_run_before_it_starts():
    model = module()
    message = r"^Wanting: got 'a model without blocks.0.mlp.hook_post, blocks.7.hook_resid_post', expected one with"
    with pytest.raises(ConfigError, match=message):
        train(model, 5, Wanting("blocks.0.mlp.hook_post", "hook_logits", "blocks.7.hook_resid_post"))
    # nothing of the run has been made yet
    assert not hasattr(model, "constants")


def test_whatever_else_a_reader_requires_is_checked_before_the_run_starts():
    def lacking(module):
        return None if module.task.layout.features else "a task of tokens"

    needs = (Requirement("Wanting.needs", lacking, "features"),)
    train(module(), 5, Wanting(needs=needs))
    with pytest.raises(ConfigError, match=r"^Wanting.needs: got 'a task of tokens', expected features$"):
        train(module(ToyTokens()), 5, Wanting(needs=needs))


@pytest.mark.parametrize("name", ["InductionHeads", "ActivationSparsity", "Calibration", "EntropyNeurons"])
def test_every_reader_of_the_probe_refuses_a_cadence_below_one_step_in_one_line(name):
    with pytest.raises(ConfigError, match=f"^{name}.every: got 0, expected at least 1 optimizer step$"):
        getattr(callbacks, name)(every=0)


def test_all_readers_but_what_ends_members_have_one_base():
    exported = {name: getattr(callbacks, name) for name in callbacks.__all__}
    rooms = ("opsin.callbacks.readers", "opsin.callbacks.wandb")
    found = {name for name, kind in exported.items() if kind.__module__.startswith(rooms)}
    assert {name for name in found if not issubclass(exported[name], Reader)} == {"StopWhen"}


def test_a_count_is_at_least_one():
    assert check_count("A.b", 1) == 1
    with pytest.raises(ConfigError, match=r"^A.b: got 0, expected at least 1 neuron$"):
        check_count("A.b", 0, "neuron")


def test_log_spaced_steps_of_a_known_case():
    assert log_spaced(100, 4) == {0, 1, 2, 3, 6, 10, 18, 32, 56, 100}
    assert log_spaced(9, 1) == {0, 1}


@pytest.mark.parametrize(
    ("reader", "settings", "line"),
    [
        (
            "EntropyNeurons",
            {"mlp_ratio": 1, "norm": "RMSNorm"},
            "got 'a model whose last norm is an RMSNorm'",
        ),
        (
            "EntropyNeurons",
            {"mlp_ratio": 1, "final_norm": False},
            "got 'a model without LayerNorm'",
        ),
        (
            "EntropyNeurons",
            {"mlp_ratio": 1, "mlp_layers": (0,)},
            "got 'a model without blocks.1.mlp.hook_post'",
        ),
        ("ActivationSparsity", {}, "got 'a model without MLPs', expected"),
    ],
)
def test_a_choice_that_a_reader_cannot_measure_is_refused_in_one_line(reader, settings, line):
    with pytest.raises(ConfigError, match=f"^{reader}: {line}"):
        train(module(ToyTokens(), replace(SMALL, **settings)), 5, getattr(callbacks, reader)())


@pytest.mark.parametrize(
    ("reader", "settings"),
    [("InductionHeads", {}), ("PreviousTokenHeads", {}), ("AttentionSinks", {"effect_every": None})],
)
def test_a_tracker_of_attention_refuses_a_model_without_any(reader, settings):
    run = OpsinModule(ToyTokens(), network=AssociativeMemory(8), compile=False)
    with pytest.raises(ConfigError, match=f"^{reader}: got 'a model without blocks.0.attn.hook_pattern"):
        train(run, 5, getattr(callbacks, reader)(**settings))


def test_entropy_neurons_are_measured_through_a_tied_read_out_and_a_norm_without_parameters():
    model = replace(SMALL, mlp_ratio=1, tied=True, norm_weight=False, norm_bias=False)
    trained = train(module(ToyTokens(), model), 5, callbacks.EntropyNeurons(every=5, tables=0))
    assert any(name.startswith("entropy_neurons") for name in trained.history.names())
