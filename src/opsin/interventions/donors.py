"""Donors: trained models whose activations another run may be given.

Legend: M members, L positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions.identity import DERIVED
from opsin.model.protocol import Model, Sizes
from opsin.model.saved import read_model, read_sizes, says_model, sizes_by_weights
from opsin.model.sites import SiteTable
from opsin.records.checkpoint import DamagedError, read_saved
from opsin.records.schema import LAST_CHECKPOINT
from opsin.records.user_files import UNREADABLE, reason
from opsin.task import Task

_PRECISIONS = (torch.float16, torch.float32, torch.float64)
"""What weights may be stored in."""

EXPECTED = "a checkpoint (RUN/checkpoints/last.ckpt), a snapshot (RUN/snapshots/step_NNNNNNN.pt) or a run folder"


@dataclass(frozen=True)
class Donor:
    """One trained model, constant for the run that it is given to.

    Args:
        name: path of the file it was read from, for people.
        digest: hash of the weights, by which donors are compared.
        model: settings of the trained model.
        parameters: weights ``[1, ...]`` under the names of the model's table.
        setting: name of the setting that asked for the donor, for messages.
        task_sizes: what of its task shaped the model; None where the weights say it.
    """

    name: str = field(compare=False, repr=False, metadata=DERIVED)
    digest: str
    model: Model
    parameters: Mapping[str, Tensor] = field(compare=False, repr=False, metadata=DERIVED)
    setting: str = field(default="donor", compare=False, repr=False, metadata=DERIVED)
    task_sizes: Sizes | None = field(default=None, compare=False, repr=False, metadata=DERIVED)

    @property
    def sizes(self) -> Sizes:
        """What of its task shaped the model."""
        return self.task_sizes or sizes_by_weights(self.parameters)

    def sites(self, positions: int) -> SiteTable:
        """Its activations and weights on sequences of this length."""
        return self.model.sites(self.sizes.with_positions(positions))

    def table(self, positions: int) -> Float[Tensor, "2 L C"]:
        """Its position table, in the precision of its weights."""
        return self.model.position_table(positions, next(iter(self.parameters.values())).dtype)

    def check(self, task: Task) -> None:
        """Refuse a donor of another task.

        Raises:
            ConfigError: it reads or predicts something else than this task, or has too few positions.
        """
        found, needed = _counts(self.sizes), _counts(Sizes.of(task))
        if found != needed:
            expected = f"a model of this task: {_sizes_in_words(needed)}"
            raise ConfigError(self.setting, f"{self.name} with {_sizes_in_words(found)}", expected)
        try:
            shapes = self.model.sites(task).weights.shapes
        except ConfigError as error:
            found_setting = f"{self.name} with {error.value} {_LIMITS.get(error.field, error.field)}"
            raise ConfigError(self.setting, found_setting, error.expected) from error
        other = [name for name, x in self.parameters.items() if tuple(x.shape[1:]) != shapes.get(name)]
        if other:
            expected = f"a model of this task, whose {other[0]} is {list(shapes.get(other[0], ()))}"
            found_shape = f"{self.name} with {other[0]} of {list(self.parameters[other[0]].shape[1:])}"
            raise ConfigError(self.setting, found_shape, expected)


_LIMITS = {"transformer.max_positions": "learned positions"}
"""Settings of models that limit a task, in words."""


def _counts(sizes: Sizes) -> dict[str, int | None]:
    return {"features": sizes.n_features, "tokens": sizes.n_tokens, "outputs": sizes.n_outputs}


def _sizes_in_words(sizes: Mapping[str, int | None]) -> str:
    return ", ".join(f"{'no' if size is None else size} {name}" for name, size in sizes.items())


@dataclass(frozen=True)
class Start:
    """Weights that a member starts from.

    Args:
        path: where a run folder, a checkpoint or a snapshot lies.
        place: number of the member in that file; 0 where it holds a single one.
    """

    path: str
    place: int = 0


def donor_from(
    name: str,
    model: Model,
    parameters: Mapping[str, Tensor],
    setting: str = "donor",
    sizes: Sizes | None = None,
) -> Donor:
    """A donor with given weights.

    Args:
        name: path of the file it was read from, for people.
        model: settings of the trained model.
        parameters: weights ``[1, ...]`` under the names of the model's table.
        setting: name of the setting that asked for the donor, for messages.
        sizes: what of its task shaped the model; None for a transformer, whose weights say it.
    """
    digest = hashlib.sha256()
    for key in sorted(parameters):
        digest.update(key.encode())
        digest.update(parameters[key].detach().cpu().contiguous().numpy().tobytes())
    weights = {k: v.detach() for k, v in parameters.items()}
    return Donor(name, digest.hexdigest()[:16], model, weights, setting, sizes)


def read_donor(writer: str, path: str | Path, member: int = 0) -> Donor:
    """One member of a run, from its checkpoint, one of its snapshots, or its folder (then the last checkpoint).

    Args:
        writer: callback whose settings ``donor`` and ``member`` are meant, for messages.
        path: where a run folder, a checkpoint or a snapshot lies.
        member: number of the member in that file, from 0.

    Raises:
        ConfigError: no such file, none that a run has written, or no such member in it.
    """
    path = Path(path)
    file = path / LAST_CHECKPOINT if path.is_dir() else path
    saved = _read_saved(f"{writer}.donor", file)
    try:
        model, parameters, sizes = _model_and_parameters(saved)
        count = _check_parameters(model, parameters, sizes)
    except UNREADABLE as error:
        raise ConfigError(f"{writer}.donor", str(file), f"{EXPECTED} ({reason(error)})") from error
    if not 0 <= member < count:
        raise ConfigError(f"{writer}.member", member, f"a member from 0 to {count - 1} of {path}")
    weights = {name: x[member : member + 1].clone() for name, x in parameters.items()}
    for name, x in weights.items():
        if not bool(x.isfinite().all()):
            raise ConfigError(f"{writer}.donor", str(file), f"finite weights; {name} of member {member} has others")
    return donor_from(str(path), model, weights, f"{writer}.donor", sizes)


def _model_and_parameters(saved: Mapping[str, Any]) -> tuple[Model, dict[str, Tensor], Sizes]:
    """What a file that some run may have written says of its model, its weights, and the sizes of its task."""
    if "parameters" in saved:
        said, parameters = saved, dict(saved["parameters"])
    else:
        said, state = saved["opsin"], saved["state_dict"]
        parameters = {name.removeprefix("members."): x for name, x in state.items() if name.startswith("members.")}
    model = read_model(said)
    _check_plain_numbers(parameters)
    return model, parameters, read_sizes(said, parameters)


def _check_plain_numbers(parameters: Mapping[str, Tensor]) -> None:
    """Refuse what are no plain tensors of numbers.

    Raises:
        ValueError: names the first.
    """
    for name, x in parameters.items():
        plain = isinstance(x, Tensor) and x.layout == torch.strided and x.device.type == "cpu"
        if not (plain and x.dtype in _PRECISIONS):
            raise ValueError(f"{name} holds no floating-point numbers")
        if x.untyped_storage().nbytes() < x.numel() * x.element_size():
            raise ValueError(f"{name} holds fewer numbers than it says")


def _check_parameters(model: Model, parameters: Mapping[str, Tensor], sizes: Sizes) -> int:
    """Refuse weights that are not those of the model.

    Returns:
        How many members have them.

    Raises:
        ValueError: names the first parameter that is missing, unknown, or not as it should be.
    """
    # or else a file could name more blocks than any memory has room for
    layers = getattr(model, "layers", 0)
    if layers > len(parameters):
        raise ValueError(f"{layers} blocks and {len(parameters)} parameters")
    members = len(next(iter(parameters.values())))
    shapes = model.parameters(sizes).shapes
    for name in sorted(shapes.keys() | parameters.keys()):
        expected = (members, *shapes[name]) if name in shapes else None
        found = tuple(parameters[name].shape) if name in parameters else None
        if found != expected:
            raise ValueError(f"{name} of shape {found}, and not {expected}")
    if not members:
        raise ValueError("no member")
    return members


def _read_saved(field_name: str, path: Path) -> dict[str, Any]:
    try:
        saved = read_saved(path, field_name)
    except DamagedError as error:
        raise ConfigError(field_name, str(path), f"{EXPECTED} ({error.reason})") from error
    opsin = saved.get("opsin")
    whole = ("parameters" in saved and says_model(saved)) or (isinstance(opsin, dict) and says_model(opsin))
    if not whole:
        raise ConfigError(field_name, str(path), EXPECTED)
    return saved
