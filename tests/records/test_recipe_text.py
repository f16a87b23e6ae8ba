"""Recipes as text: read without surprises, and written so that they read back."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from opsin.errors import ConfigError
from opsin.records.recipe_text import dump_recipe, parse_recipe, read_recipe

PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text()
SETTINGS = st.recursive(
    PLAIN | st.from_regex(r"\A[-+0-9.:eE_xob]{1,8}\Z"),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=8,
)


def refused(text):
    with pytest.raises(ConfigError) as found:
        parse_recipe(text, "recipe.yaml")
    return str(found.value)


@given(st.dictionaries(st.text(min_size=1, max_size=8), SETTINGS, min_size=1, max_size=4))
def test_settings_that_are_written_read_back_as_they_were(settings):
    assert parse_recipe(dump_recipe(settings), "recipe.yaml") == settings


@given(st.dictionaries(st.text(min_size=1, max_size=8), SETTINGS, min_size=1, max_size=4))
def test_settings_that_are_written_read_back_with_any_loader_of_yaml(settings):
    assert yaml.safe_load(dump_recipe(settings)) == settings


@pytest.mark.parametrize("written", ["1:1", "0:1", "12:30", "1:30:00", "1:1.5", "010", "0o17", "2026-11-25", "1.2.3"])
def test_what_looks_like_a_head_a_time_or_a_date_is_text(written):
    assert parse_recipe(f"a: {written}\nb: [{written}]\n", "recipe.yaml") == {"a": written, "b": [written]}


@pytest.mark.parametrize(
    ("written", "number"),
    [("1e-3", 1e-3), ("3.0e-5", 3e-5), ("1_000", 1000), ("-7", -7), ("0", 0), (".5", 0.5), ("5.", 5.0), ("0x10", 16)],
)
def test_decimal_numbers_are_numbers(written, number):
    found = parse_recipe(f"a: {written}\n", "recipe.yaml")["a"]
    assert found == number and type(found) is type(number)


def test_a_key_that_stands_twice_is_refused_with_its_name_and_both_lines():
    message = refused("model:\n  seed: 1\n  width: 2\n  seed: 3\n")
    assert "line 4: model" in message and "'seed'" in message and "line 2" in message


def test_keys_of_different_mappings_may_be_equal():
    settings = {"a": {"seed": 1}, "b": [{"seed": 2}, {"seed": 3}]}
    assert parse_recipe("a: {seed: 1}\nb:\n- seed: 2\n- seed: 3\n", "recipe.yaml") == settings


def test_an_alias_of_something_finished_is_that_again():
    assert parse_recipe("a: &x {b: 1}\nc: *x\n", "recipe.yaml") == {"a": {"b": 1}, "c": {"b": 1}}


def test_an_alias_inside_of_what_it_names_is_refused():
    assert "*x" in refused("a: &x\n  b: *x\n")


def test_aliases_that_unfold_to_very_much_are_refused_before_they_do():
    text = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    assert "unfold" in refused(text)


def test_a_mark_of_byte_order_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: {seed: 1}\n")
    assert read_recipe(path) == {"model": {"seed": 1}}


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match="--config"):
        read_recipe(tmp_path)
