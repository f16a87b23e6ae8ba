"""Claims about docstrings and annotations, and about what the documents say of the tree."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator

from tests.contracts.house import DEFINITIONS, Module, documents, modules, recipes, report
from tests.helpers.paths import ROOT

LEAST_WORDS = 4
LONGEST = 50
EMPTY_START = re.compile(r"(of|theirs|the same|it|its|those|these|this|whose|who)\b", re.IGNORECASE)
BLOCK = re.compile(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"    ([\w, *`]+): (.*)", re.DOTALL)
PATH = re.compile(r"`((?:src|tasks|callbacks|tests|scripts|docs|recipes)/[\w./-]*|[\w./-]+\.(?:md|yaml|py))`")


def definitions(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """Classes, functions and methods with their dotted names, but nothing inside of functions."""

    def inside(node: ast.AST, prefix: str) -> Iterator[tuple[ast.AST, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, DEFINITIONS):
                yield child, f"{prefix}{child.name}"
                if isinstance(child, ast.ClassDef):
                    yield from inside(child, f"{prefix}{child.name}.")

    return inside(module.tree, "")


def is_public(dotted: str) -> bool:
    return not any(part.startswith("_") for part in dotted.split("."))


def found_in(module: Module, dotted: str) -> tuple[object, type | None]:
    """The thing of that name, and the class it stands in."""
    holder: object = None
    thing: object = importlib.import_module(module.name)
    for part in dotted.split("."):
        holder, thing = thing, inspect.getattr_static(thing, part)
    return thing, holder if isinstance(holder, type) else None


def inherited(module: Module, dotted: str) -> str | None:
    """The docstring of the nearest base that has one."""
    thing, holder = found_in(module, dotted)
    if isinstance(thing, type):
        return next((base.__doc__ for base in thing.__mro__[1:-1] if base.__doc__), None)
    bases = holder.__mro__[1:] if holder else ()
    overridden = [inspect.getattr_static(base, dotted.rpartition(".")[2], None) for base in bases]
    return next((item.__doc__ for item in overridden if item is not None and item.__doc__), None)


def test_every_public_module_class_function_and_property_has_a_docstring():
    offences = []
    for module in modules():
        if module.text.strip() and not ast.get_docstring(module.tree):
            offences.append(f"{module.shown}:1: the module")
        for node, dotted in definitions(module):
            if is_public(dotted) and not ast.get_docstring(node) and not inherited(module, dotted):
                offences.append(f"{module.shown}:{node.lineno}: {dotted}")
    report("public things without a docstring", offences)


def argument_lines(text: str) -> Iterator[tuple[str, str | None]]:
    """Of a docstring, the lines of what it documents argument by argument: names, and what is said of them."""
    for block in BLOCK.findall(text):
        for line in re.split(r"\n(?=    \S)", block.rstrip()):
            entry = ENTRY.fullmatch(line)
            yield (entry[1], " ".join(entry[2].split())) if entry else (line.strip(), None)


def documented() -> Iterator[tuple[Module, ast.AST, str, str, str | None]]:
    """Every argument line of the house, with where it stands."""
    for module in modules():
        for node, dotted in definitions(module):
            for names, text in argument_lines(ast.get_docstring(node) or ""):
                yield module, node, dotted, names, text


def test_every_argument_line_says_what_the_argument_is_in_a_whole_phrase():
    offences = []
    for module, node, dotted, names, text in documented():
        if text is None or len(text.split()) < LEAST_WORDS or EMPTY_START.match(text):
            offences.append(f"{module.shown}:{node.lineno}: {dotted}({names}): {text}")
    report("argument lines that do not say what the argument is", offences)


def test_every_argument_that_is_documented_exists():
    offences = []
    for module, node, dotted, names, _ in documented():
        known = parameters(module, dotted)
        named = [name.strip(" *`") for name in names.split(",")]
        offences += [f"{module.shown}:{node.lineno}: {dotted}({name})" for name in named if name not in known]
    report("documented arguments that do not exist", offences)


def parameters(module: Module, dotted: str) -> set[str]:
    thing, _ = found_in(module, dotted)
    if isinstance(thing, type):
        fields = {name for base in thing.__mro__ for name in inspect.get_annotations(base)}
        return fields | set(inspect.signature(thing).parameters)
    if isinstance(thing, property):
        return set()
    thing = getattr(thing, "__func__", getattr(thing, "func", thing))
    return set(inspect.signature(thing).parameters)


def test_no_function_is_longer_than_a_page():
    offences = []
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1 - lines_of_docstring(node)
                if length > LONGEST:
                    offences.append(f"{module.shown}:{node.lineno}: {node.name} has {length} lines")
    report(f"functions of more than {LONGEST} lines", offences)


def lines_of_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if ast.get_docstring(node) is None:
        return 0
    first = node.body[0]
    return first.end_lineno - first.lineno + 1


def test_everything_is_annotated():
    offences = []
    for module in modules():
        methods = {id(child) for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef) for child in node.body}
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lacking = unannotated(node, method=id(node) in methods)
                offences += [f"{module.shown}:{node.lineno}: {node.name}: {name}" for name in lacking]
    report("arguments and results without an annotation", offences)


def unannotated(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> list[str]:
    arguments = [*node.args.posonlyargs, *node.args.args]
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    arguments = arguments[1:] if method and not static else arguments
    arguments += [*node.args.kwonlyargs, *filter(None, [node.args.vararg, node.args.kwarg])]
    return [item.arg for item in arguments if item.annotation is None] + ([] if node.returns else ["the result"])


def test_every_file_that_a_document_names_exists():
    offences = []
    for document in (*documents(), *recipes()):
        for number, line in enumerate(document.read_text().splitlines(), 1):
            for name in PATH.findall(line):
                if not is_there(name, document.parent):
                    offences.append(f"{document.relative_to(ROOT)}:{number}: {name}")
    report("files that do not exist", offences)


def is_there(name: str, folder: object) -> bool:
    """A file of the tree, as seen from the top or the document's folder; a bare name may lie anywhere."""
    if (ROOT / name).exists() or (folder / name).exists():
        return True
    # what a run leaves behind, and what a user has
    written = name in ("config.yaml", "recipe.yaml", "branches.yaml") or name.startswith("runs/")
    return written or ("/" not in name and any(ROOT.glob(f"src/**/{name}")))
