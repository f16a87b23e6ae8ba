"""Graft: join a run to a donor, a trained model that stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Literal

from lightning.pytorch import Callback

from opsin.callbacks.writers.base import ActivationWriter, check_layer
from opsin.errors import ConfigError
from opsin.interventions.build_plan import Writer
from opsin.interventions.donors import Donor, read_donor
from opsin.interventions.intervention import Intervention, Pass, Relative, Source, Value
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection
from opsin.interventions.values.passes import FromPass
from opsin.model.sites import SiteTable

# after whatever else overwrites the cut inside the donor
AFTER_ALL_OTHERS = 2**31


class Graft(ActivationWriter):
    """Replace the lower or the upper blocks by those of a trained model.

    ``part: lower`` overwrites the output of block ``layer`` by the donor's on the same input, so that only what
    lies above learns; gradient stops there. ``part: upper`` hands the output of block ``layer`` to the
    donor's later blocks and answers with the donor's logits; gradient flows through the donor, which stays
    constant, into the blocks up to ``layer``. Reference options ``graft_in_model_till_layer`` and
    ``graft_out_model_from_layer`` (Singh et al. 2024).

    Args:
        donor: a run folder, a checkpoint or a snapshot of a run on the same task.
        layer: number of the last block below the cut.
        part: which blocks the donor provides, the ``lower`` or the ``upper`` ones.
        member: which member of the donor's population is used.
        donor_callbacks: writers that act inside the donor, with its sites and its weights; passes that they take
            values from are the donor's too.
        members: members it acts in; all when None.
        schedule: strength at every step, in [0, 1]; 1 throughout by default.
        order: rank among writers that touch the same entries; the later wins.

    Raises:
        ConfigError: no such file or member, no such layer, a donor whose width does not fit, or one that was
            trained on another task.
    """

    path_settings = ("donor",)

    def __init__(
        self,
        donor: str | Donor,
        layer: int,
        part: Literal["lower", "upper"] = "lower",
        member: int = 0,
        donor_callbacks: Sequence[Callback] = (),
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        super().__init__(members, schedule, order)
        if part not in ("lower", "upper"):
            raise ConfigError("Graft.part", part, "'lower' or 'upper'")
        self.donor = donor if isinstance(donor, Donor) else read_donor("Graft", donor, member)
        self.layer, self.part, self.donor_callbacks = layer, part, donor_callbacks

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it overwrites on a model with these sites."""
        donor, donor_sites = self.donor, self.donor.sites(sites.size("L"))
        check_layer("Graft.layer", self.layer, sites)
        check_layer("Graft.layer", self.layer, donor_sites)
        width = donor_sites.size("D")
        if width != sites.size("D"):
            raise ConfigError("Graft.donor", f"{donor.name} of width {width}", f"width {sites.size('D')}")
        inside = self._inside_donor(donor_sites)
        cut = f"blocks.{self.layer}.hook_resid_post"
        if self.part == "lower":
            return [self.intervention_at(cut, FromPass(Source(cut, Pass(inside, donor))))]
        handed_over = FromPass(Source(cut, Relative.ASKING_PASS))
        joined = Intervention("Graft", cut, Selection(), handed_over, order=AFTER_ALL_OTHERS)
        return [self.intervention_at("hook_logits", FromPass(Source("hook_logits", Pass((*inside, joined), donor))))]

    def _inside_donor(self, donor_sites: SiteTable) -> tuple[Intervention, ...]:
        found: list[Intervention] = []
        for callback in self.donor_callbacks:
            if not isinstance(callback, Writer):
                expected = "callbacks that overwrite activations"
                raise ConfigError("Graft.donor_callbacks", type(callback).__name__, expected)
            found += callback.interventions(donor_sites)
        return _of_donor(tuple(found), self.donor)


def _of_donor(noun: Any, donor: Donor) -> Any:
    """A noun of a plan with the donor wherever it speaks of the weights that are trained."""
    if isinstance(noun, tuple):
        return tuple(_of_donor(entry, donor) for entry in noun)
    if not isinstance(noun, (Intervention, Value, Source, Pass)):
        return noun
    inside = {f.name: _of_donor(getattr(noun, f.name), donor) for f in fields(noun)}  # type: ignore[arg-type]
    if isinstance(noun, Pass) and noun.donor is None:
        inside["donor"] = donor
    return replace(noun, **inside)  # type: ignore[type-var]
