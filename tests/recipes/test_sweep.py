"""The recipe of a sweep, made tiny: it trains, survives a kill, and leaves one table and one map."""

import json

import pandas as pd
import yaml

from tests.helpers.paths import RECIPES
from tests.helpers.processes import Started, kill_in_training, opsin

RATE, COPIES = "model.learning_rate", "task.init_args.burstiness"


def tiny_sweep():
    """Two rates, two burstinesses and the condition with other heads, of one seed each."""
    recipe = yaml.safe_load((RECIPES / "sweep.yaml").read_text())
    recipe["task"]["init_args"]["exemplars"]["init_args"]["features"] = 16
    recipe["task"]["init_args"] |= {"context": 4, "batch_size": 8}
    recipe["model"] |= {"steps_per_batch": 10, "evaluation_size": 16, "probe_size": 16, "compile": False}
    recipe["model"]["transformer"]["width"] = 16
    recipe["trainer"] |= {"max_steps": 60, "callbacks": recipe["trainer"]["callbacks"][:2]}
    recipe["population"] |= {"seeds": 1, "processes": 2}
    recipe["population"]["grid"] = {key: values[:2] for key, values in recipe["population"]["grid"].items()}
    return recipe


def test_a_sweep_ends_after_a_kill_as_one_left_alone_with_one_table_and_one_map_and_can_be_forked(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_sweep(), sort_keys=False))
    start = ["fit", "--config", "recipe.yaml", "--checkpoint_every", "10", "--run_folder"]
    opsin(*start, "whole", folder=tmp_path)
    fit = Started(*start, "killed", folder=tmp_path)
    kill_in_training(fit, tmp_path, "killed")
    opsin("resume", "killed", folder=tmp_path)
    for name in ("metrics.csv", "members.csv", "conditions.csv", "differences.csv", "grid.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    table = pd.read_csv(tmp_path / "whole" / "conditions.csv").set_index("condition")
    assert [*table.index] == [
        "four_heads",
        *(f"learning_rate={r} burstiness={b}" for r in ("3e-05", "0.0001") for b in (1, 2)),
    ]
    assert table[[RATE, COPIES]].drop("four_heads").drop_duplicates().shape == (4, 2)
    assert table["final_loss"].notna().all() and table["unfinished"].eq(0).all()
    rows = json.loads((tmp_path / "whole" / "population.json").read_text())["members"]
    chunks = {row["condition"]: row["chunk"] for row in rows}
    assert chunks["learning_rate=3e-05 burstiness=1"] == chunks["learning_rate=0.0001 burstiness=1"]
    assert len(set(chunks.values())) == 3, "other heads and other burstinesses train apart, rates together"
    opsin("fork", "whole", "--member", "0", "--at", "30", "--run_folder", "branch", folder=tmp_path)
    assert json.loads((tmp_path / "branch" / "population.json").read_text())["fork"]["replay_equals_run"]
    branch = yaml.safe_load((tmp_path / "branch" / "config.yaml").read_text())
    assert branch["model"]["transformer"]["init_args"]["heads"] == 4
