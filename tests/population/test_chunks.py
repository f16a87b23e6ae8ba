"""Claims about the members of a population, and which of them train together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.errors import ConfigError
from opsin.population.chunks import (
    Chunking,
    chunk_recipe,
    cut_into_chunks,
    expanded,
    members_of,
    merged,
    population_document,
)
from opsin.population.settings import Population

ABLATE = {"class_path": "opsin.callbacks.Ablate", "init_args": {"heads": ["1:0"]}}
TRACK = {"class_path": "opsin.callbacks.InductionHeads"}
RECIPE = {
    "task": {"class_path": "opsin.tasks.FewShot", "init_args": {"n_labels": 5, "exemplars": {"init_args": {"a": 1}}}},
    "model": {"seed": 3, "learning_rate": 0.1, "weight_decay": 0.0},
    "trainer": {"callbacks": [TRACK, {"class_path": "opsin.callbacks.WeightsAndBiases"}]},
    "population": {"seeds": 2, "conditions": {"none": {}, "cut": {"callbacks": [ABLATE], "learning_rate": 0.2}}},
}


def test_every_seed_is_in_every_condition_with_the_same_number():
    found = members_of(2, 5, ["a", "b"], paired=True)
    assert [(m.member, m.condition, m.seed, m.seed_index) for m in found] == [
        (0, "a", 5, 0),
        (1, "a", 6, 1),
        (2, "b", 5, 0),
        (3, "b", 6, 1),
    ]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5, unique=True), st.integers(1, 4))
def test_without_pairing_no_two_members_share_a_seed(seeds, conditions):
    found = members_of(seeds, 0, [str(index) for index in range(conditions)], paired=False)
    assert len({member.seed for member in found}) == len(found) == len(seeds) * conditions


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 8), st.integers(1, 16))
def test_chunks_hold_every_member_once_and_never_mix_graphs(graphs, seeds, processes, most):
    names = [str(index) for index in range(len(graphs))]
    members = members_of(seeds, 0, names, paired=True)
    chunks = cut_into_chunks(members, dict(zip(names, graphs, strict=True)), Chunking(processes, most, "recipe"))
    assert sorted(m.member for chunk in chunks for m in chunk) == list(range(len(members)))
    assert all(1 <= len(chunk) <= most for chunk in chunks)
    assert all(len({graphs[int(member.condition)] for member in chunk}) == 1 for chunk in chunks)
    # no process waits where there is work that can be shared out
    assert len(chunks) >= min(processes, len(members)) or max(map(len, chunks)) <= -(-len(members) // processes)


def test_a_chunk_is_an_ordinary_recipe_of_its_members():
    conditions = expanded(RECIPE).settings
    members = members_of(2, 3, list(conditions), paired=True)
    chunk = chunk_recipe(RECIPE, conditions, members[1:])
    assert "population" not in chunk
    assert chunk["model"]["seed"] == [4, 3, 4] and chunk["model"]["learning_rate"] == [0.1, 0.2, 0.2]
    assert chunk["model"]["weight_decay"] == 0.0 and chunk["model"]["initial"] is None
    names = [callback["class_path"].rsplit(".", 1)[1] for callback in chunk["trainer"]["callbacks"]]
    assert names == ["InductionHeads", "WeightsAndBiases", "Ablate"]
    assert chunk["trainer"]["callbacks"][-1]["init_args"] == {"heads": ["1:0"], "members": [1, 2]}
    assert RECIPE["model"]["seed"] == 3 and "members" not in ABLATE["init_args"]


def test_a_callback_of_all_chunks_that_names_members_is_refused():
    named = {**ABLATE, "init_args": {"heads": ["1:0"], "members": [0]}}
    conditions = expanded(RECIPE).settings
    members = members_of(2, 3, list(conditions), paired=True)
    with pytest.raises(ConfigError, match=r"trainer.callbacks: got \{'members': \[0\]\}, expected no members"):
        chunk_recipe({**RECIPE, "trainer": {"callbacks": [named]}}, conditions, members)


def test_initial_weights_follow_the_seed():
    conditions = {"all": {"initial": "runs/x"}}
    chunk = chunk_recipe(RECIPE, conditions, members_of([7, 9], 0, ["all"], paired=True)[1:])
    assert chunk["model"]["initial"] == [{"path": "runs/x", "place": 1}]


def test_settings_of_a_condition_replace_only_what_they_name():
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}}) == {"a": {"b": 1, "c": 4}, "d": 3}


def test_windows_are_conditions_that_differ_by_their_schedule():
    windows = {"callbacks": [ABLATE], "starts": [0, 10], "lengths": [5], "unit": "steps"}
    conditions, grid, crossed = expanded({"population": {"conditions": None, "windows": windows}})
    assert list(conditions) == ["none", "start_0_length_5", "start_10_length_5"]
    schedule = conditions["start_10_length_5"]["callbacks"][0]["init_args"]["schedule"]
    assert schedule == {"start": 10, "stop": 15, "unit": "steps"}
    assert grid == {
        "none": None,
        "start_0_length_5": {"start": 0, "length": 5, "unit": "steps"},
        "start_10_length_5": {"start": 10, "length": 5, "unit": "steps"},
    }
    assert crossed == {}


def test_a_grid_stands_behind_the_conditions_and_changes_the_recipe_of_its_chunks():
    grid = {"model.learning_rate": [0.1, 0.3], "task.n_labels": [5, 3]}
    recipe = RECIPE | {"population": {"conditions": {"base": {}}, "grid": grid}}
    conditions, windows, crossed = expanded(recipe)
    assert [*conditions] == ["base", *crossed] and len(crossed) == 4 and windows == {}
    assert crossed["learning_rate=0.3 n_labels=3"] == {"model.learning_rate": 0.3, "task.n_labels": 3}
    (member,) = members_of([7], 0, ["learning_rate=0.3 n_labels=3"], paired=True)
    chunk = chunk_recipe(recipe, conditions, [member])
    assert chunk["task"]["init_args"]["n_labels"] == 3 and chunk["model"]["learning_rate"] == 0.3
    assert RECIPE["task"]["init_args"]["n_labels"] == 5


def test_a_condition_may_not_have_the_name_of_a_combination():
    population = {"conditions": {"n_labels=3": {}}, "grid": {"task.n_labels": [5, 3]}}
    with pytest.raises(ConfigError, match=r"^population.conditions: got 'n_labels=3', expected another name"):
        expanded(RECIPE | {"population": population})


def test_a_condition_that_names_members_itself_is_refused():
    conditions = {"a": {"callbacks": [{**ABLATE, "init_args": {"heads": ["1:0"], "members": [0]}}]}}
    with pytest.raises(ConfigError, match=r"^population.conditions.a.callbacks"):
        chunk_recipe(RECIPE, conditions, members_of(1, 0, ["a"], paired=True))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"seeds": 0}, "seeds"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"seeds": [-1]}, "seeds"),
        ({"processes": 0}, "processes"),
        ({"members_per_process": 0}, "members_per_process"),
        ({"conditions": {"a,b": None}}, "conditions"),
    ],
)
def test_an_impossible_population_is_refused_by_name(settings, field):
    with pytest.raises(ConfigError) as refused:
        Population(**settings)
    assert refused.value.field == f"population.{field}"


def test_the_document_keeps_the_words_that_folders_on_disk_have():
    members = members_of(2, 5, ["a"], paired=True)
    content = population_document([members[1:], members[:1]], ["a"], arrangement=Chunking(2, 1, "rule").as_settings())
    assert content == {
        "members": [
            {"member": 0, "condition": "a", "seed": 5, "place": 0, "chunk": 1, "slot": 0},
            {"member": 1, "condition": "a", "seed": 6, "place": 1, "chunk": 0, "slot": 0},
        ],
        "conditions": ["a"],
        "arrangement": {"processes": 2, "members_per_process": 1, "chosen_by": "rule"},
    }
    assert list(content["members"][0]) == ["member", "condition", "seed", "place", "chunk", "slot"]
