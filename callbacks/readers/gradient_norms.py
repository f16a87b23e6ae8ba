"""GradientNorms: how large the gradient of the loss is in each part of a model, over training.

Legend: M members.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.callbacks.readers.base import ProbeReader
from opsin.metrics.weight_norms import norms_by_kind
from opsin.model.sites import SiteTable
from opsin.records.axes import Axes
from opsin.training.objective import scored_logits
from opsin.training.observers import Observation


class GradientNorms(ProbeReader):
    """Records the 2-norm of the gradient of the probe's loss with respect to all weights of each kind, ``[M]`` each.

    The names are ``gradient_norm/embed``, ``gradient_norm/position``, ``gradient_norm/attention``,
    ``gradient_norm/mlp``, .., as the model declares its trained parameters; biases count with the part that they belong
    to. Under the interventions in force, and read-only.

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
    """

    def __init__(self, every: int = 100) -> None:
        super().__init__(every)

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        return {f"gradient_norm/{kind}": {} for kind in dict.fromkeys(_trained_kinds(sites).values())}

    def measure(self, seen: Observation) -> None:
        kinds = _trained_kinds(self._module.sites)
        norms = norms_by_kind(self._gradients(seen), kinds)
        self._module.record(seen.step, {f"gradient_norm/{kind}": norms[kind] for kind in kinds.values()})

    def _gradients(self, seen: Observation) -> dict[str, Float[Tensor, "M ..."]]:
        """Gradient of each member's loss on the probe, by parameter; 0 where the loss does not depend on one."""
        module, batch = self._module, seen.batch
        weights = {name: value.detach().clone() for name, value in module.parameters_by_name().items()}
        trained = [weights[name].requires_grad_() for name in _trained_kinds(module.sites)]
        with torch.enable_grad():
            tap = module.forward_passes.tap(batch)
            outputs = module.network.forward(weights, module.constants.table, batch, tap)
            losses = module.task.objective.member_loss(scored_logits(outputs, batch), batch)
            found = torch.autograd.grad(losses.sum(), trained, allow_unused=True, materialize_grads=True)
        return dict(zip(_trained_kinds(module.sites), found, strict=True))


def _trained_kinds(sites: SiteTable) -> dict[str, str]:
    """The kind of each parameter that learns, by its name."""
    return {parameter.name: parameter.kind for parameter in sites.weights if parameter.trained}
