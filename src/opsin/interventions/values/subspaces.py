"""Subspaces of activations: where their directions come from, and projection onto or away from them.

A basis ``[M, W, C]`` has orthonormal columns; columns of zeros are not in use, so that an empty basis spans nothing.
At sites with heads every head has its own, ``[M, H, W, C]``.

Legend: M members, H heads, W width of a site's last axis, C columns of a basis, G given directions, I and O input
and output of a weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions.identity import DERIVED
from opsin.interventions.intervention import Overwrite, Supply, Value
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection
from opsin.interventions.values.nullspace import Label
from opsin.task import Batch

LEAST_INDEPENDENT = 1e-6
"""Smallest singular value of independent directions of length 1."""


# ---- where directions come from -------------------------------------------------------------------


@dataclass(frozen=True)
class GivenDirections:
    """Directions that stay as they are; compared by what they span.

    Args:
        digest: of the basis.
        basis: ``[W, G]``, orthonormal.
    """

    digest: str
    basis: Float[Tensor, "W G"] = field(compare=False, repr=False, metadata=DERIVED)


@dataclass(frozen=True, kw_only=True)
class WeightDirections:
    """Singular vectors of a weight, as the weight is when they are taken.

    Args:
        name: of a matrix of the model, stored input x output, for example ``unembed.W_U``; ``W_Q``, ``W_K`` and
            ``W_V`` of a block name the thirds of its ``W_QKV``. At a site with heads: the ``W_Q``, ``W_K`` or
            ``W_V`` (side output) or the ``W_O`` (side input) of a block, head by head.
        side: whether the site is what the weight reads (input) or writes (output).
        part: those of the largest (top) or the smallest (bottom) singular values, of which there are
            as many as the shorter side of the weight is long.
        rank: how many.
        at: when they are first taken, in the schedule's unit; its start when None.
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
        rounds: classifiers in turn.
        at: when they are first learned, in the schedule's unit; its start when None.
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
        first: position of the first time.
        unit: what ``first`` counts.
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
    """When these directions are taken for an intervention on that schedule.

    Raises:
        ConfigError: the first time would be after the schedule has started.
    """
    first = schedule.start if origin.at is None else origin.at
    if first > schedule.start:
        raise ConfigError(f"{field_name}.at", first, f"at most schedule.start = {schedule.start}")
    return Renewal(first, schedule.unit, origin.every)


@dataclass(frozen=True)
class Basis(Supply):
    """The directions of one site, with everything that defines them.

    Args:
        site: its name.
        width: of its last axis.
        columns: most directions there may be.
        heads: H where the site has heads.
        selection: entries that are projected; learned directions are learned from them.
        origin: where the directions come from.
        renewal: when they are taken; None where they are given.
    """

    site: str
    width: int
    columns: int
    heads: int | None
    selection: Selection
    origin: GivenDirections | WeightDirections | LearnedDirections
    renewal: Renewal | None

    @property
    def chosen_heads(self) -> tuple[int, ...]:
        """Heads that are projected; none where the site has none."""
        return tuple(range(self.heads or 0)) if self.selection.heads is None else self.selection.heads

    def __str__(self) -> str:
        if isinstance(self.origin, GivenDirections) or self.renewal is None:
            return f"{self.columns} given directions"
        what = (
            f"{self.origin.part} {self.columns} of {self.origin.side} {self.origin.name}"
            if isinstance(self.origin, WeightDirections)
            else f"classifiers of {self.origin.label}"
        )
        again = "" if self.renewal.every is None else f" and every {self.renewal.every} steps from there"
        return f"{what} at {self.renewal.unit} {self.renewal.first}{again}"

    def initial(self, members: int) -> Float[Tensor, "M ... W C"]:
        """The given directions; an empty basis where they are still to be taken."""
        each = (members,) if self.heads is None else (members, self.heads)
        if isinstance(self.origin, GivenDirections):
            return self.origin.basis.expand(*each, -1, -1).clone()
        return torch.zeros(*each, self.width, self.columns, dtype=torch.float64)

    @property
    def fixed(self) -> bool:
        return self.renewal is None


# ---- what is done with them -----------------------------------------------------------------------


