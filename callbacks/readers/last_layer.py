"""What the readers of the last layer's neurons share.

Legend: M members, B batch, Q scored positions, D model width, N neurons.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from opsin.errors import ConfigError
from opsin.metrics.mean_ablation import Effect, mean_ablation_effects
from opsin.metrics.neuron_weights import ReadOut, random_outputs
from opsin.model.transformer import Transformer
from opsin.training.module import OpsinModule

CONTROL_SEED = 0
"""Of the random output weights that neurons are compared with."""


def require_neurons(own: str, model: Transformer) -> None:
    """A model has what decides on a neuron's effect through LayerNorm.

    Args:
        own: the callback that needs it.

    Raises:
        ConfigError: it has no MLPs or no LayerNorm.
    """
    if model.neurons is None:
        raise ConfigError(own, "a model without MLPs", "one with them: transformer.mlp_ratio a number")
    if not model.norm:
        raise ConfigError(own, "a model without LayerNorm", "one with it: transformer.norm true")


def neuron_sites(module: OpsinModule) -> tuple[str, str]:
    """Of the last layer, the residual stream after it and its neurons' activations."""
    layer = module.sites.layers - 1
    return f"blocks.{layer}.hook_resid_post", f"blocks.{layer}.mlp.hook_post"


def read_out_and_outputs(module: OpsinModule) -> tuple[ReadOut, Float[Tensor, "M N D"]]:
    """By the weights as they are, what turns the last residual stream into logits, and what each last neuron writes."""
    parameters = module.parameters_by_name()
    return ReadOut.of(parameters), parameters[f"blocks.{module.sites.layers - 1}.mlp.W_out"].detach()


def effects_and_control(
    module: OpsinModule, resid: Float[Tensor, "M B Q D"], post: Float[Tensor, "M B Q N"], **about: Any
) -> tuple[dict[str, Effect], dict[str, Effect]]:
    """Effects of the last layer's neurons, and of as many random output weights of the same norms.

    Args:
        module: its weights decide.
        resid, post: activations of ``neuron_sites``.
        about: more arguments of ``mean_ablation_effects``.
    """
    read_out, w_out = read_out_and_outputs(module)
    effects, control = (
        mean_ablation_effects(read_out, resid, post, outputs, **about)
        for outputs in (w_out, random_outputs(w_out, CONTROL_SEED))
    )
    return effects, control
