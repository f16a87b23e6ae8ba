"""One training step as a pure function of tensors; eager and compiled are the same function.

Legend: M members, B batch, L positions, Q scored positions, V outputs, I interventions.
"""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opsin.errors import log
from opsin.model import Tap, Transformer, forward
from opsin.plan import Plan
from opsin.scene import Constants, Scene, run_passes
from opsin.task import Batch, Task
from opsin.weights import Changing, moving

ABSENT_LOGIT = -1e20

COMPILE_FROM_STEPS = 5_000
"""Runs of at least this many optimizer steps repay the compiler's half minute."""


@dataclass(frozen=True)
class AdamState:
    """Parameters (leaves that require grad) and their running moments, in the same order."""

    names: Sequence[str]
    parameters: Sequence[Tensor]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]


@dataclass(frozen=True)
class Hyper:
    """Optimizer hyper-parameters; tensors, so that changing them changes no graph.

    Args:
        learning_rate: per member.
        weight_decay: decoupled, per member.
        clip: largest gradient norm, per member; infinity for none.
        correction: bias corrections 1 - beta1^t and 1 - beta2^t of this step.
    """

    learning_rate: Float[Tensor, " M"]
    weight_decay: Float[Tensor, " M"]
    clip: Float[Tensor, " M"]
    correction: Float[Tensor, "2"]


@dataclass(frozen=True)
class Moment:
    """What the interventions of one step are told; tensors, so that no schedule changes the graph.

    Args:
        gates: strength of every intervention, then of every change of weights.
        clock: seed of every member and the number of the step.
        fired: steps so far in which each of them changed an activation, or a weight; counted up in place.
        alive: members that still learn; one whose loss or gradient is no number stops before its weights are touched.
        missed: updates that have passed by the entries of every parameter that is ever changed; counted up in place.
    """

    gates: Float[Tensor, "I M"]
    clock: Int[Tensor, "M 2"]
    fired: Int[Tensor, "I M"]
    alive: Bool[Tensor, " M"]
    missed: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """The step of one run: everything that is fixed before training and shapes the graph."""

    model: Transformer
    task: Task
    plan: Plan
    betas: tuple[float, float]
    eps: float

    def __call__(
        self,
        state: AdamState,
        hyper: Hyper,
        constants: Constants,
        draw: Mapping[str, Tensor],
        moment: Moment,
    ) -> Float[Tensor, "3 M"]:
        """Gather, draw weights anew, forward, loss, gradient and Adam where nothing is frozen, in place.

        Returns:
            Loss (nats, before the update), accuracy and gradient norm (of what may move) of every member.
        """
        batch = self.task.assemble(constants.bank, draw)
        parameters = dict(zip(state.names, state.parameters, strict=True))
        scene = Scene(self.model, parameters, constants, batch, moment.gates, moment.clock)
        changing = self._changing(state, constants, moment)
        with torch.no_grad():
            renewed = changing.renew()
        fired: dict[int, Tensor] = {}
        tap = run_passes(self.plan, scene, fired)
        logits = scored_logits(forward(parameters, constants.table, batch, self.model, tap), batch)
        loss = cross_entropy(logits, batch).mean((1, 2))
        # members do not mix, so the gradient of the sum holds each member's own
        gradients = torch.autograd.grad(loss.sum(), list(state.parameters))
        with torch.no_grad():
            held = changing.held()
            norm = member_norm(moving(dict(zip(state.names, gradients, strict=True)), held))
            # in place, so that what made it stop is the last that it saw
            moment.alive.logical_and_(loss.isfinite() & norm.isfinite())
            before, corrections = changing.copies(held), changing.corrections(hyper.correction, self.betas)
            adam_update(state, gradients, norm, hyper, moment.alive, self.betas, self.eps, corrections)
            counts = [*(fired[index] for index in sorted(fired)), *renewed, *changing.hold(held, before)]
            if counts:
                moment.fired.add_(torch.stack(counts) & moment.alive)
            seen = torch.stack([loss.detach(), accuracy(logits, batch), norm])
            return seen.masked_fill(~moment.alive, torch.nan)

    def _changing(self, state: AdamState, constants: Constants, moment: Moment) -> Changing:
        """The changes of weights of one step."""
        first = len(self.plan.interventions)
        strengths = [
            moment.gates[row].view(-1, *[1] * (mask.dim() - 1)) * mask
            for row, mask in enumerate(constants.masks[first:], first)
        ]
        tensors = zip(state.parameters, state.exp_avg, state.exp_avg_sq, strict=True)
        by_name = dict(zip(state.names, tensors, strict=True))
        return Changing(self.plan.changes, strengths, constants.fresh, moment.missed, moment.clock, by_name)


def scored_logits(logits: Float[Tensor, "M B L V"], batch: Batch) -> Float[Tensor, "M B Q V"]:
    """Logits at the positions that enter the loss."""
    return logits[:, :, list(batch.layout.scored)]


