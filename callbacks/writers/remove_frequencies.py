"""RemoveFrequencies: project frequencies out of the embedding of numbers."""

from __future__ import annotations

from opsin.callbacks.writers.base import ActivationWriter
from opsin.errors import ConfigError
from opsin.interventions.intervention import Intervention
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.frequencies import WithoutFrequencies
from opsin.model.sites import SiteTable


class RemoveFrequencies(ActivationWriter):
    """Take frequencies out of the token embedding of the numbers 0 .. p - 1, where p is the number of outputs.

    What a model that learns an operation modulo p can compute with is then made of other frequencies (Nanda et al.
    2023, "Progress measures for grokking via mechanistic interpretability", ablate them after training). Gradient:
    flows through what is left and has no part along these frequencies. Adam, which scales every entry on its own, moves
    the weight along them all the same; the model does not see it.

    `- {class_path: opsin.callbacks.RemoveFrequencies, init_args: {frequencies: [1], schedule: {stop: 2000}}}`

    Args:
        frequencies: frequencies k that are taken out, turns of cos(2 pi k x / p) over the numbers x, 1 to below p / 2.
        members: members it acts in; all when None.
        schedule: strength at every step, in [0, 1]; 1 throughout by default.
        order: rank among writers that touch the same entries; the later wins.

    Raises:
        ConfigError: no frequency or, when the run is built, one that p numbers do not have, or a model without an
            embedding of them.
    """

    def __init__(
        self,
        frequencies: list[int],
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        super().__init__(members, schedule, order)
        if not frequencies or len({*frequencies}) < len(frequencies):
            raise ConfigError("RemoveFrequencies.frequencies", frequencies, "different frequencies, at least one")
        self.frequencies = tuple(frequencies)

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """The embedding without the frequencies, on a model with these sites."""
        modulus, numbers = sites.size("V"), sites.weights.one("embed.W_E", "RemoveFrequencies").shape[0]
        highest = (modulus - 1) // 2
        wrong = [frequency for frequency in self.frequencies if not 1 <= frequency <= highest]
        if wrong:
            expected = f"1 .. {highest}: the task has {modulus} outputs"
            raise ConfigError("RemoveFrequencies.frequencies", wrong[0], expected)
        if numbers < modulus:
            expected = f"one for each of the {modulus} outputs, or more"
            raise ConfigError("RemoveFrequencies", f"{numbers} tokens", expected)
        return [self.intervention_at("hook_embed", WithoutFrequencies(self.frequencies, modulus))]
