"""A multilayer perceptron that reads a whole sequence at once, one number after the other.

The input is the one-hot vector of every token, one after the other, and then every feature vector. With one hidden
layer and ``bias: first`` it is the network of Lyu et al. 2024 ("Dichotomy of early and late phase implicit biases"),
with ``activation: square`` and ``bias: none`` that of Morwani et al. 2024 ("Feature emergence via margin
maximization").

Legend: M members, B batch, L positions, I numbers of the input or of the layer before, N neurons, V outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError, check_number
from opsin.model.layers import ACTIVATIONS, Activation, linear, one_hot_tokens
from opsin.model.parameters import ZEROS, Initial, Parameter, Parameters, ParameterTable
from opsin.model.protocol import Model, Tap, TaskSizes, identity_tap, refuse_other_rows
from opsin.model.sites import SiteTable, site_table
from opsin.task import Batch


@dataclass(frozen=True)
class MLP(Model):
    """Hidden layers of neurons over the whole sequence, and a linear read-out; its logits are alike at all rows.

    Weights are normal with a variance of 2 / fan-in (He et al. 2015) before ``init_scale``; biases are 0.

    Args:
        width: N, neurons of every hidden layer.
        layers: number of hidden layers.
        activation: nonlinearity of the neurons.
        bias: which layers add a bias: none of them, the first, all hidden ones, or the read-out too (all).
        init_scale: alpha, by which every weight is multiplied at initialisation.

    Raises:
        ConfigError: a number out of its range, or an unknown choice.
    """

    width: int = 128
    layers: int = 1
    activation: Activation = "relu"
    bias: Literal["none", "first", "hidden", "all"] = "first"
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("MLP.width", self.width, "at least 1", 1)
        check_number("MLP.layers", self.layers, "at least 1", 1)
        check_number("MLP.init_scale", self.init_scale, "more than 0", 0, open_low=True)
        for name, known in (("activation", tuple(ACTIVATIONS)), ("bias", ("none", "first", "hidden", "all"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"MLP.{name}", getattr(self, name), f"one of {', '.join(known)}")

    def parameters(self, task: TaskSizes) -> ParameterTable:
        """Weights stored input x output, layer by layer."""
        refuse_other_rows("MLP", task)
        return ParameterTable((*self._hidden(task), *self._read_out(task)))

    def _hidden(self, task: TaskSizes) -> Iterator[Parameter]:
        inputs = len(task.layout.tokens) * task.n_tokens + len(task.layout.features) * (task.n_features or 0)
        for layer in range(self.layers):
            block = f"blocks.{layer}.mlp"
            yield Parameter(f"{block}.W_in", (inputs, self.width), self._he(inputs), "mlp", "IN")
            if self.bias in ("hidden", "all") or (self.bias == "first" and layer == 0):
                yield Parameter(f"{block}.b_in", (self.width,), ZEROS, "mlp", "N")
            inputs = self.width

    def _read_out(self, task: TaskSizes) -> Iterator[Parameter]:
        yield Parameter("unembed.W_U", (self.width, task.n_outputs), self._he(self.width), "unembed", "NV")
        if self.bias == "all":
            yield Parameter("unembed.b_U", (task.n_outputs,), ZEROS, "unembed", "V")

    def _he(self, fan_in: int) -> Initial:
        return Initial("normal", self.init_scale * math.sqrt(2 / fan_in))

    def sites(self, task: TaskSizes) -> SiteTable:
        """The neurons of every layer before and after the nonlinearity, and the logits."""
        rows = []
        for layer in range(self.layers):
            rows.append((f"blocks.{layer}.mlp.hook_pre", "MB1N", "neurons before the nonlinearity"))
            rows.append((f"blocks.{layer}.mlp.hook_post", "MB1N", "neurons after the nonlinearity"))
        rows.append(("hook_logits", "MBLV", "logits, alike at every position"))
        sizes = {"L": task.layout.positions, "N": self.width, "V": task.n_outputs}
        return site_table(rows, sizes, self.parameters(task))

    def forward(
        self, parameters: Parameters, table: Float[Tensor, "2 L C"], batch: Batch, tap: Tap = identity_tap
    ) -> Float[Tensor, "M B L V"]:
        """Logits from all tokens and features together."""
        weight, act = parameters["unembed.W_U"], ACTIVATIONS[self.activation]
        vocabulary = self._vocabulary(parameters, batch)
        read = [one_hot_tokens(batch, vocabulary, weight.dtype).flatten(2)]
        if batch.features is not None:
            read.append(batch.features.to(weight.dtype).flatten(2))
        x = torch.cat(read, 2)[:, :, None]  # M B 1 I
        for layer in range(self.layers):
            block = f"blocks.{layer}.mlp"
            pre = tap(f"{block}.hook_pre", linear(x, parameters[f"{block}.W_in"], parameters.get(f"{block}.b_in")))
            x = tap(f"{block}.hook_post", act(pre))
        logits = linear(x, weight, parameters.get("unembed.b_U"))
        return tap("hook_logits", logits.expand(-1, -1, batch.layout.positions, -1))

    def _vocabulary(self, parameters: Parameters, batch: Batch) -> int:
        """Tokens of the vocabulary, by the rows of the first weight that no feature has."""
        features = 0 if batch.features is None else batch.features.shape[2] * batch.features.shape[3]
        return (parameters["blocks.0.mlp.W_in"].shape[1] - features) // max(1, batch.tokens.shape[2])
