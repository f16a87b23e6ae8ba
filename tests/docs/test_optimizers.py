"""What docs/optimizers.md shows trains, and it names every optimizer."""

import re

import pytest
import yaml

import opsin.optimizers
from opsin.population.settings import Condition
from tests.helpers.paths import ROOT
from tests.launch.test_optimizers import recipe

TEXT = (ROOT / "docs" / "optimizers.md").read_text()
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)]


def test_the_table_has_every_optimizer():
    named = {*re.findall(r"^\| `(\w+)`", TEXT, flags=re.MULTILINE)}
    assert named == {*opsin.optimizers.__all__} - {"Optimizer"}


@pytest.mark.parametrize("number", [number for number, block in enumerate(BLOCKS) if "optimizer" in block])
def test_a_piece_of_the_page_trains(number, opsin, tmp_path, monkeypatch):
    for code in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        (tmp_path / re.match(r"# (\w+\.py)\n", code)[1]).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(BLOCKS[number]["optimizer"])))
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "run", "--trainer.max_steps", 10)
    assert ended.code == 0, ended.err


def test_the_conditions_of_the_page_are_conditions():
    (conditions,) = [block["conditions"] for block in BLOCKS if "conditions" in block]
    assert all(Condition(**(settings or {})) for settings in conditions.values())
