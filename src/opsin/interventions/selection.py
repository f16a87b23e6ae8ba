"""Which entries of a site: layers, heads, neurons, positions and members."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.model.sites import Site


def check_share(field: str, value: float) -> None:
    """A strength must lie in [0, 1].

    Raises:
        ConfigError: it does not.
    """
    if not 0 <= value <= 1:
        raise ConfigError(field, value, "a number from 0 to 1")


SELECTED_AXES = {"heads": "H", "neurons": "N", "positions": "L", "members": "M"}


def entries(items: list[int] | None) -> tuple[int, ...] | None:
    """Entries as a user lists them, in a form that can be hashed; None stays None."""
    return None if items is None else tuple(items)


@dataclass(frozen=True)
class Selection:
    """Which entries of a site; None selects all along that axis."""

    heads: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    members: tuple[int, ...] | None = None

    def mask(self, site: Site, members: int, field_name: str) -> Float[Tensor, "..."]:
        """1 at selected entries and 0 elsewhere, broadcastable to the site.

        Raises:
            ConfigError: the site has no such axis, or the axis no such entry.
        """
        mask = torch.ones([1] * len(site.axes))
        for name, axis in SELECTED_AXES.items():
            chosen = getattr(self, name)
            if chosen is None:
                continue
            size = members if axis == "M" else site.sizes.get(axis)
            if size is None:
                raise ConfigError(f"{field_name}.{name}", list(chosen), f"nothing: {site.name} has no {name}")
            wrong = [index for index in chosen if not 0 <= index < size]
            if wrong or not chosen:
                expected = f"{name} from 0 to {size - 1} of {site.name}"
                raise ConfigError(f"{field_name}.{name}", wrong[0] if wrong else [], expected)
            along = torch.zeros(size).index_fill(0, torch.tensor(chosen), 1.0)
            mask = mask * along.view([size if a == axis else 1 for a in site.axes])
        return mask

    def __str__(self) -> str:
        parts = [f"{name} {list(chosen)}" for name in SELECTED_AXES if (chosen := getattr(self, name)) is not None]
        return ", ".join(parts) or "all"


def parse_pairs(name: str, items: Sequence[str], first_size: int, second_size: int, what: str) -> dict[int, list[int]]:
    """``["1:3", "1:7"]`` as ``{1: [3, 7]}``: layer, then head or neuron.

    Raises:
        ConfigError: not of the form layer:index, or out of range.
    """
    parsed: dict[int, list[int]] = defaultdict(list)
    expected = f"layer:{what} with layer 0 to {first_size - 1} and {what} 0 to {second_size - 1}"
    for item in items:
        try:
            layer, index = (int(part) for part in str(item).split(":"))
        except ValueError:
            raise ConfigError(name, item, expected) from None
        if not (0 <= layer < first_size and 0 <= index < second_size):
            raise ConfigError(name, item, expected)
        parsed[layer].append(index)
    if not parsed:
        raise ConfigError(name, list(items), f"at least one {expected}")
    return dict(parsed)
