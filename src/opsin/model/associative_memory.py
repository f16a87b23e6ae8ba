"""One associative matrix: logits = U W e_x, with frozen vectors of inputs and outputs.

Cabannes et al. 2023, "Scaling laws for associative memories": every token x has a vector e_x, every output a vector
u_y, and one matrix stores which belongs to which. Each position is read by itself.

Legend: M members, B batch, L positions, D width, I width before the matrix, T tokens, V outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError, check_number
from opsin.model.layers import Norm, fan_in_scale, linear, looked_up
from opsin.model.parameters import Initial, Parameter, Parameters, ParameterTable
from opsin.model.protocol import Model, Tap, TaskSizes, identity_tap
from opsin.model.sites import SiteTable, site_table
from opsin.task import Batch


@dataclass(frozen=True)
class AssociativeMemory(Model):
    """A matrix between vectors of tokens and vectors of outputs, all N(0, 1/D) at initialisation.

    Args:
        width: D, length of the vectors.
        learned_inputs: whether the vectors of the tokens are trained; they stay as they are drawn otherwise.
        learned_outputs: whether the vectors of the outputs are trained; they stay as they are drawn otherwise.
        relu: whether what the matrix writes passes a ReLU.
        norm: whether what the matrix writes is normalised first (LayerNorm without weight and bias).

    Raises:
        ConfigError: a width below 1.
    """

    width: int = 64
    learned_inputs: bool = False
    learned_outputs: bool = False
    relu: bool = False
    norm: bool = False

    def __post_init__(self) -> None:
        check_number("AssociativeMemory.width", self.width, "at least 1", 1)

    def parameters(self, task: TaskSizes) -> ParameterTable:
        """Vectors of tokens, the matrix (stored input x output), and vectors of outputs."""
        if task.n_features is not None:
            raise ConfigError("AssociativeMemory", f"a task with {task.n_features} features", "a task of tokens alone")
        width, initial = self.width, Initial("normal", fan_in_scale(self.width))
        outputs = task.n_outputs
        return ParameterTable(
            (
                Parameter("embed.W_E", (task.n_tokens, width), initial, "embed", "TD", trained=self.learned_inputs),
                Parameter("memory.W", (width, width), initial, "mlp", "ID"),
                Parameter("unembed.W_U", (width, outputs), initial, "unembed", "DV", trained=self.learned_outputs),
            )
        )

    def sites(self, task: TaskSizes) -> SiteTable:
        """What goes into the matrix, what it writes, and the logits."""
        rows = [("hook_embed", "MBLD", "vectors of the tokens"), ("memory.hook_out", "MBLD", "what the matrix writes")]
        if self.norm:
            rows.append(("ln_final.hook_scale", "MBL1", "standard deviation the LayerNorm divides by"))
            rows.append(("ln_final.hook_normalized", "MBLD", "what the LayerNorm makes"))
        if self.relu:
            rows.append(("memory.hook_post", "MBLD", "what the ReLU lets through"))
        rows.append(("hook_logits", "MBLV", "logits at every position"))
        sizes = {"L": task.layout.positions, "D": self.width, "V": task.n_outputs}
        norms = {"ln_final": Norm("LayerNorm", weight=False, bias=False)} if self.norm else {}
        return site_table(rows, sizes, self.parameters(task), norms)

    def forward(
        self, parameters: Parameters, table: Float[Tensor, "2 L C"], batch: Batch, tap: Tap = identity_tap
    ) -> Float[Tensor, "M B L V"]:
        """Logits at every position, from its token alone."""
        embedded = tap("hook_embed", looked_up(batch.tokens, parameters["embed.W_E"]))
        x = tap("memory.hook_out", linear(embedded, parameters["memory.W"]))
        if self.norm:
            x = tap("ln_final.hook_normalized", Norm().normalise(x, lambda scale: tap("ln_final.hook_scale", scale)))
        if self.relu:
            x = tap("memory.hook_post", x.relu())
        return tap("hook_logits", linear(x, parameters["unembed.W_U"]))
