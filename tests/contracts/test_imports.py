"""Claims about who imports whom: one way through the house, in no circle; lazy imports and type hints count."""

from __future__ import annotations

import ast
import re
from collections import defaultdict, deque

from tests.contracts.house import Import, Module, imports_of, modules, modules_of_tests, report, scripts

LEVELS = (
    ("errors",),
    ("batch", "records", "optimizers"),
    ("objective",),
    ("task",),
    ("model",),
    ("interventions", "metrics", "tasks"),
    ("training", "population"),
    ("figures",),
    ("callbacks", "reports", "exports"),
    ("launch",),
    ("cli",),
    ("__main__",),
)
"""Wings from the lowest to the highest; each may import those of lower levels, and none of its own level but itself."""

LEVEL = {wing: number for number, level in enumerate(LEVELS) for wing in level}
FRONT = "opsin"
"""The package itself, which may name anything, lazily."""

KNOWN = {"writers": ("writers",), "readers": ("readers",), "wandb": ("wandb", "readers")}
"""Of the folders in callbacks, whom each may know; nobody knows a writer but by its protocol."""


BARE = re.compile(r"\s*(from|import)\s+(tasks|callbacks)\b")


def wing_of(name: str) -> str:
    return name.split(".")[1] if "." in name else FRONT


def all_imports() -> list[Import]:
    return [found for module in modules() if module.name != FRONT for found in imports_of(module)]


def circle(edges: dict[str, dict[str, Import]], start: str) -> list[Import]:
    """The shortest way from a module back to itself; none where there is no way."""
    came: dict[str, Import] = {}
    queue = deque([start])
    while queue:
        for following, found in edges.get(queue.popleft(), {}).items():
            if following not in came:
                came[following] = found
                queue.append(following)
    way: list[Import] = []
    while start in came and (not way or way[-1].importer != start):
        way.append(came[way[-1].importer if way else start])
    return way[::-1]


def test_no_modules_import_each_other_in_a_circle():
    edges: dict[str, dict[str, Import]] = defaultdict(dict)
    for found in all_imports():
        edges[found.importer].setdefault(found.imported, found)
    circles = {frozenset(way): way for name in edges if (way := circle(edges, name))}
    report("circles of imports", (" -> ".join(map(str, way)) for way in circles.values()))


def test_every_wing_has_a_level():
    unknown = {wing_of(module.name) for module in modules()} - {FRONT} - LEVEL.keys()
    report("wings that stand on no level", sorted(unknown))


def test_imports_point_one_way():
    offences = []
    for found in all_imports():
        upper, lower = wing_of(found.importer), wing_of(found.imported)
        if upper != lower and LEVEL.get(upper, -1) <= LEVEL.get(lower, len(LEVELS)):
            offences.append(f"{found}: {upper} does not stand above {lower}")
    report("imports against the order of the wings", offences)


def test_inside_callbacks_only_wandb_knows_readers_and_nobody_knows_a_writer():
    offences = []
    for found in all_imports():
        user, used = found.importer.split("."), found.imported.split(".")
        if user[1] != "callbacks" or used[1:2] != ["callbacks"] or user == ["opsin", "callbacks"]:
            continue
        # beside the three folders there may be modules that all of them share, and that know none of them
        shared = len(used) == 3 and used[2] not in KNOWN
        folder = used[2] if len(used) > 2 else "all of them"
        if not shared and folder not in KNOWN.get(user[2], ()):
            offences.append(f"{found}: {user[2]} may know {', '.join(KNOWN.get(user[2], ())) or 'none'} only")
    report("callbacks that know what they should not", offences)


def test_nobody_imports_a_bare_tasks_or_callbacks():
    offences = []
    for module in (*modules(), *scripts(), *modules_of_tests()):
        for number, line in enumerate(module.text.splitlines(), 1):
            if BARE.match(line):
                offences.append(f"{module.shown}:{number}: {line.strip()}")
    report("imports of a folder that is installed as opsin.tasks or opsin.callbacks", offences)


def test_nobody_imports_the_generator_of_the_standard_library():
    offences = []
    for module in modules():
        for node in ast.walk(module.tree):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module] if isinstance(node, ast.ImportFrom) else []
            offences += [f"{module.shown}:{node.lineno}" for name in named if name == "random"]
    report("random numbers that no seed and step decide", offences)


def test_the_tools_of_this_file_find_a_circle_and_an_import_inside_a_function(tmp_path):
    path = tmp_path / "one.py"
    path.write_text("def f():\n    from opsin.task import Task\n    import opsin.cli\n")
    # a file of no wing, in which what counts is what is found
    found = imports_of(Unnamed("opsin.one", path))
    assert [item.imported for item in found] == ["opsin.task", "opsin.cli"]
    edges = {"a": {"b": Import("a", "b", "1")}, "b": {"c": Import("b", "c", "2")}, "c": {"a": Import("c", "a", "3")}}
    assert [item.imported for item in circle(edges, "a")] == ["b", "c", "a"]
    assert not circle({"a": {"b": Import("a", "b", "1")}}, "a")


class Unnamed(Module):
    """A module outside of the house."""

    @property
    def shown(self) -> str:
        return self.path.name
