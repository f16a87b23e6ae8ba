"""PathPatch: change what one part of the model sends into another, and nowhere else."""

from __future__ import annotations

from collections import defaultdict
from typing import Literal, get_args

from opsin.callbacks.writers.base import ActivationWriter
from opsin.errors import ConfigError
from opsin.interventions.intervention import Intervention
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.paths import Receiver, Replacement, Sender, path_patched, read_receiver, read_sender
from opsin.model.sites import SiteTable

REPLACEMENTS = get_args(Replacement)


class PathPatch(ActivationWriter):
    """Change what senders contribute to the input of receivers, while everything else sees them as they are.

    Path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023) while the model learns. Each receiver is patched
    by itself: what it then does reaches the rest of the model. The changes of several senders add up. The
    LayerNorm ahead of a receiver takes its statistics from the patched input.

    Gradient: flows into all the receiver still sees; none reaches a sender along a path that ``zero``, ``mean``
    or ``resample`` cuts. ``plain`` lets it into the pass without interventions.

    Args:
        senders: heads ``"0:2"``, MLPs ``"0:mlp"``, the embedding ``"embed"``, and ``"pos_embed"`` where position
            vectors are added. A head's contribution is what it read (``hook_z``) times its rows of ``W_O``.
        receivers: a head's query, key or value ``"1:3.q"``, ``"1:3.k"``, ``"1:3.v"``, an MLP ``"1:mlp"``, or the
            read-out ``"logits"``. Each sender must come before each receiver.
        value: what replaces a contribution: ``zero``, its ``mean`` over the batch, ``resample`` (of
            another example of the batch, the same one for all senders), or ``plain`` (what it is in a pass
            without interventions; it differs only beside other writers).
        detach: whether gradient stops at what ``plain`` puts there.
        positions: positions of the receiver (queries, keys, rows) it acts at; all when None.
        members: members it acts in; all when None.
        schedule: strength at every step, in [0, 1]; 1 throughout by default.
        order: rank among writers that touch the same entries; the later wins, and sees nothing of the earlier.

    Raises:
        ConfigError: no sender, no receiver, an unknown value, or detach without ``plain``; when the run is built, a
            part that the model does not have, or a sender that does not come before a receiver.
    """

    def __init__(
        self,
        senders: list[str],
        receivers: list[str],
        value: Literal["zero", "mean", "resample", "plain"] = "zero",
        detach: bool = False,
        positions: list[int] | None = None,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        super().__init__(members, schedule, order, positions)
        if value not in REPLACEMENTS:
            raise ConfigError("PathPatch.value", value, f"one of {', '.join(REPLACEMENTS)}")
        if detach and value != "plain":
            raise ConfigError("PathPatch.detach", True, f"false: no gradient flows through {value}")
        for setting, names in (("senders", senders), ("receivers", receivers)):
            if not names:
                raise ConfigError(f"PathPatch.{setting}", names, "at least one")
        self.senders, self.receivers, self.value, self.detach = senders, receivers, value, detach

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it overwrites on a model with these sites."""
        senders = [read_sender(name, "PathPatch.senders", sites) for name in self.senders]
        if self.value in ("mean", "resample") and any(sender.name == "pos_embed" for sender in senders):
            raise ConfigError("PathPatch.value", self.value, "zero: pos_embed is the same for the whole batch")
        # receivers that differ in their head alone are one value
        alike: dict[tuple[int, str | None], list[Receiver]] = defaultdict(list)
        for name in self.receivers:
            receiver = read_receiver(name, "PathPatch.receivers", sites)
            _check_order(senders, receiver)
            alike[receiver.depth, receiver.part].append(receiver)
        return [self._patch(senders, receivers, sites) for receivers in alike.values()]

    def _patch(self, senders: list[Sender], receivers: list[Receiver], sites: SiteTable) -> Intervention:
        value = path_patched(senders, receivers, self.value, self.detach, sites)
        return self.intervention_at(value.receiver_input.site, value, value.receiver_input.heads or None)


def _check_order(senders: list[Sender], receiver: Receiver) -> None:
    for sender in senders:
        if sender.depth >= receiver.depth:
            raise ConfigError("PathPatch.senders", sender.name, f"a sender that comes before receiver {receiver.name}")
