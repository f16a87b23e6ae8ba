"""Context or weights: bursty items of many classes, whose labels can be copied from the context or known for ever.

Reddy 2023, "The mechanistic basis of data dependence and abrupt learning in an in-context classification task". It is
the few-shot task with fixed labels, in the terms of that paper.

Legend: S steps drawn together, M members, B batch, F features of an item.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from opsin.errors import ConfigError, check_number
from opsin.task import Batch, Draw
from opsin.tasks.fewshot import FewShot, Kind
from opsin.tasks.shared.exemplars import GaussianClusters
from opsin.tasks.shared.streams import below, stream_key, uniforms

_OFFSET_STREAM = 4
"""The stream after those of ``FewShot``."""


class ContextOrWeights(FewShot):
    """Reddy's task: (item, label) pairs, then an item whose label is predicted.

    Class k carries label k mod ``n_labels`` for ever. An item of class k is (mu_k + eps eta) / sqrt(1 + eps ** 2), with
    mu_k ~ N(0, I / F) fixed and eta ~ N(0, I / F) drawn for every item. There are three kinds of sequences:

    - bursty: context / burstiness different classes, each ``burstiness`` times, the query's class among them;
    - independent, a share of 1 - ``bursty_share``: classes of the context and of the query are drawn one by one;
    - new, a share of ``new_share`` of all: bursty, of classes drawn for the sequence with different labels.

    Evaluation sets: ``train``; ``ic``, new classes, whose labels only the context tells; ``ic2``, training classes that
    carry the next label (k + 1 mod ``n_labels``) in the context, which is the target; ``iw``, all classes different and
    of different labels, the query's class and label absent. The first two are learned in context, the last in weights.

    Args:
        classes: K, number of classes that training draws from, at least one for every label.
        n_labels: L, number of labels, more than pairs in the context.
        context: N, number of (item, label) pairs before the query.
        features: F, entries of an item; vectors of labels have as many.
        burstiness: how often a class of a bursty sequence occurs in its context; divides ``context``.
        bursty_share: share of the sequences of training classes that are bursty, in [0, 1].
        new_share: share of all sequences that have new classes, in [0, 1].
        zipf: class c (from 0) has probability proportional to 1 / (c + 1) ** zipf; 0 for uniform.
        eps: deviation of an item from its class, relative to the size of the class's vector, at least 0.
        offsets: number of positions of the model's position code that a sequence may begin at, one drawn for each.
        batch_size: B, sequences in a batch of one member.
        class_seed: seed of the vectors of all classes, at least 0.

    Raises:
        ConfigError: settings that do not fit each other.
    """

    added_settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        classes: int = 1024,
        n_labels: int = 32,
        context: int = 8,
        features: int = 63,
        burstiness: int = 2,
        bursty_share: float = 1.0,
        new_share: float = 0.0,
        zipf: float = 0.0,
        eps: float = 0.1,
        offsets: int = 1,
        batch_size: int = 128,
        class_seed: int = 0,
    ) -> None:
        counts = {"classes": classes, "n_labels": n_labels, "context": context, "features": features}
        for name, count in {**counts, "burstiness": burstiness, "offsets": offsets}.items():
            check_number(f"ContextOrWeights.{name}", count, "at least 1", 1)
        for name, share in {"bursty_share": bursty_share, "new_share": new_share}.items():
            check_number(f"ContextOrWeights.{name}", share, "a share from 0 to 1", 0, 1)
        check_number("ContextOrWeights.eps", eps, "at least 0", 0)
        _check_fit(classes, n_labels, context, burstiness)
        size = 1 / math.sqrt(features * (1 + eps**2))
        kinds = _kinds_by_name(burstiness)
        shares = (1 - new_share) * bursty_share, (1 - new_share) * (1 - bursty_share), new_share
        mixed = zip(shares, ("bursty", "one_by_one", "ic"), strict=True)
        super().__init__(
            GaussianClusters(classes, 1, features, within=0.0, common=0.0, seed=class_seed, scale=size),
            n_labels,
            batch_size,
            context,
            train_classes=classes,
            zipf=zipf,
            noise=eps * size,
            kinds=[replace(kinds[name], weight=share) for share, name in mixed if share > 0],
            labels="fixed",
            evaluation_kinds={name: [kinds[name]] for name in ("ic", "ic2", "iw")},
        )
        self.offsets = offsets

    def draw(
        self, seeds: Sequence[int], first: int, count: int, split: str = "train", batch_size: int | None = None
    ) -> Draw:
        """The choices of ``FewShot.draw`` and, where there are several, ``offset``: Int64 [S, M, B]."""
        found = super().draw(seeds, first, count, split, batch_size)
        if self.offsets == 1:
            return found
        size = self.batch_size if batch_size is None else batch_size
        keys = [stream_key(seed, split, size) for seed in seeds]
        u = uniforms(keys, _OFFSET_STREAM, first, count, size, {"offset": 1})["offset"]
        return found | {"offset": torch.from_numpy(below(u, self.offsets).reshape(count, len(keys), size))}

    def assemble(self, bank: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> Batch:
        return replace(super().assemble(bank, draw), offset=draw.get("offset"))


def _check_fit(classes: int, n_labels: int, context: int, burstiness: int) -> None:
    """Refuse numbers of classes, labels, pairs and copies that contradict each other."""
    if context % burstiness:
        raise ConfigError("ContextOrWeights.burstiness", burstiness, f"a divisor of context {context}")
    if n_labels <= context:
        raise ConfigError("ContextOrWeights.n_labels", n_labels, f"more than context {context}")
    if classes < n_labels:
        raise ConfigError("ContextOrWeights.classes", classes, f"at least n_labels {n_labels}")


def _kinds_by_name(burstiness: int) -> dict[str, Kind]:
    """Kinds of sequences of training and evaluation, by name."""
    bursty = Kind(matches=burstiness, distractor_copies=burstiness)
    return {
        "bursty": bursty,
        "one_by_one": Kind(independent=True),
        "ic": replace(bursty, new_classes=True),
        "ic2": replace(bursty, labels="shifted"),
        "iw": Kind(no_support=1.0),
    }
