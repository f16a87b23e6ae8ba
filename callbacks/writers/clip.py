"""Clip: keep neurons from passing a mean."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import Callback

from opsin.callbacks.writers.base import _neuron_site, _neurons
from opsin.errors import ConfigError
from opsin.interventions.intervention import Intervention
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection, entries
from opsin.interventions.values.plain import Clipped
from opsin.model.sites import SiteTable


class Clip(Callback):
    """Keep neurons, where the sequence repeats, from passing the mean they have where it does not.

    Acts at queries, the rows whose answer stands in the context; the mean is over the batch and all other rows, per
    member and neuron. Entries beyond it are set to it, all others stay. Stolfo et al. 2024 ("Confidence regulation
    neurons in language models"), the case study of induction: whether a neuron's change on the repeated part matters.
    Gradient: stopped at the entries that are set, and at the mean.

    Args:
        neurons: ``"layer:neuron"``.
        side: the entries that are set: those ``above`` the mean, or ``below`` it.
        at: neurons ``pre`` (``mlp.hook_pre``) or ``post`` (``mlp.hook_post``) their nonlinearity; post when None.
        members: members it acts in; all when None.
        schedule: when, and how strongly.
        order: rank among writers that touch the same entries; the later wins.

    Raises:
        ConfigError: a side or a place that is none; when the run is built, a neuron that does not exist.
    """

    def __init__(
        self,
        neurons: list[str],
        side: Literal["above", "below"] = "above",
        at: Literal["pre", "post"] | None = None,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        if side not in ("above", "below"):
            raise ConfigError("Clip.side", side, "'above' or 'below'")
        self.neurons, self.value, self.members = neurons, Clipped(side), entries(members)
        self.neuron_site = _neuron_site("Clip.at", at)
        self.schedule, self.order = schedule, order

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it clips on a model with these sites."""
        pairs = _neurons("Clip.neurons", self.neurons, sites)
        return [
            Intervention(
                "Clip",
                f"blocks.{layer}.{self.neuron_site}",
                Selection(neurons=tuple(chosen), members=self.members),
                self.value,
                self.schedule,
                self.order,
            )
            for layer, chosen in pairs.items()
        ]
