"""The writers that act on weights: some stand still, or start anew, while the others learn."""

from __future__ import annotations

from lightning.pytorch import Callback

from opsin.errors import ConfigError
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection, entries, parse_pairs
from opsin.interventions.weights import Fresh, Frozen, WeightChange, WeightTable

PARTS = {"heads": ("W_Q", "W_K", "W_V", "W_O"), "neurons": ("W_in", "b_in", "W_out")}
WHERE = {"heads": ("attn", "H", "head"), "neurons": ("mlp", "N", "neuron")}


class OnWeights(Callback):
    """What these writers have in common.

    Args:
        kind: what becomes of the weights.
        chosen: ``heads``, ``neurons`` and ``weights``, as the user names them.
        parts: which weights of the heads and neurons; all when None.
        members: members it acts in; all when None.
        schedule: when.
        order: rank among draws that set the same entries.
    """

    def __init__(
        self,
        kind: Frozen | Fresh,
        chosen: dict[str, list[str] | None],
        parts: list[str] | None,
        members: list[int] | None,
        schedule: Schedule,
        order: int | None = None,
    ) -> None:
        self.name = type(self).__name__
        self.kind, self.schedule, self.order = kind, schedule, order
        self.chosen = {what: names for what, names in chosen.items() if names}
        if not self.chosen:
            raise ConfigError(self.name, None, "heads, neurons or weights")
        self.parts = self._checked(parts)
        self.members = entries(members)

    def _checked(self, parts: list[str] | None) -> dict[str, list[str]]:
        """The parts of each kind that is chosen, each of which must have some."""
        known = {what: PARTS[what] for what in self.chosen if what in PARTS}
        wanted = [part for all_parts in known.values() for part in all_parts] if parts is None else parts
        for part in wanted:
            if not any(part in all_parts for all_parts in known.values()):
                expected = ", ".join(part for all_parts in known.values() for part in all_parts)
                raise ConfigError(f"{self.name}.parts", part, expected or "heads or neurons that it is part of")
        found = {what: [part for part in all_parts if part in wanted] for what, all_parts in known.items()}
        for what, kept in found.items():
            if not kept:
                raise ConfigError(f"{self.name}.parts", parts, f"for its {what} any of {', '.join(PARTS[what])}")
        return found

    def weight_changes(self, weights: WeightTable) -> list[WeightChange]:
        """What it wants changed in a model with these weights."""
        found = []
        for what, parts in self.parts.items():
            where, axis, one = WHERE[what]
            if not weights.size(axis):
                raise ConfigError(f"{self.name}.{what}", self.chosen[what], "nothing: this model has no MLP")
            pairs = parse_pairs(f"{self.name}.{what}", self.chosen[what], weights.layers, weights.size(axis), one)
            found += [
                self._change(weights, f"blocks.{layer}.{where}.{part}", **{what: tuple(indices)})
                for layer, indices in pairs.items()
                for part in parts
            ]
        for given in self.chosen.get("weights") or ():
            found += [self._change(weights, name) for name in weights.find(given, f"{self.name}.weights")]
        return found

    def _change(self, weights: WeightTable, name: str, **selected: tuple[int, ...]) -> WeightChange:
        selection = Selection(members=self.members, **selected)
        return WeightChange(self.name, name, weights[name].parameter, selection, self.kind, self.schedule, self.order)


class Freeze(OnWeights):
    """Let weights stand still while the others learn.

    At strength 1 neither they nor Adam's running moments of them move, bit for bit, and weight decay spares them; at
    a strength f in between, weight and moments move 1 - f of the way that the update would take them. Gradient still
    flows through them into what comes before. Everything is as if they were no parameters of the optimizer: their
    gradient counts 1 - f times in the norm that is clipped and logged, and an update that passes them by does not
    count in Adam's bias correction of them (as torch.optim.Adam keeps a count of steps for each tensor), so that
    they start gently when they are let go. Where freezes overlap, the stronger one counts.

    Args:
        heads: ``"layer:head"``.
        neurons: ``"layer:neuron"`` of the MLPs.
        parts: which weights of those heads (``W_Q``, ``W_K``, ``W_V``, ``W_O``) and neurons (``W_in``, ``b_in``,
            ``W_out``); all when None.
        weights: whole weights as TransformerLens names them (``blocks.0.attn.W_Q``, ``embed.W_E``, ``ln_final.w``), or
            all below a name such as ``blocks.0``.
        members: members it acts in; all when None.
        schedule: when, and how strongly.

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


class Reinitialise(OnWeights):
    """Set weights back to where they began, or to a fresh draw of the initialiser.

    At every step at which the schedule is on (a strength above 0), before the batch is seen, the weights are set and
    Adam's running moments of them become zero; its bias correction of them counts updates from there, so that they
    learn as at the beginning of a run. Trackers and checkpoints that stand at the number of that step see the
    weights before. Where a ``Freeze`` holds the same weights, they are set all the same and then stand still there.

    Args:
        schedule: when; for a single step ``{start: 5000, stop: 5001}``. Weights are set whole, so it has no ramps.
        heads: ``"layer:head"``.
        neurons: ``"layer:neuron"`` of the MLPs.
        parts: which weights of those heads (``W_Q``, ``W_K``, ``W_V``, ``W_O``) and neurons (``W_in``, ``b_in``,
            ``W_out``); all when None.
        weights: whole weights as TransformerLens names them (``blocks.0.attn.W_Q``, ``embed.W_E``, ``ln_final.w``), or
            all below a name such as ``blocks.0``.
        seed: of a fresh draw, which is what a run of that seed begins with: one for all members, or one for each.
            By default each member's own seed, which rewinds it to its own first values.
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
        if seeds is not None and (not seeds or min(seeds) < 0):
            raise ConfigError("Reinitialise.seed", seed, "one seed of 0 or more, or one per member")
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
