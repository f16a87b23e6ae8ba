"""Whether a value states the truth about its gradient, found by autograd on a tiny case.

A value of the user's own is called before training with random numbers in place of the activation and of what it is
made from: once with standard normals, once with numbers of many sizes. What autograd finds is compared with what the
value states. The run's random numbers stay where they are. The package's own values are checked by a test.

Legend: M members, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions.donors import Donor
from opsin.interventions.intervention import Intervention, Need, Overwrite, Pass, Relative, Source, Supply, Weight
from opsin.interventions.plan import Plan
from opsin.model.sites import SiteTable
from opsin.records.user_files import reason
from opsin.task import Batch, Task

TINY_BATCH = 2
"""Sequences of the tiny case; a value that cannot be computed on so few gets the run's own number."""

Numbers = Callable[[tuple[int, ...]], Tensor]
"""Random numbers of a shape."""

Gradient = Literal["stops", "flows"]
"""Whether gradient passes through a value, into what it is made from."""


@dataclass(frozen=True)
class Found:
    """What autograd has found.

    Args:
        into: what gradient reaches through the value, by name.
        undecided: whether gradient is not finite somewhere, and nowhere else than there.
    """

    into: tuple[str, ...]
    undecided: bool

    @property
    def gradient(self) -> Gradient | None:
        """What a value should state; None where its gradient is no number."""
        return "flows" if self.into else None if self.undecided else "stops"


@dataclass(frozen=True)
class TinyCase:
    """What a value is tried on: one member, and a few sequences of the run's task.

    Args:
        sites: activations of the model that is trained.
        parameters: weights of that model, ``[M, ...]`` by name; only their shapes count.
        batch: sequences of one member.
    """

    sites: SiteTable
    parameters: Mapping[str, Tensor]
    batch: Batch

    def shape(self, site: str, donor: Donor | None) -> tuple[int, ...]:
        """Shape of an activation of a pass that runs the weights of the donor, or of the trained model."""
        return self.table(donor)[site].shape(*self.batch.tokens.shape[:2])

    def table(self, donor: Donor | None) -> SiteTable:
        """Sites and weights of the donor, or of the trained model."""
        return self.sites if donor is None else donor.sites(self.batch.layout.positions)

    def input(self, need: Need, donor: Donor | None, numbers: Numbers, real_supplies: bool) -> Tensor:
        """A tensor in place of what a value needs.

        Args:
            need: what the value is made from.
            donor: donor whose weights the pass of the value runs; None for the trained model.
            numbers: random numbers in place of activations and weights.
            real_supplies: whether a supply is what it is before the first step; random numbers otherwise.
        """
        if isinstance(need, Source):
            origin = need.of.donor if isinstance(need.of, Pass) else donor if need.of is Relative.SAME_PASS else None
            tensor = numbers(self.shape(need.site, origin))
        elif isinstance(need, Weight):
            tensor = numbers((1, *self.table(donor).weights[need.name].shape))
        elif isinstance(need, Supply):
            initial = need.initial(1)
            return initial.to(numbers((1,)).dtype) if real_supplies else numbers(tuple(initial.shape))
        else:
            return torch.tensor([[0, 1]])
        trains = need.trains if isinstance(need, Source) else not need.detach
        return tensor.requires_grad_(trains)


