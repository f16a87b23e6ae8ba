"""What writers share."""

from __future__ import annotations

from lightning.pytorch import Callback

from opsin.errors import ConfigError
from opsin.interventions.intervention import Intervention, Value
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection, entries, parse_pairs
from opsin.model.sites import SiteTable


def _neuron_site(field: str, at: str | None) -> str:
    if at not in (None, "pre", "post"):
        raise ConfigError(field, at, "'pre' or 'post'")
    return f"mlp.hook_{at or 'post'}"


def _neurons(field: str, items: list[str], sites: SiteTable) -> dict[int, list[int]]:
    if not sites.size("N"):
        raise ConfigError(field, items, "nothing: this model has no MLP")
    return parse_pairs(field, items, sites.layers, sites.size("N"), "neuron")


class FromAnotherPass(Callback):
    """What these writers have in common.

    Args:
        detach: stop the gradient at what is taken; by default it flows into the other pass, as in the
            reference system.
        members: members it acts in; all when None.
        schedule: when, and how strongly. The other pass runs at every step.
        order: rank among writers that touch the same entries; the later wins.
    """

    def __init__(self, detach: bool, members: list[int] | None, schedule: Schedule, order: int | None) -> None:
        self.detach, self.schedule, self.order = detach, schedule, order
        self.members = entries(members)

    def _at(self, site: str, value: Value) -> Intervention:
        selection = Selection(members=self.members)
        return Intervention(type(self).__name__, site, selection, value, self.schedule, self.order)


def check_layer(name: str, layer: int, sites: SiteTable) -> None:
    """A layer must exist.

    Raises:
        ConfigError: it does not.
    """
    if not 0 <= layer < sites.layers:
        raise ConfigError(name, layer, f"a layer from 0 to {sites.layers - 1}")
