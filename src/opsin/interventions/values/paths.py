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
from opsin.model.layers import Norm, linear, scaled_and_shifted
from opsin.model.sites import SiteTable
from opsin.task import Batch

Replacement = Literal["zero", "mean", "resample", "plain"]

ADDRESS = re.compile(r"(\d+):(?:mlp|(\d+)(?:\.([qkv]))?)")
ADDED_FIRST = ("embed", "pos_embed")
BEFORE_BLOCKS = -1


@dataclass(frozen=True)
class Sender:
    """A part of the model that adds one term to the sum.

    Args:
        name: the sender as the user wrote it.
        depth: 2l for the heads of block l, 2l + 1 for its MLP, ``BEFORE_BLOCKS`` for embeddings. A sender reaches
            the receivers of a greater depth.
        head: number of the head within its block; None for an MLP or an embedding.
    """

    name: str
    depth: int
    head: int | None = None


@dataclass(frozen=True)
class Receiver:
    """A part of the model that reads the sum.

    Args:
        name: the receiver as the user wrote it.
        depth: depth as of a sender; twice the number of blocks for the read-out.
        head: number of the head within its block; None for an MLP or the read-out.
        part: which input of the head, ``q``, ``k`` or ``v``; None for an MLP or the read-out.
    """

    name: str
    depth: int
    head: int | None = None
    part: str | None = None


@dataclass(frozen=True)
class Term:
    """One term of the sum, as it goes on in the pass.

    Args:
        site: name of the site that is added, or ``attn.hook_z`` of a block some of whose heads are replaced.
        replaced: whether the term is replaced, all of it or those heads.
        heads: heads that are replaced; none where the term is no attention.
        bias: name of the bias that the block's attention adds to what its heads write; None where it has none.
    """

    site: str
    replaced: bool = False
    heads: tuple[int, ...] = ()
    bias: str | None = None


