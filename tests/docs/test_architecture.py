"""What docs/architecture.md says: its examples run, its files and names exist, its picture is that of the imports."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache

import pytest
import torch
import yaml
from PIL import Image

from opsin.callbacks import Clamp, Graft
from opsin.interventions.apply import run_passes
from opsin.interventions.donors import donor_from
from opsin.interventions.values.patterns import PreviousToken
from opsin.model.protocol import init_parameters
from opsin.model.transformer import Transformer
from tests.contracts.house import DEFINITIONS, Module, imports_of, modules, report, top_level_names
from tests.contracts.test_imports import FRONT, LEVELS, wing_of
from tests.helpers.paths import ROOT
from tests.helpers.toys import batch_of, inputs_of, plan_of, run, weights
from tests.helpers.wandb_files import history, offline_runs, read

PAGE = (ROOT / "docs" / "architecture.md").read_text()
PROSE = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
STEPS = 12
SPANS = re.compile(r"`([^`]+)`", re.DOTALL)
PATH = re.compile(r"(?:src|tasks|callbacks|tests|docs)/[\w./-]*")
FILE_ENDING = re.compile(r"\.(csv|json|png|yaml|md|py)$")
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")
CLASS = re.compile(r"_?[A-Z][a-z]+[A-Za-z]*")
NOT_OURS = {"torch.lerp", "torch.autograd.grad"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def section(title: str) -> str:
    """What stands below a heading, up to the next of its rank or a higher one."""
    rank = re.search(rf"^(#+) {re.escape(title)}$", PAGE, flags=re.MULTILINE)[1]
    text = PAGE.split(f"\n{rank} {title}\n")[1]
    return re.split(rf"^#{{1,{len(rank)}}} ", text, flags=re.MULTILINE)[0]


def table(title: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# ---- the examples ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of the page's recipe, with the page's writer and reader attached."""
    from opsin.cli import main

    folder = tmp_path_factory.mktemp("examples")
    for code in blocks("python"):
        (folder / re.match(r"# (\w+\.py)\n", code)[1]).write_text(code)
    recipes = [yaml.safe_load(block) for block in blocks("yaml")]
    (recipe,) = [content for content in recipes if isinstance(content, dict)]
    for further in recipes:
        # a callback of the package on the page is explained there, and tested elsewhere
        if isinstance(further, list) and not further[0]["class_path"].startswith("opsin."):
            recipe["trainer"]["callbacks"] += further
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    short = ["--trainer.max_steps", str(STEPS), "--model.steps_per_batch", "4", "--model.log_every", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setenv("WANDB_MODE", "offline")
        assert main(["fit", "--config", "recipe.yaml", "--run_folder", "run", *short]) == 0
    return folder / "run"


def recorded(folder, metric: str) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["metric"] == metric]


def test_every_example_is_a_module_with_its_recipe():
    named = {re.match(r"# (\w+)\.py\n", code)[1] for code in blocks("python")}
    used = {path.rpartition(".")[0] for path in re.findall(r"class_path: ([\w.]+)", "".join(blocks("yaml")))}
    assert len(named) == 3 and named <= used


def test_the_example_of_a_task_is_learned_from(trained):
    losses = [float(row["value"]) for row in recorded(trained, "train/loss")]
    assert len(losses) == STEPS // 4 and all(0 < loss < 5 for loss in losses)


def test_the_exact_predictor_of_the_example_of_a_task_is_right_where_a_token_is_a_copy(trained, monkeypatch):
    monkeypatch.syspath_prepend(trained.parent)
    from cycles import Cycles

    task = Cycles(vocabulary=5, period=3, positions=8, batch_size=4)
    batch = task.batch(seed=1, step=2)
    right = task.exact(batch).exp().gather(-1, batch.targets[..., None])[0, ..., 0]
    assert right[:, 2:].allclose(right.new_tensor(1.0)) and right[:, :2].allclose(right.new_tensor(1 / 5))
    assert batch.truth.query[0, :, 3:].all() and not batch.truth.query[0, :, :3].any()


