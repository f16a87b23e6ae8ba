"""Freeze: let weights stand still while the others learn."""

from __future__ import annotations

from opsin.callbacks.writers.chosen_weights import ChosenWeightsWriter
from opsin.interventions.schedules import Schedule
from opsin.interventions.weights import Frozen


class Freeze(ChosenWeightsWriter):
    """Let weights stand still while the others learn.

    At strength 1 neither they nor Adam's running moments of them move, bit for bit, and weight decay spares them; at
    a strength f in between, weight and moments move 1 - f of the way that the update would take them. Gradient still
    flows through them into what comes before. Everything is as if they were no parameters of the optimizer: their
    gradient counts 1 - f times in the norm that is clipped and logged, and an update that passes them by does not
    count in Adam's bias correction of them (as torch.optim.Adam keeps a count of steps for each tensor), so that
    they start gently when they are let go. Where freezes overlap, the stronger one counts.

    Args:
        heads: heads whose weights stand still, ``"layer:head"``.
        neurons: neurons of the MLPs whose weights stand still, ``"layer:neuron"``.
        parts: which weights of those heads (``W_Q``, ``W_K``, ``W_V``, ``W_O``) and neurons (``W_in``, ``b_in``,
            ``W_out``); all when None.
        weights: whole weights as TransformerLens names them (``blocks.0.attn.W_Q``, ``embed.W_E``, ``ln_final.w``), or
            all below a name such as ``blocks.0``.
        members: members it acts in; all when None.
        schedule: strength at every step, in [0, 1]; 1 throughout by default.

    Raises:
        ConfigError: nothing chosen, or something that the model does not have.
    """

    def __init__(
        self,
        heads: list[str] | None = None,
        neurons: list[str] | None = None,
        parts: list[str] | None = None,
        weights: list[str] | None = None,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(Frozen(), {"heads": heads, "neurons": neurons, "weights": weights}, parts, members, schedule)
