"""BinaryFeatures: several independent features of one input of bits, some of them easy and others hard.

Lampinen, Chan and Hermann 2024, "Learned feature representations are biased by complexity, learning order, position,
and more": every feature is computed from bits of its own, and a model says all of them at once. A feature of one bit is
linear; of two bits it is their XOR, of four the XOR of XORs, and of n their parity.

Legend: S steps drawn together, M members, B batch, L bits, V features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opsin.errors import ConfigError
from opsin.objective import BinaryCrossEntropy, Measure
from opsin.task import Bank, Batch, Draw, Feature, Layout, Task, Truth
from opsin.tasks.shared.streams import below, check_draw, stream_key, uniforms

UNUSED = "unused"
"""Name of the declared feature that is the first bit that decides nothing."""


@dataclass(frozen=True)
class FeatureCrossEntropy(BinaryCrossEntropy):
    """Binary cross-entropy (nats) of features, with the accuracy of each beside that of all: ``accuracy_NAME``.

    Args:
        names: name of the feature that each output says.
    """

    names: tuple[str, ...] = ()

    @property
    def measures(self) -> tuple[Measure, ...]:  # type: ignore[override]
        """Accuracy of all features, of each of them, and the share of sequences of which all are right."""
        by_name = [
            Measure(f"accuracy_{name}", "up", partial(_output_right, index), while_training=True)
            for index, name in enumerate(self.names)
        ]
        return (*BinaryCrossEntropy.measures, *by_name)


def _output_right(index: int, outputs: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
    """1 where one output is on the target's side of probability 1/2."""
    return ((outputs[..., index] > 0) == (batch.targets[..., index] > 0)).to(outputs.dtype)


class BinaryFeatures(Task):
    """Uniform bits; each feature is the parity of the bits that belong to it, and all of them are said at once.

    Bits are tokens 0 and 1; those of the first feature come first, those that decide nothing last. Features: each by
    its name, and ``unused``, the first bit that decides nothing, where there is one. Baselines (nats): guessing all,
    and guessing all but those of one bit.

    Args:
        parities: number of bits of each feature by its name; ``{easy: 1, hard: 4}`` where it is None.
        unused: number of bits that decide nothing.
        batch_size: B, sequences of one training step.

    Raises:
        ConfigError: no feature, one without a bit, or a number out of its range.
    """

    n_features, n_tokens, evaluations = None, 2, ("train",)

    def __init__(self, parities: dict[str, int] | None = None, unused: int = 3, batch_size: int = 256) -> None:
        self.parities = {"easy": 1, "hard": 4} if parities is None else dict(parities)
        if not self.parities:
            raise ConfigError("BinaryFeatures.parities", parities, "at least one name with a number of bits")
        for name, bits in self.parities.items():
            if not name.isidentifier() or name in ("target", UNUSED):
                expected = f"names of letters, digits and underscores other than target and {UNUSED}"
                raise ConfigError("BinaryFeatures.parities", name, expected)
            if bits < 1:
                raise ConfigError(f"BinaryFeatures.parities.{name}", bits, "at least 1 bit")
        for setting, value, least in (("unused", unused, 0), ("batch_size", batch_size, 1)):
            if value < least:
                raise ConfigError(f"BinaryFeatures.{setting}", value, f"at least {least}")
        self.unused, self.batch_size, self.n_outputs = unused, batch_size, len(self.parities)
        everywhere = tuple(range(sum(self.parities.values()) + unused))
        self.layout = Layout(features=(), tokens=everywhere, labels=(), scored=everywhere[-1:])
        self.objective = FeatureCrossEntropy(names=tuple(self.parities))

    def bank(self) -> Bank:
        return {}

    def draw(
        self, seeds: Sequence[int], first: int, count: int, split: str = "train", batch_size: int | None = None
    ) -> Draw:
        """``bits``: Int64 [S, M, B, L], each 0 or 1 with the same probability."""
        size, bits = self.batch_size if batch_size is None else batch_size, self.layout.positions
        splits = ("train", *(f"eval/{name}" for name in self.evaluations))
        check_draw("BinaryFeatures", splits, split, seeds, (first, count, size))
        keys = [stream_key(seed, split, size) for seed in seeds]
        u = uniforms(keys, 0, first, count, size, {"bits": bits})["bits"]
        drawn = below(u, 2).reshape(bits, count, len(seeds), size)
        return {"bits": torch.from_numpy(drawn.transpose(1, 2, 3, 0).copy())}

    def assemble(self, bank: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> Batch:
        bits = draw["bits"]
        parities = [part.sum(-1) % 2 for part in bits.split([*self.parities.values(), self.unused], -1)]
        targets = torch.stack(parities[: self.n_outputs], -1)[:, :, None]  # M B 1 V
        truth = Truth.without_queries(self.layout, bits.shape[0], bits.shape[1], bits.device)
        return Batch(None, bits, targets=targets, plausible=None, truth=truth, layout=self.layout)

    def declared_features(self) -> Mapping[str, Feature]:
        found: dict[str, Feature] = {name: partial(_feature_value, index) for index, name in enumerate(self.parities)}
        return {**found, UNUSED: partial(_bit_at, sum(self.parities.values()))} if self.unused else found

    def baselines(self) -> dict[str, float]:
        hard = sum(bits > 1 for bits in self.parities.values())
        guessing = {"guessing": self.n_outputs * math.log(2)}
        return guessing | {"linear_features": hard * math.log(2)} if 0 < hard < self.n_outputs else guessing


def _feature_value(index: int, batch: Batch) -> Int64[Tensor, "M B"]:
    """The right answer of one output."""
    return batch.targets[:, :, 0, index]


def _bit_at(position: int, batch: Batch) -> Int64[Tensor, "M B"]:
    """The bit at one position."""
    return batch.tokens[..., position]