def test_the_example_of_a_writer_fires(trained):
    (row,) = json.loads((trained / "summary.json").read_text())["interventions"]
    assert row["writer"] == "ScaleHeads" and row["changed_steps"] == row["active_steps"] == [STEPS]


def test_the_example_of_a_reader_records_draws_and_is_shown_in_wandb(trained):
    rows = recorded(trained, "attention_entropy")
    # before the first step and after the last, every head of two layers
    assert {row["step"] for row in rows} == {"0", str(STEPS)} and len(rows) == 2 * 2 * 4
    assert all(0 <= float(row["value"]) < 4 for row in rows)
    assert Image.open(trained / "attention_entropy.png").size > (300, 200)
    (sent,) = offline_runs(trained)
    assert any(key.startswith("attention_entropy") for row in history(read(sent)) for key in row)
    assert list(sent.parent.glob("files/media/images/attention_entropy_*.png"))


# ---- what the plan does -------------------------------------------------------------------------------------


@pytest.fixture
def graft(tiny_task):
    """A model, and the upper graft of the page onto it."""
    model = Transformer(layers=2, width=16, heads=2)
    donor = donor_from("donor", model, init_parameters(model, tiny_task, [9]))
    return model, Graft(donor, layer=0, part="upper")


def test_the_upper_graft_has_the_two_passes_of_the_page(graft, tiny_task):
    model, writer = graft
    nested, run_pass = plan_of(model, tiny_task, writer).passes
    assert nested.nested and nested.donor == 0 and not run_pass.nested
    cells = [re.sub("`", "", row) for _, row, _ in table("The upper graft, a pass inside a pass")]
    assert [[row.target for row in each.rows] for each in (nested, run_pass)] == [[cells[0]], [cells[1]]]
    assert [each.keeps for each in (nested, run_pass)] == [("hook_logits",), ("blocks.0.hook_resid_post",)]
    addresses = [(each.rows[0].inputs[0].kind, each.rows[0].inputs[0].index) for each in (nested, run_pass)]
    assert addresses == [("asking", 0), ("nested", 0)]
    assert nested.rows[0].always and not run_pass.rows[0].always


def test_the_upper_graft_runs_in_the_order_of_the_page(graft, tiny_task):
    model, writer = graft
    plan, batch, values = plan_of(model, tiny_task, writer), batch_of(tiny_task), weights(model, tiny_task)
    values["embed.W_F"].requires_grad_()
    seen: dict[int, dict] = {}
    tap = run_passes(plan, inputs_of(plan, model, values, batch), seen=seen)
    assert not seen, "no pass has run before the run's own"
    logits, _ = run(model, values, batch, tap)
    assert list(seen) == [1, 0], "the nested pass begins inside the run's own"
    cut = "blocks.0.hook_resid_post"
    assert torch.equal(seen[0][cut], seen[1][cut]) and torch.equal(seen[0]["hook_logits"], logits)
    (gradient,) = torch.autograd.grad(logits.square().sum(), [values["embed.W_F"]])
    assert bool((gradient != 0).any()), "gradient reaches the trained block through the donor"


def test_the_clamp_of_the_page_is_the_row_that_it_says(tiny_task):
    (settings,) = [content for block in blocks("yaml") for content in yaml.safe_load(block) if "Clamp" in str(content)]
    (row,) = plan_of(Transformer(layers=2, width=16, heads=4), tiny_task, Clamp(**settings["init_args"])).rows
    assert row.target == "blocks.0.attn.hook_pattern" and row.intervention.selection.heads == (2,)
    assert type(row.intervention.value) is PreviousToken and row.gate == 0
    assert row.mask.flatten().tolist() == [0, 0, 1, 0]


# ---- the picture of the wings -----------------------------------------------------------------------------


