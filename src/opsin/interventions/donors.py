"""Donors: trained models whose activations another run may be given.

Legend: M members, L positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions.identity import DERIVED
from opsin.model.sites import SiteTable
from opsin.model.transformer import Transformer, position_table
from opsin.records.checkpoint import DamagedError, read_saved
from opsin.records.schema import LAST_CHECKPOINT
from opsin.task import Task

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
        tokens, outputs = self.parameters["embed.W_E"].shape[1], self.parameters["unembed.W_U"].shape[-1]
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
    saved = _read_saved(f"{writer}.donor", path / LAST_CHECKPOINT if path.is_dir() else path)
    if "parameters" in saved:
        shape, parameters = saved["transformer"], saved["parameters"]
    else:
        shape, state = saved["opsin"]["transformer"], saved["state_dict"]
        parameters = {name.removeprefix("members."): x for name, x in state.items() if name.startswith("members.")}
    count = next(iter(parameters.values())).shape[0]
    if not 0 <= member < count:
        raise ConfigError(f"{writer}.member", member, f"a member from 0 to {count - 1} of {path}")
    weights = {name: x[member : member + 1].clone() for name, x in parameters.items()}
    return donor_from(str(path), Transformer(**shape), weights, f"{writer}.donor")


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
