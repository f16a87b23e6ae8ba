"""CopyFromPattern: a perfect copy of what one head attends to is the answer."""

from __future__ import annotations

from opsin.callbacks.writers.base import ActivationWriter, heads_by_layer
from opsin.callbacks.writers.perfect_previous_input import perfect_input_pass
from opsin.interventions.intervention import Intervention, Pass, Source
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.passes import CopyOutput
from opsin.model.sites import SiteTable


class CopyFromPattern(ActivationWriter):
    """Answer with one head's attention: its score for a label of the context is that label's logit.

    Reference option ``perfect_copy_from_head_pattern``. The scores come from a pass without
    interventions, so that other writers have no effect on the loss. That pass runs at every step.

    Gradient: flows into the other pass unless ``detach``.

    Args:
        head: the head whose scores are the answer, ``"layer:head"``.
        perfect_input: whether the scores come from the pass of ``PerfectPreviousInput`` instead.
        detach: whether gradient stops at the scores.
        members: members it acts in; all when None.
        schedule: strength at every step, in [0, 1]; 1 throughout by default.
        order: rank among writers that touch the same entries; the later wins.

    Raises:
        ConfigError: when the run is built, a head that does not exist.
    """

    def __init__(
        self,
        head: str,
        perfect_input: bool = False,
        detach: bool = False,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        super().__init__(members, schedule, order)
        self.head, self.perfect_input, self.detach = head, perfect_input, detach

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it overwrites on a model with these sites."""
        ((layer, (head,)),) = heads_by_layer("CopyFromPattern.head", [self.head], sites).items()
        scores_of = perfect_input_pass() if self.perfect_input else Pass()
        source = Source(f"blocks.{layer}.attn.hook_attn_scores", scores_of, self.detach)
        return [self.intervention_at("hook_logits", CopyOutput(source, head))]
