"""What writers share: where, when and in which order they act, and settings that name heads, neurons and layers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning.pytorch import Callback

from opsin.errors import ConfigError
from opsin.interventions.intervention import Intervention, Value
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection, entries, parse_pairs
from opsin.model.sites import Site, SiteTable


class ScheduledWriter(Callback, ABC):
    """A callback that changes some members of a run at some steps.

    Args:
        members: members it acts in; all when None.
        schedule: strength at every step, in [0, 1].
        order: rank among writers that touch the same entries; the later wins.
    """

    # abstract, so that no recipe can name the class
    @abstractmethod
    def __init__(self, members: list[int] | None, schedule: Schedule, order: int | None) -> None:
        self.members, self.schedule, self.order = entries(members), schedule, order


class ActivationWriter(ScheduledWriter):
    """A writer that overwrites activations: a subclass says which, in ``interventions``.

    Args:
        members: members it acts in; all when None.
        schedule: strength at every step, in [0, 1].
        order: rank among writers that touch the same entries; the later wins.
        positions: positions it acts at; all when None.
    """

    def __init__(
        self,
        members: list[int] | None,
        schedule: Schedule,
        order: int | None,
        positions: list[int] | None = None,
    ) -> None:
        super().__init__(members, schedule, order)
        self.positions = entries(positions)

    @abstractmethod
    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it overwrites on a model with these sites.

        Raises:
            ConfigError: a head, neuron, layer or site that the model does not have; names the setting.
        """

    def selection(self, heads: tuple[int, ...] | None = None, neurons: tuple[int, ...] | None = None) -> Selection:
        """These heads or neurons of a site, in the writer's members and at its positions."""
        return Selection(heads, neurons, self.positions, self.members)

    def intervention_at(
        self, site: str, value: Value, heads: tuple[int, ...] | None = None, neurons: tuple[int, ...] | None = None
    ) -> Intervention:
        """One overwriting, on the writer's schedule and in its order.

        Args:
            site: name of the site that is overwritten.
            value: what its selected entries are overwritten by.
            heads: heads of the site that are overwritten; all when None.
            neurons: neurons of the site that are overwritten; all when None.
        """
        selection = self.selection(heads, neurons)
        return Intervention(type(self).__name__, site, selection, value, self.schedule, self.order)


# ---- settings that name parts of a model ----------------------------------------------------------


def heads_by_layer(field_name: str, heads: list[str], sites: SiteTable) -> dict[int, tuple[int, ...]]:
    """``["1:3", "1:7"]`` as ``{1: (3, 7)}``.

    Args:
        field_name: the setting that names the heads, for messages.
        heads: heads as a user writes them, ``"layer:head"``.
        sites: activations of the model that has the heads.

    Raises:
        ConfigError: a model without heads, not of that form, or no such head.
    """
    if not sites.size("H"):
        raise ConfigError(field_name, heads, "nothing: this model has no heads")
    found = parse_pairs(field_name, heads, sites.layers, sites.size("H"), "head")
    return {layer: tuple(indices) for layer, indices in found.items()}


def heads_of_site(field_name: str, heads: list[str], site: Site, sites: SiteTable) -> tuple[int, ...]:
    """Heads that a user names at one site.

    Args:
        field_name: the setting that names the heads, for messages.
        heads: heads as a user writes them, ``"layer:head"``.
        site: the site that is narrowed down to them.
        sites: activations of the model that has the heads.

    Raises:
        ConfigError: no such head, or one of another layer than the site.
    """
    found = heads_by_layer(field_name, heads, sites)
    if list(found) != [site.layer]:
        raise ConfigError(field_name, heads, f"heads of the layer of {site.name}")
    (indices,) = found.values()
    return indices


def neurons_by_layer(field_name: str, neurons: list[str], sites: SiteTable) -> dict[int, tuple[int, ...]]:
    """``["1:30", "1:7"]`` as ``{1: (30, 7)}``.

    Args:
        field_name: the setting that names the neurons, for messages.
        neurons: neurons of the MLPs as a user writes them, ``"layer:neuron"``.
        sites: activations of the model that has the neurons.

    Raises:
        ConfigError: a model without MLPs, not of that form, or no such neuron.
    """
    if not sites.size("N"):
        raise ConfigError(field_name, neurons, "nothing: this model has no MLP")
    found = parse_pairs(field_name, neurons, sites.layers, sites.size("N"), "neuron")
    return {layer: tuple(indices) for layer, indices in found.items()}


def neuron_site(field_name: str, at: str | None) -> str:
    """Name, within its block, of the site of neurons before (``pre``) or after (``post``, None) their nonlinearity.

    Raises:
        ConfigError: something else than these.
    """
    if at not in (None, "pre", "post"):
        raise ConfigError(field_name, at, "'pre' or 'post'")
    return f"mlp.hook_{at or 'post'}"


def check_layer(field_name: str, layer: int, sites: SiteTable) -> None:
    """A layer must exist.

    Raises:
        ConfigError: it does not.
    """
    if not 0 <= layer < sites.layers:
        raise ConfigError(field_name, layer, f"a layer from 0 to {sites.layers - 1}")
