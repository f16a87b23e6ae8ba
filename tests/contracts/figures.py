"""Every function that draws a figure, found by its annotation, and what each has drawn while it was watched."""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from matplotlib.figure import Figure

from tests.contracts.house import modules

WING = "opsin.figures."
Drawn = dict[str, list[Figure]]


def figure_functions() -> list[str]:
    """Dotted names of the functions of the figures' wing that return a Figure."""
    return [
        f"{module.name}.{node.name}"
        for module in modules()
        if module.name.startswith(WING)
        for node in module.tree.body
        if isinstance(node, ast.FunctionDef) and node.returns and ast.unparse(node.returns) == "Figure"
    ]


@contextmanager
def collected() -> Iterator[Drawn]:
    """The figures that each of these functions returns meanwhile, whoever calls it."""
    for module in modules():
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    drawn: Drawn = {name: [] for name in figure_functions()}
    replaced = []
    for dotted in drawn:
        holder, _, name = dotted.rpartition(".")
        original = getattr(sys.modules[holder], name)
        watched = _watched(original, drawn[dotted])
        for module in [held for known, held in sys.modules.items() if known.split(".")[0] == "opsin"]:
            for attribute in [known for known, value in vars(module).items() if value is original]:
                replaced.append((module, attribute, original))
                setattr(module, attribute, watched)
    try:
        yield drawn
    finally:
        for module, attribute, original in replaced:
            setattr(module, attribute, original)


def _watched(draw: Callable[..., Figure], figures: list[Figure]) -> Callable[..., Figure]:
    @functools.wraps(draw)
    def drawing(*arguments: object, **named: object) -> Figure:
        figures.append(draw(*arguments, **named))
        return figures[-1]

    return drawing
