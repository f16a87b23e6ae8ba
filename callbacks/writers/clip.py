"""Clip: keep neurons from passing a mean."""

from __future__ import annotations

from typing import Literal

from opsin.callbacks.writers.base import ActivationWriter, neuron_site, neurons_by_layer
from opsin.errors import ConfigError
from opsin.interventions.intervention import Intervention
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.plain import Clipped
from opsin.model.sites import SiteTable


class Clip(ActivationWriter):
    """Keep neurons, where the sequence repeats, from passing the mean they have where it does not.

    Acts at queries, the rows whose answer stands in the context; the mean is over the batch and all other rows, per
    member and neuron. Entries beyond it are set to it, all others stay. Stolfo et al. 2024 ("Confidence regulation
    neurons in language models"), the case study of induction: whether a neuron's change on the repeated part matters.
    Gradient: stopped at the entries that are set, and at the mean.

    Args:
        neurons: neurons of the MLPs that are clipped, ``"layer:neuron"``.
        side: the entries that are set: those ``above`` the mean, or ``below`` it.
        at: neurons ``pre`` (``mlp.hook_pre``) or ``post`` (``mlp.hook_post``) their nonlinearity; post when None.
        members: members it acts in; all when None.
        schedule: strength at every step, in [0, 1]; 1 throughout by default.
        order: rank among writers that touch the same entries; the later wins.

    Raises:
        ConfigError: an unknown ``side`` or ``at``; when the run is built, a neuron that does not exist.
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
        super().__init__(members, schedule, order)
        if side not in ("above", "below"):
            raise ConfigError("Clip.side", side, "'above' or 'below'")
        self.neurons, self.value = neurons, Clipped(side)
        self.neuron_site = neuron_site("Clip.at", at)

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it clips on a model with these sites."""
        layers = neurons_by_layer("Clip.neurons", self.neurons, sites)
        return [
            self.intervention_at(f"blocks.{layer}.{self.neuron_site}", self.value, neurons=neurons)
            for layer, neurons in layers.items()
        ]