@dataclass(frozen=True)
class Projected(Value):
    """The activation without (remove) or with nothing but (keep) its part along the directions.

    Remove: x - (x - c) B Bᵀ; keep: c + (x - c) B Bᵀ, with c = 0 or the mean over the batch. Gradient flows through
    the part of x that is left and none through B and c. With an empty basis the activation stays as it is.

    Args:
        basis: B.
        mode: ``remove`` or ``keep``.
        about: what c is.
    """

    basis: Basis
    mode: Literal["remove", "keep"] = "remove"
    about: Literal["zero", "mean"] = "zero"

    @property
    def needs(self) -> tuple[Basis, ...]:
        return (self.basis,)

    @property
    def gradient(self) -> str:
        return "flows"

    def __call__(self, x: Float[Tensor, "M ... W"], batch: Batch, *taken: Tensor) -> Overwrite:
        (basis,) = taken
        centre = x.detach().mean(1, keepdim=True) if self.about == "mean" else None
        inside = along(x if centre is None else x - centre, basis)
        if self.mode == "remove":
            return Overwrite(x - inside)
        there = (basis != 0).flatten(-2).any(-1, keepdim=True)  # M 1 or M H 1
        there = there.view(-1, *[1] * (x.dim() - there.dim()), *there.shape[1:])
        return Overwrite(inside if centre is None else centre + inside, there)


def along(x: Float[Tensor, "M ... W"], basis: Float[Tensor, "M ... W C"]) -> Float[Tensor, "M ... W"]:
    """The part of every vector of ``x`` that lies in the span of its member's (and its head's) basis."""
    head = "h" if basis.dim() == 4 else ""
    coordinates = torch.einsum(f"m...{head}w,m{head}wc->m...{head}c", x, basis)
    return torch.einsum(f"m...{head}c,m{head}wc->m...{head}w", coordinates, basis)


# ---- given directions -----------------------------------------------------------------------------


def read_directions(field_name: str, given: str | list[list[float]]) -> GivenDirections:
    """Directions, one a row, as a basis of their span.

    Args:
        field_name: the setting they were given under, for messages.
        given: the rows, or a path of a ``.npy`` file that holds them.

    Raises:
        ConfigError: no such file, or rows that are not finite, not equally long, or not independent.
    """
    shown, expected = given if isinstance(given, str) else f"{len(given)} rows", "equally long rows of numbers"
    try:
        rows = np.load(given, allow_pickle=False) if isinstance(given, str) else np.array(given, np.float64)
    except (OSError, ValueError, TypeError, EOFError):
        rows = None
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or not rows.size or rows.dtype.kind not in "fiu":
        raise ConfigError(field_name, shown, f"a .npy file of {expected}" if isinstance(given, str) else expected)
    if not np.isfinite(rows).all():
        raise ConfigError(field_name, shown, "finite numbers")
    rows = torch.from_numpy(rows.astype(np.float64))
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    # each of length 1, so that the scale of a direction says nothing about whether it is independent
    _, values, right = torch.linalg.svd(rows / lengths.clamp(min=torch.finfo(torch.float64).tiny), full_matrices=False)
    rank = int((values > LEAST_INDEPENDENT).sum())
    if rank < len(rows):
        expected = f"linearly independent directions: these {len(rows)} span {rank}"
        raise ConfigError(field_name, shown, expected)
    basis = right.T.contiguous()
    return GivenDirections(hashlib.sha256(basis.numpy().tobytes()).hexdigest()[:16], basis)


# ---- directions of a weight -----------------------------------------------------------------------


def weight_matrix(
    parameters: Mapping[str, Tensor], name: str, side: str, heads: int | None
) -> Float[Tensor, "M ... I O"]:
    """A matrix of the model; with ``heads``, its part of every head, ``[M, H, I, O]``.

    Raises:
        ConfigError: no such matrix, or none that has a part for every head on that side.
    """
    block, _, last = name.rpartition(".")
    whole = f"{block}.W_QKV"
    if last in ("W_Q", "W_K", "W_V") and whole in parameters:
        weight = parameters[whole].detach().chunk(3, -1)["QKV".index(last[-1])]
    elif name in parameters and parameters[name].dim() == 3:
        weight = parameters[name].detach()
    else:
        matrices = ", ".join(known for known, tensor in parameters.items() if tensor.dim() == 3)
        raise ConfigError("Project.weight.name", name, f"one of {matrices}, or W_Q, W_K, W_V of a block")
    if heads is None:
        return weight
    if (last, side) == ("W_O", "input"):
        return weight.unflatten(1, (heads, -1))
    if last in ("W_Q", "W_K", "W_V") and side == "output":
        return weight.unflatten(2, (heads, -1)).movedim(2, 1)
    expected = "W_Q, W_K or W_V (side output) or W_O (side input) of a block, since the site has heads"
    raise ConfigError("Project.weight.name", f"{name}, side {side}", expected)


def singular_directions(weight: Float[Tensor, "M ... I O"], origin: WeightDirections) -> Float[Tensor, "M ... W C"]:
    """The singular vectors that are asked for; W is I on the input side and O on the output side."""
    left, _, right = torch.linalg.svd(weight.to("cpu", torch.float64), full_matrices=False)
    vectors = left if origin.side == "input" else right.mT
    return vectors[..., : origin.rank] if origin.part == "top" else vectors[..., -origin.rank :]
