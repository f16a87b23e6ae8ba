"""The clustering model: one learned query pools the sequence into a point, a small MLP classifies it.

Odonnat, Bouaziz and Cabannes 2024, "Clustering head": in two dimensions every weight and activation can be drawn.
Vectors of tokens and positions are added and normalised (RMSNorm without weight), one query attends to all positions,
nothing is added around it; then an MLP with a residual, and the token vectors again as read-out.

Legend: M members, B batch, L and K positions, D width, N neurons, T tokens, V outputs (as many as tokens).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError, check_number
from opsin.model.layers import ACTIVATIONS, Norm, fan_in_scale, linear, looked_up
from opsin.model.parameters import Initial, NamedWeight, Parameter, Parameters, ParameterTable
from opsin.model.protocol import Model, Tap, TaskSizes, identity_tap, refuse_other_rows
from opsin.model.sites import SiteTable, site_table
from opsin.task import Batch

NORM = Norm("RMSNorm", weight=False, bias=False)


@dataclass(frozen=True)
class ClusteringTransformer(Model):
    """One pooling query over the sequence, an MLP with GELU, and a read-out tied to the token vectors.

    Vectors are standard normals, all else uniform within 1/sqrt(fan-in). Logits are alike at all rows.

    Args:
        width: D, dimensions of the plane in which everything happens.
        neurons: N, of the MLP.
        max_positions: rows of the table of position vectors.

    Raises:
        ConfigError: a number below 1.
    """

    width: int = 2
    neurons: int = 32
    max_positions: int = 12

    def __post_init__(self) -> None:
        for name in ("width", "neurons", "max_positions"):
            check_number(f"ClusteringTransformer.{name}", getattr(self, name), "at least 1", 1)

    def parameters(self, task: TaskSizes) -> ParameterTable:
        """Vectors, the query, the values, and the MLP with its biases; stored input x output."""
        refuse_other_rows("ClusteringTransformer", task)
        if task.n_features is not None or task.n_tokens != task.n_outputs:
            found = f"a task with {task.n_features or 0} features, {task.n_tokens} tokens and {task.n_outputs} outputs"
            raise ConfigError("ClusteringTransformer", found, "as many outputs as tokens, since the read-out is tied")
        if task.layout.positions > self.max_positions:
            expected = f"at least the task's {task.layout.positions}"
            raise ConfigError("ClusteringTransformer.max_positions", self.max_positions, expected)
        return ParameterTable(tuple(self._table(task)))

    def _table(self, task: TaskSizes) -> Iterator[Parameter]:
        width, neurons, normal = self.width, self.neurons, Initial("normal", 1.0)
        into, out = Initial("uniform", fan_in_scale(width)), Initial("uniform", fan_in_scale(neurons))
        tied = NamedWeight("unembed.W_U", "embed.W_E", "DV", "VD", {"D": width, "V": task.n_outputs})
        yield Parameter("embed.W_E", (task.n_tokens, width), normal, "embed", "TD", parts=(tied,))
        yield Parameter("pos_embed.W_pos", (self.max_positions, width), normal, "position", "PD")
        yield Parameter("pool.q", (width,), into, "attention", "D")
        yield Parameter("pool.W_V", (width, width), into, "attention", "ID")
        yield Parameter("mlp.W_in", (width, neurons), into, "mlp", "DN")
        yield Parameter("mlp.b_in", (neurons,), into, "mlp", "N")
        yield Parameter("mlp.W_out", (neurons, width), out, "mlp", "ND")
        yield Parameter("mlp.b_out", (width,), out, "mlp", "D")

    def sites(self, task: TaskSizes) -> SiteTable:
        """Vectors, what the query sees and pools, the MLP, and the logits."""
        rows = [
            ("hook_embed", "MBLD", "vectors of the tokens"),
            ("hook_pos_embed", "MLD", "position vectors"),
            ("ln1.hook_scale", "MBL1", "root mean square the RMSNorm divides by"),
            ("ln1.hook_normalized", "MBLD", "what the query sees"),
            ("pool.hook_v", "MBLD", "values"),
            ("pool.hook_scores", "MBK", "scaled scores of the one query"),
            ("pool.hook_pattern", "MBK", "attention after the softmax"),
            ("pool.hook_z", "MB1D", "the point that the sequence is pooled into"),
            ("ln2.hook_scale", "MB11", "root mean square the RMSNorm divides by"),
            ("ln2.hook_normalized", "MB1D", "input of the MLP"),
            ("mlp.hook_pre", "MB1N", "neurons before the nonlinearity"),
            ("mlp.hook_post", "MB1N", "neurons after the nonlinearity"),
            ("hook_mlp_out", "MB1D", "what the MLP writes"),
            ("hook_resid_post", "MB1D", "the point that is read out"),
            ("hook_logits", "MBLV", "logits, alike at every position"),
        ]
        length = task.layout.positions
        sizes = {"L": length, "K": length, "D": self.width, "N": self.neurons, "V": task.n_outputs}
        return site_table(rows, sizes, self.parameters(task), {"ln1": NORM, "ln2": NORM})

    def forward(
        self, parameters: Parameters, table: Float[Tensor, "2 L C"], batch: Batch, tap: Tap = identity_tap
    ) -> Float[Tensor, "M B L V"]:
        """Logits from the whole sequence."""
        vectors = parameters["embed.W_E"]
        x = tap("hook_embed", looked_up(batch.tokens, vectors))
        x = x + tap("hook_pos_embed", parameters["pos_embed.W_pos"][:, : x.shape[2]])[:, None]
        seen = tap("ln1.hook_normalized", NORM.normalise(x, lambda scale: tap("ln1.hook_scale", scale)))
        v = tap("pool.hook_v", linear(seen, parameters["pool.W_V"]))
        scores = (seen * parameters["pool.q"][:, None, None]).sum(-1) / math.sqrt(self.width)  # M B K
        pattern = tap("pool.hook_pattern", tap("pool.hook_scores", scores).softmax(-1))
        z = tap("pool.hook_z", (pattern[..., None] * v).sum(2, keepdim=True))  # M B 1 D
        point = tap("hook_resid_post", z + self._mlp(parameters, z, tap))
        return tap("hook_logits", linear(point, vectors.mT).expand(-1, -1, x.shape[2], -1))

    def _mlp(self, parameters: Parameters, z: Float[Tensor, "M B 1 D"], tap: Tap) -> Float[Tensor, "M B 1 D"]:
        x = tap("ln2.hook_normalized", NORM.normalise(z, lambda scale: tap("ln2.hook_scale", scale)))
        pre = tap("mlp.hook_pre", linear(x, parameters["mlp.W_in"], parameters["mlp.b_in"]))
        post = tap("mlp.hook_post", ACTIVATIONS["gelu"](pre))
        return tap("hook_mlp_out", linear(post, parameters["mlp.W_out"], parameters["mlp.b_out"]))
