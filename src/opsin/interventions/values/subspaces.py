"""Subspaces of activations: the directions of a site, and projection onto or away from them.

A basis ``[M, W, C]`` has orthonormal columns; columns of zeros are not in use, so that an empty basis spans nothing.
At sites with heads every head has its own, ``[M, H, W, C]``.

Legend: M members, H heads, W width of a site's last axis, C columns of a basis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.interventions.intervention import Overwrite, Supply, Value
from opsin.interventions.selection import Selection
from opsin.interventions.values.directions import GivenDirections, LearnedDirections, Renewal, WeightDirections
from opsin.task import Batch


@dataclass(frozen=True)
class Basis(Supply):
    """The directions of one site, with everything that defines them.

    Args:
        site: name of the site whose activations are projected.
        width: W, the width of the site's last axis.
        columns: C, most directions that there may be.
        heads: H where the site has heads; None where it has none.
        selection: entries of the site that are projected; learned directions are learned from them.
        origin: where the directions come from.
        renewal: when the directions are taken; None where they are given.
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
        description = (
            f"{self.origin.part} {self.columns} of {self.origin.side} {self.origin.name}"
            if isinstance(self.origin, WeightDirections)
            else f"classifiers of {self.origin.label}"
        )
        again = "" if self.renewal.every is None else f" and every {self.renewal.every} steps from there"
        return f"{description} at {self.renewal.unit} {self.renewal.first}{again}"

    def initial(self, members: int) -> Float[Tensor, "M ... W C"]:
        """The given directions; an empty basis where they are still to be taken."""
        bases = (members,) if self.heads is None else (members, self.heads)
        if isinstance(self.origin, GivenDirections):
            return self.origin.basis.expand(*bases, -1, -1).clone()
        return torch.zeros(*bases, self.width, self.columns, dtype=torch.float64)

    @property
    def fixed(self) -> bool:
        """Whether the directions are given, and so never renewed."""
        return self.renewal is None


@dataclass(frozen=True)
class Projected(Value):
    """The activation without (remove) or with nothing but (keep) its part along the directions.

    Remove: x - (x - c) B Bᵀ; keep: c + (x - c) B Bᵀ, with c = 0 or the mean over the batch. Gradient flows through
    the part of x that is left and none through B and c. With an empty basis the activation stays as it is.

    Args:
        basis: B, the directions of the site, of every member.
        mode: ``remove`` the part along the directions, or ``keep`` nothing but that part.
        about: the point c: ``zero``, or the ``mean`` over the batch.
    """

    basis: Basis
    mode: Literal["remove", "keep"] = "remove"
    about: Literal["zero", "mean"] = "zero"

    @property
    def needs(self) -> tuple[Basis, ...]:
        """The basis as it stands at this step."""
        return (self.basis,)

    @property
    def needs_classes(self) -> bool:
        """Whether the directions are those in which a classifier reads the right answer."""
        return isinstance(self.basis.origin, LearnedDirections) and self.basis.origin.label == "target"

    @property
    def gradient(self) -> str:
        """``"flows"``, through the part of the activation that is left."""
        return "flows"

    def __call__(self, x: Float[Tensor, "M ... W"], batch: Batch, *inputs: Tensor) -> Overwrite:
        (basis,) = inputs
        centre = x.detach().mean(1, keepdim=True) if self.about == "mean" else None
        inside = along(x if centre is None else x - centre, basis)
        if self.mode == "remove":
            return Overwrite(x - inside)
        in_use = (basis != 0).flatten(-2).any(-1, keepdim=True)  # M 1 or M H 1
        in_use = in_use.view(-1, *[1] * (x.dim() - in_use.dim()), *in_use.shape[1:])
        return Overwrite(inside if centre is None else centre + inside, in_use)


def along(x: Float[Tensor, "M ... W"], basis: Float[Tensor, "M ... W C"]) -> Float[Tensor, "M ... W"]:
    """The part of every vector of ``x`` that lies in the span of its member's (and its head's) basis."""
    head = "h" if basis.dim() == 4 else ""
    coordinates = torch.einsum(f"m...{head}w,m{head}wc->m...{head}c", x, basis)
    return torch.einsum(f"m...{head}c,m{head}wc->m...{head}w", coordinates, basis)