def test_the_table_of_wings_says_what_each_imports():
    found = defaultdict(set, {wing_of(module.name): set() for module in modules()})
    for each in (each for module in modules() for each in imports_of(module)):
        if wing_of(each.importer) != wing_of(each.imported):
            found[wing_of(each.importer)].add(wing_of(each.imported))
    for name in (FRONT, "__main__"):
        found.pop(name)
    stated = {wing: {*names.split(", ")} - {"nothing"} for wing, _, names in table("The wings")}
    assert stated == dict(found)


def test_the_picture_has_the_levels_of_the_imports():
    (picture,) = blocks("text")
    wings = {wing_of(module.name) for module in modules()} - {FRONT, "__main__"}
    levels = [{*level} & wings for level in LEVELS]
    assert [{*line.split()} for line in picture.splitlines()] == [level for level in levels if level]


# ---- the files and names --------------------------------------------------------------------------------


@cache
def members_of() -> dict[str, set[str]]:
    """What each class of the package defines or is assigned, by its name, with what it inherits from the package."""
    found: dict[str, set[str]] = defaultdict(set)
    bases: dict[str, set[str]] = defaultdict(set)
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                bases[node.name] |= {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                found[node.name] |= set(_attributes(node))
    for _ in range(4):
        for name, above in bases.items():
            found[name] |= set().union(*(found.get(base, set()) for base in above))
    return found


def _attributes(definition: ast.ClassDef) -> Iterator[str]:
    for node in definition.body:
        if isinstance(node, DEFINITIONS):
            yield node.name
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
    for node in ast.walk(definition):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def top_level(module: Module) -> set[str]:
    return {name for name, _ in top_level_names(module)}


def owners_of(dotted: str) -> list[str]:
    """Files that define a name written as ``module.name`` or ``Class.member``."""
    first, second, *_ = dotted.split(".")
    return [
        module.shown
        for module in modules()
        if (module.path.stem == first and second in top_level(module))
        or (first in top_level(module) and second in members_of().get(first, set()))
    ]


def spans(text: str) -> list[str]:
    return [" ".join(span.split()) for span in SPANS.findall(text)]


def names_in(text: str) -> list[str]:
    """Dotted names in backticks that are no files, sites, or names of other packages."""
    found = [span for span in spans(text) if DOTTED.fullmatch(span) and not FILE_ENDING.search(span)]
    return [name for name in found if not name.startswith(("opsin.", "blocks.")) and name not in NOT_OURS]


def test_every_file_on_the_page_exists():
    named = [span for span in spans(PROSE) if PATH.fullmatch(span)]
    assert len(named) > 40
    report("files that do not exist", (name for name in named if not (ROOT / name).exists()))


def test_every_module_and_package_on_the_page_exists():
    known = {module.name for module in modules()}
    named = [span for span in spans(PROSE) if re.fullmatch(r"opsin\.\w+", span)]
    report("modules that do not exist", (name for name in named if name not in known))


def test_every_name_on_the_page_exists():
    named = names_in(PROSE)
    assert len(named) > 60
    report("names that do not exist", (name for name in named if not owners_of(name)))


def test_every_class_on_the_page_exists():
    known = set().union(*(top_level(module) for module in modules()))
    shown = {node.name for code in blocks("python") for node in ast.parse(code).body if isinstance(node, ast.ClassDef)}
    named = [span for span in spans(PROSE) if CLASS.fullmatch(span)]
    report("classes that do not exist", (name for name in named if name not in known | shown))


def test_twenty_questions_are_answered_by_a_name_in_the_named_file():
    rows = table("Where to look first")
    assert len(rows) == 20
    offences = []
    for _, file, name in rows:
        assert names_in(name) and len(spans(file)) == 1
        offences += [f"{each} in {file}" for each in names_in(name) if spans(file)[0] not in owners_of(each)]
    report("names that the named file does not define", offences)
