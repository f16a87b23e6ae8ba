"""Donors: trained models whose activations another run may be given.

Legend: M members, L positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions.identity import DERIVED
from opsin.model.sites import SiteTable
from opsin.model.transformer import Transformer, parameter_shapes, position_table
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
        model: shape of the trained transformer.
        parameters: weights ``[1, ...]`` under the names of ``init_parameters``.
        setting: name of the setting that asked for the donor, for messages.
    """

    name: str = field(compare=False, repr=False, metadata=DERIVED)
    digest: str
    model: Transformer
    parameters: Mapping[str, Tensor] = field(compare=False, repr=False, metadata=DERIVED)
    setting: str = field(default="donor", compare=False, repr=False, metadata=DERIVED)

    def sites(self, positions: int) -> SiteTable:
        """Its activations on sequences of this length."""
        return self.model.sites_of(positions, outputs=self.parameters["unembed.W_U"].shape[-1])

    def table(self, positions: int) -> Float[Tensor, "2 L half"]:
        """Its position table, in the precision of its weights."""
        return position_table(self.model, positions, self.parameters["unembed.W_U"].dtype)

    def check(self, task: Task) -> None:
        """Refuse a donor of another task.

        Raises:
            ConfigError: it reads or predicts something else than this task, or has too few positions.
        """
        features = self.parameters["embed.W_F"].shape[1] if "embed.W_F" in self.parameters else None
        tokens = self.parameters["embed.W_E"].shape[1] if "embed.W_E" in self.parameters else 0
        outputs = self.parameters["unembed.W_U"].shape[-1]
        found = {"features": features, "tokens": tokens, "outputs": outputs}
        needed = {"features": task.n_features, "tokens": task.n_tokens, "outputs": task.n_outputs}
        if found != needed:
            expected = f"a model of this task: {_sizes_in_words(needed)}"
            raise ConfigError(self.setting, f"{self.name} with {_sizes_in_words(found)}", expected)
        if self.model.positions == "learned" and self.model.max_positions < task.layout.positions:
            expected = f"at least the task's {task.layout.positions}"
            raise ConfigError(self.setting, f"{self.name} with {self.model.max_positions} learned positions", expected)


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


def donor_from(name: str, model: Transformer, parameters: Mapping[str, Tensor], setting: str = "donor") -> Donor:
    """A donor with these weights (``[1, ...]``)."""
    digest = hashlib.sha256()
    for key in sorted(parameters):
        digest.update(key.encode())
        digest.update(parameters[key].detach().cpu().contiguous().numpy().tobytes())
    return Donor(name, digest.hexdigest()[:16], model, {k: v.detach() for k, v in parameters.items()}, setting)


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
        model, parameters = _model_and_parameters(saved)
        count = _check_parameters(model, parameters)
    except UNREADABLE as error:
        raise ConfigError(f"{writer}.donor", str(file), f"{EXPECTED} ({reason(error)})") from error
    if not 0 <= member < count:
        raise ConfigError(f"{writer}.member", member, f"a member from 0 to {count - 1} of {path}")
    weights = {name: x[member : member + 1].clone() for name, x in parameters.items()}
    for name, x in weights.items():
        if not bool(x.isfinite().all()):
            raise ConfigError(f"{writer}.donor", str(file), f"finite weights; {name} of member {member} has others")
    return donor_from(str(path), model, weights, f"{writer}.donor")


def _model_and_parameters(saved: Mapping[str, Any]) -> tuple[Transformer, dict[str, Tensor]]:
    """What a file that some run may have written says of its model, and its weights."""
    if "parameters" in saved:
        shape, parameters = saved["transformer"], dict(saved["parameters"])
    else:
        shape, state = saved["opsin"]["transformer"], saved["state_dict"]
        parameters = {name.removeprefix("members."): x for name, x in state.items() if name.startswith("members.")}
    for setting in fields(Transformer):
        value, kind = shape.get(setting.name, setting.default), type(setting.default)
        numbers = isinstance(value, (int, float)) or (value is None and setting.name == "mlp_ratio")
        if not (numbers if setting.name == "mlp_ratio" or kind is float else isinstance(value, kind)):
            raise ValueError(f"transformer.{setting.name} is {value!r}")
    return Transformer(**shape), parameters


def _check_parameters(model: Transformer, parameters: Mapping[str, Tensor]) -> int:
    """Refuse weights that are not those of the model.

    Returns:
        How many members have them.

    Raises:
        ValueError: names the first parameter that is missing, unknown, or not as it should be.
    """
    for name, x in parameters.items():
        plain = isinstance(x, Tensor) and x.layout == torch.strided and x.device.type == "cpu"
        if not (plain and x.dtype in _PRECISIONS):
            raise ValueError(f"{name} holds no floating-point numbers")
        if x.untyped_storage().nbytes() < x.numel() * x.element_size():
            raise ValueError(f"{name} holds fewer numbers than it says")
    # a model reads tokens, features, or both
    embeddings = [name for name in ("embed.W_E", "embed.W_F") if name in parameters] or ["embed.W_E"]
    for name in ("unembed.W_U", *embeddings):
        if name not in parameters or parameters[name].dim() != 3:
            raise ValueError(f"no {name} of three axes")
    # or else a file could name more blocks than any memory has room for
    if model.layers > len(parameters):
        raise ValueError(f"{model.layers} blocks and {len(parameters)} parameters")
    features = parameters["embed.W_F"].shape[1] if "embed.W_F" in parameters else None
    tokens = parameters["embed.W_E"].shape[1] if "embed.W_E" in parameters else 0
    members = parameters["unembed.W_U"].shape[0]
    shapes = parameter_shapes(model, features, tokens, parameters["unembed.W_U"].shape[-1])
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
    whole = {"transformer", "parameters"} <= saved.keys() or (isinstance(opsin, dict) and "transformer" in opsin)
    if not whole:
        raise ConfigError(field_name, str(path), EXPECTED)
    return saved
