"""What the writers of weights share: how heads, neurons and whole weights are chosen."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from opsin.callbacks.writers.base import ScheduledWriter
from opsin.errors import ConfigError
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection, parse_pairs
from opsin.interventions.weights import Fresh, Frozen, WeightChange
from opsin.model.parameters import ParameterTable


class Component(NamedTuple):
    """What a block has several of, and the weights that each of them has a part of.

    Args:
        module: name of the part of a block that holds the weights.
        axis: letter of the weights' axis along which they lie.
        noun: what one of them is called in messages.
        usual: names of the weights within the module.
        further: names of weights that some models have beside them.
    """

    module: str
    axis: str
    noun: str
    usual: tuple[str, ...]
    further: tuple[str, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of all weights that a model may have within the module."""
        return (*self.usual, *self.further)


COMPONENTS = {
    "heads": Component("attn", "H", "head", ("W_Q", "W_K", "W_V", "W_O"), ("b_Q", "b_K", "b_V")),
    "neurons": Component("mlp", "N", "neuron", ("W_in", "b_in", "W_out"), ("W_gate",)),
}
"""What weights can be chosen by, under the name of the setting that chooses it."""


MISSING = {"H": "heads", "N": "MLP"}
"""What a model without an axis lacks, in words."""


class ChosenWeightsWriter(ScheduledWriter):
    """A writer that changes weights of chosen heads and neurons, or whole weights.

    Args:
        kind: what becomes of the weights.
        chosen: the settings ``heads``, ``neurons`` and ``weights``, as the user wrote them.
        parts: names of the weights of heads and neurons that are changed; all when None.
        members: members it acts in; all when None.
        schedule: strength at every step, in [0, 1].
        order: rank among draws that set the same entries; the later wins.

    Raises:
        ConfigError: nothing chosen, or a part that nothing chosen has; names the setting.
    """

    # abstract, so that no recipe can name the class
    @abstractmethod
    def __init__(
        self,
        kind: Frozen | Fresh,
        chosen: dict[str, list[str] | None],
        parts: list[str] | None,
        members: list[int] | None,
        schedule: Schedule,
        order: int | None = None,
    ) -> None:
        super().__init__(members, schedule, order)
        self.name, self.kind = type(self).__name__, kind
        self.chosen = {setting: names for setting, names in chosen.items() if names}
        if not self.chosen:
            raise ConfigError(self.name, None, "heads, neurons or weights")
        self.all_parts, self.parts = parts is None, self._checked_parts(parts)

    def _checked_parts(self, parts: list[str] | None) -> dict[str, list[str]]:
        """Names of the weights that are changed, for heads and for neurons; whichever is chosen must have some."""
        known = {setting: COMPONENTS[setting].weights for setting in self.chosen if setting in COMPONENTS}
        all_parts = [part for weights in known.values() for part in weights]
        wanted = all_parts if parts is None else parts
        for part in wanted:
            if part not in all_parts:
                expected = ", ".join(all_parts) or "heads or neurons that it is part of"
                raise ConfigError(f"{self.name}.parts", part, expected)
        kept = {setting: [part for part in weights if part in wanted] for setting, weights in known.items()}
        for setting, names in kept.items():
            if not names:
                expected = f"for its {setting} any of {', '.join(COMPONENTS[setting].weights)}"
                raise ConfigError(f"{self.name}.parts", parts, expected)
        return kept

    def weight_changes(self, weights: ParameterTable) -> list[WeightChange]:
        """What it changes in a model with these weights.

        Raises:
            ConfigError: a head, neuron or weight that the model does not have; names the setting.
        """
        changes = []
        for setting, parts in self.parts.items():
            module, axis, noun, *_ = COMPONENTS[setting]
            field_name = f"{self.name}.{setting}"
            if not weights.size(axis):
                raise ConfigError(field_name, self.chosen[setting], f"nothing: this model has no {MISSING[axis]}")
            layers = parse_pairs(field_name, self.chosen[setting], weights.layers, weights.size(axis), noun)
            changes += [
                self._change(weights, name, **{setting: tuple(indices)})
                for layer, indices in layers.items()
                for name in self._names(weights, f"blocks.{layer}.{module}", parts)
            ]
        for prefix in self.chosen.get("weights") or ():
            changes += [self._change(weights, name) for name in weights.find(prefix, f"{self.name}.weights")]
        return changes

    def _names(self, weights: ParameterTable, prefix: str, parts: list[str]) -> list[str]:
        """Names of those weights of a module that are trained; a part that the user has named must be there."""
        names = [f"{prefix}.{part}" for part in parts]
        if self.all_parts and (found := [name for name in names if name in weights and weights[name].trained]):
            return found
        return [weights.one(name, f"{self.name}.parts").name for name in names]

    def _change(self, weights: ParameterTable, name: str, **selected: tuple[int, ...]) -> WeightChange:
        selection = Selection(members=self.members, **selected)
        return WeightChange(self.name, name, weights[name].parameter, selection, self.kind, self.schedule, self.order)
