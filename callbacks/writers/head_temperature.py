"""HeadTemperature: make the attention of heads sharper or softer."""

from __future__ import annotations

from opsin.callbacks.writers.base import ActivationWriter, heads_by_layer
from opsin.errors import check_number
from opsin.interventions.intervention import Intervention, Source
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.passes import Tempered
from opsin.model.sites import SiteTable


class HeadTemperature(ActivationWriter):
    """Divide the scores of heads by a temperature, all scores of their layers being those of a pass without it.

    Reference option ``set_head_temperature``: the layer's scores come from a pass without interventions, which runs
    at every step. Gradient: flows into that pass unless ``detach``.

    Args:
        temperatures: ``"layer:head"`` and its temperature, more than 0; below 1 sharpens.
        detach: whether gradient stops at the scores of the other pass.
        members: members it acts in; all when None.
        schedule: strength at every step, in [0, 1]; 1 throughout by default.
        order: rank among writers that touch the same entries; the later wins.

    Raises:
        ConfigError: a temperature that is not above 0; when the run is built, a head that does not exist.
    """

    def __init__(
        self,
        temperatures: dict[str, float],
        detach: bool = False,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        super().__init__(members, schedule, order)
        for head, temperature in temperatures.items():
            check_number(f"HeadTemperature.temperatures[{head}]", temperature, "more than 0", 0, open_low=True)
        self.temperatures, self.detach = temperatures, detach

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it overwrites on a model with these sites."""
        layers = heads_by_layer("HeadTemperature.temperatures", list(self.temperatures), sites)
        return [self._layer_scores(layer, heads) for layer, heads in layers.items()]

    def _layer_scores(self, layer: int, heads: tuple[int, ...]) -> Intervention:
        site = f"blocks.{layer}.attn.hook_attn_scores"
        temperatures = tuple((head, float(self.temperatures[f"{layer}:{head}"])) for head in heads)
        return self.intervention_at(site, Tempered(Source(site, detach=self.detach), temperatures))
