"""The transformer, in one plain file. Every activation passes the tap.

Every parameter and every activation carries the member axis M first: a single run is M = 1.
The mathematics is that of the two-layer in-context model of "What needs to go right for an
induction head?" (Singh et al. 2024, section 2), generalised in depth, positions, MLPs and input.

Legend: M members, B batch, L positions (query side), K positions (key side), D width, H heads,
E head width, N neurons, V outputs, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.errors import ConfigError, check_number
from opsin.model.sites import SiteTable, build_sites
from opsin.task import Batch, Layout, Task

Parameters = Mapping[str, Tensor]
Tap = Callable[[str, Tensor], Tensor]

MOST_LAYERS = 10_000
NORM_EPS = 1e-5
MASKED_SCORE = -1e20
# standard deviation of a standard normal truncated at two sigma
TRUNCATED_STD = 0.87962566103423978
# at up to this many scores a pair the compiler fuses multiply-and-sum better than it calls matmul
BROADCAST_POSITIONS = 8


def identity_tap(_: str, activation: Tensor) -> Tensor:
    """The tap that changes nothing."""
    return activation


@dataclass(frozen=True)
class Transformer:
    """Shape of the decoder; sizes of input and output come from the task.

    Args:
        layers: number of blocks, one after the other.
        width: D, of the residual stream.
        heads: H, heads a block; must divide ``width``.
        mlp_ratio: hidden width of the MLPs over ``width``; None for an attention-only model.
        norm: LayerNorm before attention, MLP and read-out.
        causal: mask keys after the query.
        positions: rotary (adjacent channel pairs), added sinusoids, or an added learned table.
        position_base: tau, the base of the rotary and sinusoidal frequencies.
        max_positions: rows of the learned position table.
        init_scale: multiplies every linear weight at initialisation.
        unembed_bias: whether the read-out adds a bias to the logits; without it everything that moves them passes
            the last LayerNorm.
    """

    layers: int = 2
    width: int = 64
    heads: int = 8
    mlp_ratio: float | None = None
    norm: bool = True
    causal: bool = True
    positions: Literal["rope", "sinusoidal", "learned"] = "rope"
    position_base: float = 10_000.0
    max_positions: int = 32
    init_scale: float = 1.0
    unembed_bias: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "max_positions"):
            check_number(f"transformer.{name}", getattr(self, name), "at least 1", 1)
        if self.layers > MOST_LAYERS:
            raise ConfigError("transformer.layers", self.layers, f"at most {MOST_LAYERS:,}")
        if self.width % self.heads:
            raise ConfigError("transformer.heads", self.heads, f"a divisor of the width {self.width}")
        if self.positions not in ("rope", "sinusoidal", "learned"):
            raise ConfigError("transformer.positions", self.positions, "'rope', 'sinusoidal' or 'learned'")
        if self.positions == "rope" and self.head_width % 2:
            raise ConfigError("transformer.heads", self.heads, "an even head width for rotary positions")
        if self.positions == "sinusoidal" and self.width % 2:
            raise ConfigError("transformer.width", self.width, "an even width for sinusoidal positions")
        if self.mlp_ratio is not None:
            # half a neuron is rounded to none
            least, expected = 0.5 / self.width, "at least one neuron, or null for no MLPs"
            check_number("transformer.mlp_ratio", self.mlp_ratio, expected, least, open_low=True)
        for name in ("position_base", "init_scale"):
            check_number(f"transformer.{name}", getattr(self, name), "more than 0", 0, open_low=True)

    @property
    def head_width(self) -> int:
        """E."""
        return self.width // self.heads

    @property
    def neurons(self) -> int | None:
        """N, None without MLPs."""
        return None if self.mlp_ratio is None else round(self.mlp_ratio * self.width)

    def sites(self, task: Task) -> SiteTable:
        """Every activation of this model on that task."""
        if self.positions == "learned" and task.layout.positions > self.max_positions:
            raise ConfigError(
                "transformer.max_positions", self.max_positions, f"at least the task's {task.layout.positions}"
            )
        return self.sites_of(task.layout.positions, task.n_outputs)

    def sites_of(self, positions: int, outputs: int) -> SiteTable:
        """Every activation of this model on any task with these sizes.

        Args:
            positions: L, length of a sequence.
            outputs: V, number of classes that are predicted.
        """
        return build_sites(
            layers=self.layers,
            positions=positions,
            width=self.width,
            heads=self.heads,
            neurons=self.neurons,
            outputs=outputs,
            additive=self.positions != "rope",
            norm=self.norm,
            unembed_bias=self.unembed_bias,
        )


def init_parameters(model: Transformer, task: Task, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Fresh float32 parameters, one member per seed, stacked on the member axis.

    Linear weights are truncated normals (two sigma) rescaled to a standard deviation of
    1/sqrt(fan-in); token embeddings 0.02 times the un-rescaled truncated normal; biases 0, norms 1;
    a learned position table is uniform within 1/sqrt(rows). Weights are stored input x output.
    A member's values depend on its own seed alone.
    """
    members = [_init_member(model, task, seed) for seed in seeds]
    return {name: torch.stack([member[name] for member in members]) for name in members[0]}


