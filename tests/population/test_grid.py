"""Claims about a grid: its combinations, their names, and what is no grid."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.errors import ConfigError
from opsin.population.grid import crossed_conditions, key_names, value_names
from opsin.population.settings import REFUSED_IN_NAMES, Population, Windows


def test_every_combination_is_a_condition_with_a_readable_name():
    found = crossed_conditions({"model.learning_rate": [1e-3, 3e-5], "task.init_args.burstiness": [1, 2]})
    assert [*found] == [
        "learning_rate=0.001 burstiness=1",
        "learning_rate=0.001 burstiness=2",
        "learning_rate=3e-05 burstiness=1",
        "learning_rate=3e-05 burstiness=2",
    ]
    assert found["learning_rate=3e-05 burstiness=1"] == {"model.learning_rate": 3e-5, "task.init_args.burstiness": 1}


def test_keys_with_one_last_part_are_told_apart_by_what_is_before_it():
    keys = ["task.init_args.zipf", "task.init_args.exemplars.init_args.seed", "task.init_args.seed"]
    assert [*key_names(keys).values()] == ["zipf", "exemplars.seed", "task.seed"]


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.floats(-10, 10),
    st.text(max_size=60),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(0, 1), max_size=1),
)


@given(st.lists(VALUES, min_size=2, max_size=6, unique_by=repr))
def test_names_of_values_are_unambiguous_and_fit_for_tables(values):
    names = value_names(values)
    assert len({*names}) == len(values)
    assert not any(sign in name for name in names for sign in REFUSED_IN_NAMES)


def test_values_of_every_kind_have_short_names():
    mlp = {"class_path": "opsin.model.mlp.MLP", "init_args": {"width": 3}}
    values = ["texts/a.txt", None, True, [0.9, 0.98], mlp, [{"matches": 1}], [{"matches": 2}], 0.1234567891]
    expected = ["a.txt", "null", "true", "0.9+0.98", "MLP", "settings#6", "settings#7", "0.1234567891"]
    assert value_names(values) == expected
    assert value_names(["x/a", "y/a", "a#1"]) == ["a#1#1", "a#2#2", "a#1#3"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "population.grid: got {}, expected values of one setting or more"),
        ({"a.b": []}, "population.grid.a.b: got [], expected a list of two values or more"),
        ({"a.b": [1]}, "population.grid.a.b: got [1], expected a list of two values or more; one alone is a setting"),
        ({"a.b": 1}, "population.grid.a.b: got 1, expected a list of two values or more"),
        ({"a.b": [1, 2, 1.0]}, "population.grid.a.b: got 1.0, expected every value once"),
        ({key: [*range(10)] for key in "abcdef"}, "population.grid: got 1000000, expected at most 100,000 comb"),
    ],
)
def test_what_is_no_grid_is_refused_in_one_line(grid, message):
    with pytest.raises(ConfigError) as refused:
        crossed_conditions(grid)
    assert str(refused.value).startswith(message)


def test_a_grid_is_refused_beside_windows():
    with pytest.raises(ConfigError, match=r"^population.grid: .*none beside population.windows"):
        Population(grid={"a.b": [1, 2]}, windows=Windows([object()], [0], [1]))