def cross_entropy(logits: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
    """Negative log-likelihood of the targets, in nats."""
    return -logits.log_softmax(-1).gather(-1, batch.targets[..., None]).squeeze(-1)


def accuracy(logits: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, " M"]:
    """Share of scored positions whose most likely output is the target."""
    return (logits.argmax(-1) == batch.targets).to(logits.dtype).mean((1, 2))


def restrict(logits: Float[Tensor, "M B Q V"], plausible: Bool[Tensor, "M B V"]) -> Float[Tensor, "M B Q V"]:
    """Logits with outputs that do not occur in the context ruled out."""
    return logits + ABSENT_LOGIT * (~plausible[:, :, None]).to(logits.dtype)


def evaluate(logits: Float[Tensor, "M B Q V"], batch: Batch) -> dict[str, Float[Tensor, " M"]]:
    """Loss and accuracy, and where the task names plausible outputs the accuracy and probability among them."""
    metrics = {"loss": cross_entropy(logits, batch).mean((1, 2)), "accuracy": accuracy(logits, batch)}
    if batch.plausible is not None:
        possible = restrict(logits, batch.plausible)
        metrics["accuracy_in_context"] = accuracy(possible, batch)
        metrics["probability_in_context"] = (-cross_entropy(possible, batch)).exp().mean((1, 2))
    return metrics


def member_norm(tensors: Sequence[Float[Tensor, "M ..."]]) -> Float[Tensor, " M"]:
    """2-norm over all tensors, per member."""
    return torch.stack([tensor.square().flatten(1).sum(-1) for tensor in tensors]).sum(0).sqrt()


def adam_update(
    state: AdamState,
    gradients: Sequence[Tensor],
    norm: Float[Tensor, " M"],
    hyper: Hyper,
    alive: Bool[Tensor, " M"],
    betas: tuple[float, float],
    eps: float,
    corrections: Mapping[str, Sequence[Tensor]] | None = None,
) -> None:
    """Adam with decoupled weight decay and per-member clipping, in place and elementwise over members.

    Kingma and Ba 2015, algorithm 1, eps outside the square root; decay as Loshchilov and Hutter 2019.

    Args:
        alive: members that are updated; the others stay as they are, bit for bit.
        corrections: the two bias corrections of parameters that have their own, by name.
    """
    # a comparison, since the quotient of an overflown norm and no clipping is no number
    scale = torch.where(norm > hyper.clip, hyper.clip / norm, torch.ones_like(norm))
    for name, parameter, gradient, mean, square in zip(
        state.names, state.parameters, gradients, state.exp_avg, state.exp_avg_sq, strict=True
    ):
        rate, decay, shrink, living = (
            x.view(-1, *[1] * (gradient.dim() - 1)) for x in (hyper.learning_rate, hyper.weight_decay, scale, alive)
        )
        correction = (corrections or {}).get(name, hyper.correction)
        gradient = gradient * shrink
        first = betas[0] * mean + (1 - betas[0]) * gradient
        second = betas[1] * square + (1 - betas[1]) * gradient * gradient
        move = (first / correction[0]) / ((second / correction[1]).sqrt() + eps)
        moved = parameter * (1 - rate * decay) - rate * move
        for old, new in ((mean, first), (square, second), (parameter, moved)):
            old.copy_(torch.where(living, new, old))


@functools.cache
def has_compiler() -> bool:
    """Whether a C++ compiler, which torch.compile needs on the CPU, is on the path."""
    return any(shutil.which(name) for name in ("g++", "clang++"))


def compile_step(step: Step) -> Callable[..., Tensor]:
    """The same step as one compiled graph; shapes are fixed, values are inputs."""
    # without this the gradient inside the step would break the graph
    torch._dynamo.config.trace_autograd_ops = True
    # every run of a process has a graph of its own, and the compiler counts them as one function's
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    return torch.compile(step.__call__, fullgraph=True, dynamic=False)


def keep_compiled(folder: Path) -> None:
    """Keep compiled kernels in ``folder``, so that the next start of the same recipe finds them.

    A folder the user has chosen through ``TORCHINDUCTOR_CACHE_DIR`` is left alone.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # the compiler, once imported, has put its own default there
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", "") in ("", default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def timed_first(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same step; says how long its first call took, which is where it is compiled."""
    waiting = True

    def timed(*arguments: Any) -> Tensor:
        nonlocal waiting
        if not waiting:
            return step(*arguments)
        waiting, began = False, time.monotonic()
        result = step(*arguments)
        log.info(f"opsin: compiled in {time.monotonic() - began:.1f} s")
        return result

    return timed


def choose_step(step: Step, setting: Literal["auto"] | bool, steps: int) -> Callable[..., Tensor]:
    """The step, compiled where that is asked for or, with ``auto``, where the run is long enough; says which."""
    wanted = steps >= COMPILE_FROM_STEPS if setting == "auto" else setting
    if not (wanted and has_compiler()):
        reason = "no C++ compiler on the path" if wanted else f"{steps:,} steps do not repay compiling"
        log.info(f"opsin: the step runs eagerly ({reason if setting == 'auto' else 'as set'})")
        return step
    reason = f"{steps:,} steps repay it" if setting == "auto" else "as set"
    log.info(f"opsin: compiling the step ({reason}); up to a minute the first time, seconds after that")
    keep_compiled(Path.home() / ".cache" / "opsin" / "kernels")
    return timed_first(compile_step(step))


class _Seen(Exception):
    """Everything that was asked for has been seen."""


def observe(
    model: Transformer,
    parameters: Mapping[str, Tensor],
    table: Tensor,
    batch: Batch,
    tap: Tap,
    sites: Collection[str],
) -> dict[str, Tensor]:
    """The activations of ``sites`` as they go on after the tap, without gradient.

    The forward pass ends where the last of them has been computed.
    """
    kept: dict[str, Tensor] = {}

    def keeping(name: str, activation: Tensor) -> Tensor:
        activation = tap(name, activation)
        if name in sites:
            kept[name] = activation
            if len(kept) == len(sites):
                raise _Seen
        return activation

    with torch.no_grad(), suppress(_Seen):
        forward(parameters, table, batch, model, keeping)
    return kept
