"""Claims about what a person types: setup, run, test, and the bench's arithmetic."""

import os
import subprocess

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.toys import script


@pytest.mark.parametrize("name", ["scripts/setup", "scripts/run", "scripts/test", ".ci/run"])
def test_a_script_is_executable_and_parses(name):
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / name], check=True)


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 1\n", None], ids=["too old", "missing"])
def test_setup_refuses_a_python_it_cannot_use_in_one_line(tmp_path, text):
    python = tmp_path / "python"
    if text:
        python.write_text(text)
        python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    ended = subprocess.run([ROOT / "scripts/setup"], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and str(python) in ended.stderr and "3.11" in ended.stderr


def test_run_and_test_stop_where_setup_stops(tmp_path):
    environment = {**os.environ, "PYTHON": str(tmp_path / "none")}
    for name in ("scripts/run", "scripts/test", ".ci/run"):
        ended = subprocess.run([ROOT / name], env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.count("\n") == 1


def test_the_bench_states_medians_of_the_ratios_within_a_round():
    speeds = {
        "eager": [100.0, 200.0, 50.0],
        "eager_two_threads": [50.0, 50.0, 100.0],
        "bare": [300.0, 400.0, 250.0],
        "clamps_and_trackers": [150.0, 300.0, 225.0],
        "progress_measures": [270.0, 380.0, 200.0],
    }
    figures = script("bench").summarise(speeds)
    assert figures["ratio_bare_to_eager"] == 3
    assert figures["ratio_bare_to_eager_two_threads"] == 6
    assert figures["ratio_clamps_and_trackers_to_bare"] == 0.75
    assert figures["ratio_progress_measures_to_bare"] == 0.9
    assert figures["steps_per_second_clamps_and_trackers"] == 225 and figures["rounds"] == 3


def test_the_operations_of_a_step_are_those_of_its_matrix_products():
    bench, population = script("bench"), script("bench_population")
    tokens, width = 32 * 5, 64
    # gradients need twice the products of the forward pass, but for the features, which have none; the 50 exemplars
    # are fewer than the features of a batch, and the last block has keys and values alone at rows that are not scored
    embed, blocks, logits = 50 * 512 * width, (6 * tokens + 2 * 32) * width * width, 32 * width * 5
    expected = 2 * (2 * embed + 3 * blocks + 3 * logits)
    assert abs(population.operations(bench.REFERENCE, bench.FewShot()) / expected - 1) < 0.01


def test_the_population_bench_counts_member_steps_of_all_processes():
    population = script("bench_population")
    kinds = {kind.name: kind for kind in population.compared_processes("cpu")}
    rates = {name: [100.0, 200.0, 300.0] for name in kinds}
    rates["2x8_members_1_thread"] = [900.0, 1000.0, 1500.0]
    memory = {name: 1e9 + 2e6 * (kind.members - 1) for name, kind in kinds.items()}
    figures = population._summary(rates, kinds, "cpu", [5e10] * 3, memory, 44_000_000)
    assert figures["best"] == "2x8_members_1_thread"
    assert figures["ratio_2x8_members_1_thread_to_eager_2_threads"] == 5
    assert figures["share_of_matmul_rate"] == 44e6 * 1000 / 5e10 and figures["bytes_per_extra_member"] == 2e6


def test_the_neuron_bench_states_forward_passes_per_64_neurons_within_a_round():
    neurons = script("bench_neurons")
    figures = neurons.summarise_neurons([0.01, 0.02, 0.04], [0.32, 0.32, 0.64], neurons=512)
    assert figures["forward_passes_per_64_neurons"] == 2
    assert (figures["seconds_forward"], figures["seconds_effects"]) == (0.02, 0.32)
    assert (figures["neurons"], figures["rounds"]) == (512, 3)


def test_the_neuron_bench_measures_every_neuron_of_the_probe_its_forward_pass_saw():
    neurons = script("bench_neurons")
    task = neurons.Repeats(vocabulary=6, positions=8, segments=1, shortest=2, longest=4)
    turns = neurons.contestants(neurons.Transformer(layers=2, width=8, heads=2, mlp_ratio=3.0), task)
    assert turns["forward"]().shape == (1, neurons.SEQUENCES, 8, 6)
    effects = turns["effects"]()
    assert set(effects) == {"entropy", "loss", "kl"} and effects["kl"].total.shape == (1, 24)
    assert (effects["entropy"].total > 0).all()
