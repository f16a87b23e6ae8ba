"""The house as text: its modules, their syntax trees, what each imports, and every name that each binds."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from tests.helpers.paths import ROOT

SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
ROOMS = {package: ROOT / folder for package, folder in SETUPTOOLS["package-dir"].items()}
"""Where each top folder of the package lies, by the name under which it is imported."""

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True)
class Module:
    """One Python file.

    Args:
        name: dotted name under which it is imported, or the path of a script.
        path: the file.
    """

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        """The source."""
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    @property
    def is_package(self) -> bool:
        """Whether it is the ``__init__.py`` of a folder."""
        return self.path.name == "__init__.py"

    @property
    def shown(self) -> str:
        """The file as messages name it."""
        return str(self.path.relative_to(ROOT))


@dataclass(frozen=True)
class Import:
    """One import of one module by another; wherever it stands, in a function or under TYPE_CHECKING too.

    Args:
        importer: name of the module in which it stands.
        imported: name of the module that it names.
        where: file and line, as messages show them.
    """

    importer: str
    imported: str
    where: str

    def __str__(self) -> str:
        return f"{self.where}: {self.importer} imports {self.imported}"


@dataclass(frozen=True)
class Binding:
    """One name that a file gives to something.

    Args:
        name: the identifier.
        where: file and line, as messages show them.
        owner: class in whose body it is a field; empty for every other name.
    """

    name: str
    where: str
    owner: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.owner + '.' if self.owner else ''}{self.name}"


def python_files(folder: Path) -> list[Path]:
    """All Python files below a folder, in order."""
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


@cache
def modules() -> tuple[Module, ...]:
    """All modules of the package."""
    found = []
    for package, folder in ROOMS.items():
        for path in python_files(folder):
            parts = path.relative_to(folder).with_suffix("").parts
            found.append(Module(".".join([package, *(part for part in parts if part != "__init__")]), path))
    return tuple(found)


@cache
def scripts() -> tuple[Module, ...]:
    """What a person types."""
    return tuple(Module(path.stem, path) for path in python_files(ROOT / "scripts"))


@cache
def modules_of_tests() -> tuple[Module, ...]:
    """All tests but the contracts, which have to name what they forbid."""
    paths = [path for path in python_files(ROOT / "tests") if "contracts" not in path.parts]
    return tuple(Module(path.stem, path) for path in paths)


@cache
def documents() -> tuple[Path, ...]:
    """Prose for people."""
    return tuple(sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]))


@cache
def recipes() -> tuple[Path, ...]:
    """Experiments."""
    return tuple(sorted((ROOT / "recipes").rglob("*.yaml")))


def imports_of(module: Module) -> list[Import]:
    """What a module imports from the package, each module once a line."""
    known = {item.name for item in modules()}
    found = []
    for node in ast.walk(module.tree):
        for name in _named(node, module):
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name and name != module.name:
                found.append(Import(module.name, name, f"{module.shown}:{node.lineno}"))
    return list(dict.fromkeys(found))


def _named(node: ast.AST, module: Module) -> Iterator[str]:
    """Dotted names that an import statement may mean, the longest first."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = module.name.split(".")
            kept = len(parts) - node.level + module.is_package
            base = ".".join([*parts[:kept], *([node.module] if node.module else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
        first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield first.value


def bindings(module: Module) -> list[Binding]:
    """Every name that a file binds: classes, functions, arguments, locals, loop variables, attributes, aliases."""
    return [Binding(name, f"{module.shown}:{line}", owner) for name, line, owner in _bound(module.tree, "")]


def _bound(node: ast.AST, owner: str) -> Iterator[tuple[str, int, str]]:
    line = getattr(node, "lineno", 0)
    if isinstance(node, DEFINITIONS):
        yield node.name, line, ""
    elif isinstance(node, ast.arg):
        yield node.arg, line, ""
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id, line, owner
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr, line, ""
    elif isinstance(node, ast.alias) and node.asname:
        yield node.asname, line, ""
    elif isinstance(node, (ast.MatchAs, ast.MatchStar, ast.ExceptHandler)) and node.name:
        yield node.name, line, ""
    inside = node.name if isinstance(node, ast.ClassDef) else "" if isinstance(node, FUNCTIONS) else owner
    for child in ast.iter_child_nodes(node):
        yield from _bound(child, inside)


def top_level_names(module: Module) -> Iterator[tuple[str, int]]:
    """Functions, classes and constants of a module, with their lines."""
    for node in module.tree.body:
        if isinstance(node, DEFINITIONS):
            yield node.name, node.lineno
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from ((name.id, node.lineno) for name in ast.walk(target) if isinstance(name, ast.Name))


def words(identifier: str) -> list[str]:
    """The words of an identifier, in small letters: ``_EveryOne_else`` has every, one and else."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", identifier)]


def report(rule: str, offences: Iterable[object]) -> None:
    """Fail with every offence on a line of its own.

    Raises:
        AssertionError: there is one.
    """
    lines = [str(offence) for offence in offences]
    if lines:
        raise AssertionError("\n".join([f"{rule} ({len(lines)}):", *lines]))
