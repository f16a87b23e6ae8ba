"""The transformer, in one plain file. Every activation passes the tap.

Every parameter and every activation carries the member axis M first: a single run is M = 1.
The mathematics is that of the two-layer in-context model of "What needs to go right for an
induction head?" (Singh et al. 2024, section 2), generalised in depth, positions, MLPs and input;
each choice is one line where it acts. ``docs/models.md`` says what each is and which paper uses it.

Legend: M members, B batch, L positions (query side), R those of them that go on (all, or the
scored ones), K positions (key side), D width, H heads, E head width, N neurons, V outputs, T tokens, F features,
P position rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError, check_number
from opsin.model.layers import (
    ACTIVATIONS,
    GATES,
    MASKED_SCORE,
    Activation,
    Norm,
    attended,
    future_of,
    in_order,
    linear,
    looked_up,
    raw_scores,
    scaled_and_shifted,
)
from opsin.model.parameters import (
    ONES,
    TRUNCATED_STD,
    ZEROS,
    Initial,
    NamedWeight,
    Parameter,
    Parameters,
    ParameterTable,
    PartKind,
)
from opsin.model.protocol import ADDED, Model, Tap, TaskSizes, identity_tap
from opsin.model.sites import SiteRow, SiteTable, site_table
from opsin.task import Batch, NeededRows

MOST_LAYERS = 10_000

NormKind = Literal["LayerNorm", "RMSNorm"]
Positions = Literal["rope", "sinusoidal", "learned", "relative", "none"]


@dataclass(frozen=True)
class Transformer(Model):
    """Shape of the decoder; sizes of input and output come from the task.

    Args:
        layers: number of blocks, one after the other.
        width: D, of the residual stream.
        heads: H, heads a block; must divide ``width``.
        mlp_ratio: hidden width of the MLPs over ``width``; None for an attention-only model.
        norm: what normalises the input of attention and MLP: LayerNorm (true), RMSNorm, or nothing (false).
        causal: mask keys after the query.
        positions: rotary (adjacent channel pairs), added sinusoids, an added learned table, a learned bias of the
            keys by their distance from the query (relative), or none.
        position_base: tau, the base of the rotary and sinusoidal frequencies.
        max_positions: rows of the learned position table; with relative positions the largest distance that has a
            bias of its own.
        init_scale: multiplies every linear weight at initialisation.
        unembed_bias: whether the read-out adds a bias to the logits; without it everything that moves them passes
            the last norm.
        activation: nonlinearity of the neurons; tanh-GELU by default.
        gated: whether the nonlinearity multiplies a second linear map of the MLP's input.
        mlp_layers: layers that have an MLP; all when None.
        final_norm: what normalises the input of the read-out; as ``norm`` when None.
        norm_weight: whether norms multiply by a learned weight.
        norm_bias: whether LayerNorms add a learned bias; RMSNorm has none.
        attention_biases: letters of those of queries, keys, values and output that have a bias, of ``"qkvo"``.
        mlp_bias: whether the linear maps of MLPs add a bias.
        feature_bias: whether the linear map of features into the width adds a bias.
        tied: whether the read-out is the transposed token embedding.
        attention: softmax of the scores, or the scores as they are (linear).
        scale_scores: whether scores are divided by the root of the head width.
        embed_scale: size of token embeddings at initialisation: what their truncated normal is multiplied by.
        position_scale: multiplies the learned positions at initialisation.
        attention_scale: multiplies the weights of attention at initialisation, beside ``init_scale``.
        mlp_scale: multiplies the weights of MLPs at initialisation, beside ``init_scale``.
        unembed_scale: multiplies the weight of the read-out at initialisation, beside ``init_scale``.
    """

    setting: ClassVar[str] = "model.transformer"

    layers: int = 2
    width: int = 64
    heads: int = 8
    mlp_ratio: float | None = None
    norm: bool | NormKind = True
    causal: bool = True
    positions: Positions = "rope"
    position_base: float = 10_000.0
    max_positions: int = 32
    init_scale: float = 1.0
    unembed_bias: bool = True
    activation: Activation = field(default="gelu_tanh", metadata=ADDED)
    gated: bool = field(default=False, metadata=ADDED)
    mlp_layers: tuple[int, ...] | None = field(default=None, metadata=ADDED)
    final_norm: bool | NormKind | None = field(default=None, metadata=ADDED)
    norm_weight: bool = field(default=True, metadata=ADDED)
    norm_bias: bool = field(default=True, metadata=ADDED)
    attention_biases: str = field(default="", metadata=ADDED)
    mlp_bias: bool = field(default=True, metadata=ADDED)
    feature_bias: bool = field(default=True, metadata=ADDED)
    tied: bool = field(default=False, metadata=ADDED)
    attention: Literal["softmax", "linear"] = field(default="softmax", metadata=ADDED)
    scale_scores: bool = field(default=True, metadata=ADDED)
    embed_scale: float = field(default=0.02, metadata=ADDED)
    position_scale: float = field(default=1.0, metadata=ADDED)
    attention_scale: float = field(default=1.0, metadata=ADDED)
    mlp_scale: float = field(default=1.0, metadata=ADDED)
    unembed_scale: float = field(default=1.0, metadata=ADDED)

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "max_positions"):
            check_number(f"transformer.{name}", getattr(self, name), "at least 1", 1)
        if self.layers > MOST_LAYERS:
            raise ConfigError("transformer.layers", self.layers, f"at most {MOST_LAYERS:,}")
        if self.width % self.heads:
            raise ConfigError("transformer.heads", self.heads, f"a divisor of the width {self.width}")
        _check_choice("positions", self.positions, get_args(Positions))
        if self.positions == "rope" and self.head_width % 2:
            raise ConfigError("transformer.heads", self.heads, "an even head width for rotary positions")
        if self.positions == "sinusoidal" and self.width % 2:
            raise ConfigError("transformer.width", self.width, "an even width for sinusoidal positions")
        if self.mlp_ratio is not None:
            # half a neuron is rounded to none
            least, expected = 0.5 / self.width, "at least one neuron, or null for no MLPs"
            check_number("transformer.mlp_ratio", self.mlp_ratio, expected, least, open_low=True)
        scales = ("embed_scale", "position_scale", "attention_scale", "mlp_scale", "unembed_scale")
        for name in ("position_base", "init_scale", *scales):
            check_number(f"transformer.{name}", getattr(self, name), "more than 0", 0, open_low=True)
        self._check_norms_and_attention()
        self._check_mlps()

    def _check_norms_and_attention(self) -> None:
        _check_choice("norm", self.norm, (True, False, *get_args(NormKind)))
        _check_choice("final_norm", self.final_norm, (None, True, False, *get_args(NormKind)))
        _check_choice("attention", self.attention, ("softmax", "linear"))
        letters = self.attention_biases
        if sorted(set(letters)) != sorted(letters) or not set(letters) <= set("qkvo"):
            raise ConfigError("transformer.attention_biases", letters, "letters of 'qkvo', each at most once")
        if self.tied and self.unembed_scale != 1:
            raise ConfigError("transformer.unembed_scale", self.unembed_scale, "1: a tied read-out is the embedding")
        if self.position_scale != 1 and self.positions not in ("learned", "relative"):
            expected = "1: only learned and relative positions are drawn"
            raise ConfigError("transformer.position_scale", self.position_scale, expected)

    def _check_mlps(self) -> None:
        _check_choice("activation", self.activation, tuple(ACTIVATIONS))
        if self.gated and self.activation not in GATES:
            raise ConfigError("transformer.activation", self.activation, f"one with a gate: {', '.join(GATES)}")
        if self.mlp_ratio is None and self.gated:
            raise ConfigError("transformer.gated", True, "false: without mlp_ratio there are no MLPs")
        if self.mlp_layers is None:
            return
        # a list where a file or a program has made it
        object.__setattr__(self, "mlp_layers", tuple(self.mlp_layers))
        if self.mlp_ratio is None:
            raise ConfigError("transformer.mlp_layers", list(self.mlp_layers), "null: without mlp_ratio there are none")
        wrong = [layer for layer in self.mlp_layers if not 0 <= layer < self.layers]
        if wrong or len(set(self.mlp_layers)) != len(self.mlp_layers):
            expected = f"different layers from 0 to {self.layers - 1}"
            raise ConfigError("transformer.mlp_layers", list(self.mlp_layers), expected)

    @property
    def head_width(self) -> int:
        """E."""
        return self.width // self.heads

    @property
    def neurons(self) -> int | None:
        """N, None without MLPs."""
        return None if self.mlp_ratio is None else round(self.mlp_ratio * self.width)

    def has_mlp(self, layer: int) -> bool:
        """Whether a block has an MLP."""
        return self.mlp_ratio is not None and (self.mlp_layers is None or layer in self.mlp_layers)

    def norm_at(self, name: str) -> Norm | None:
        """What the norm of a name does, ``ln1``, ``ln2`` or ``ln_final``; None where nothing is normalised."""
        setting = self.norm if self.final_norm is None or name != "ln_final" else self.final_norm
        if setting is False:
            return None
        kind: NormKind = "LayerNorm" if setting is True else setting
        return Norm(kind, self.norm_weight, self.norm_bias and kind == "LayerNorm")

    def in_words(self) -> str:
        """Layers, width and neurons."""
        return f"{self.layers} layers of width {self.width} with {self.neurons or 0} neurons"

    # ---- tables -------------------------------------------------------------------------------------

    def parameters(self, task: TaskSizes) -> ParameterTable:
        """Every parameter, in the order in which they are drawn.

        Linear weights are truncated normals (two sigma) rescaled to a standard deviation of
        1/sqrt(fan-in); token embeddings 0.02 times the un-rescaled truncated normal; biases 0, norms 1;
        a learned position table is uniform within 1/sqrt(rows). Weights are stored input x output.

        Args:
            task: what gives the sizes of input and output.

        Raises:
            ConfigError: a tied read-out of another size than the embedding.
        """
        if self.tied and task.n_tokens != task.n_outputs:
            expected = f"false: the task has {task.n_tokens} tokens and {task.n_outputs} outputs"
            raise ConfigError("transformer.tied", True, expected)
        found = [*self._input_parameters(task)]
        for layer in range(self.layers):
            found += self._block_parameters(f"blocks.{layer}", self.has_mlp(layer))
        return ParameterTable((*found, *self._norm_parameters("ln_final"), *self._read_out_parameters(task)))

    def _linear(self, name: str, fan_in: int, fan_out: int, kind: PartKind, axes: str, scale: float = 1) -> Parameter:
        sigma = self.init_scale / math.sqrt(fan_in) / TRUNCATED_STD
        sizes = {"H": self.heads, "E": self.head_width, "D": self.width}
        return Parameter(name, (fan_in, fan_out), Initial("truncated_normal", sigma * scale), kind, axes, sizes)

    def _input_parameters(self, task: TaskSizes) -> Iterator[Parameter]:
        width, rows = self.width, self.max_positions
        if task.n_features is not None:
            yield self._linear("embed.W_F", task.n_features, width, "embed", "FD")
            if self.feature_bias:
                yield Parameter("embed.b_F", (width,), ZEROS, "embed", "D")
        if task.n_tokens:
            initial = Initial("truncated_normal", self.embed_scale, self.init_scale)
            sizes = {"T": task.n_tokens, "V": task.n_outputs, "D": width}
            read_out = (NamedWeight("unembed.W_U", "embed.W_E", "DV", "VD", sizes),) if self.tied else ()
            yield Parameter("embed.W_E", (task.n_tokens, width), initial, "embed", "TD", parts=read_out)
        if self.positions == "learned":
            bound = 1 / math.sqrt(rows) * self.position_scale
            yield Parameter("pos_embed.W_pos", (rows, width), Initial("uniform", bound), "position", "PD")

    def _norm_parameters(self, name: str) -> Iterator[Parameter]:
        norm = self.norm_at(name.rpartition(".")[2])
        if norm is not None and norm.weight:
            yield Parameter(f"{name}.w", (self.width,), ONES, "norm", "D")
        if norm is not None and norm.bias:
            yield Parameter(f"{name}.b", (self.width,), ZEROS, "norm", "D")

    def _block_parameters(self, block: str, mlp: bool) -> Iterator[Parameter]:
        width, heads, attn = self.width, {"H": self.heads, "E": self.head_width, "D": self.width}, f"{block}.attn"
        yield from self._norm_parameters(f"{block}.ln1")
        packed = self._linear(f"{attn}.W_QKV", width, 3 * width, "attention", "DO", self.attention_scale)
        parts = tuple(_third(f"{attn}.W_{part}", packed.name, heads, index) for index, part in enumerate("QKV"))
        yield Parameter(packed.name, packed.shape, packed.initial, packed.kind, packed.axes, parts=parts)
        yield self._linear(f"{attn}.W_O", width, width, "attention", "HED", self.attention_scale)
        for part in "qkv":
            if part in self.attention_biases:
                yield Parameter(f"{attn}.b_{part.upper()}", (width,), ZEROS, "attention", "HE", heads)
        if "o" in self.attention_biases:
            yield Parameter(f"{attn}.b_O", (width,), ZEROS, "attention", "D")
        if self.positions == "relative":
            rows, sigma = 2 * self.max_positions + 1, self.position_scale / math.sqrt(self.head_width) / TRUNCATED_STD
            initial = Initial("truncated_normal", sigma)
            yield Parameter(f"{attn}.W_rel", (rows, self.head_width), initial, "position", "PE")
        if mlp:
            yield from self._mlp_parameters(block)

    def _mlp_parameters(self, block: str) -> Iterator[Parameter]:
        width, neurons, scale = self.width, self.neurons or 0, self.mlp_scale
        yield from self._norm_parameters(f"{block}.ln2")
        if self.gated:
            yield self._linear(f"{block}.mlp.W_gate", width, neurons, "mlp", "DN", scale)
        yield self._linear(f"{block}.mlp.W_in", width, neurons, "mlp", "DN", scale)
        if self.mlp_bias:
            yield Parameter(f"{block}.mlp.b_in", (neurons,), ZEROS, "mlp", "N")
        yield self._linear(f"{block}.mlp.W_out", neurons, width, "mlp", "ND", scale)
        if self.mlp_bias:
            yield Parameter(f"{block}.mlp.b_out", (width,), ZEROS, "mlp", "D")

    def _read_out_parameters(self, task: TaskSizes) -> Iterator[Parameter]:
        if not self.tied:
            yield self._linear("unembed.W_U", self.width, task.n_outputs, "unembed", "DV", self.unembed_scale)
        if self.unembed_bias:
            yield Parameter("unembed.b_U", (task.n_outputs,), ZEROS, "unembed", "V")

    def sites(self, task: TaskSizes) -> SiteTable:
        """Every activation of this model on that task.

        Args:
            task: what gives the sizes of input and output.

        Raises:
            ConfigError: sequences longer than the learned table of positions.
        """
        length = task.layout.positions
        if self.positions == "learned" and length > self.max_positions:
            raise ConfigError("transformer.max_positions", self.max_positions, f"at least the task's {length}")
        sizes = {"L": length, "K": length, "D": self.width, "H": self.heads, "E": self.head_width, "V": task.n_outputs}
        if self.neurons is not None:
            sizes["N"] = self.neurons
        names = [
            f"blocks.{layer}.{name}"
            for layer in range(self.layers)
            for name in ("ln1", "ln2")[: 1 + self.has_mlp(layer)]
        ]
        norms = {name: self.norm_at(name.rpartition(".")[2]) for name in (*names, "ln_final")}
        found = {name: norm for name, norm in norms.items() if norm is not None}
        rows = [*self._site_rows()]
        names = [name for name, _, _ in rows]
        last = f"blocks.{self.layers - 1}"
        # keys and values, and what they are made of, are read by other rows
        read = {f"{last}.attn.hook_{part}" for part in ("k", "v", "rot_k")}
        row_by_row = set(names[names.index(f"{last}.attn.hook_q") :]) - read
        return site_table(rows, sizes, self.parameters(task), found, row_by_row)

    def _site_rows(self) -> Iterator[SiteRow]:
        yield "hook_embed", "MBLD", "token embeddings, before positions"
        if self.positions in ("sinusoidal", "learned"):
            yield "hook_pos_embed", "MLD", "position vectors"
        for layer in range(self.layers):
            for name, axes, meaning in self._block_rows(self.has_mlp(layer)):
                yield f"blocks.{layer}.{name}", axes, meaning
        yield from self._norm_rows("ln_final", "input of the read-out")
        yield "hook_logits", "MBLV", "logits at every position"

    def _norm_rows(self, name: str, meaning: str) -> Iterator[SiteRow]:
        norm = self.norm_at(name)
        if norm is not None:
            size = "standard deviation" if norm.kind == "LayerNorm" else "root mean square"
            yield f"{name}.hook_scale", "MBL1", f"{size} the {norm.kind} divides by"
            yield f"{name}.hook_normalized", "MBLD", f"what the {norm.kind} makes, before weight and bias"
        yield f"{name}.hook_out", "MBLD", meaning

    def _block_rows(self, mlp: bool) -> Iterator[SiteRow]:
        yield "hook_resid_pre", "MBLD", "residual stream entering the block"
        yield from self._norm_rows("ln1", "input of attention")
        yield "attn.hook_q", "MBLHE", "queries, before rotation"
        yield "attn.hook_k", "MBLHE", "keys, before rotation"
        yield "attn.hook_v", "MBLHE", "values"
        yield "attn.hook_rot_q", "MBLHE", "queries as they meet the keys"
        yield "attn.hook_rot_k", "MBLHE", "keys as they meet the queries"
        if self.positions == "relative":
            yield "attn.hook_rel_scores", "MBHLK", "what the distance of key and query adds to the scores, unscaled"
        if self.attention == "softmax":
            yield "attn.hook_attn_scores", "MBHLK", "scaled, masked scores"
            yield "attn.hook_pattern", "MBHLK", "attention after the softmax"
        else:
            yield "attn.hook_pattern", "MBHLK", "scores, 0 at masked keys: attention is linear"
        yield "attn.hook_z", "MBLHE", "what each head read"
        yield "hook_attn_out", "MBLD", "what attention writes"
        if mlp:
            yield "hook_resid_mid", "MBLD", "residual stream between attention and MLP"
            yield from self._norm_rows("ln2", "input of the MLP")
            yield "mlp.hook_pre", "MBLN", "neurons before the nonlinearity"
            if self.gated:
                yield "mlp.hook_pre_linear", "MBLN", "what the nonlinearity multiplies"
            yield "mlp.hook_post", "MBLN", "neurons after the nonlinearity"
            yield "hook_mlp_out", "MBLD", "what the MLP writes"
        yield "hook_resid_post", "MBLD", "residual stream leaving the block"

    # ---- the forward pass ---------------------------------------------------------------------------

    def position_table(self, length: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "2 L half"]:
        """Cosines and sines of the position angles: of a head's channel pairs (rotary) or of the width's (sinusoidal).

        A table given to the graph, because a compiler that sees the trigonometry recomputes it for every activation.
        """
        width = self.head_width if self.positions == "rope" else self.width
        channel = torch.arange(0, width, 2, dtype=torch.float64)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * self.position_base ** (-channel / width)
        return torch.stack([angle.cos(), angle.sin()]).to(dtype)

    def forward(
        self, parameters: Parameters, table: Float[Tensor, "2 L half"], batch: Batch, tap: Tap = identity_tap
    ) -> Float[Tensor, "M B R V"]:
        """Logits at every position, or at those of ``batch.rows``; every activation by way of the tap."""
        scope = _Scope(parameters, table, tap, "", batch.rows)
        resid = scope.tap("hook_embed", _embed(parameters, batch))  # M B L D
        if self.positions in ("sinusoidal", "learned"):
            resid = resid + scope.tap("hook_pos_embed", _position_vectors(scope, self, resid))[:, None]
        for layer in range(self.layers):
            rows = batch.rows if layer == self.layers - 1 else None
            block = _Scope(parameters, table, tap, f"blocks.{layer}.", rows)
            resid = _block(block, resid, self, self.has_mlp(layer))
        final = _norm(scope, "ln_final", resid, self)
        unembed = parameters["embed.W_E"].mT if self.tied else parameters["unembed.W_U"]
        return scope.tap("hook_logits", scope.linear(final, unembed, parameters.get("unembed.b_U")))


def _third(name: str, parameter: str, sizes: Mapping[str, int], index: int) -> NamedWeight:
    """Queries', keys' or values' columns of a packed weight, as the weight that they are."""
    width = sizes["H"] * sizes["E"]
    before, after = index * width, (2 - index) * width
    return NamedWeight(name, parameter, "HDE", "DHE", sizes, before, after, heads_are_one_axis=True)


