"""Claims about conditions that change the recipe: what is refused by whom, what shares a graph, what is built."""

import copy
import re
from collections import Counter

import pytest
import yaml

from opsin.errors import ConfigError
from opsin.launch import conditions
from opsin.launch.population import build_population
from opsin.launch.recipe import OpsinCLI
from opsin.population.chunks import Chunking, chunk_recipe, cut_into_chunks
from opsin.records.recipe_text import parse_recipe
from tests.launch.test_population import ABLATED, RECIPE

HEADS = "model.transformer.heads"


def with_population(**population):
    found = copy.deepcopy(RECIPE)
    found["population"] = {"seeds": 2, "processes": 2, **population}
    return found


@pytest.fixture
def built(tmp_path):
    """A population section -> the population before it is trained, and how often each run was built."""

    def build(**population):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(with_population(**population), sort_keys=False))
        recipe = parse_recipe(OpsinCLI(["--config", str(path), "--run_folder", str(tmp_path)]).resolved(), "recipe")
        return build_population(recipe, tmp_path)

    return build


def test_conditions_of_one_graph_share_chunks_and_others_do_not(built):
    changed = {
        "base": {},
        "same_heads": {"set": {HEADS: 4}},
        "two_heads": {"set": {HEADS: 2}},
        "slow": {"set": {"model.learning_rate": 1e-4}},
        "heavy": {"set": {"model.weight_decay": 0.1}},
        "betas": {"set": {"model.optimizer.init_args.betas": [0.9, 0.98]}},
        "other_betas": {"set": {"model.betas": [0.8, 0.98]}},
        "labels": {"set": {"task.n_labels": 3}},
        "as_labels": {"task": {"n_labels": 3}},
        "mlp": {"set": {"model.transformer.mlp_ratio": 2}},
    }
    found = built(conditions=changed, seeds=1)
    groups = {}
    for name, graph in found.graphs.items():
        groups.setdefault(graph, []).append(name)
    assert {frozenset(names) for names in groups.values()} == {
        frozenset({"base", "heavy", "same_heads", "slow"}),
        frozenset({"betas", "other_betas"}),
        frozenset({"as_labels", "labels"}),
        frozenset({"mlp"}),
        frozenset({"two_heads"}),
    }
    chunks = cut_into_chunks(found.members, found.graphs, Chunking(1, 16, "recipe"))
    recipe = chunk_recipe(found.recipe, found.conditions, next(chunk for chunk in chunks if len(chunk) == 4))
    assert recipe["model"]["learning_rate"] == [1e-3, 1e-3, 1e-4, 1e-3]
    assert recipe["model"]["weight_decay"] == [0.0, 0.0, 0.0, 0.1]


def test_what_is_equal_is_not_built_twice(built, monkeypatch):
    count = Counter()
    made = conditions.OpsinCLI

    def counted(arguments):
        count["runs"] += 1
        return made(arguments)

    monkeypatch.setattr(conditions, "OpsinCLI", counted)
    rates = [1e-4 * 1.1**n for n in range(40)]
    found = built(grid={"model.learning_rate": rates, HEADS: [2, 4]}, seeds=1)
    assert len(found.conditions) == 80 == len(found.crossed) and len({*found.graphs.values()}) == 2
    # all rates of a number of heads together
    assert count["runs"] == 2


@pytest.mark.parametrize(
    ("population", "message"),
    [
        ({"grid": {HEADS: [4, 3]}}, "population.grid: heads=3: transformer.heads: got 3, expected"),
        (
            {"grid": {"model.transformer.head": [4, 2]}},
            "population.grid: got 'model.transformer.head', expected a setting of the recipe; nearest: model.tr",
        ),
        (
            {"grid": {HEADS: [4, "many"]}},
            "population.grid: heads=many: Transformer.heads: got 'many', expected a whole",
        ),
        (
            {"grid": {"model.learning_rate": [0.1, 0.2, -1.0, 0.3]}},
            "population.grid: learning_rate=-1: model.learning_rate: got -1.0, expected more than 0",
        ),
        (
            {"conditions": {"a": {}, "b": {"set": {"model.learning_rate": "fast"}}}},
            "population.conditions.b: model.learning_rate: got 'fast', expected a number (float)",
        ),
        (
            {"conditions": {"b": {"set": {"model.optimizer.momentum": 0.1}}}},
            "population.conditions.b.set: got 'model.optimizer.momentum', expected a setting of the recipe",
        ),
        (
            {"conditions": {"b": {"set": {"model.optimizer.init_args.betas": 0.1}}}},
            "population.conditions.b: AdamW.betas: got 0.1, expected",
        ),
        (
            {"conditions": {"b": {"set": {"trainer.callbacks": [ABLATED | {"init_args": {"heads": ["1:9"]}}]}}}},
            "population.conditions.b: Ablate.heads: got '1:9', expected",
        ),
        (
            {"conditions": {"b": {"set": {"trainer.max_steps": 10}}}},
            "population.conditions.b.set: got 'trainer.max_steps', expected a setting of task, model or trainer.callb",
        ),
    ],
    ids=lambda value: re.sub(r"\W+", "_", str(value))[-60:],
)
def test_a_wrong_change_is_one_line_that_names_its_condition_before_the_folder_is_made(
    population, message, opsin, tmp_path
):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(with_population(**population), sort_keys=False))
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "run")
    assert ended.code == 2 and not (tmp_path / "run").exists()
    (line,) = ended.err.splitlines()
    assert line.startswith(f"opsin: {message}"), line


def test_paths_in_changes_are_found_beside_the_recipe(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("to be or not to be, that is the question. " * 40)
    recipe = with_population(grid={"task.path": ["a.txt", "b.txt"]}, conditions={"c": {"set": {"task.path": "b.txt"}}})
    recipe["task"] = {"class_path": "opsin.tasks.Characters", "init_args": {"path": "a.txt", "positions": 8}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cli = OpsinCLI(["--config", str(tmp_path / "recipe.yaml"), "--run_folder", "run"])
    population = parse_recipe(cli.resolved(), "recipe")["population"]
    assert population["grid"]["task.path"] == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert population["conditions"]["c"]["set"]["task.path"] == str(tmp_path / "b.txt")


def test_a_wrong_setting_of_a_part_is_raised_and_not_printed(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {seed: many}\n")
    with pytest.raises(ConfigError, match=r"model.seed: got 'many'"), conditions.parser_errors_raised():
        OpsinCLI(["--config", str(tmp_path / "recipe.yaml")])
    assert capsys.readouterr().err == ""
