"""Every row of docs/interventions.md is a recipe that trains."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from opsin import callbacks as callbacks
from tests.helpers.paths import ROOT

TEXT = (ROOT / "docs" / "interventions.md").read_text()
PIECE = re.compile(r"`(- \{class_path: .*?\}|- \{class_path: [\w.]+\})`(?=[ <])")
ROWS = [line for line in TEXT.splitlines() if line.startswith("|") and "class_path" in line]


def pieces(row: str) -> list[dict]:
    return [yaml.safe_load(piece)[0] for piece in PIECE.findall(row)]


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    """A run to graft from."""
    from opsin.cli import main

    folder = tmp_path_factory.mktemp("donor") / "donor"
    # of another seed than the recipe's, or else a graft from it would change nothing
    further = ["--trainer.max_steps", "2", "--trainer.callbacks", "null", "--model.seed", "9"]
    assert main(["fit", "--config", str(recipe_of([], folder.parent)), "--run_folder", str(folder), *further]) == 0
    return folder


def recipe_of(attached: list[dict], folder: Path) -> Path:
    recipe = yaml.safe_load((ROOT / "recipes" / "induction.yaml").read_text())
    recipe["task"]["init_args"]["exemplars"]["init_args"]["features"] = 16
    recipe["model"] |= {"transformer": {"layers": 2, "width": 64, "heads": 8, "mlp_ratio": 4}, "probe_size": 256}
    recipe["trainer"] |= {"callbacks": attached, "max_steps": 2, "enable_progress_bar": False}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def into_two_steps(callback: dict) -> None:
    """Move a schedule to where a run of two steps can see it."""
    for holder in (callback, *callback.get("init_args", {}).get("donor_callbacks", [])):
        schedule = holder.get("init_args", {}).get("schedule", {})
        for name in {"start", "stop", "ramp", "ramp_down"} & set(schedule):
            schedule[name] = {"start": 0, "stop": 2}.get(name, 1)
        schedule.pop("unit", None)


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip()[:60] for row in ROWS])
def test_a_row_of_the_table_trains(row, donor, opsin, tmp_path):
    attached = pieces(row)
    assert attached and len(attached) == row.count("`- {")
    for callback in attached:
        into_two_steps(callback)
    (tmp_path / "runs").mkdir(exist_ok=True)
    shutil.copytree(donor, tmp_path / "runs" / "donor")
    ended = opsin("fit", "--config", recipe_of(attached, tmp_path), "--run_folder", "run")
    assert ended.code == 0, ended.err


def test_every_reference_option_that_the_check_knows_has_a_row():
    from tests.helpers.toys import script

    files = script("reference_files")
    options = files.OPTIONS - files.NO_INFORMATION
    assert {option for option in options if not re.search(rf"`[^`]*{option}[^`]*`", TEXT)} == set()
