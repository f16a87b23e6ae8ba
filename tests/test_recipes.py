"""Every recipe trains, and the clamped one is the other with a clamp."""

from pathlib import Path

import pytest
import yaml

from tests.tasks.test_exemplars import archive

RECIPES = Path(__file__).parents[1] / "recipes"


# a window must open within the few steps of the test, and one seed shows as much as several
BRIEF = {
    "critical_period.yaml": ["--population.windows.starts", "[0]", "--population.windows.lengths", "[64]"],
}


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_a_recipe_trains(opsin, tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    # what the recipe of the real characters names, with just enough classes for its split
    archive(tmp_path / "images_background.zip", [f"Alphabet/character{number:02}" for number in range(52)], drawings=5)
    brief = BRIEF.get(name, [])
    population = "population" in yaml.safe_load((RECIPES / name).read_text())
    if population:
        brief = [*brief, "--population.seeds", 1]
    ended = opsin("fit", "--config", RECIPES / name, "--trainer.max_steps", 4, "--run_folder", "run", *brief)
    assert ended.code == 0
    # a population says how far it is
    assert all(line.startswith("opsin: ") for line in ended.err.splitlines()) and (population or ended.err == "")
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_clamped_recipe_differs_by_the_clamp_alone():
    plain, clamped = (yaml.safe_load((RECIPES / f"induction{end}.yaml").read_text()) for end in ("", "_clamped"))
    clamp = [callback for callback in clamped["trainer"]["callbacks"] if callback not in plain["trainer"]["callbacks"]]
    assert [callback["class_path"] for callback in clamp] == ["opsin.callbacks.Clamp"]
    clamped["trainer"]["callbacks"].remove(clamp[0])
    assert clamped == plain
