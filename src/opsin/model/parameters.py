"""Parameters: the typed addresses of weights, how each is stored, drawn and named.

A model declares its parameters once, in a ``ParameterTable``. Weights are named as TransformerLens names them and have
its shapes, ``blocks.0.attn.W_Q`` [H, D, E], however they are stored: a parameter may hold several of them side by side.

Legend: M members, D width, H heads, E head width, N neurons, V outputs, T tokens, F features, P position rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from opsin.errors import ConfigError

Parameters = Mapping[str, Tensor]

WEIGHT_AXES = {"T": "tokens", "F": "features", "P": "position rows", "I": "inputs", "O": "outputs of several weights"}
"""Letters of axes that weights have and activations have not."""

# standard deviation of a standard normal truncated at two sigma
TRUNCATED_STD = 0.87962566103423978

PartKind = Literal["embed", "position", "attention", "mlp", "norm", "unembed"]
"""What part of a model a parameter belongs to."""


def layer_of(name: str) -> int | None:
    """The block that a site or a weight belongs to; None outside the blocks."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


@dataclass(frozen=True)
class Initial:
    """How the values of a parameter are drawn.

    Args:
        kind: distribution: a standard normal truncated at two sigma, a standard normal, uniform within -1 and 1, or 1.
        scale: number that what is drawn is multiplied by first.
        gain: number that it is multiplied by then.
    """

    kind: Literal["truncated_normal", "normal", "uniform", "constant"] = "constant"
    scale: float = 0.0
    gain: float = 1.0

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Values of one member, float32.

        Args:
            shape: shape of the parameter of one member.
            generator: generator of the member, which a constant leaves alone.
        """
        if self.kind == "constant":
            return torch.full(shape, self.scale * self.gain)
        if self.kind == "truncated_normal":
            drawn = nn.init.trunc_normal_(torch.empty(shape), 0.0, 1.0, -2.0, 2.0, generator=generator)
        elif self.kind == "normal":
            drawn = torch.randn(shape, generator=generator)
        else:
            drawn = torch.rand(shape, generator=generator) * 2 - 1
        # one after the other, since their product would round differently
        return self.scale * drawn * self.gain

    def __str__(self) -> str:
        size = self.scale * self.gain
        if self.kind == "constant":
            return f"{size:g}"
        if self.kind == "uniform":
            return f"uniform within {size:.3g}"
        return f"{'truncated normal' if self.kind == 'truncated_normal' else 'normal'} times {size:.3g}"


ZEROS, ONES = Initial(), Initial(scale=1.0)


@dataclass(frozen=True)
class NamedWeight:
    """A parameter, or the columns of one that have a name of their own.

    Args:
        name: TransformerLens' name, for example ``blocks.0.attn.W_Q``.
        parameter: name of the parameter that holds it.
        axes: letters of its axes without M, in TransformerLens' order, for example ``"HDE"``.
        stored: the letters in the order in which the parameter has them; H and E may be one axis there.
        sizes: length of every axis.
        before: number of columns of the parameter that precede the weight.
        after: number of columns of the parameter that follow the weight.
        trained: whether its parameter is trained.
        heads_are_one_axis: whether the parameter holds all heads side by side in one axis, of length H times E.
    """

    name: str
    parameter: str
    axes: str
    stored: str
    sizes: Mapping[str, int]
    before: int = 0
    after: int = 0
    trained: bool = True
    heads_are_one_axis: bool = False

    @property
    def layer(self) -> int | None:
        """The block it belongs to; None outside the blocks."""
        return layer_of(self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in one member, in TransformerLens' order."""
        return tuple(self.sizes[axis] for axis in self.axes)

    def flat(self, parameters: Parameters) -> Tensor:
        """The weight ``[M, ...]`` as it is stored, its heads side by side.

        Args:
            parameters: parameters of every member, by name.
        """
        x = parameters[self.parameter]
        if not (self.before or self.after):
            return x
        return x.narrow(-1, self.before, x.shape[-1] - self.before - self.after)

    def read(self, parameters: Parameters) -> Tensor:
        """The weight ``[M, ...]`` in TransformerLens' shape; a view of its parameter.

        Args:
            parameters: parameters of every member, by name.
        """
        x = self.flat(parameters)
        if self.heads_are_one_axis:
            x = x.unflatten(1 + self.stored.index("H"), (self.sizes["H"], self.sizes["E"]))
        if self.axes == self.stored:
            return x
        return x.permute(0, *(1 + self.stored.index(axis) for axis in self.axes))


