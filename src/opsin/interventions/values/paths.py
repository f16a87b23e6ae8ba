"""Path patching: what a receiver would be if some of what it reads had come from elsewhere.

What a head, an MLP or the read-out reads is a sum: the embedding, the position vectors where they are added, and
what every earlier head and MLP writes. One path is one term of that sum for one receiver (Wang et al. 2022,
"Interpretability in the wild", section 3.1; Goldowsky-Dill et al. 2023, "Localizing model behavior with path
patching", section 2). The sum is made anew from its terms: taking a term out of the residual stream instead would
leave the rounding of a difference as gradient along a path that is cut, and Adam acts on gradient of any size.

Legend: M members, B batch, L positions, D width, H heads, E head width, G heads of one receiver.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions.identity import DERIVED
from opsin.interventions.intervention import Clock, Need, Overwrite, Relative, Source, Value, Weight
from opsin.interventions.values.plain import BatchMean, Resample
from opsin.model.sites import SiteTable
from opsin.model.transformer import layer_norm, linear
from opsin.task import Batch

Replacement = Literal["zero", "mean", "resample", "plain"]

ADDRESS = re.compile(r"(\d+):(?:mlp|(\d+)(?:\.([qkv]))?)")
ADDED_FIRST = ("embed", "pos_embed")
BEFORE_BLOCKS = -1


@dataclass(frozen=True)
class Sender:
    """What adds one term.

    Args:
        name: as it was written.
        depth: 2l for the heads of block l, 2l + 1 for its MLP, ``BEFORE_BLOCKS`` for embeddings. A sender reaches
            the receivers of a greater depth.
        head: of its block; None for an MLP or an embedding.
    """

    name: str
    depth: int
    head: int | None = None


@dataclass(frozen=True)
class Receiver:
    """What reads the sum.

    Args:
        name: as it was written.
        depth: as that of a sender; twice the number of blocks for the read-out.
        head: of its block; None for an MLP or the read-out.
        part: of the head: ``q``, ``k`` or ``v``.
    """

    name: str
    depth: int
    head: int | None = None
    part: str | None = None


@dataclass(frozen=True)
class Term:
    """One term of the sum, as it goes on in the pass.

    Args:
        site: what is added, or ``attn.hook_z`` of a block some of whose heads are replaced.
        replaced: whether it is, all of it or those heads.
        heads: that are replaced; none where the term is no attention.
    """

    site: str
    replaced: bool = False
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reader:
    """How a receiver reads the sum.

    Args:
        site: what it reads it into.
        width: D, of the sum.
        norm: the LayerNorm ahead of it; None in a model without.
        weight: its parameter.
        bias: its parameter; None where there is none, as for heads.
        part: place of queries, keys or values in ``W_QKV``; None where it is no head.
        heads: in rising order; only theirs is computed.
    """

    site: str
    width: int
    norm: str | None
    weight: str
    bias: str | None = None
    part: int | None = None
    heads: tuple[int, ...] = ()

    @property
    def needs(self) -> tuple[Weight, ...]:
        """Its parameters."""
        norm = () if self.norm is None else (f"{self.norm}.w", f"{self.norm}.b")
        bias = () if self.bias is None else (self.bias,)
        return tuple(Weight(name) for name in (*norm, self.weight, *bias))

    def __call__(
        self, resid: Float[Tensor, "M B L D"], x: Float[Tensor, "M B L ..."], given: Iterator[Tensor]
    ) -> Float[Tensor, "M B L ..."]:
        """What is read from ``resid``; heads that do not read keep ``x``, through which no gradient flows."""
        if self.norm is not None:
            resid = layer_norm(resid, next(given), next(given))
        weight = next(given)
        if self.part is None:
            return linear(resid, weight, next(given) if self.bias is not None else None)
        parts = weight.unflatten(-1, (3, *x.shape[3:]))  # M D 3 H E
        # slices, since the gradient of an indexed weight is a scatter, which the compiler does not fuse
        chosen = torch.cat([parts[:, :, self.part, head : head + 1] for head in self.heads], 2)  # M D G E
        read = linear(resid, chosen.flatten(2)).unflatten(-1, chosen.shape[2:]).split(1, 3)
        every = list(x.detach().split(1, 3))
        for head, own in zip(self.heads, read, strict=True):
            every[head] = own
        return torch.cat(every, 3)


@dataclass(frozen=True)
class PathPatched(Value):
    """What receivers read when the senders' terms are replaced for them alone.

    The terms are what goes on in the same pass, with whatever else overwrites them; a head's is its ``hook_z``
    times its rows of ``W_O``. The LayerNorm ahead of the receiver takes its statistics from the patched sum.
    Not seen: what overwrites the residual stream between the first sender and the receiver, ``hook_attn_out`` of
    a block whose heads send, or the receiver's LayerNorm.

    Gradient flows into everything but what replaces a term by zero, mean or resample: no part of a sender gets
    any along the path. Through ``plain`` it flows into the other pass unless it is detached.

    Args:
        senders: whose terms are replaced, for people.
        by: zero, the mean over the batch, another example's, or what it is in a pass without interventions.
        detach: stop the gradient at what replaces them; for ``plain``, others have none.
        terms: of the sum, in order of addition, without those that are zero.
        reader: what reads it.
    """

    senders: str
    by: Replacement
    detach: bool
    terms: tuple[Term, ...] = field(repr=False, metadata=DERIVED)
    reader: Reader = field(repr=False, metadata=DERIVED)

    @property
    def needs(self) -> tuple[Need, ...]:
        found: list[Need] = []
        for term in self.terms:
            plain = term.replaced and self.by == "plain"
            if term.heads or not plain:
                found.append(Source(term.site, Relative.THIS))
            if plain:
                found.append(Source(term.site, detach=self.detach))
            if term.heads:
                found.append(Weight(term.site.replace("hook_z", "W_O")))
        clock = (Clock(),) if self.by == "resample" else ()
        return (*found, *self.reader.needs, *clock)

    @property
    def gradient(self) -> str:
        # into the receiver's own weights even where nothing else is left of the sum
        return "flows"

    def __call__(self, x: Float[Tensor, "M B L ..."], batch: Batch, *taken: Tensor) -> Overwrite:
        given = iter(taken)
        resid = x.new_zeros(*x.shape[:3], self.reader.width)
        for term in self.terms:
            part = self._part(term, batch, given, taken[-1])
            resid = resid + (part if part.dim() == 4 else part[:, None])  # position vectors have no B
        return Overwrite(self.reader(resid, x, given))

    def _part(self, term: Term, batch: Batch, given: Iterator[Tensor], clock: Tensor) -> Float[Tensor, "..."]:
        """One term of the sum."""
        x = next(given)
        if not term.replaced or (self.by == "plain" and not term.heads):
            return x
        if self.by == "plain":
            new = next(given)
        elif self.by == "mean":
            new = BatchMean()(x, batch).value
        elif self.by == "resample":
            new = Resample()(x, batch, clock).value
        else:
            new = torch.zeros_like(x)
        if not term.heads:
            return new
        constant = self.detach or self.by != "plain"
        return written(x, new, next(given), term.heads, constant)


def written(
    z: Float[Tensor, "M B L H E"],
    new: Float[Tensor, "M B L H E"],
    weight: Float[Tensor, "M D D"],
    heads: Sequence[int],
    constant: bool,
) -> Float[Tensor, "M B L D"]:
    """What a block's heads write when some of them had read ``new``.

    Args:
        constant: whether gradient stops at those heads' rows of ``weight`` too.
    """
    chosen = torch.zeros(z.shape[3:], dtype=torch.bool, device=z.device)
    chosen[list(heads)] = True
    if constant:
        weight = torch.where(chosen.flatten()[:, None], weight.detach(), weight)
    return linear(torch.where(chosen, new, z).flatten(3), weight)


def path_patched(
    senders: Sequence[Sender], receivers: Sequence[Receiver], by: Replacement, detach: bool, sites: SiteTable
) -> PathPatched:
    """The value for receivers that differ in their head alone."""
    reader = _reader(receivers, sites)
    terms = _terms(senders, receivers[0].depth, sites)
    if by == "zero":
        terms = [term for term in terms if term.heads or not term.replaced]
    return PathPatched(", ".join(sender.name for sender in senders), by, detach, tuple(terms), reader)


def _reader(receivers: Sequence[Receiver], sites: SiteTable) -> Reader:
    first, width = receivers[0], sites.size("D")
    block = f"blocks.{first.depth // 2}"
    if first.depth == 2 * sites.layers:
        site, norm, weight = "hook_logits", "ln_final", "unembed.W_U"
        bias = "unembed.b_U" if sites.unembed_bias else None
    elif first.part is None:
        site, norm, weight, bias = f"{block}.mlp.hook_pre", f"{block}.ln2", f"{block}.mlp.W_in", f"{block}.mlp.b_in"
    else:
        site, norm, weight, bias = f"{block}.attn.hook_{first.part}", f"{block}.ln1", f"{block}.attn.W_QKV", None
    has_norm = "ln_final.hook_scale" in sites.sites
    heads = tuple(sorted({receiver.head for receiver in receivers if receiver.head is not None}))
    part = None if first.part is None else "qkv".index(first.part)
    return Reader(site, width, norm if has_norm else None, weight, bias, part, heads)


def _terms(senders: Sequence[Sender], depth: int, sites: SiteTable) -> list[Term]:
    """The sum that is read at some depth, from the first sender on."""
    names = {sender.name for sender in senders}
    first = min(sender.depth for sender in senders)
    if first == BEFORE_BLOCKS:
        added = [name for name in ADDED_FIRST if f"hook_{name}" in sites.sites]
        terms = [Term(f"hook_{name}", name in names) for name in added]
    else:
        terms = [Term(f"blocks.{first // 2}.hook_resid_{'mid' if first % 2 else 'pre'}")]
    for at in range(max(first, 0), depth):
        block, own = f"blocks.{at // 2}", [sender for sender in senders if sender.depth == at]
        heads = tuple(sorted({sender.head for sender in own if sender.head is not None}))
        if heads:
            terms.append(Term(f"{block}.attn.hook_z", True, heads))
        elif at % 2 == 0:
            terms.append(Term(f"{block}.hook_attn_out"))
        elif sites.size("N"):
            terms.append(Term(f"{block}.hook_mlp_out", bool(own)))
    return terms


def read_sender(name: str, field_name: str, sites: SiteTable) -> Sender:
    """A sender as a user writes it: ``"0:2"``, ``"0:mlp"``, ``"embed"`` or ``"pos_embed"``.

    Raises:
        ConfigError: it is none of these, or the model has no such thing.
    """
    added = [added for added in ADDED_FIRST if f"hook_{added}" in sites.sites]
    if name in added:
        return Sender(name, BEFORE_BLOCKS)
    layer, head, part = _address(name, field_name, f"{', '.join(added)}, layer:head or layer:mlp", sites)
    if part is not None:
        raise ConfigError(field_name, name, f"a sender, which has no .{part}: {name.removesuffix('.' + part)}")
    return Sender(str(name), 2 * layer + (head is None), head)


def read_receiver(name: str, field_name: str, sites: SiteTable) -> Receiver:
    """A receiver as a user writes it: ``"1:3.q"``, ``"1:3.k"``, ``"1:3.v"``, ``"1:mlp"`` or ``"logits"``.

    Raises:
        ConfigError: it is none of these, or the model has no such thing.
    """
    if name == "logits":
        return Receiver(name, 2 * sites.layers)
    layer, head, part = _address(name, field_name, "logits, layer:head.q, .k or .v, or layer:mlp", sites)
    if head is not None and part is None:
        raise ConfigError(field_name, name, f"which input of the head: {name}.q, {name}.k or {name}.v")
    return Receiver(str(name), 2 * layer + (head is None), head, part)


def _address(name: str, field_name: str, forms: str, sites: SiteTable) -> tuple[int, int | None, str | None]:
    """Layer, head (None for the MLP), and the part of the head if one is named."""
    layers, heads = sites.layers, sites.size("H")
    found = ADDRESS.fullmatch(str(name))
    if found and int(found[1]) < layers and int(found[2] or 0) < heads and (found[2] or sites.size("N")):
        return int(found[1]), None if found[2] is None else int(found[2]), found[3]
    expected = f"{forms}, with layer 0 to {layers - 1} and head 0 to {heads - 1}"
    raise ConfigError(field_name, name, expected + ("" if sites.size("N") else "; this model has no MLP"))
