"""How large weights, or their gradients, are, by kind. Pure functions.

Legend: M members.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

ALL = "all"
"""Name of the norm of all weights together."""


def norms_by_kind(values: Mapping[str, Float[Tensor, "M ..."]], kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """2-norm of all weights of each kind, and of all together, ``[M]`` each.

    Args:
        values: weights of every member by name, or what has a number for each of them, such as gradients.
        kinds: kind of each of these weights by its name: embed, attention, mlp, ...
    """
    squares = {name: value.detach().flatten(1).square().sum(1) for name, value in values.items()}
    found = {
        kind: torch.stack([square for name, square in squares.items() if kinds[name] == kind]).sum(0)
        for kind in dict.fromkeys(kinds.values())
    }
    return {kind: square.sqrt() for kind, square in {**found, ALL: torch.stack([*found.values()]).sum(0)}.items()}
