"""One intervention: which site, which entries, by what value, when; and where a value comes from.

A value may be taken from another forward pass of the same batch, which has interventions of its own and
may run a donor's weights. Equal passes are one pass: they are compared by what they are, not by who asked
for them. Next to read: ``plan.py``, which puts the interventions of a run in order.

Legend: M members, B batch, L positions, N neurons, H heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from opsin.interventions.donors import Donor
from opsin.interventions.identity import identity
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection
from opsin.task import Batch


@dataclass(frozen=True)
class Overwrite:
    """What a value makes of one activation.

    Args:
        value: what the activation is overwritten by, broadcastable to the site.
        where: entries that it applies to, a bool tensor broadcastable to the site; everywhere when None.
    """

    value: Tensor
    where: Tensor | None = None


class Value(ABC):
    """What an activation is overwritten by: a small frozen dataclass, a pure function of the activation and its needs.

    A subclass states its gradient: ``"flows"`` where gradient passes through it, into the activation or into what it
    needs, and ``"stops"`` where it detaches them. A run refuses a value of the user's own that states something else
    than autograd finds (``check_gradient.py``).

    A subclass states its identity: every field counts, but for those with ``metadata=DERIVED``. A class that has been
    renamed since its name was first written to a checkpoint keeps that name as ``identity_name``.
    """

    @property
    def identity(self) -> str:
        """Equal for values that do the same, and different for values that do not."""
        return identity(self)

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the value is made from beside the activation itself and the batch."""
        return ()

    @property
    def sources(self) -> tuple[Source, ...]:
        """The activations among its needs."""
        return tuple(need for need in self.needs if isinstance(need, Source))

    @property
    def needs_classes(self) -> bool:
        """Whether it means something only where outputs are logits of classes; a run of another task refuses it."""
        return False

    @property
    def gradient(self) -> str:
        """``"stops"`` or ``"flows"``: whether gradient passes through the value, into what it is made from.

        By default that of its sources: right for a value that detaches ``x``, and no source of its own.
        """
        return "flows" if any(source.trains for source in self.sources) else "stops"

    @abstractmethod
    def __call__(self, x: Tensor, batch: Batch, *inputs: Tensor) -> Overwrite:
        """The value for activation ``x`` of this batch; ``inputs`` are its needs, in order."""


@dataclass(frozen=True)
class Intervention:
    """One overwriting: where, what, by which value, when.

    Args:
        writer: name of the callback that asks for it, for messages.
        site: name of the activation that is overwritten.
        selection: which entries of the site are overwritten.
        value: what these entries are overwritten by.
        schedule: how strongly it acts at which step.
        order: rank among interventions that touch the same entries; the later wins.
    """

    writer: str
    site: str
    selection: Selection
    value: Value
    schedule: Schedule = field(default_factory=Schedule)
    order: int | None = None


@dataclass(frozen=True)
class Pass:
    """Another forward pass of the same batch.

    Args:
        interventions: what is overwritten in this pass alone.
        donor: the model whose weights it runs; by default the one that is trained.
    """

    interventions: tuple[Intervention, ...] = ()
    donor: Donor | None = None

    @property
    def asks(self) -> bool:
        """Whether it uses activations of the pass that takes a value from it, and so runs nested inside that one."""
        return any(source.of is Relative.ASKING_PASS for item in self.interventions for source in item.value.sources)

    @property
    def trains(self) -> bool:
        """Whether gradient that enters it can reach a trained weight."""
        sources = [source for item in self.interventions for source in item.value.sources]
        return self.donor is None or any(source.trains for source in sources if source.of is not Relative.SAME_PASS)


class Relative(Enum):
    """A pass named by where it is mentioned."""

    SAME_PASS = "this pass"
    """The one in which the value is used; its site must come earlier in it."""

    ASKING_PASS = "the asking pass"
    """The one that takes a value from the pass in which this is mentioned."""

    @property
    def identity_name(self) -> str:
        """The name that checkpoints know it by."""
        return "THIS" if self is Relative.SAME_PASS else "ASKING"


@dataclass(frozen=True)
class Source:
    """An activation as it goes on in some pass.

    Args:
        site: name of the activation in that pass.
        of: the pass it is taken from; by default one without any intervention.
        detach: whether gradient stops at it; by default it flows into the other pass.
    """

    site: str
    of: Pass | Relative = Pass()
    detach: bool = False

    @property
    def trains(self) -> bool:
        """Whether gradient that enters it can reach a trained weight."""
        return not self.detach and (isinstance(self.of, Relative) or self.of.trains)


@dataclass(frozen=True)
class Weight:
    """A weight ``[M, ...]`` of the model that the pass runs, in TransformerLens' shape: ``W_Q`` is ``[M, H, D, E]``.

    Args:
        name: weight as the model's table of parameters names it.
        detach: whether gradient stops at the parameter.
    """

    name: str
    detach: bool = False


@dataclass(frozen=True)
class Clock:
    """Every member's seed and the number of the optimizer step, ``[M, 2]`` int64: what noise is made from."""


class Supply(ABC):
    """A tensor that lies beside the graph and that its writer may change between steps, for example directions.

    Subclasses are small frozen dataclasses; equal supplies are one tensor.
    """

    @abstractmethod
    def initial(self, members: int) -> Tensor:
        """What it is before the first step, ``[M, ...]``; every later tensor has this shape."""

    @property
    def fixed(self) -> bool:
        """Whether it stays what it is before the first step."""
        return False


Need = Source | Weight | Clock | Supply
"""What a value may be made from."""
