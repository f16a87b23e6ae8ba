"""Claims about clustering heads, for sixteen seeds: some solve the task, and clusters come before the classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from opsin.callbacks import ClusteringHead, KeepRun
from opsin.model.clustering import ClusteringTransformer
from opsin.tasks import SparseModularAddition
from opsin.training.module import OpsinModule
from tests.helpers.paths import RECIPES
from tests.helpers.toys import train

SEEDS, PICTURES = 16, [0, 320, 640, 1280, 2560, 5120, 10240]


def sixteen(folder: Path, positions: int, relevant: int, learning_rate: float, epochs: int) -> list[dict[str, Any]]:
    """What became of sixteen seeds: when clusters had formed, and when the test sequences were answered."""
    settings = {"steps_per_batch": 64, "log_every": 32, "probe": "test", "probe_size": 512}
    task, seeds = SparseModularAddition(positions=positions, relevant=relevant), list(range(1, SEEDS + 1))
    model = OpsinModule(task, network=ClusteringTransformer(), seed=seeds, learning_rate=learning_rate, **settings)
    train(model, 64 * epochs, ClusteringHead(every=64, pictures=PICTURES), KeepRun(folder / "run"))
    return model.summary["clustering"]


@pytest.mark.slow
def test_of_twelve_bits_some_seed_learns_the_parity_of_five_and_clusters_come_first(tmp_path):
    rows = sixteen(tmp_path, positions=12, relevant=5, learning_rate=3e-3, epochs=400)
    solved = [row for row in rows if row["solved_at"] is not None]
    assert solved, rows
    for row in solved:
        assert row["clustered_at"] is not None and row["clustered_at"] < row["solved_at"], row


@pytest.mark.slow
def test_of_eight_bits_at_least_a_quarter_of_the_seeds_learn_the_parity_of_three(tmp_path):
    rows = sixteen(tmp_path, positions=8, relevant=3, learning_rate=1e-2, epochs=200)
    solved = [row for row in rows if row["solved_at"] is not None]
    assert len(solved) >= SEEDS // 4, rows
    assert all(row["clustered_at"] is not None for row in solved), rows


def test_the_recipe_has_the_settings_of_the_paper():
    recipe = yaml.safe_load((RECIPES / "clustering.yaml").read_text())
    task, model = recipe["task"]["init_args"], recipe["model"]
    assert task == {"modulus": 2, "positions": 12, "relevant": 5, "vocabulary": 3, "batch_size": 32}
    assert model["network"]["init_args"] == {"width": 2, "neurons": 32, "max_positions": 12}
    assert model["learning_rate"] == 3e-3 and recipe["population"]["seeds"] == 64
