"""PerfectPreviousInput: layer 1 attends as behind a layer 0 of perfect previous-token heads."""

from __future__ import annotations

from opsin.callbacks.writers.base import ActivationWriter, check_layer
from opsin.interventions.intervention import Intervention, Pass, Source
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection
from opsin.interventions.values.passes import FromPass, PreviousInput
from opsin.model.sites import SiteTable


class PerfectPreviousInput(ActivationWriter):
    """Layer 1 attends as if every label carried its exemplar, while its values stay those of the bare embedding.

    Reference manipulation ``perfect_prev_token_input``, which replaces layer 0: block 0 passes the
    embedding on, and block 1's patterns come from a pass in which block 0's output is the embedding moved on by one
    position. Parameters of block 0 get exactly zero gradient. The other pass runs at every step.

    Gradient: flows into the embedding, and into the other pass unless ``detach``.

    Args:
        detach: whether gradient stops at the patterns of the other pass.
        members: members it acts in; all when None.
        schedule: strength at every step, in [0, 1]; 1 throughout by default.
        order: rank among writers that touch the same entries; the later wins.

    Raises:
        ConfigError: when the run is built, a model of one layer.
    """

    def __init__(
        self,
        detach: bool = False,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        super().__init__(members, schedule, order)
        self.detach = detach

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it overwrites on a model with these sites."""
        check_layer("PerfectPreviousInput", 1, sites)
        pattern = "blocks.1.attn.hook_pattern"
        return [
            self.intervention_at("blocks.0.hook_resid_post", FromPass(Source("blocks.0.hook_resid_pre"))),
            self.intervention_at(pattern, FromPass(Source(pattern, perfect_input_pass(), self.detach))),
        ]


def perfect_input_pass() -> Pass:
    """The pass in which block 0 hands on the embedding moved on by one position."""
    value = PreviousInput(Source("blocks.0.hook_resid_pre"))
    return Pass((Intervention("PerfectPreviousInput", "blocks.0.hook_resid_post", Selection(), value),))