def find_gradient(item: Intervention, donor: Donor | None, case: TinyCase) -> Found:
    """Whether autograd finds gradient through the value of an intervention, and into what.

    Args:
        item: the intervention, whose value is tried.
        donor: donor whose weights its pass runs; None for the trained model.
        case: what the value is tried on.

    Raises:
        Exception: whatever the value raises, where it can be computed with neither kind of numbers.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = next(iter(case.parameters.values())).dtype

    def normals(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    def of_many_sizes(shape: tuple[int, ...]) -> Tensor:
        # where normals are all below a threshold, or above it
        return normals(shape) * (2 * normals(shape)).exp()

    found: list[Found] = []
    problems: list[Exception] = []
    for numbers in (normals, of_many_sizes):
        try:
            x = numbers(case.shape(item.site, donor)).requires_grad_()
            inputs = [case.input(need, donor, numbers, numbers is normals) for need in item.value.needs]
            found.append(_reached(item, _gradients(item, x, inputs, case.batch, normals)))
        except Exception as error:
            problems.append(error)
    if not found:
        raise problems[0]
    into = tuple(dict.fromkeys(name for finding in found for name in finding.into))
    return Found(into, undecided=not into and any(finding.undecided for finding in found))


def _reached(item: Intervention, gradients: Sequence[Tensor | None]) -> Found:
    needs = [getattr(need, "site", getattr(need, "name", "")) for need in item.value.needs]
    known = {
        name: gradient
        for name, gradient in zip(["the activation", *needs], gradients, strict=True)
        if gradient is not None
    }
    into = tuple(name for name, gradient in known.items() if bool((gradient.isfinite() & (gradient != 0)).any()))
    return Found(into, undecided=not all(bool(gradient.isfinite().all()) for gradient in known.values()))


def _gradients(
    item: Intervention, x: Tensor, inputs: Sequence[Tensor], batch: Batch, numbers: Numbers
) -> list[Tensor | None]:
    """Gradient of a random sum of the entries that a value overwrites: into the activation, and into each input."""
    # clones, since a value may change in place what a graph computes but not where it begins
    chosen = item.value(x.clone(), batch, *(given.clone() for given in inputs))
    if not isinstance(chosen, Overwrite):
        raise TypeError(f"it returns a {type(chosen).__name__} and no Overwrite")
    value = chosen.value.expand(x.shape)
    where = torch.ones_like(x, dtype=torch.bool) if chosen.where is None else chosen.where.bool().expand(x.shape)
    if not value.requires_grad:
        return [None] * (1 + len(inputs))
    # where a batch has nothing to overwrite, the whole value stands for what others have
    total = (value * numbers(tuple(x.shape)))[where if bool(where.any()) else torch.ones_like(where)].sum()
    leaves = [x, *inputs]
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(total, trained, allow_unused=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def check_gradients(plan: Plan, sites: SiteTable, parameters: Mapping[str, Tensor], task: Task) -> None:
    """Refuse a value of the user's own that states something else about its gradient than autograd finds.

    Args:
        plan: interventions of the run.
        sites: activations of the model that is trained.
        parameters: weights of that model, ``[M, ...]`` by name.
        task: what is learned; the tiny case is of its sequences.

    Raises:
        ConfigError: names writer and value.
    """
    rows = [
        (row.intervention, planned.donor)
        for planned in plan.passes
        for row in planned.rows
        if not _of_this_package(row.intervention)
    ]
    for item, number in dict.fromkeys(rows):
        donor = None if number is None else plan.donors[number]
        with isolate_rng(include_cuda=False), torch.inference_mode(False), torch.enable_grad():
            contradiction = _contradiction(item, donor, sites, parameters, task)
        if contradiction is not None:
            raise contradiction


def _of_this_package(item: Intervention) -> bool:
    return type(item.value).__module__.partition(".")[0] == __name__.partition(".")[0]


def _contradiction(
    item: Intervention, donor: Donor | None, sites: SiteTable, parameters: Mapping[str, Tensor], task: Task
) -> ConfigError | None:
    """What is wrong with a value; not raised, so that the random numbers are put back."""
    kind, problem = type(item.value).__name__, Exception()
    for size in (TINY_BATCH, task.batch_size):
        try:
            batch = task.batch(0, 0, batch_size=size)
            found = find_gradient(item, donor, TinyCase(sites, parameters, batch))
            return _compared(f"{item.writer}: {kind}.gradient", item.value.gradient, found)
        except Exception as error:
            problem = error
    expected = f"a value that can be computed at {item.site} ({type(problem).__name__}: {reason(problem)})"
    return ConfigError(item.writer, kind, expected)


def _compared(field: str, stated: str, found: Found) -> ConfigError | None:
    if stated == found.gradient or (found.gradient is None and stated in get_args(Gradient)):
        return None
    if found.into:
        expected = (
            f"'flows', since autograd finds gradient into {', '.join(found.into)}: state it, or detach what stops"
        )
    else:
        expected = "'stops', since autograd finds no gradient through it: state it, or do not detach what should flow"
    return ConfigError(field, stated, expected)
