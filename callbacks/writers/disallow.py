"""Disallow: attention that heads may not pay."""

from __future__ import annotations

from typing import Literal

from opsin.callbacks.writers.base import ActivationWriter, heads_by_layer
from opsin.errors import ConfigError
from opsin.interventions.intervention import Intervention
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.patterns import Disallowed
from opsin.model.sites import SiteTable


class Disallow(ActivationWriter):
    """Keep heads from attending to the previous token, or to anything but labels.

    Acts on the scores, ahead of the softmax: what the head would have paid goes to the other keys.
    Gradient: stopped at the scores that are overwritten.

    Args:
        heads: heads whose scores are overwritten, ``"layer:head"``.
        attention: ``previous_token`` (in every row but the first) or ``non_labels`` (in rows whose
            prediction is scored: every key that holds no label, the row's own included).
        labels_only: previous_token: whether it is disallowed only in rows that hold a label.
        members: members it acts in; all when None.
        schedule: strength at every step, in [0, 1]; 1 throughout by default.
        order: rank among writers that touch the same entries; the later wins.

    Raises:
        ConfigError: an unknown attention, or labels_only with non_labels; when the run is built, a head that does
            not exist.
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
        super().__init__(members, schedule, order)
        if attention not in ("previous_token", "non_labels"):
            raise ConfigError("Disallow.attention", attention, "'previous_token' or 'non_labels'")
        if labels_only and attention == "non_labels":
            raise ConfigError("Disallow.labels_only", True, "false: no label is scored")
        self.heads, self.value = heads, Disallowed(attention, labels_only)

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it overwrites on a model with these sites."""
        layers = heads_by_layer("Disallow.heads", self.heads, sites)
        return [
            self.intervention_at(f"blocks.{layer}.attn.hook_attn_scores", self.value, heads)
            for layer, heads in layers.items()
        ]
