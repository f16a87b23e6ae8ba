"""Disallow: attention that heads may not pay."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import Callback

from opsin.errors import ConfigError
from opsin.interventions.intervention import Intervention
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection, entries, parse_pairs
from opsin.interventions.values.patterns import Disallowed
from opsin.model.sites import SiteTable


class Disallow(Callback):
    """Keep heads from attending to the previous token, or to anything but labels.

    Acts on the scores, ahead of the softmax: what the head would have paid goes to the other keys.
    Gradient: stopped at the scores that are overwritten.

    Args:
        heads: ``"layer:head"``.
        attention: ``previous_token`` (in every row but the first) or ``non_labels`` (in rows whose
            prediction is scored: every key that holds no label, the row's own included).
        labels_only: previous_token: only in rows that hold a label.
        members: members it acts in; all when None.
        schedule: when, and how strongly.
        order: rank among writers that touch the same entries; the later wins.
    """

    def __init__(
        self,
        heads: list[str],
        attention: Literal["previous_token", "non_labels"],
        labels_only: bool = False,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        if attention not in ("previous_token", "non_labels"):
            raise ConfigError("Disallow.attention", attention, "'previous_token' or 'non_labels'")
        if labels_only and attention == "non_labels":
            raise ConfigError("Disallow.labels_only", True, "false: no label is scored")
        self.heads, self.members = heads, entries(members)
        self.value = Disallowed(attention, labels_only)
        self.schedule, self.order = schedule, order

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it overwrites on a model with these sites."""
        pairs = parse_pairs("Disallow.heads", self.heads, sites.layers, sites.size("H"), "head")
        return [
            Intervention(
                "Disallow",
                f"blocks.{layer}.attn.hook_attn_scores",
                Selection(heads=tuple(heads), members=self.members),
                self.value,
                self.schedule,
                self.order,
            )
            for layer, heads in pairs.items()
        ]
