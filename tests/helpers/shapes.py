"""Run-time checks of the shapes in the package's signatures, and of nothing else.

Settings of a wrong kind must reach the package's own ``ConfigError``, so annotations without a shape
are left alone; and a compiler must see the plain functions, so nothing is checked while one traces.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
import torch
from beartype import beartype

_SHAPE = re.compile(r"\[(Tensor|np\.ndarray), ['\"]")
_jaxtyped = jaxtyping.jaxtyped


def install(package: str) -> None:
    """Check every function and dataclass of ``package`` that states a shape; call before it is imported."""
    jaxtyping.jaxtyped = _decorator
    jaxtyping.install_import_hook(package, "beartype.beartype")


def _decorator(*, typechecker: object) -> Callable[[Any], Any]:
    return _checked


def _checked(item: Any) -> Any:
    if torch.compiler.is_compiling():
        return item
    if inspect.isclass(item):
        if dataclasses.is_dataclass(item):
            item.__init__ = _checked(item.__init__)
        return item
    stated = " ".join(map(str, getattr(item, "__annotations__", {}).values()))
    if not _SHAPE.search(stated) or "<locals>" in item.__qualname__:
        return item  # a function inside a function would be wrapped anew at every call
    checked = _jaxtyped(item, typechecker=_shapes_only)

    @functools.wraps(item)
    def function(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return item(*args, **kwargs)
        return checked(*args, **kwargs)

    return function


def _shapes_only(function: Any) -> Any:
    shaped = {name: hint for name, hint in function.__annotations__.items() if _holds_shape(hint)}
    function.__annotations__ = shaped
    return beartype(function)


def _holds_shape(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(_holds_shape(part) for part in get_args(annotation))
