"""Reddy's network for learning in context or in weights: one-hot positions, bare attention, an MLP as read-out.

Reddy 2023, "The mechanistic basis of data dependence and abrupt learning in an in-context classification task". An
item is its position as a one-hot vector, then its features, or the frozen vector of its label. Two causal layers of one
head follow, without norms, without an output matrix and with undivided scores, then three layers of ReLU neurons and a
linear classifier at every row.

Legend: M members, B batch, L positions (query side), K positions (key side), D width, H heads (one), E head width (D),
N neurons, P position channels, F features, T tokens, V outputs, I input of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError, check_number
from opsin.model.layers import MASKED_SCORE, attended, fan_in_scale, future_of, in_order, linear, looked_up, raw_scores
from opsin.model.parameters import ZEROS, Initial, Parameter, Parameters, ParameterTable
from opsin.model.protocol import Model, Tap, TaskSizes, identity_tap
from opsin.model.sites import SiteRow, SiteTable, site_table
from opsin.task import Batch


@dataclass(frozen=True)
class ReddyNetwork(Model):
    """Attention over items with one-hot positions, and an MLP that classifies; weights are N(0, 1/fan-in).

    A sequence begins at the position that the batch's ``offset`` says, which a task may draw; at 0 where it says none.

    Args:
        position_width: P, channels of the one-hot position, which are put before the features.
        token_width: F, length of the frozen vectors of labels where the task has no features to match.
        layers: number of attention layers.
        neurons: N, of every layer of the read-out.
        hidden_layers: layers of ReLU neurons of the read-out, before the linear classifier.

    Raises:
        ConfigError: a number below 1.
    """

    position_width: int = 65
    token_width: int = 63
    layers: int = 2
    neurons: int = 128
    hidden_layers: int = 3

    def __post_init__(self) -> None:
        for name in ("position_width", "token_width", "layers", "neurons", "hidden_layers"):
            check_number(f"ReddyNetwork.{name}", getattr(self, name), "at least 1", 1)

    def width(self, task: TaskSizes) -> int:
        """D: channels of the position and of what stands there."""
        return self.position_width + (task.n_features or self.token_width)

    def positions_coded(self, task: TaskSizes) -> int:
        return self.position_width

    def parameters(self, task: TaskSizes) -> ParameterTable:
        """Frozen vectors of labels, attention, and the read-out with its biases; stored input x output."""
        if task.layout.positions > self.position_width:
            expected = f"at least the task's {task.layout.positions}"
            raise ConfigError("ReddyNetwork.position_width", self.position_width, expected)
        return ParameterTable(tuple(self._table(task)))

    def _table(self, task: TaskSizes) -> Iterator[Parameter]:
        width, features = self.width(task), task.n_features or self.token_width
        vectors = Initial("normal", fan_in_scale(features))
        yield Parameter("embed.W_E", (task.n_tokens, features), vectors, "embed", "TF", trained=False)
        for layer in range(self.layers):
            for part in ("Q", "K", "V"):
                initial, name = Initial("normal", fan_in_scale(width)), f"blocks.{layer}.attn.W_{part}"
                yield Parameter(name, (1, width, width), initial, "attention", "HDE")
        inputs = width
        for layer in range(self.hidden_layers):
            initial = Initial("normal", fan_in_scale(inputs))
            yield Parameter(f"read_out.{layer}.W_in", (inputs, self.neurons), initial, "mlp", "IN")
            yield Parameter(f"read_out.{layer}.b_in", (self.neurons,), ZEROS, "mlp", "N")
            inputs = self.neurons
        initial = Initial("normal", fan_in_scale(inputs))
        yield Parameter("unembed.W_U", (inputs, task.n_outputs), initial, "unembed", "NV")
        yield Parameter("unembed.b_U", (task.n_outputs,), ZEROS, "unembed", "V")

    def sites(self, task: TaskSizes) -> SiteTable:
        """Items with their positions, attention, the neurons of the read-out, and the logits."""
        length, width = task.layout.positions, self.width(task)
        sizes = {"L": length, "K": length, "D": width, "H": 1, "E": width, "N": self.neurons, "V": task.n_outputs}
        return site_table([*self._rows()], sizes, self.parameters(task))

    def _rows(self) -> Iterator[SiteRow]:
        yield "hook_embed", "MBLD", "one-hot positions, then features or vectors of labels"
        for layer in range(self.layers):
            yield f"blocks.{layer}.hook_resid_pre", "MBLD", "residual stream entering the block"
            yield f"blocks.{layer}.attn.hook_q", "MBLHE", "queries"
            yield f"blocks.{layer}.attn.hook_k", "MBLHE", "keys"
            yield f"blocks.{layer}.attn.hook_v", "MBLHE", "values"
            yield f"blocks.{layer}.attn.hook_attn_scores", "MBHLK", "masked scores, not divided"
            yield f"blocks.{layer}.attn.hook_pattern", "MBHLK", "attention after the softmax"
            yield f"blocks.{layer}.attn.hook_z", "MBLHE", "what the head read, which is added as it is"
            yield f"blocks.{layer}.hook_resid_post", "MBLD", "residual stream leaving the block"
        for layer in range(self.hidden_layers):
            yield f"read_out.{layer}.hook_pre", "MBLN", "neurons before the ReLU"
            yield f"read_out.{layer}.hook_post", "MBLN", "neurons after the ReLU"
        yield "hook_logits", "MBLV", "logits at every position"

    def forward(
        self, parameters: Parameters, table: Float[Tensor, "2 L C"], batch: Batch, tap: Tap = identity_tap
    ) -> Float[Tensor, "M B L V"]:
        """Logits at every position."""
        x = tap("hook_embed", self._items(parameters, batch))
        for layer in range(self.layers):
            block = f"blocks.{layer}"
            x = tap(f"{block}.hook_resid_pre", x)
            x = tap(f"{block}.hook_resid_post", x + self._attention(parameters, x, block, tap))
        for layer in range(self.hidden_layers):
            weight, bias = parameters[f"read_out.{layer}.W_in"], parameters[f"read_out.{layer}.b_in"]
            pre = tap(f"read_out.{layer}.hook_pre", linear(x, weight, bias))
            x = tap(f"read_out.{layer}.hook_post", pre.relu())
        return tap("hook_logits", linear(x, parameters["unembed.W_U"], parameters["unembed.b_U"]))

    def _items(self, parameters: Parameters, batch: Batch) -> Float[Tensor, "M B L D"]:
        items = looked_up(batch.tokens, parameters["embed.W_E"])
        if batch.features is not None:
            items = in_order(batch.features.to(items.dtype), items, batch.layout)
        position = torch.arange(items.shape[2], device=items.device).expand(items.shape[:3])
        if batch.offset is not None:
            position = position + batch.offset[..., None]
        channels = torch.eye(self.position_width, dtype=items.dtype, device=items.device)
        return torch.cat([channels[position], items], 3)

    def _attention(
        self, parameters: Parameters, x: Float[Tensor, "M B L D"], block: str, tap: Tap
    ) -> Float[Tensor, "M B L D"]:
        weights = {part: parameters[f"{block}.attn.W_{part.upper()}"][:, 0] for part in "qkv"}
        q, k, v = (
            tap(f"{block}.attn.hook_{part}", linear(x, weight)[:, :, :, None]) for part, weight in weights.items()
        )
        scores = raw_scores(q, k).masked_fill(future_of(x), MASKED_SCORE)  # M B 1 L K
        scores = tap(f"{block}.attn.hook_attn_scores", scores)
        pattern = tap(f"{block}.attn.hook_pattern", scores.softmax(-1))
        return tap(f"{block}.attn.hook_z", attended(pattern, v))[:, :, :, 0]
