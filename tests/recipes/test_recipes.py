"""Every recipe trains, and the clamped one is the other with a clamp."""

from pathlib import Path

import pytest
import yaml

from tests.helpers.paths import RECIPES
from tests.helpers.processes import opsin as in_process
from tests.tasks.shared.test_exemplars import archive


def shortened(settings):
    """The same with one seed, two values of a key, little to measure, and every intervention active from the start."""
    if isinstance(settings, list):
        return [shortened(each) for each in settings]
    if not isinstance(settings, dict):
        return settings
    found = {name: shortened(value) for name, value in settings.items() if name not in ("start", "stop")}
    if "starts" in found:
        found |= {"starts": [0], "lengths": [64]}
    if found.get("grid"):
        found["grid"] = {key: values[:2] for key, values in found["grid"].items()}
    if "seeds" in found:
        found["seeds"] = found["seeds"][:1] if isinstance(found["seeds"], list) else 1
    if "transformer" in found:
        found |= {"probe_size": 16, "evaluation_size": 16}
    if "by_seed" in found:
        found["by_seed"] = dict(list(found["by_seed"].items())[:1])
    return found


VARIANTS = {
    *("associations", "birth_frozen", "clustering_silenced", "confidence", "confidence_clamped", "coopetition"),
    *(
        "grokking_dichotomy",
        "grokking_frequencies",
        "subcircuits",
        "regression_grid",
        "regression_mixture",
        "regression_pairs",
        "single_heads",
        "sweep",
    ),
}
"""Recipes whose task, model and readers others or other tests have as well: trained among the slow tests."""


def names(population):
    found = {path.name: "population" in yaml.safe_load(path.read_text()) for path in RECIPES.glob("*.yaml")}
    chosen = sorted(name for name, has_one in found.items() if has_one == population)
    slow = [pytest.mark.slow]
    return [pytest.param(name, marks=slow if name.removesuffix(".yaml") in VARIANTS else ()) for name in chosen]


@pytest.mark.parametrize("name", names(population=False))
def test_a_recipe_trains(opsin, tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    # what the recipe of the real characters names, with just enough classes for its split
    archive(tmp_path / "images_background.zip", [f"Alphabet/character{number:02}" for number in range(52)], drawings=5)
    ended = opsin("fit", "--config", RECIPES / name, "--trainer.max_steps", 4, "--run_folder", "run")
    assert ended.code == 0 and ended.err == ""
    assert (tmp_path / "run" / "summary.json").exists()


def donors(settings):
    """Run folders that a recipe takes trained models from; each is what the recipe of its name leaves."""
    if isinstance(settings, list):
        return {donor for each in settings for donor in donors(each)}
    if not isinstance(settings, dict):
        return set()
    return {settings["donor"]} if "donor" in settings else donors(list(settings.values()))


@pytest.mark.parametrize("name", names(population=True))
def test_a_recipe_of_a_population_trains(tmp_path, name):
    for donor in donors(yaml.safe_load((RECIPES / name).read_text())):
        recipe = RECIPES / f"{Path(donor).name}.yaml"
        short = ["--trainer.max_steps", "4", "--model.evaluation_size", "16"]
        in_process("fit", "--config", recipe, "--run_folder", donor, *short, folder=tmp_path, WANDB_MODE="disabled")
    (tmp_path / name).write_text(
        yaml.safe_dump(shortened(yaml.safe_load((RECIPES / name).read_text())), sort_keys=False)
    )
    settings = ["--config", name, "--run_folder", "run", "--trainer.max_steps", "4"]
    ended = in_process("fit", *settings, folder=tmp_path, check=False, WANDB_MODE="disabled")
    # it says how far it is
    assert ended.code == 0 and all(line.startswith("opsin: ") for line in ended.err.splitlines()), ended.err
    assert (tmp_path / "run" / "population.png").exists()


def test_the_clamped_recipe_differs_by_the_clamp_alone():
    plain, clamped = (yaml.safe_load((RECIPES / f"induction{end}.yaml").read_text()) for end in ("", "_clamped"))
    clamp = [callback for callback in clamped["trainer"]["callbacks"] if callback not in plain["trainer"]["callbacks"]]
    assert [callback["class_path"] for callback in clamp] == ["opsin.callbacks.Clamp"]
    clamped["trainer"]["callbacks"].remove(clamp[0])
    assert clamped == plain