def parameter_shapes(model: Transformer, features: int | None, tokens: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of one member, without the member axis, by the names of ``init_parameters``.

    Args:
        model: shape of the transformer.
        features: F, entries of a feature vector; None when the input is tokens only.
        tokens: size of the input vocabulary; 0 when the input is features only.
        outputs: V, numbers that are predicted at a position.
    """
    width, neurons = model.width, model.neurons

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.w": (width,), f"{name}.b": (width,)} if model.norm else {}

    shapes: dict[str, tuple[int, ...]] = {"embed.W_E": (tokens, width)} if tokens else {}
    if features is not None:
        shapes |= {"embed.W_F": (features, width), "embed.b_F": (width,)}
    if model.positions == "learned":
        shapes["pos_embed.W_pos"] = (model.max_positions, width)
    for layer in range(model.layers):
        block = f"blocks.{layer}"
        shapes |= norm(f"{block}.ln1")
        shapes |= {f"{block}.attn.W_QKV": (width, 3 * width), f"{block}.attn.W_O": (width, width)}
        if neurons is not None:
            shapes |= norm(f"{block}.ln2")
            shapes |= {f"{block}.mlp.W_in": (width, neurons), f"{block}.mlp.b_in": (neurons,)}
            shapes |= {f"{block}.mlp.W_out": (neurons, width), f"{block}.mlp.b_out": (width,)}
    shapes |= norm("ln_final")
    shapes["unembed.W_U"] = (width, outputs)
    return shapes | ({"unembed.b_U": (outputs,)} if model.unembed_bias else {})


def _init_member(model: Transformer, task: Task, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width, neurons = model.width, model.neurons

    def linear(fan_in: int, fan_out: int) -> Tensor:
        sigma = model.init_scale / math.sqrt(fan_in) / TRUNCATED_STD
        return _truncated_normal((fan_in, fan_out), generator) * sigma

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.w": torch.ones(width), f"{name}.b": torch.zeros(width)} if model.norm else {}

    values: dict[str, Tensor] = {}
    if task.n_features is not None:
        values |= {"embed.W_F": linear(task.n_features, width), "embed.b_F": torch.zeros(width)}
    if task.n_tokens:
        values["embed.W_E"] = 0.02 * _truncated_normal((task.n_tokens, width), generator) * model.init_scale
    if model.positions == "learned":
        bound = 1 / math.sqrt(model.max_positions)
        values["pos_embed.W_pos"] = (torch.rand(model.max_positions, width, generator=generator) * 2 - 1) * bound
    for layer in range(model.layers):
        block = f"blocks.{layer}"
        values |= norm(f"{block}.ln1")
        values[f"{block}.attn.W_QKV"] = linear(width, 3 * width)
        values[f"{block}.attn.W_O"] = linear(width, width)
        if neurons is not None:
            values |= norm(f"{block}.ln2")
            values |= {f"{block}.mlp.W_in": linear(width, neurons), f"{block}.mlp.b_in": torch.zeros(neurons)}
            values |= {f"{block}.mlp.W_out": linear(neurons, width), f"{block}.mlp.b_out": torch.zeros(width)}
    values |= norm("ln_final")
    values["unembed.W_U"] = linear(width, task.n_outputs)
    if model.unembed_bias:
        values["unembed.b_U"] = torch.zeros(task.n_outputs)
    return values


def _truncated_normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(shape), 0.0, 1.0, -2.0, 2.0, generator=generator)


class Members(nn.Module):
    """The parameters of M members as a module tree, so that checkpoints and loggers see their names."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            *path, leaf = name.split(".")
            node: nn.Module = self
            for part in path:
                if not hasattr(node, part):
                    node.add_module(part, nn.Module())
                node = getattr(node, part)
            node.register_parameter(leaf, nn.Parameter(value))


def position_table(model: Transformer, length: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "2 L half"]:
    """Cosines and sines of the position angles: of a head's channel pairs (rotary) or of the width's (sinusoidal).

    A table given to the graph, because a compiler that sees the trigonometry recomputes it for every activation.
    """
    width = model.head_width if model.positions == "rope" else model.width
    channel = torch.arange(0, width, 2, dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * model.position_base ** (-channel / width)
    return torch.stack([angle.cos(), angle.sin()]).to(dtype)


def forward(
    parameters: Parameters,
    table: Float[Tensor, "2 L half"],
    batch: Batch,
    model: Transformer,
    tap: Tap = identity_tap,
) -> Float[Tensor, "M B L V"]:
    """Logits at every position.

    Args:
        parameters: as ``init_parameters`` names them.
        table: ``position_table`` of the model for sequences of this length.
        batch: features and tokens of every member.
        model: the shape that ``parameters`` were made with.
        tap: is handed every activation under its site name and returns what goes on.
    """
    resid = tap("hook_embed", _embed(parameters, batch))  # M B L D
    if model.positions != "rope":
        resid = resid + tap("hook_pos_embed", _position_vectors(parameters, table, model, resid))[:, None]
    for layer in range(model.layers):
        resid = _block(_Scope(parameters, table, tap, f"blocks.{layer}."), resid, model)
    final = _norm(_Scope(parameters, table, tap, ""), "ln_final", resid, model)
    logits = linear(final, parameters["unembed.W_U"], parameters.get("unembed.b_U"))
    return tap("hook_logits", logits)


@dataclass(frozen=True)
class _Scope:
    """Parameters, position table and tap under the name of one block."""

    parameters: Parameters
    table: Tensor
    tap_all: Tap
    prefix: str

    def __getitem__(self, name: str) -> Tensor:
        return self.parameters[self.prefix + name]

    def tap(self, name: str, activation: Tensor) -> Tensor:
        return self.tap_all(self.prefix + name, activation)


def linear(
    x: Float[Tensor, "M B L I"], weight: Float[Tensor, "M I O"], bias: Float[Tensor, "M O"] | None = None
) -> Float[Tensor, "M B L O"]:
    """Every member's activation through its own weight."""
    members, batch, length, _ = x.shape
    flat = x.reshape(members, batch * length, -1)
    out = torch.bmm(flat, weight) if bias is None else torch.baddbmm(bias[:, None], flat, weight)
    return out.view(members, batch, length, -1)


def _embed(parameters: Parameters, batch: Batch) -> Float[Tensor, "M B L D"]:
    if not batch.layout.tokens:
        return _embedded_features(parameters, batch)
    table = parameters["embed.W_E"]
    member = torch.arange(table.shape[0], device=table.device)[:, None, None]
    tokens = table[member, batch.tokens]  # M B Nt D
    if batch.features is None:
        return tokens
    return torch.cat([_embedded_features(parameters, batch), tokens], dim=2)[:, :, _interleave(batch.layout)]


def _embedded_features(parameters: Parameters, batch: Batch) -> Float[Tensor, "M B Nf D"]:
    assert batch.features is not None
    weight = parameters["embed.W_F"]
    return linear(batch.features.to(weight.dtype), weight, parameters["embed.b_F"])


def _interleave(layout: Layout) -> list[int]:
    """Where each position of the sequence stands in [features, tokens]."""
    stacked = (*layout.features, *layout.tokens)
    return [stacked.index(position) for position in range(layout.positions)]


def _position_vectors(
    parameters: Parameters, table: Tensor, model: Transformer, like: Float[Tensor, "M B L D"]
) -> Float[Tensor, "M L D"]:
    members, _, length, width = like.shape
    if model.positions == "learned":
        return parameters["pos_embed.W_pos"][:, :length]
    cos, sin = table
    return torch.stack([sin, cos], dim=-1).reshape(length, width).expand(members, -1, -1)


def _block(scope: _Scope, resid: Float[Tensor, "M B L D"], model: Transformer) -> Float[Tensor, "M B L D"]:
    resid = scope.tap("hook_resid_pre", resid)
    resid = resid + _attention(scope, _norm(scope, "ln1", resid, model), model)
    if model.neurons is not None:
        resid = scope.tap("hook_resid_mid", resid)
        resid = resid + _mlp(scope, _norm(scope, "ln2", resid, model))
    return scope.tap("hook_resid_post", resid)


def _norm(scope: _Scope, name: str, x: Float[Tensor, "M B L D"], model: Transformer) -> Float[Tensor, "M B L D"]:
    if model.norm:
        x = layer_norm(x, scope[f"{name}.w"], scope[f"{name}.b"], lambda scale: scope.tap(f"{name}.hook_scale", scale))
    return scope.tap(f"{name}.hook_normalized", x)


def layer_norm(
    x: Float[Tensor, "M B L D"],
    weight: Float[Tensor, "M D"],
    bias: Float[Tensor, "M D"],
    tap: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> Float[Tensor, "M B L D"]:
    """Each position by its own mean and standard deviation, which passes the tap (Ba et al. 2016)."""
    centred = x - x.mean(-1, keepdim=True)
    scale = tap((centred.square().mean(-1, keepdim=True) + NORM_EPS).sqrt())
    return centred / scale * weight[:, None, None] + bias[:, None, None]


def _attention(scope: _Scope, x: Float[Tensor, "M B L D"], model: Transformer) -> Float[Tensor, "M B L D"]:
    members, batch, length, width = x.shape
    qkv = linear(x, scope["attn.W_QKV"]).view(members, batch, length, 3, model.heads, model.head_width)
    q, k, v = (scope.tap(f"attn.hook_{name}", part) for name, part in zip("qkv", qkv.unbind(3), strict=True))
    if model.positions == "rope":
        q, k = _rotate(q, scope.table), _rotate(k, scope.table)
    q, k = scope.tap("attn.hook_rot_q", q), scope.tap("attn.hook_rot_k", k)  # M B L H E
    scores = _scores(q, k) / math.sqrt(model.head_width)  # M B H L K
    if model.causal:
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(future, MASKED_SCORE)
    scores = scope.tap("attn.hook_attn_scores", scores)
    pattern = scope.tap("attn.hook_pattern", scores.softmax(-1))
    z = scope.tap("attn.hook_z", _attended(pattern, v))  # M B L H E
    return scope.tap("hook_attn_out", linear(z.reshape(members, batch, length, width), scope["attn.W_O"]))


def _rotate(x: Float[Tensor, "M B L H E"], table: Float[Tensor, "2 L half"]) -> Float[Tensor, "M B L H E"]:
    """Rotary positions over adjacent channel pairs (2j, 2j+1)."""
    cos, sin = table[:, :, None]  # L 1 E/2
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def _scores(q: Float[Tensor, "M B L H E"], k: Float[Tensor, "M B K H E"]) -> Float[Tensor, "M B H L K"]:
    q, k = q.transpose(2, 3), k.transpose(2, 3)
    if q.shape[3] <= BROADCAST_POSITIONS:
        return (q[..., :, None, :] * k[..., None, :, :]).sum(-1)
    return q @ k.transpose(-1, -2)


def _attended(pattern: Float[Tensor, "M B H L K"], v: Float[Tensor, "M B K H E"]) -> Float[Tensor, "M B L H E"]:
    if pattern.shape[-1] <= BROADCAST_POSITIONS:
        return (pattern.permute(0, 1, 3, 4, 2)[..., None] * v[:, :, None]).sum(3)
    return (pattern @ v.transpose(2, 3)).transpose(2, 3)


def _mlp(scope: _Scope, x: Float[Tensor, "M B L D"]) -> Float[Tensor, "M B L D"]:
    pre = scope.tap("mlp.hook_pre", linear(x, scope["mlp.W_in"], scope["mlp.b_in"]))
    post = scope.tap("mlp.hook_post", nn.functional.gelu(pre, approximate="tanh"))
    return scope.tap("hook_mlp_out", linear(post, scope["mlp.W_out"], scope["mlp.b_out"]))