@dataclass(frozen=True)
class ReceiverInput:
    """How receivers that differ in their head alone read the sum.

    Args:
        site: name of the site that holds what is read.
        width: D, the width of the sum.
        norm: what the norm ahead of the receiver does; None in a model without.
        weights: names of the weights that the sum is read with, in the order in which they are used: those of the
            norm, the one that the sum is multiplied by, and a bias where there is one.
        biased: whether the last of them is a bias.
        heads: numbers of the heads that read, in rising order; only their input is computed. None of an MLP.
    """

    site: str
    width: int
    norm: Norm | None
    weights: tuple[str, ...]
    biased: bool = False
    heads: tuple[int, ...] = ()

    @property
    def needs(self) -> tuple[Weight, ...]:
        """The weights that the sum is read with, in the order in which they are used."""
        return tuple(Weight(name) for name in self.weights)

    def __call__(
        self, resid: Float[Tensor, "M B L D"], x: Float[Tensor, "M B L ..."], parameters: Iterator[Tensor]
    ) -> Float[Tensor, "M B L ..."]:
        """What is read from ``resid``; heads that do not read keep ``x``, through which no gradient flows.

        Args:
            resid: the sum that is read.
            x: the site as it is without patching.
            parameters: the weights of ``needs``, in order.
        """
        if self.norm is not None:
            weight = next(parameters) if self.norm.weight else None
            bias = next(parameters) if self.norm.bias else None
            resid = scaled_and_shifted(self.norm.normalise(resid), weight, bias)
        weight = next(parameters)
        bias = next(parameters) if self.biased else None
        if not self.heads:
            return linear(resid, weight, bias)
        by_head = weight.movedim(1, 2)  # M D H E
        # slices, since the gradient of an indexed weight is a scatter, which the compiler does not fuse
        chosen = torch.cat([by_head[:, :, head : head + 1] for head in self.heads], 2)  # M D G E
        if bias is not None:
            bias = torch.cat([bias[:, head : head + 1] for head in self.heads], 1).flatten(1)  # M GE
        read = linear(resid, chosen.flatten(2), bias).unflatten(-1, chosen.shape[2:]).split(1, 3)
        heads = list(x.detach().split(1, 3))
        for head, head_input in zip(self.heads, read, strict=True):
            heads[head] = head_input
        return torch.cat(heads, 3)


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
        senders: names of the senders whose terms are replaced, for people.
        by: what replaces a term: zero, its mean over the batch, what it is in another example (resample), or what it
            is in a pass without interventions (plain).
        detach: whether gradient stops at what ``plain`` puts there; through zero, mean and resample none flows.
        terms: all terms of the sum, in order of addition, without those that are zero.
        receiver_input: how the receivers read the sum.
    """

    senders: str
    by: Replacement
    detach: bool
    terms: tuple[Term, ...] = field(repr=False, metadata=DERIVED)
    receiver_input: ReceiverInput = field(repr=False, metadata=DERIVED)

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the terms are made from, the receivers' parameters, and for resample the clock."""
        found: list[Need] = []
        for term in self.terms:
            plain = term.replaced and self.by == "plain"
            if term.heads or not plain:
                found.append(Source(term.site, Relative.SAME_PASS))
            if plain:
                found.append(Source(term.site, detach=self.detach))
            if term.heads:
                found.append(Weight(term.site.replace("hook_z", "W_O")))
            if term.bias is not None:
                found.append(Weight(term.bias))
        clock = (Clock(),) if self.by == "resample" else ()
        return (*found, *self.receiver_input.needs, *clock)

    @property
    def gradient(self) -> str:
        """``"flows"``, whatever replaces the terms."""
        # into the receiver's own weights even where nothing else is left of the sum
        return "flows"

    def __call__(self, x: Float[Tensor, "M B L ..."], batch: Batch, *inputs: Tensor) -> Overwrite:
        needed = iter(inputs)
        resid = x.new_zeros(*x.shape[:3], self.receiver_input.width)
        for term in self.terms:
            added = self._added(term, batch, needed, inputs[-1])
            resid = resid + (added if added.dim() == 4 else added[:, None])  # position vectors have no B
        return Overwrite(self.receiver_input(resid, x, needed))

    def _added(self, term: Term, batch: Batch, needed: Iterator[Tensor], clock: Tensor) -> Float[Tensor, "..."]:
        """What one term adds to the sum; takes what it needs off ``needed``."""
        x = next(needed)
        if not term.replaced or (self.by == "plain" and not term.heads):
            return x
        if self.by == "plain":
            new = next(needed)
        elif self.by == "mean":
            new = BatchMean()(x, batch).value
        elif self.by == "resample":
            new = Resample()(x, batch, clock).value
        else:
            new = torch.zeros_like(x)
        if not term.heads:
            return new
        constant = self.detach or self.by != "plain"
        added = written(x, new, next(needed), term.heads, constant)
        return added if term.bias is None else added + next(needed)[:, None, None]


def written(
    z: Float[Tensor, "M B L H E"],
    new: Float[Tensor, "M B L H E"],
    weight: Float[Tensor, "M H E D"],
    heads: Sequence[int],
    constant: bool,
) -> Float[Tensor, "M B L D"]:
    """What a block's heads write when some of them had read ``new``.

    Args:
        z: what the heads read, ``hook_z`` of the block.
        new: what the chosen heads read instead.
        weight: ``W_O`` of the block, the rows of all heads.
        heads: numbers of the chosen heads.
        constant: whether gradient stops at those heads' rows of ``weight`` too.
    """
    chosen = torch.zeros(z.shape[3:], dtype=torch.bool, device=z.device)
    chosen[list(heads)] = True
    if constant:
        weight = torch.where(chosen[..., None], weight.detach(), weight)
    return linear(torch.where(chosen, new, z).flatten(3), weight.flatten(1, 2))


