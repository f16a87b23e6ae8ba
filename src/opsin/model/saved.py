"""What a checkpoint or a snapshot says of the model whose weights it holds, and how that is read again."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor

from opsin.model.protocol import Model, Sizes, TaskSizes
from opsin.model.transformer import Transformer
from opsin.task import Layout


def saved_model(model: Model, task: TaskSizes) -> dict[str, Any]:
    """What a file says of a model, beside its weights.

    Args:
        model: settings of the model.
        task: what gives the sizes of input and output.
    """
    settings, sizes = asdict(model), asdict(Sizes.of(task))  # type: ignore[call-overload]
    if type(model) is Transformer:
        return {"transformer": settings, "sizes": sizes}
    return {"network": {"class_path": class_path(type(model)), "init_args": settings}, "sizes": sizes}


def class_path(kind: type) -> str:
    """Where a class is defined, as recipes name it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def says_model(saved: Mapping[str, Any]) -> bool:
    """Whether a file says what model its weights are of."""
    return "transformer" in saved or "network" in saved


def read_model(saved: Mapping[str, Any]) -> Model:
    """The model that a file holds the weights of.

    Args:
        saved: what ``saved_model`` has made, and perhaps more.

    Raises:
        ValueError: settings of another type, or a class that nobody has imported, since a file imports no code.
    """
    if "network" not in saved:
        return _read_transformer(saved["transformer"])
    path = saved["network"]["class_path"]
    if isinstance(path, str) and path.startswith("opsin.model."):
        importlib.import_module(path.rpartition(".")[0])
    for kind in known_models():
        if class_path(kind) == path:
            return kind(**saved["network"]["init_args"])
    raise ValueError(f"a model of {path!r}, which the recipe does not name")


def _read_transformer(shape: Mapping[str, Any]) -> Transformer:
    for setting in fields(Transformer):
        value = shape.get(setting.name, setting.default)
        if not _fits(value, setting.default):
            raise ValueError(f"transformer.{setting.name} is {value!r}")
    settings: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in shape.items()}
    return Transformer(**settings)


def _fits(value: object, default: object) -> bool:
    """Whether a setting has a type that its default, or its own check, allows."""
    if default is None:
        return value is None or isinstance(value, (bool, int, float, str, tuple, list))
    if isinstance(default, float):
        return isinstance(value, (int, float))
    return isinstance(value, (str, bool) if isinstance(default, bool) else type(default))


def read_sizes(saved: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Sizes:
    """The sizes of input and output that a file's model has.

    Args:
        saved: what ``saved_model`` has made, and perhaps more.
        parameters: weights of the file ``[M, ...]``, by which a file of an earlier version is known.
    """
    if "sizes" not in saved:
        return sizes_by_weights(parameters)
    found = dict(saved["sizes"])
    layout = {name: tuple(int(position) for position in positions) for name, positions in found.pop("layout").items()}
    sizes = Sizes(Layout(**layout), **found)
    for name in ("n_features", "n_tokens", "n_outputs"):
        count = getattr(sizes, name)
        if not (isinstance(count, int) or (name == "n_features" and count is None)):
            raise ValueError(f"sizes.{name} is {count!r}")
    return sizes


def sizes_by_weights(parameters: Mapping[str, Tensor]) -> Sizes:
    """The sizes of a transformer whose weights are all there is of it; its sequences may have any length.

    Args:
        parameters: weights ``[M, ...]`` under the names of the table.
    """
    for name in ("embed.W_E", "unembed.W_U", *(["embed.W_F"] if "embed.W_F" in parameters else [])):
        if name not in parameters or parameters[name].dim() != 3:
            raise ValueError(f"no {name} of three axes")
    features = parameters["embed.W_F"].shape[1] if "embed.W_F" in parameters else None
    tokens, outputs = parameters["embed.W_E"].shape[1], parameters["unembed.W_U"].shape[-1]
    return Sizes(Layout((), (), (), ()), features, tokens, outputs)


def known_models(kind: type[Model] = Model) -> list[type[Model]]:
    """Every model that has been imported: the subclasses of a class, and theirs.

    Args:
        kind: class whose subclasses are meant.
    """
    return [found for below in kind.__subclasses__() for found in (below, *known_models(below))]
