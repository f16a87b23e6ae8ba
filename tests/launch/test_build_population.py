"""Claims about a population before it is trained."""

import pytest

from opsin.errors import ConfigError
from opsin.launch.population import build_population


def test_initial_weights_of_the_recipe_are_refused_beside_a_population(tmp_path, monkeypatch):
    monkeypatch.setattr("opsin.launch.population.OpsinCLI", lambda *_: pytest.fail("was built"))
    recipe = {"population": {"seeds": 2}, "model": {"seed": 1, "initial": [{"path": "donor"}]}}
    with pytest.raises(ConfigError, match=r"^model.initial: got .*, expected none beside a population"):
        build_population(recipe, tmp_path)
