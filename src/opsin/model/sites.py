"""Sites: the typed addresses of activations, named as TransformerLens names them.

Legend: M members, B batch, L positions (query side), K positions (key side), D model width,
H heads, E head width, N neurons of an MLP, V outputs.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from opsin.errors import ConfigError
from opsin.model.layers import Norm
from opsin.model.parameters import ParameterTable, layer_of

AXES = {
    "M": "members",
    "B": "batch",
    "L": "positions",
    "K": "key positions",
    "D": "width",
    "H": "heads",
    "E": "head width",
    "N": "neurons",
    "V": "outputs",
    "1": "one",
}


@dataclass(frozen=True)
class Site:
    """One activation of the model.

    Args:
        name: TransformerLens' name, for example ``blocks.1.attn.hook_pattern``.
        axes: letters of the legend, in order, for example ``"MBHLK"``.
        sizes: length of every axis but M and B, which belong to the run and not to the model.
        meaning: what the activation is, in a few words.
        kept: whether the backward pass needs it, whatever a compiler fuses.
        row_by_row: whether it reaches the outputs of each row by that row alone, so that training computes it at scored
            rows only where the model does as ``Batch.rows`` says.
    """

    name: str
    axes: str
    sizes: Mapping[str, int]
    meaning: str
    kept: bool = False
    row_by_row: bool = False

    @property
    def layer(self) -> int | None:
        """The block the site belongs to; None outside the blocks."""
        return layer_of(self.name)

    def shape(self, members: int, batch: int) -> tuple[int, ...]:
        """The activation's shape for a run of ``members`` and a batch of ``batch``."""
        sizes = {**self.sizes, "M": members, "B": batch, "1": 1}
        return tuple(sizes[axis] for axis in self.axes)


@dataclass(frozen=True)
class SiteTable:
    """All sites of one model, in order of computation.

    Args:
        sites: every activation by its name, in order of computation.
        weights: parameters of the model.
        norms: what each normalisation of the model does, by its name, for example ``blocks.0.ln1`` or ``ln_final``.
    """

    sites: Mapping[str, Site]
    weights: ParameterTable = field(default=ParameterTable(), repr=False)
    norms: Mapping[str, Norm] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Site:
        return self.find(name, "site")

    def __contains__(self, name: str) -> bool:
        return name in self.sites

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites.values())

    def find(self, name: str, field: str) -> Site:
        """The site of that name.

        Raises:
            ConfigError: no such site; names the field and the nearest names that exist.
        """
        if name in self.sites:
            return self.sites[name]
        near = difflib.get_close_matches(name, self.sites, n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ConfigError(field, name, f"a site of this model (`opsin sites` lists them){hint}")

    def size(self, axis: str) -> int:
        """Length of an axis that every site sharing it agrees on (``"H"``, ``"L"``, ``"N"``); 0 if absent."""
        return next((site.sizes[axis] for site in self if axis in site.sizes), 0)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return 1 + max((site.layer for site in self if site.layer is not None), default=-1)


SiteRow = tuple[str, str, str]
"""Name, axes and meaning of a site."""

KEPT = ("hook_pattern", "hook_q", "hook_k", "hook_v", "hook_z", "hook_pre")
"""Endings of the names of activations that a backward pass needs, whatever a compiler fuses."""


def site_table(
    rows: Sequence[SiteRow],
    sizes: Mapping[str, int],
    weights: ParameterTable,
    norms: Mapping[str, Norm] | None = None,
    row_by_row: Collection[str] = (),
) -> SiteTable:
    """The sites of a model whose axes of one letter are all equally long.

    Args:
        rows: name, axes and meaning of every activation, in order of computation.
        sizes: length of every axis but M and B.
        weights: parameters of the model.
        norms: what each normalisation does, by its name; none in a model without.
        row_by_row: names of the activations that the forward pass computes at ``Batch.rows`` alone.
    """
    table = {
        name: Site(
            name, axes, {a: sizes[a] for a in axes if a in sizes}, meaning, name.endswith(KEPT), name in row_by_row
        )
        for name, axes, meaning in rows
    }
    return SiteTable(table, weights, norms or {})
