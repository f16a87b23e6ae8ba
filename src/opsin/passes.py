"""What is overwritten, by what, and where a value comes from: the nouns of a plan.

A value may be taken from another forward pass of the same batch, which has interventions of its own.
Equal passes are one pass: they are compared by what they are, not by who asked for them.

Legend: M members, B batch, L positions, N neurons, H heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.schedules import Schedule
from opsin.sites import Site
from opsin.task import Batch

SELECTED_AXES = {"heads": "H", "neurons": "N", "positions": "L", "members": "M"}


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


@dataclass(frozen=True)
class Overwrite:
    """A value and, where it does not apply everywhere, the entries it applies to (broadcast to the site)."""

    value: Tensor
    where: Tensor | None = None


class Value(ABC):
    """What an activation is overwritten by. Values are small frozen dataclasses, so that plans can be hashed."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """Activations of other passes that the value is made from."""
        return ()

    @property
    def gradient(self) -> str:
        """``"stops"`` or ``"flows"``: whether gradient passes through the value, into the passes it is taken from."""
        return "flows" if any(not source.detach for source in self.sources) else "stops"

    @abstractmethod
    def __call__(self, x: Tensor, batch: Batch, *taken: Tensor) -> Overwrite:
        """The value for activation ``x`` of this batch; ``taken`` are the sources, in order."""


@dataclass(frozen=True)
class Intervention:
    """One overwriting: where, what, by which value, when.

    Args:
        writer: the callback that asks for it, for messages.
        site: name of the site.
        selection: which entries of it.
        value: what they are overwritten by.
        schedule: how strongly at which step.
        order: rank among interventions that touch the same entries; the later wins.
    """

    writer: str
    site: str
    selection: Selection
    value: Value
    schedule: Schedule = field(default_factory=Schedule)
    order: int | None = None


@dataclass(frozen=True)
class Pass:
    """Another forward pass of the same batch and parameters; its interventions are always in force."""

    interventions: tuple[Intervention, ...] = ()


@dataclass(frozen=True)
class Source:
    """An activation of another pass.

    Args:
        site: its name.
        of: the pass; by default one without any intervention.
        detach: whether gradient stops at it; by default it flows into the other pass.
    """

    site: str
    of: Pass = Pass()
    detach: bool = False
