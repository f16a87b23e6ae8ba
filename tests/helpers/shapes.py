"""Run-time checks of the shapes in the package's signatures, and of nothing else.

Settings of a wrong kind must reach the package's own ``ConfigError``, so annotations without a shape
are left alone; and a compiler must see the plain functions, so nothing is checked while one traces.

Whether a call passes depends on shapes, dtypes and types alone. So a call whose arguments and result are in these what
those of an earlier one were is not checked again: training makes the same calls step after step.
"""

import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jaxtyping
import numpy as np
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
    checked, results = _jaxtyped(item, typechecker=_shapes_only), list[Any]()
    check_result = _jaxtyped(_returning_last(results, item), typechecker=_shapes_only)
    passed: dict[Any, set[Any]] = {}

    @functools.wraps(item)
    def function(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return item(*args, **kwargs)
        described = _described(args), _described(kwargs)
        if described not in passed:
            result = checked(*args, **kwargs)
            passed[described] = {_described(result)}
            return result
        result = item(*args, **kwargs)
        if (found := _described(result)) not in passed[described]:
            results.append(result)
            check_result(*args, **kwargs)
            results.pop()
            passed[described].add(found)
        return result

    return function


def _returning_last(results: list[Any], item: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the signature of ``item`` that returns the newest of these results."""

    def returning(*args: Any, **kwargs: Any) -> Any:
        return results[-1]

    function = types.FunctionType(returning.__code__, item.__globals__, closure=returning.__closure__)
    return functools.update_wrapper(function, item)


def _described(value: Any) -> Any:
    """What the checks can see of a value, hashable: shapes and dtypes, in containers too, and else its type."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return type(value), tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return type(value), tuple([(key, _described(part)) for key, part in value.items()])
    if isinstance(value, list | tuple):
        return type(value), tuple([_described(part) for part in value])
    return type(value)


def _shapes_only(function: Any) -> Any:
    shaped = {name: hint for name, hint in function.__annotations__.items() if _holds_shape(hint)}
    function.__annotations__ = shaped
    return beartype(function)


def _holds_shape(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(_holds_shape(part) for part in get_args(annotation))