def _check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    # 1 is no true here
    if not any(value is one or (isinstance(value, str) and value == one) for one in known):
        words = ", ".join(
            "null" if one is None else str(one).lower() if isinstance(one, bool) else repr(one) for one in known
        )
        raise ConfigError(f"transformer.{name}", value, f"one of {words}")


@dataclass(frozen=True)
class _Scope:
    """Parameters, position table, tap and needed rows under the name of one block; rows are None where all are."""

    parameters: Parameters
    table: Tensor
    tap_all: Tap
    prefix: str
    rows: NeededRows | None

    def __getitem__(self, name: str) -> Tensor:
        return self.parameters[self.prefix + name]

    def get(self, name: str) -> Tensor | None:
        return self.parameters.get(self.prefix + name)

    def tap(self, name: str, activation: Tensor, axis: int = 2) -> Tensor:
        return self.kept(name, self.tap_all(self.prefix + name, activation), axis)

    def kept(self, name: str | None, x: Tensor, axis: int = 2) -> Tensor:
        """The rows of an activation that go on from a site; None before the first that is read row by row."""
        return x if self.rows is None else self.rows.kept(name and self.prefix + name, x, axis)

    def as_many(self, count: int, x: Tensor, axis: int = 2) -> Tensor:
        """A tensor at the rows of one that has so many."""
        return x if self.rows is None else self.rows.as_many(count, x, axis)

    def apart(self, function: Callable[..., Tensor], *inputs: Tensor, axis: int = 2) -> Tensor:
        """What a function of rows makes; ``NeededRows`` says why."""
        return function(*inputs) if self.rows is None else self.rows.apart(function, *inputs, axis=axis)

    def linear(self, x: Float[Tensor, "M B L I"], weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A linear map, row by row."""
        return self.apart(lambda rows: linear(rows, weight, bias), x)

    def whole(self) -> _Scope:
        """The same with all rows needed."""
        return replace(self, rows=None)


def _embed(parameters: Parameters, batch: Batch) -> Float[Tensor, "M B L D"]:
    if not batch.layout.tokens:
        return _embedded_features(parameters, batch)
    tokens = looked_up(batch.tokens, parameters["embed.W_E"])  # M B Nt D
    if batch.features is None:
        return tokens
    return in_order(_embedded_features(parameters, batch), tokens, batch.layout)


def _embedded_features(parameters: Parameters, batch: Batch) -> Float[Tensor, "M B Nf D"]:
    assert batch.features is not None
    weight, bias = parameters["embed.W_F"], parameters.get("embed.b_F")
    if batch.shown is None:
        return linear(batch.features.to(weight.dtype), weight, bias)
    vectors = batch.shown.vectors.to(weight.dtype).expand(len(weight), 1, -1, -1)
    return looked_up(batch.shown.which, linear(vectors, weight, bias)[:, 0])


def _position_vectors(scope: _Scope, model: Transformer, like: Float[Tensor, "M B L D"]) -> Float[Tensor, "M L D"]:
    members, _, length, width = like.shape
    if model.positions == "learned":
        return scope["pos_embed.W_pos"][:, :length]
    cos, sin = scope.table
    return torch.stack([sin, cos], dim=-1).reshape(length, width).expand(members, -1, -1)


def _block(scope: _Scope, resid: Float[Tensor, "M B L D"], model: Transformer, mlp: bool) -> Float[Tensor, "M B R D"]:
    resid = scope.tap("hook_resid_pre", resid)
    written = _attention(scope, _norm(scope.whole(), "ln1", resid, model), model)
    resid = scope.as_many(written.shape[2], resid) + written
    if mlp:
        resid = scope.tap("hook_resid_mid", resid)
        written = _mlp(scope, _norm(scope, "ln2", resid, model), model)
        resid = scope.as_many(written.shape[2], resid) + written
    return scope.tap("hook_resid_post", resid)


def _norm(scope: _Scope, name: str, x: Float[Tensor, "M B L D"], model: Transformer) -> Float[Tensor, "M B R D"]:
    norm = model.norm_at(name)
    if norm is not None:
        scale_site = f"{name}.hook_scale"
        x = norm.normalise(x, lambda scale: scope.tap_all(scope.prefix + scale_site, scale))
        x = scope.tap(f"{name}.hook_normalized", scope.kept(scale_site, x))
        weight, bias = scope.get(f"{name}.w"), scope.get(f"{name}.b")
        x = scope.apart(lambda rows: scaled_and_shifted(rows, weight, bias), x)
    return scope.tap(f"{name}.hook_out", x)


def _attention(scope: _Scope, x: Float[Tensor, "M B L D"], model: Transformer) -> Float[Tensor, "M B R D"]:
    parts = zip("qkv", _queries_keys_values(scope, x, model), strict=True)
    q, k, v = (scope.tap(f"attn.hook_{name}", part) for name, part in parts)
    if model.positions == "rope":
        q, k = _rotate(q, scope.as_many(q.shape[2], scope.table, axis=1)), _rotate(k, scope.table)
    q, k = scope.tap("attn.hook_rot_q", q), scope.tap("attn.hook_rot_k", k)  # M B L H E
    pattern = scope.tap("attn.hook_pattern", _attention_pattern(scope, q, k, model), axis=3)

    def read(rows: Float[Tensor, "M B H L K"]) -> Float[Tensor, "M B H L E"]:
        return attended(rows, v).transpose(2, 3)

    z = scope.tap("attn.hook_z", scope.apart(read, pattern, axis=3).transpose(2, 3))  # M B L H E
    return scope.tap("hook_attn_out", scope.linear(z.flatten(3), scope["attn.W_O"], scope.get("attn.b_O")))


def _queries_keys_values(
    scope: _Scope, x: Float[Tensor, "M B L D"], model: Transformer
) -> tuple[Float[Tensor, "M B _ H E"], ...]:
    """Queries, keys and values; where not all queries are needed they are computed by themselves."""
    width, weight = model.width, scope["attn.W_QKV"]

    def by_head(packed: Float[Tensor, "M B R O"]) -> tuple[Float[Tensor, "M B R H E"], ...]:
        return packed.unflatten(3, (-1, model.heads, model.head_width)).unbind(3)

    if scope.rows is None:
        return by_head(linear(x, weight, _biases(scope, "qkv")))
    q = scope.linear(scope.kept(None, x), weight[..., :width], _biases(scope, "q"))
    return *by_head(q), *by_head(linear(x, weight[..., width:], _biases(scope, "kv")))


def _biases(scope: _Scope, parts: str) -> Float[Tensor, "M O"] | None:
    """Biases of queries, keys and values side by side, 0 where one has none; None where none has."""
    found = [scope.get(f"attn.b_{part.upper()}") for part in parts]
    like = next((bias for bias in found if bias is not None), None)
    return None if like is None else torch.cat([torch.zeros_like(like) if bias is None else bias for bias in found], 1)


def _attention_pattern(
    scope: _Scope, q: Float[Tensor, "M B L H E"], k: Float[Tensor, "M B K H E"], model: Transformer
) -> Float[Tensor, "M B H R K"]:
    by_head = q.transpose(2, 3)
    if model.positions == "relative":
        relative = _relative_scores(scope, by_head, scope["attn.W_rel"])
        by_head = scope.as_many(relative.shape[3], by_head, axis=3)
    scores = scope.apart(lambda rows: raw_scores(rows.transpose(2, 3), k), by_head, axis=3)
    if model.positions == "relative":
        scores = scores + relative
    if model.scale_scores:
        scores = scores / math.sqrt(model.head_width)
    if model.causal:
        future = scope.as_many(scores.shape[3], future_of(k), axis=0)
        scores = scores.masked_fill(future, MASKED_SCORE if model.attention == "softmax" else 0.0)
    return scope.tap("attn.hook_attn_scores", scores, axis=3).softmax(-1) if model.attention == "softmax" else scores


def _relative_scores(
    scope: _Scope, q: Float[Tensor, "M B H L E"], rows: Float[Tensor, "M P E"]
) -> Float[Tensor, "M B H R K"]:
    """Inner product of every query with the row of its distance to every key (Shaw et al. 2018, equation 4)."""
    length, most = scope.table.shape[1], rows.shape[1] // 2
    position = torch.arange(length, device=q.device)
    distance = (position[None, :] - position[:, None]).clamp(-most, most) + most  # L K
    vectors = scope.as_many(q.shape[3], rows[:, distance][:, None, None], axis=3)  # M 1 1 L K E

    def compared(q: Float[Tensor, "M B H L E"], vectors: Float[Tensor, "M 1 1 L K E"]) -> Float[Tensor, "M B H L K"]:
        return torch.einsum("mbhle,mlke->mbhlk", q, vectors[:, 0, 0])

    return scope.tap("attn.hook_rel_scores", scope.apart(compared, q, vectors, axis=3), axis=3)


def _rotate(x: Float[Tensor, "M B L H E"], table: Float[Tensor, "2 L half"]) -> Float[Tensor, "M B L H E"]:
    """Rotary positions over adjacent channel pairs (2j, 2j+1)."""
    cos, sin = table[:, :, None]  # L 1 E/2
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def _mlp(scope: _Scope, x: Float[Tensor, "M B L D"], model: Transformer) -> Float[Tensor, "M B R D"]:
    act, bias = ACTIVATIONS[model.activation], scope.get("mlp.b_in")
    if model.gated:
        pre = scope.tap("mlp.hook_pre", scope.linear(x, scope["mlp.W_gate"]))
        x = scope.as_many(pre.shape[2], x)
        linear_part = scope.tap("mlp.hook_pre_linear", scope.linear(x, scope["mlp.W_in"]))
        post = act(scope.as_many(linear_part.shape[2], pre)) * linear_part
        if bias is not None:
            post = scope.apart(lambda rows: rows + bias[:, None, None], post)
    else:
        post = act(scope.tap("mlp.hook_pre", scope.linear(x, scope["mlp.W_in"], bias)))
    post = scope.tap("mlp.hook_post", post)
    return scope.tap("hook_mlp_out", scope.linear(post, scope["mlp.W_out"], scope.get("mlp.b_out")))
