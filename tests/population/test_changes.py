"""Claims about the settings of a recipe that a condition changes by their keys."""

import copy

import pytest

from opsin.errors import ConfigError
from opsin.population.changes import change_recipe, full_changes, with_full_changes

RECIPE = {
    "task": {
        "class_path": "opsin.tasks.FewShot",
        "init_args": {
            "context": 2,
            "burstiness": None,
            "exemplars": {"class_path": "opsin.tasks.GaussianClusters", "init_args": {"features": 16}},
        },
    },
    "model": {
        "transformer": {"class_path": "opsin.Transformer", "init_args": {"layers": 2, "heads": 8}},
        **{"seed": 1, "learning_rate": 0.1, "weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8},
        **{"steps_per_batch": 50, "optimizer": None, "network": None, "gradient_clip": None, "initial": None},
    },
    "trainer": {
        "max_steps": 100,
        "callbacks": [{"class_path": "opsin.callbacks.InductionHeads", "init_args": {"every": 100}}],
    },
    "run_folder": None,
    "population": {"seeds": 2},
}


@pytest.mark.parametrize(
    ("key", "full"),
    [
        ("model.transformer.heads", "model.transformer.init_args.heads"),
        ("model.transformer.init_args.heads", "model.transformer.init_args.heads"),
        ("task.context", "task.init_args.context"),
        ("task.exemplars.features", "task.init_args.exemplars.init_args.features"),
        ("trainer.callbacks.0.every", "trainer.callbacks.0.init_args.every"),
        ("model.optimizer.betas", "model.optimizer.init_args.betas"),
        ("model.network", "model.network"),
    ],
)
def test_a_key_names_one_setting_with_or_without_init_args(key, full):
    assert full_changes("set", {key: 3}, RECIPE) == {full: 3}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.transformer.head", "expected a setting of the recipe; nearest: model.transformer.heads"),
        ("task.init_args.contexts", "expected a setting of the recipe; nearest: task.context"),
        ("modl.learning_rate", "nearest: model.learning_rate"),
        ("model.network.width", "expected a setting of the recipe"),
        ("trainer.callbacks.1.every", "nearest: trainer.callbacks.0.every"),
        ("trainer.max_steps", "expected a setting of task, model or trainer.callbacks; all members share this one"),
        ("run_folder", "all members share this one"),
        ("population.seeds", "all members share this one"),
        ("model.seed", "all members share this one; population.seeds chooses it"),
        ("model.initial", "all members share this one; `initial` of a condition"),
        ("model.steps_per_batch", "all members share this one"),
        ("model", "all members share this one"),
    ],
)
def test_an_unknown_key_gets_its_nearest_and_a_shared_one_is_called_so(key, message):
    with pytest.raises(ConfigError) as refused:
        full_changes("population.conditions.a.set", {key: 3}, RECIPE)
    assert str(refused.value).startswith(f"population.conditions.a.set: got {key!r}, expected ")
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "keys",
    [
        ("task.context", "task.init_args.context"),
        ("task.init_args.exemplars", "task.init_args.exemplars.init_args.features"),
    ],
)
def test_one_setting_is_not_changed_by_two_keys(keys):
    with pytest.raises(ConfigError, match=r"^set: got 'task"):
        full_changes("set", dict.fromkeys(keys, 3), RECIPE)


def test_a_change_replaces_one_setting_and_leaves_the_recipe_it_came_from():
    before, recipe = copy.deepcopy(RECIPE), copy.deepcopy(RECIPE)
    change_recipe(recipe, {"model.transformer.init_args.heads": 4, "trainer.callbacks.0.init_args.every": 10})
    assert recipe["model"]["transformer"]["init_args"] == {"layers": 2, "heads": 4}
    assert recipe["trainer"]["callbacks"][0]["init_args"] == {"every": 10}
    recipe["model"]["transformer"]["init_args"]["heads"] = 8
    recipe["trainer"]["callbacks"][0]["init_args"]["every"] = 100
    assert recipe == before


def test_another_class_begins_with_its_defaults_and_takes_the_settings_beside_it():
    changes = {"task.copies": 3, "task.class_path": "opsin.tasks.Repeats"}
    full = full_changes("set", changes, RECIPE)
    recipe = copy.deepcopy(RECIPE)
    change_recipe(recipe, full)
    assert recipe["task"] == {"class_path": "opsin.tasks.Repeats", "init_args": {"copies": 3}}


def test_another_model_replaces_the_transformer():
    recipe = copy.deepcopy(RECIPE)
    changes = {"model.network.class_path": "opsin.model.mlp.MLP", "model.network.width": 3}
    change_recipe(recipe, full_changes("set", changes, RECIPE))
    assert recipe["model"]["network"] == {"class_path": "opsin.model.mlp.MLP", "init_args": {"width": 3}}
    assert "transformer" not in recipe["model"]


def test_what_moves_the_weights_becomes_settings_of_the_member():
    changes = {"model.learning_rate": 0.2, "model.betas": [0.5, 0.9], "task.context": 4}
    found = with_full_changes("a", {"set": changes, "callbacks": []}, RECIPE)
    assert found == {
        "callbacks": [],
        "learning_rate": 0.2,
        "optimizer": {"init_args": {"betas": [0.5, 0.9]}},
        "set": {"task.init_args.context": 4},
    }
    other = {"model.optimizer.class_path": "opsin.optimizers.SGD", "model.optimizer.momentum": 0.9}
    found = with_full_changes("a", {"set": other}, RECIPE)
    assert found["optimizer"] == {"class_path": "opsin.optimizers.SGD", "init_args": {"momentum": 0.9}}


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"learning_rate": 0.1, "set": {"model.learning_rate": 0.2}}, "a.set"),
        ({"task": {"context": 3}, "set": {"task.init_args.context": 4}}, "a.set"),
        ({"optimizer": {"init_args": {"eps": 1.0}}, "set": {"model.optimizer.eps": 0.1}}, "a.set"),
        ({"set": {"model.learning_rate": [0.1, 0.2]}}, "a.set.model.learning_rate"),
        ({"set": {"model.learning_rate": None}}, "a.set.model.learning_rate"),
        ({"set": {"model.optimizer": None}}, "a.set.model.optimizer"),
        ({"set": {"model.learning_rate": 0.1, "model.optimizer.learning_rate": 0.2}}, "a.set"),
    ],
)
def test_what_a_condition_would_change_twice_or_not_at_all_is_refused(settings, field):
    with pytest.raises(ConfigError) as refused:
        with_full_changes("a.set", settings, RECIPE)
    assert refused.value.field == field
