"""How readers run the model themselves, beside what the probe shows them.

Legend: M members.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from opsin.interventions.apply import Scene, run_passes
from opsin.model.transformer import Tap
from opsin.task import Batch
from opsin.training.module import OpsinModule

Weights = dict[str, Tensor]


def constant_weights(module: OpsinModule) -> Weights:
    """The module's parameters ``[M, ...]`` as they are, for passes whose gradient stays out of them."""
    return {name: parameter.detach() for name, parameter in module.parameters_by_name().items()}


def tap_in_force(module: OpsinModule, batch: Batch) -> Tap:
    """A tap for one pass, under the interventions as they stood at the last step."""
    moment = module.control.moment(max(module.steps_done - 1, 0))
    scene = Scene(module.transformer, constant_weights(module), module.constants, batch, moment.gates, moment.clock)
    return run_passes(module.plan, scene)


def sequences_of(batch: Batch, which: slice) -> Batch:
    """Some of a batch's sequences."""
    features, plausible = (None if x is None else x[:, which] for x in (batch.features, batch.plausible))
    truth = batch.truth
    return replace(
        batch,
        features=features,
        tokens=batch.tokens[:, which],
        targets=batch.targets[:, which],
        plausible=plausible,
        truth=replace(truth, query=truth.query[:, which], match=truth.match[:, which], other=truth.other[:, which]),
    )
