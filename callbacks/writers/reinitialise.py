"""Reinitialise: set weights back to where they began, or to a fresh draw."""

from __future__ import annotations

from opsin.callbacks.writers.chosen_weights import ChosenWeightsWriter
from opsin.errors import ConfigError
from opsin.interventions.schedules import Schedule
from opsin.interventions.weights import Fresh


class Reinitialise(ChosenWeightsWriter):
    """Set weights back to where they began, or to a fresh draw of the initialiser.

    At every step at which the schedule is on (a strength above 0), before the batch is seen, the weights are set and
    Adam's running moments of them become zero; its bias correction of them counts updates from there, so that they
    learn as at the beginning of a run. Trackers and checkpoints that stand at the number of that step see the
    weights before. Where a ``Freeze`` holds the same weights, they are set all the same and then stand still there.

    Args:
        schedule: steps at which the weights are set; for a single step ``{start: 5000, stop: 5001}``. Weights are set
            whole, so it has no ramps.
        heads: heads whose weights are set, ``"layer:head"``.
        neurons: neurons of the MLPs whose weights are set, ``"layer:neuron"``.
        parts: which weights of those heads (``W_Q``, ``W_K``, ``W_V``, ``W_O``) and neurons (``W_in``, ``b_in``,
            ``W_out``); all when None.
        weights: whole weights as TransformerLens names them (``blocks.0.attn.W_Q``, ``embed.W_E``, ``ln_final.w``), or
            all below a name such as ``blocks.0``.
        seed: what a fresh draw is made from, so that it is what a run of that seed begins with: one number for all
            members, or a list of one per member. By default each member's own seed, which rewinds it to its own
            first values.
        members: members it acts in; all when None.
        order: rank among draws that set the same entries; the later wins.

    Raises:
        ConfigError: nothing chosen, something that the model does not have, no schedule or one with a ramp, or not
            one seed per member.
    """

    def __init__(
        self,
        schedule: Schedule,
        heads: list[str] | None = None,
        neurons: list[str] | None = None,
        parts: list[str] | None = None,
        weights: list[str] | None = None,
        seed: int | list[int] | None = None,
        members: list[int] | None = None,
        order: int | None = None,
    ) -> None:
        seeds = [seed] if isinstance(seed, int) else seed
        if seeds is not None and (not seeds or min(seeds) < 0 or max(seeds) >= 2**64):
            raise ConfigError("Reinitialise.seed", seed, "one seed of 0 or more, below 2**64, or one per member")
        if schedule == Schedule():
            expected = "when the weights are set, such as {start: 5000, stop: 5001}"
            raise ConfigError("Reinitialise.schedule", str(schedule), expected)
        for ramp in ("ramp", "ramp_down"):
            if getattr(schedule, ramp):
                expected = "0: weights are set whole"
                raise ConfigError(f"Reinitialise.schedule.{ramp}", getattr(schedule, ramp), expected)
        kind = Fresh(tuple(seed) if isinstance(seed, list) else seed)
        chosen = {"heads": heads, "neurons": neurons, "weights": weights}
        super().__init__(kind, chosen, parts, members, schedule, order)