@dataclass(frozen=True)
class Parameter:
    """One tensor of weights as it is stored.

    Args:
        name: name of the tensor, under which checkpoints have it.
        shape: lengths of the axes that one member has.
        initial: how its values are drawn.
        kind: what part of the model it belongs to.
        axes: letters of its axes without M; H and E, two letters, may be one axis of the tensor.
        sizes: length of an axis that is not one of the tensor's own, as H and E are not where they are one.
        trained: whether the optimizer moves it; one that is not trained is drawn and stays.
        parts: weights that it holds under names of their own.
    """

    name: str
    shape: tuple[int, ...]
    initial: Initial
    kind: PartKind
    axes: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    trained: bool = True
    parts: tuple[NamedWeight, ...] = ()

    @property
    def whole(self) -> NamedWeight:
        """The parameter as a weight under its own name."""
        plain = len(self.axes) == len(self.shape)
        sizes = dict(zip(self.axes, self.shape, strict=True)) if plain else self.sizes
        return NamedWeight(
            self.name, self.name, self.axes, self.axes, sizes, trained=self.trained, heads_are_one_axis=not plain
        )


@dataclass(frozen=True)
class ParameterTable:
    """All parameters of one model, in the order in which they are drawn.

    Args:
        parameters: every tensor of weights, as it is stored.
    """

    parameters: tuple[Parameter, ...] = ()
    weights: Mapping[str, NamedWeight] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        named = [weight for parameter in self.parameters for weight in (parameter.whole, *parameter.parts)]
        object.__setattr__(self, "weights", {weight.name: weight for weight in named})

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.parameters)

    def __getitem__(self, name: str) -> NamedWeight:
        return self.weights[name]

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of one member, by name."""
        return {parameter.name: parameter.shape for parameter in self.parameters}

    @property
    def untrained(self) -> tuple[str, ...]:
        """Names of the parameters that no optimizer moves."""
        return tuple(parameter.name for parameter in self.parameters if not parameter.trained)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return 1 + max((named.layer for named in self.weights.values() if named.layer is not None), default=-1)

    def size(self, axis: str) -> int:
        """Number of heads (``"H"``) or neurons (``"N"``) of a block; 0 if it has none."""
        return next((named.sizes[axis] for named in self.weights.values() if axis in named.axes), 0)

    def one(self, name: str, field_name: str) -> NamedWeight:
        """The weight of that name.

        Raises:
            ConfigError: no such weight; names the field and the nearest names that exist.
        """
        if name in self.weights:
            return self.weights[name]
        raise ConfigError(field_name, name, f"a weight of this model{self._nearest(name)}")

    def find(self, name: str, field_name: str) -> list[str]:
        """The weight of that name; for ``blocks.0`` or ``embed``, all trained parameters whose names begin so.

        Raises:
            ConfigError: no such weight; names the field and the nearest names that exist.
        """
        if name in self.weights:
            return [name]
        if found := [p.name for p in self.parameters if p.trained and p.name.startswith(f"{name}.")]:
            return found
        raise ConfigError(field_name, name, f"a weight of this model, or a block such as blocks.0{self._nearest(name)}")

    def view(self, parameters: Parameters) -> dict[str, Tensor]:
        """Every weight ``[M, ...]`` in TransformerLens' shape, by its name; views of the parameters.

        Args:
            parameters: parameters of every member, by name.
        """
        return {name: named.read(parameters) for name, named in self.weights.items()}

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.weights, n=3, cutoff=0.4)
        return f"; nearest: {', '.join(near)}" if near else ""

    def draw(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Fresh float32 parameters ``[M, ...]``, one member a seed; a member's values depend on its own seed alone.

        Args:
            seeds: seed of every member.
        """
        members = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            members.append({p.name: p.initial.draw(p.shape, generator) for p in self.parameters})
        return {name: torch.stack([member[name] for member in members]) for name in members[0]}


class Members(nn.Module):
    """The parameters of M members as a module tree, so that checkpoints and loggers see their names.

    Args:
        values: parameters ``[M, ...]``, by name.
        untrained: names of those that ask for no gradient.
    """

    def __init__(self, values: Mapping[str, Tensor], untrained: Sequence[str] = ()) -> None:
        super().__init__()
        for name, value in values.items():
            *path, leaf = name.split(".")
            node: nn.Module = self
            for part in path:
                if not hasattr(node, part):
                    node.add_module(part, nn.Module())
                node = getattr(node, part)
            node.register_parameter(leaf, nn.Parameter(value, requires_grad=name not in untrained))
