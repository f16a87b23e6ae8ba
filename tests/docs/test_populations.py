"""The page on populations: its recipes are built as it says, and what it says of a table is how pandas reads it."""

import copy
import re

import pandas as pd
import pytest
import yaml

from opsin.launch.population import build_population
from opsin.launch.recipe import OpsinCLI
from opsin.population.grid import crossed_conditions
from opsin.records.recipe_text import parse_recipe
from opsin.reports.population import finish_population
from tests.helpers.paths import ROOT
from tests.helpers.populations import seeds, write_population
from tests.launch.test_population import RECIPE

PAGE = (ROOT / "docs" / "populations.md").read_text()
PIECES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("piece", PIECES, ids=["conditions", "grid"])
def test_a_piece_of_the_page_is_a_population(piece, tmp_path):
    recipe = copy.deepcopy(RECIPE) | yaml.safe_load(piece)
    recipe["model"]["transformer"] = {"layers": 2, "width": 16, "heads": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    cli = OpsinCLI(["--config", str(tmp_path / "recipe.yaml"), "--run_folder", str(tmp_path / "run")])
    population = build_population(parse_recipe(cli.resolved(), "recipe"), tmp_path)
    assert [*population.conditions] == [*recipe["population"]["conditions"], *population.crossed]
    assert not population.crossed or "learning_rate=0.001 burstiness=2" in population.crossed


def test_the_table_of_a_grid_is_pivoted_as_on_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    crossed = crossed_conditions(yaml.safe_load(PIECES[1])["population"]["grid"])
    members = [(name, seed) for name in ("four_heads", *crossed) for seed in range(2)]
    records = [record for index in range(len(members) // 2) for record in seeds(1000.0 * (index + 1), 1000.0)]
    finish_population(write_population(tmp_path / "runs/sweep", members, records, crossed=crossed))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, found := {})
    table = found["table"].pivot(index="task.init_args.burstiness", columns="model.learning_rate", values="onset")
    pd.testing.assert_index_equal(table.index, pd.Index([1.0, 2.0], name="task.init_args.burstiness"))
    assert table.loc[1.0, 3e-4] == (2000 + 1000) / 2 and "burstiness" in capsys.readouterr().out
