"""fixed sequences, and the model run on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from opsin.model.transformer import Tap, Transformer, forward
from opsin.task import Batch

PROBE_SEED = 0


class _Seen(Exception):
    """Everything that was asked for has been seen."""


def observe(
    model: Transformer,
    parameters: Mapping[str, Tensor],
    table: Tensor,
    batch: Batch,
    tap: Tap,
    sites: Collection[str],
) -> dict[str, Tensor]:
    """The activations of ``sites`` as they go on after the tap, without gradient.

    The forward pass ends where the last of them has been computed.
    """
    kept: dict[str, Tensor] = {}

    def keeping(name: str, activation: Tensor) -> Tensor:
        activation = tap(name, activation)
        if name in sites:
            kept[name] = activation
            if len(kept) == len(sites):
                raise _Seen
        return activation

    with torch.no_grad(), suppress(_Seen):
        forward(parameters, table, batch, model, keeping)
    return kept
