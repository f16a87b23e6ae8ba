"""The simplified transformer of "Birth of a Transformer" (Bietti et al. 2023, section 4): three matrices learn.

Two layers of one head without norms. Vectors of tokens and positions are normal and frozen, so are the values of both
layers, the output of the first and the read-out; queries are the residual stream itself. Trained are the keys of both
layers and the output of the second, each of which comes to be a sum of outer products: an associative memory.

Legend: M members, B batch, L positions (query side), K positions (key side), D width, H heads (one), E head width (D).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError, check_number
from opsin.model.layers import MASKED_SCORE, attended, fan_in_scale, future_of, linear, looked_up, raw_scores
from opsin.model.parameters import Initial, Parameter, Parameters, ParameterTable
from opsin.model.protocol import Model, Tap, TaskSizes, identity_tap
from opsin.model.sites import SiteRow, SiteTable, site_table
from opsin.task import Batch

TRAINED = ("blocks.0.attn.W_K", "blocks.1.attn.W_K", "blocks.1.attn.W_O")
"""Weights that are trained, beside the linear map of the second layer where there is one."""


@dataclass(frozen=True)
class BirthTransformer(Model):
    """Two layers of one head with frozen vectors and identity queries; weights are uniform within 1/sqrt(D).

    Args:
        width: D, of the residual stream and of the head.
        max_positions: rows of the table of position vectors.
        linear_mlp: whether the second layer adds a linear map of its residual stream.

    Raises:
        ConfigError: a number below 1.
    """

    width: int = 128
    max_positions: int = 256
    linear_mlp: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "max_positions"):
            check_number(f"BirthTransformer.{name}", getattr(self, name), "at least 1", 1)

    def parameters(self, task: TaskSizes) -> ParameterTable:
        """All weights, the frozen ones among them; stored input x output, each with an axis for its one head."""
        if task.n_features is not None:
            raise ConfigError("BirthTransformer", f"a task with {task.n_features} features", "a task of tokens alone")
        if task.layout.positions > self.max_positions:
            expected = f"at least the task's {task.layout.positions}"
            raise ConfigError("BirthTransformer.max_positions", self.max_positions, expected)
        return ParameterTable(tuple(self._table(task)))

    def _table(self, task: TaskSizes) -> Iterator[Parameter]:
        width, rows, normal = self.width, self.max_positions, Initial("normal", 1.0)
        uniform = Initial("uniform", fan_in_scale(width))
        yield Parameter("embed.W_E", (task.n_tokens, width), normal, "embed", "TD", trained=False)
        yield Parameter("pos_embed.W_pos", (rows, width), normal, "position", "PD", trained=False)
        for layer in range(2):
            for end, axes in (("W_K", "HDE"), ("W_V", "HDE"), ("W_O", "HED")):
                name = f"blocks.{layer}.attn.{end}"
                yield Parameter(name, (1, width, width), uniform, "attention", axes, trained=name in TRAINED)
        if self.linear_mlp:
            yield Parameter("blocks.1.mlp.W", (width, width), uniform, "mlp", "ID")
        yield Parameter("unembed.W_U", (width, task.n_outputs), uniform, "unembed", "DV", trained=False)

    def sites(self, task: TaskSizes) -> SiteTable:
        """Vectors, both attention layers, and the logits."""
        length, width = task.layout.positions, self.width
        sizes = {"L": length, "K": length, "D": width, "H": 1, "E": width, "V": task.n_outputs}
        return site_table([*self._rows()], sizes, self.parameters(task))

    def _rows(self) -> Iterator[SiteRow]:
        yield "hook_embed", "MBLD", "vectors of the tokens"
        yield "hook_pos_embed", "MLD", "position vectors"
        for layer in range(2):
            yield f"blocks.{layer}.hook_resid_pre", "MBLD", "residual stream entering the block, which is its query"
            yield f"blocks.{layer}.attn.hook_k", "MBLHE", "keys"
            yield f"blocks.{layer}.attn.hook_v", "MBLHE", "values"
            yield f"blocks.{layer}.attn.hook_attn_scores", "MBHLK", "scaled, masked scores"
            yield f"blocks.{layer}.attn.hook_pattern", "MBHLK", "attention after the softmax"
            yield f"blocks.{layer}.attn.hook_z", "MBLHE", "what the head read"
            yield f"blocks.{layer}.hook_attn_out", "MBLD", "what attention writes"
            if layer == 1 and self.linear_mlp:
                yield "blocks.1.hook_resid_mid", "MBLD", "residual stream between attention and linear map"
                yield "blocks.1.hook_mlp_out", "MBLD", "what the linear map writes"
            yield f"blocks.{layer}.hook_resid_post", "MBLD", "residual stream leaving the block"
        yield "hook_logits", "MBLV", "logits at every position"

    def forward(
        self, parameters: Parameters, table: Float[Tensor, "2 L C"], batch: Batch, tap: Tap = identity_tap
    ) -> Float[Tensor, "M B L V"]:
        """Logits at every position."""
        resid = tap("hook_embed", looked_up(batch.tokens, parameters["embed.W_E"]))
        resid = resid + tap("hook_pos_embed", parameters["pos_embed.W_pos"][:, : resid.shape[2]])[:, None]
        for layer in range(2):
            block = f"blocks.{layer}"
            resid = tap(f"{block}.hook_resid_pre", resid)
            resid = resid + self._attention(parameters, resid, block, tap)
            if layer == 1 and self.linear_mlp:
                resid = tap("blocks.1.hook_resid_mid", resid)
                resid = resid + tap("blocks.1.hook_mlp_out", linear(resid, parameters["blocks.1.mlp.W"]))
            resid = tap(f"{block}.hook_resid_post", resid)
        return tap("hook_logits", linear(resid, parameters["unembed.W_U"]))

    def _attention(
        self, parameters: Parameters, x: Float[Tensor, "M B L D"], block: str, tap: Tap
    ) -> Float[Tensor, "M B L D"]:
        key, value, output = (parameters[f"{block}.attn.{end}"][:, 0] for end in ("W_K", "W_V", "W_O"))
        k = tap(f"{block}.attn.hook_k", linear(x, key)[:, :, :, None])  # M B L 1 E
        v = tap(f"{block}.attn.hook_v", linear(x, value)[:, :, :, None])
        scores = raw_scores(x[:, :, :, None], k) / math.sqrt(self.width)  # M B 1 L K
        scores = tap(f"{block}.attn.hook_attn_scores", scores.masked_fill(future_of(x), MASKED_SCORE))
        pattern = tap(f"{block}.attn.hook_pattern", scores.softmax(-1))
        z = tap(f"{block}.attn.hook_z", attended(pattern, v))
        return tap(f"{block}.hook_attn_out", linear(z[:, :, :, 0], output))