def path_patched(
    senders: Sequence[Sender], receivers: Sequence[Receiver], by: Replacement, detach: bool, sites: SiteTable
) -> PathPatched:
    """The value for receivers that differ in their head alone.

    Args:
        senders: parts of the model whose terms are replaced.
        receivers: parts of the model that read the patched sum; they differ in their head alone.
        by: what replaces a term.
        detach: whether gradient stops at what ``plain`` puts there.
        sites: activations of the model that is patched.
    """
    receiver_input = _receiver_input(receivers, sites)
    terms = _terms(senders, receivers[0].depth, sites)
    if by == "zero":
        terms = [term for term in terms if term.heads or not term.replaced]
    return PathPatched(", ".join(sender.name for sender in senders), by, detach, tuple(terms), receiver_input)


def _receiver_input(receivers: Sequence[Receiver], sites: SiteTable) -> ReceiverInput:
    first, width = receivers[0], sites.size("D")
    block = f"blocks.{first.depth // 2}"
    if first.depth == 2 * sites.layers:
        site, norm, weight, bias = "hook_logits", "ln_final", "unembed.W_U", "unembed.b_U"
    elif first.part is None:
        site, norm, weight, bias = f"{block}.mlp.hook_pre", f"{block}.ln2", f"{block}.mlp.W_in", f"{block}.mlp.b_in"
    else:
        letter = first.part.upper()
        weight, bias = f"{block}.attn.W_{letter}", f"{block}.attn.b_{letter}"
        site, norm = f"{block}.attn.hook_{first.part}", f"{block}.ln1"
    optional = [f"{norm}.w", f"{norm}.b", weight, bias]
    weights = tuple(name for name in optional if name == weight or name in sites.weights)
    heads = tuple(sorted({receiver.head for receiver in receivers if receiver.head is not None}))
    return ReceiverInput(site, width, sites.norms.get(norm), weights, bias in weights, heads)


def _terms(senders: Sequence[Sender], depth: int, sites: SiteTable) -> list[Term]:
    """The sum that is read at some depth, from the first sender on."""
    names = {sender.name for sender in senders}
    first = min(sender.depth for sender in senders)
    if first == BEFORE_BLOCKS:
        added = [name for name in ADDED_FIRST if f"hook_{name}" in sites.sites]
        terms = [Term(f"hook_{name}", name in names) for name in added]
    else:
        terms = [Term(f"blocks.{first // 2}.hook_resid_{'mid' if first % 2 else 'pre'}")]
    for level in range(max(first, 0), depth):
        block, replaced = f"blocks.{level // 2}", [sender for sender in senders if sender.depth == level]
        heads = tuple(sorted({sender.head for sender in replaced if sender.head is not None}))
        if heads:
            bias = f"{block}.attn.b_O"
            terms.append(Term(f"{block}.attn.hook_z", True, heads, bias if bias in sites.weights else None))
        elif level % 2 == 0:
            terms.append(Term(f"{block}.hook_attn_out"))
        elif f"{block}.hook_mlp_out" in sites:
            terms.append(Term(f"{block}.hook_mlp_out", bool(replaced)))
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
    if head is None and f"blocks.{layer}.mlp.hook_pre_linear" in sites:
        raise ConfigError(field_name, name, "a head or the logits: a gated MLP reads its input twice")
    if head is not None and part is None:
        raise ConfigError(field_name, name, f"which input of the head: {name}.q, {name}.k or {name}.v")
    return Receiver(str(name), 2 * layer + (head is None), head, part)


def _address(name: str, field_name: str, forms: str, sites: SiteTable) -> tuple[int, int | None, str | None]:
    """Layer, head (None for the MLP), and the part of the head if one is named."""
    layers, heads = sites.layers, sites.size("H")
    found = ADDRESS.fullmatch(str(name))
    mlp = found is not None and f"blocks.{int(found[1])}.hook_mlp_out" in sites
    if found and int(found[1]) < layers and int(found[2] or 0) < heads and (found[2] or mlp):
        return int(found[1]), None if found[2] is None else int(found[2]), found[3]
    expected = f"{forms}, with layer 0 to {layers - 1} and head 0 to {heads - 1}"
    lacking = f"; layer {found[1]} has no MLP" if found and int(found[1]) < layers and not found[2] else ""
    raise ConfigError(field_name, name, expected + (lacking if sites.size("N") else "; this model has no MLP"))
