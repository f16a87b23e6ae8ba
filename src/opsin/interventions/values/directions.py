"""Directions of a subspace: given ones, singular vectors of a weight, or those that a classifier reads.

A basis ``[M, W, C]`` has orthonormal columns. ``subspaces`` projects activations onto it or away from it.

Legend: M members, H heads, W width of a site's last axis, C columns of a basis, G given directions, I and O input
and output of a weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions.identity import DERIVED
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.nullspace import Label
from opsin.model.parameters import ParameterTable
from opsin.records.user_files import UNREADABLE, check_regular, read_npy_header, read_npy_numbers, reason

LEAST_INDEPENDENT = 1e-6
"""Smallest singular value of independent directions of length 1."""


# ---- where directions come from -------------------------------------------------------------------


@dataclass(frozen=True)
class GivenDirections:
    """Directions that stay as they are; compared by what they span.

    Args:
        digest: the first 16 hexadecimal digits of the SHA-256 of the basis.
        basis: orthonormal columns that span the directions, ``[W, G]``.
    """

    digest: str
    basis: Float[Tensor, "W G"] = field(compare=False, repr=False, metadata=DERIVED)


@dataclass(frozen=True, kw_only=True)
class WeightDirections:
    """Singular vectors of a weight, as the weight is when they are taken.

    Args:
        name: name of a matrix of the model, stored input x output, for example ``unembed.W_U``; ``W_Q``, ``W_K`` and
            ``W_V`` of a block have all heads side by side. At a site with heads: the ``W_Q``, ``W_K`` or
            ``W_V`` (side output) or the ``W_O`` (side input) of a block, head by head.
        side: whether the site is what the weight reads (input) or writes (output).
        part: which singular vectors: those of the largest (top) or the smallest (bottom) singular values, of which
            there are as many as the shorter side of the weight is long.
        rank: how many singular vectors are directions.
        at: when they are first taken, in the schedule's unit; the schedule's start when None.
        every: optimizer steps after which they are taken anew; never when None.

    Raises:
        ConfigError: a value out of its range.
    """

    name: str
    side: Literal["input", "output"] = "input"
    part: Literal["top", "bottom"] = "top"
    rank: int = 1
    at: int | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if self.side not in ("input", "output"):
            raise ConfigError("Project.weight.side", self.side, "'input' or 'output'")
        if self.part not in ("top", "bottom"):
            raise ConfigError("Project.weight.part", self.part, "'top' or 'bottom'")
        if self.rank < 1:
            raise ConfigError("Project.weight.rank", self.rank, "at least 1 direction")
        _check_times("Project.weight", self.at, self.every)


@dataclass(frozen=True, kw_only=True)
class LearnedDirections:
    """Directions that linear classifiers of a label read, found by iterative null-space projection on the probe.

    Ravfogel et al. 2020, "Null It Out", algorithm 1. A round fits a classifier and removes the directions its
    weights span, one fewer than there are labels; the union of all rounds is the subspace.

    Args:
        label: what is predicted from one position: ``target``, the right answer, at scored positions; ``token``, the
            token at positions that hold one; ``previous_token``, the token before, where one precedes.
        rounds: how many classifiers are fitted and removed in turn.
        at: when they are first learned, in the schedule's unit; the schedule's start when None.
        every: optimizer steps after which they are learned anew; never when None.

    Raises:
        ConfigError: a value out of its range.
    """

    label: Label = "target"
    rounds: int = 1
    at: int | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if self.label not in get_args(Label):
            raise ConfigError("Project.learn.label", self.label, f"one of {', '.join(get_args(Label))}")
        if self.rounds < 1:
            raise ConfigError("Project.learn.rounds", self.rounds, "at least 1")
        _check_times("Project.learn", self.at, self.every)


def _check_times(field_name: str, at: int | None, every: int | None) -> None:
    if at is not None and at < 0:
        raise ConfigError(f"{field_name}.at", at, "0 or more")
    if every is not None and every < 1:
        raise ConfigError(f"{field_name}.every", every, "at least 1 optimizer step, or null")


@dataclass(frozen=True)
class Renewal:
    """When directions are taken.

    Args:
        first: position of the first time, in steps or sequences.
        unit: what ``first`` counts, optimizer steps or sequences.
        every: optimizer steps from then to the next time, and so on; None for once.
    """

    first: int
    unit: Literal["steps", "sequences"]
    every: int | None

    def due(self, step: int, batch_size: int) -> bool:
        """Whether directions are taken after ``step`` optimizer steps, and so ahead of step ``step``."""
        first = self._first_step(batch_size)
        return step == first or (self.every is not None and step > first and (step - first) % self.every == 0)

    def begun(self, step: int, batch_size: int) -> bool:
        """Whether the first time is at most ``step`` optimizer steps after the start."""
        return step >= self._first_step(batch_size)

    def _first_step(self, batch_size: int) -> int:
        return self.first if self.unit == "steps" else -(-self.first // batch_size)


def renewal(origin: WeightDirections | LearnedDirections, schedule: Schedule, field_name: str) -> Renewal:
    """When directions are taken for an intervention on a schedule.

    Args:
        origin: where the directions come from, with the times that the user set.
        schedule: when the intervention acts.
        field_name: the setting that holds the origin, for messages.

    Raises:
        ConfigError: the first time would be after the schedule has started.
    """
    first = schedule.start if origin.at is None else origin.at
    if first > schedule.start:
        raise ConfigError(f"{field_name}.at", first, f"at most schedule.start = {schedule.start}")
    return Renewal(first, schedule.unit, origin.every)


# ---- given directions -----------------------------------------------------------------------------


def read_directions(field_name: str, setting: str | list[list[float]]) -> GivenDirections:
    """Directions, one a row, as a basis of their span.

    Args:
        field_name: the setting that holds the rows, for messages.
        setting: the rows as the user wrote them, or a path of a ``.npy`` file that holds them.

    Raises:
        ConfigError: no such file, or rows that are not finite, not equally long, or not independent.
    """
    shown, expected = setting if isinstance(setting, str) else f"{len(setting)} rows", "equally long rows of numbers"
    try:
        given = _read_rows(setting) if isinstance(setting, str) else np.array(setting, np.float64)
    except UNREADABLE as error:
        found = f"a .npy file of {expected} ({reason(error)})" if isinstance(setting, str) else expected
        raise ConfigError(field_name, shown, found) from error
    if given.ndim != 2 or not given.size:
        raise ConfigError(field_name, shown, f"a .npy file of {expected}" if isinstance(setting, str) else expected)
    if not np.isfinite(given).all():
        raise ConfigError(field_name, shown, "finite numbers")
    rows = torch.from_numpy(np.ascontiguousarray(given, np.float64))
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    # each of length 1, so that the scale of a direction says nothing about whether it is independent
    _, values, right = torch.linalg.svd(rows / lengths.clamp(min=torch.finfo(torch.float64).tiny), full_matrices=False)
    rank = int((values > LEAST_INDEPENDENT).sum())
    if rank < len(rows):
        expected = f"linearly independent directions: these {len(rows)} span {rank}"
        raise ConfigError(field_name, shown, expected)
    basis = right.T.contiguous()
    return GivenDirections(hashlib.sha256(basis.numpy().tobytes()).hexdigest()[:16], basis)


def _read_rows(path: str) -> np.ndarray:
    size = check_regular(path)
    with Path(path).open("rb") as file:
        return read_npy_numbers(file, read_npy_header(file), size)


# ---- directions of a weight -----------------------------------------------------------------------


def weight_matrix(
    parameters: Mapping[str, Tensor], table: ParameterTable, name: str, side: str, heads: int | None
) -> Float[Tensor, "M ... I O"]:
    """A matrix of the model; with ``heads``, its part of every head, ``[M, H, I, O]``.

    Args:
        parameters: all parameters of the model, ``[M, ...]``.
        table: names of the weights that they hold.
        name: name of the matrix, as ``WeightDirections`` takes it.
        side: whether a site is what the weight reads (input) or writes (output).
        heads: H where the site has heads; None where it has none.

    Raises:
        ConfigError: no such matrix, or none that has a part for every head on that side.
    """
    matrices = [named for named in table.weights.values() if len(named.axes) == (3 if "H" in named.axes else 2)]
    found = next((named for named in matrices if named.name == name), None)
    if found is None:
        whole = ", ".join(named.name for named in matrices if named.name == named.parameter)
        raise ConfigError("Project.weight.name", name, f"one of {whole}, or W_Q, W_K, W_V of a block")
    if heads is None and ("H" not in found.axes or found.heads_are_one_axis):
        return (found.flat(parameters) if "H" in found.axes else found.read(parameters)).detach()
    if found.axes[:1] == "H" and (found.axes[1:] == "ED") == (side == "input"):
        return found.read(parameters).detach()
    expected = "W_Q, W_K or W_V (side output) or W_O (side input) of a block, since the site has heads"
    raise ConfigError("Project.weight.name", f"{name}, side {side}", expected)


def singular_directions(weight: Float[Tensor, "M ... I O"], origin: WeightDirections) -> Float[Tensor, "M ... W C"]:
    """The singular vectors that ``origin`` names; W is I on the input side and O on the output side."""
    left, _, right = torch.linalg.svd(weight.to("cpu", torch.float64), full_matrices=False)
    vectors = left if origin.side == "input" else right.mT
    return vectors[..., : origin.rank] if origin.part == "top" else vectors[..., -origin.rank :]
