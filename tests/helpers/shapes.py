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
    shaped: set[str] = set()
    check, results = functools.partial(_shapes_only, shaped), list[Any]()
    checked = _jaxtyped(item, typechecker=check)
    check_result = _jaxtyped(_returning_last(results, item), typechecker=check)
    seen = _seen_by_checks(item, shaped)
    passed: dict[Any, set[Any]] = {}

    @functools.wraps(item)
    def function(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return item(*args, **kwargs)
        described = seen(args, kwargs)
        if described not in passed:
            result = checked(*args, **kwargs)
            passed[described] = {_described(result)}
            return result
        result = item(*args, **kwargs)
        if "return" in shaped and (found := _described(result)) not in passed[described]:
            results.append(result)
            check_result(*args, **kwargs)
            results.pop()
            passed[described].add(found)
        return result

    return function


def _seen_by_checks(item: Callable[..., Any], shaped: set[str]) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Any]:
    """From the arguments of a call to what the checks see of them: of those alone whose annotation has a shape."""
    parameters = inspect.signature(item).parameters.values()
    named = [(i, p.name, p.kind is p.VAR_POSITIONAL) for i, p in enumerate(parameters) if p.name in shaped]
    any_name = any(p.kind is p.VAR_KEYWORD and p.name in shaped for p in parameters)

    def described(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        found = [
            _described(args[i:] if all_others else args[i] if i < len(args) else kwargs.get(name))
            for i, name, all_others in named
        ]
        return (*found, _described(kwargs)) if any_name else tuple(found)

    return described


def _returning_last(results: list[Any], item: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the signature of ``item`` that returns the newest of these results."""

    def returning(*args: Any, **kwargs: Any) -> Any:
        return results[-1]

    function = types.FunctionType(returning.__code__, item.__globals__, closure=returning.__closure__)
    return functools.update_wrapper(function, item)


def _described(value: Any) -> Any:
    """What the checks can see of a value, hashable: shapes and dtypes, in containers too, and else its type."""
    kind = type(value)
    if kind is torch.Tensor or isinstance(value, torch.Tensor | np.ndarray):
        return kind, value.shape, value.dtype
    if isinstance(value, Mapping):
        return kind, tuple([(key, _described(part)) for key, part in value.items()])
    if isinstance(value, list | tuple):
        return kind, tuple([_described(part) for part in value])
    return kind


def _shapes_only(shaped: set[str], function: Any) -> Any:
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if _holds_shape(hint)}
    shaped.update(function.__annotations__)
    return beartype(function)


def _holds_shape(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(_holds_shape(part) for part in get_args(annotation))
