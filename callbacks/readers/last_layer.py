"""Effects of the last layer's neurons on the output, by the weights as they are, and their random control.

Legend: M members, B batch, Q scored positions, D model width, N neurons.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from opsin.callbacks.readers.base import Requirement, needs_classes, needs_layer_norm, needs_neurons
from opsin.metrics.mean_ablation import Effect, mean_ablation_effects
from opsin.metrics.neuron_weights import ReadOut, random_outputs
from opsin.model.sites import SiteTable
from opsin.training.module import OpsinModule

CONTROL_SEED = 0
"""Seed of the random output weights that neurons are compared with."""


def needs_read_out(reader: str) -> list[Requirement]:
    """What decides on a neuron's effect on classes: MLPs, a LayerNorm before the read-out, and classes."""
    return [needs_neurons(reader), needs_layer_norm(reader), needs_classes(reader)]


def last_layer_sites(table: SiteTable) -> tuple[str, str]:
    """The residual stream after the last layer, and the activations of its neurons."""
    layer = table.layers - 1
    return f"blocks.{layer}.hook_resid_post", f"blocks.{layer}.mlp.hook_post"


def read_out_and_outputs(module: OpsinModule) -> tuple[ReadOut, Float[Tensor, "M N D"]]:
    """What turns the last residual stream into logits, and what each neuron of the last layer writes."""
    weights = module.sites.weights.view(module.parameters_by_name())
    return ReadOut.of(weights), weights[f"blocks.{module.sites.layers - 1}.mlp.W_out"].detach()


def effects_and_control(
    module: OpsinModule, resid: Float[Tensor, "M B Q D"], post: Float[Tensor, "M B Q N"], **about: Any
) -> tuple[dict[str, Effect], dict[str, Effect]]:
    """Effects of the last layer's neurons, and of as many random output weights of the same norms.

    Args:
        module: module whose current weights decide.
        resid, post: activations of ``last_layer_sites`` at the scored positions.
        about: further arguments of ``mean_ablation_effects``, by name.
    """
    read_out, w_out = read_out_and_outputs(module)
    effects, control = (
        mean_ablation_effects(read_out, resid, post, outputs, **about)
        for outputs in (w_out, random_outputs(w_out, CONTROL_SEED))
    )
    return effects, control
