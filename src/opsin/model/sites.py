"""Sites: the typed addresses of activations, named as TransformerLens names them.

Legend: M members, B batch, L positions (query side), K positions (key side), D model width,
H heads, E head width, N neurons of an MLP, V outputs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from opsin.errors import ConfigError

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
    """

    name: str
    axes: str
    sizes: Mapping[str, int]
    meaning: str

    @property
    def layer(self) -> int | None:
        """The block the site belongs to; None outside the blocks."""
        return int(self.name.split(".")[1]) if self.name.startswith("blocks.") else None

    def shape(self, members: int, batch: int) -> tuple[int, ...]:
        """The activation's shape for a run of ``members`` and a batch of ``batch``."""
        sizes = {**self.sizes, "M": members, "B": batch, "1": 1}
        return tuple(sizes[axis] for axis in self.axes)


@dataclass(frozen=True)
class SiteTable:
    """All sites of one model, in order of computation.

    Args:
        sites: every activation by its name, in order of computation.
        unembed_bias: whether the logits have a bias, which is no site.
    """

    sites: Mapping[str, Site]
    unembed_bias: bool = True

    def __getitem__(self, name: str) -> Site:
        return self.find(name, "site")

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
        return 1 + max(site.layer for site in self if site.layer is not None)


def build_sites(
    *,
    layers: int,
    positions: int,
    width: int,
    heads: int,
    neurons: int | None,
    outputs: int,
    additive: bool,
    norm: bool,
    unembed_bias: bool = True,
) -> SiteTable:
    """The site table of a decoder with these sizes.

    Args:
        neurons: N, None for an attention-only model.
        additive: whether a position vector is added to the tokens (not so with rotary positions).
        norm: whether there are LayerNorms.
        unembed_bias: whether the logits have a bias.
    """
    sizes = {"L": positions, "K": positions, "D": width, "H": heads, "E": width // heads, "V": outputs}
    if neurons is not None:
        sizes["N"] = neurons
    rows: list[tuple[str, str, str]] = [("hook_embed", "MBLD", "token embeddings, before positions")]
    if additive:
        rows.append(("hook_pos_embed", "MLD", "position vectors"))
    for layer in range(layers):
        rows += [
            (f"blocks.{layer}.{name}", axes, meaning) for name, axes, meaning in _block_sites(neurons is not None, norm)
        ]
    if norm:
        rows.append(("ln_final.hook_scale", "MBL1", "standard deviation the last LayerNorm divides by"))
    rows.append(("ln_final.hook_normalized", "MBLD", "output of the last LayerNorm"))
    rows.append(("hook_logits", "MBLV", "logits at every position"))
    table = {name: Site(name, axes, {a: sizes[a] for a in axes if a in sizes}, meaning) for name, axes, meaning in rows}
    return SiteTable(table, unembed_bias)


def _block_sites(mlp: bool, norm: bool) -> list[tuple[str, str, str]]:
    rows = [("hook_resid_pre", "MBLD", "residual stream entering the block")]
    if norm:
        rows.append(("ln1.hook_scale", "MBL1", "standard deviation the LayerNorm divides by"))
    rows += [
        ("ln1.hook_normalized", "MBLD", "input of attention"),
        ("attn.hook_q", "MBLHE", "queries, before rotation"),
        ("attn.hook_k", "MBLHE", "keys, before rotation"),
        ("attn.hook_v", "MBLHE", "values"),
        ("attn.hook_rot_q", "MBLHE", "queries as they meet the keys"),
        ("attn.hook_rot_k", "MBLHE", "keys as they meet the queries"),
        ("attn.hook_attn_scores", "MBHLK", "scaled, masked scores"),
        ("attn.hook_pattern", "MBHLK", "attention after the softmax"),
        ("attn.hook_z", "MBLHE", "what each head read"),
        ("hook_attn_out", "MBLD", "what attention writes"),
    ]
    if mlp:
        rows.append(("hook_resid_mid", "MBLD", "residual stream between attention and MLP"))
        if norm:
            rows.append(("ln2.hook_scale", "MBL1", "standard deviation the LayerNorm divides by"))
        rows += [
            ("ln2.hook_normalized", "MBLD", "input of the MLP"),
            ("mlp.hook_pre", "MBLN", "neurons before the nonlinearity"),
            ("mlp.hook_post", "MBLN", "neurons after the nonlinearity"),
            ("hook_mlp_out", "MBLD", "what the MLP writes"),
        ]
    rows.append(("hook_resid_post", "MBLD", "residual stream leaving the block"))
    return rows
