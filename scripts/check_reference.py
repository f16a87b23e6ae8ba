#!/usr/bin/env python3
"""Compare Opsin with the reference system's numbers, file by file.

    python scripts/check_reference.py DIR [--precision float64|float32|both] [--mode eager|compiled|both]

Works from what a file contains (kind, config, base, options, donor) and not from its name. Prints one line a
file: the largest relative error of its activations, losses, gradients and so on in each precision and mode, and
a mark (!) at what is not below 1e-9 in double or 1e-4 in single precision. Random draws have neither: their
"structure" must agree exactly, and the others are distances over what chance allows, 1 being the limit. The last
line has the counts and the worst errors. Exit 0 if every file is covered and passes, else 1.

Files with the same weights and inputs are compiled as one graph that has the clamps of all, a file's own in force
and the others' off, as a schedule would have them. A graph takes some minutes, less once it is in the cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from reference_files import (
    LIMITS,
    UNREADABLE,
    Case,
    File,
    Uncovered,
    load,
    norm_error,
    parameter_name,
    parameters,
    read_case,
    relative_error,
    together,
    transposed,
)
from reference_others import check_initialisation, check_sampler, toy_errors
from torch import Tensor

from opsin.errors import ConfigError
from opsin.interventions.apply import Constants, PassInputs, constants_of, run_passes
from opsin.model.transformer import Transformer
from opsin.objective import cross_entropy
from opsin.optimizers import AdamW
from opsin.training.compiling import compile_step, keep_compiled
from opsin.training.objective import scored_logits
from opsin.training.optimizers import member_optimizer
from opsin.training.step import Step
from opsin.training.step_inputs import StepCounts, StepGates

CHANCE = 1.0
TRAINED = ("base", "clamp", "trajectory")
INPUT_KINDS = ("donor", "trajectory_batches")
DRAWN = {"sampler": check_sampler, "init_unscaled": check_initialisation}

SITES = {
    "token_embedding": "hook_embed",
    "example_embedding": "hook_embed",
    "label_embedding": "hook_embed",
    "pos_embedding": "hook_pos_embed",
    "embedding": "blocks.0.hook_resid_pre",
    "final_norm_out": "ln_final.hook_out",
    "logits_all_tokens": "hook_logits",
    "logits_examples": "hook_logits",
}
BLOCK_SITES = {
    "norm_out": "ln1.hook_out",
    "q_prerope": "attn.hook_q",
    "k_prerope": "attn.hook_k",
    "q": "attn.hook_rot_q",
    "k": "attn.hook_rot_k",
    "v": "attn.hook_v",
    "scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_norm_out": "ln2.hook_out",
    "mlp_out": "hook_mlp_out",
    "block_out": "hook_resid_post",
}
BY_HEAD = {"q_prerope", "k_prerope", "q", "k", "v"}
OF_MLP = {"mlp_norm_out", "mlp_out"}
UNHELD = ("hook_scale", "mlp.hook_pre", "mlp.hook_post")


@dataclass(frozen=True)
class Mode:
    """How Opsin computes."""

    precision: torch.dtype
    compiled: bool

    @property
    def limit(self) -> float:
        return LIMITS[self.precision]

    def __str__(self) -> str:
        return f"{str(self.precision).removeprefix('torch.')} {'compiled' if self.compiled else 'eager'}"

    def prepare(self, function: Callable) -> Callable:
        """The function as this mode calls it."""
        if not self.compiled:
            return function
        # a graph of the same function for each base and precision
        torch._dynamo.config.recompile_limit = 1_000
        return compile_step(function)


Errors = dict[str, float]
"""By group of numbers."""


def main(folder: Path, modes: Sequence[Mode]) -> int:
    names = sorted(path.stem for path in folder.glob("*.npz"))
    if not names:
        print(f"{folder}: no .npz files")
        return 1
    print(f"largest errors, in this order: {', '.join(map(str, modes))}")
    tally, checker = Tally(), Checker(folder, modes)
    for name in names:
        began = time.monotonic()
        try:
            said = tally.count(checker.check(name))
        except Uncovered as reason:
            tally.uncovered += 1
            said = f"uncovered: {reason}"
        except (*UNREADABLE, RuntimeError) as error:
            tally.failed += 1
            reasons = {ConfigError: "refused", RuntimeError: "not computed"}
            why = next((reasons[kind] for kind in reasons if isinstance(error, kind)), "unreadable")
            said = f"FAIL  {why}: {type(error).__name__}: {error}"
        print(f"{name:40s} {said}  ({time.monotonic() - began:.1f} s)", flush=True)
    counts = f"{len(names)} files, {len(names) - tally.uncovered} covered, {tally.failed} failed"
    worst = ", ".join(f"{mode} {tally.worst.get(mode, 0.0):.1e}" for mode in modes)
    print(f"{counts}, {tally.uncovered} uncovered; worst error {worst}")
    return int(tally.failed + tally.uncovered > 0)


@dataclass
class Tally:
    """What has been found so far."""

    failed: int = 0
    uncovered: int = 0
    worst: dict[Mode, float] = field(default_factory=dict)

    def count(self, found: Mapping[Mode | None, Errors]) -> str:
        """Note the errors of one file, and say them."""
        good, said = True, {}
        for mode, errors in found.items():
            for group, error in errors.items():
                limit = CHANCE if mode is None else mode.limit
                good &= error < limit
                said.setdefault(group, []).append(f"{error:.1e}" + ("" if error < limit else "!"))
            if mode is not None:
                self.worst[mode] = max([self.worst.get(mode, 0.0), *errors.values()])
        self.failed += not good
        text = "  ".join(f"{group} {' '.join(numbers)}" for group, numbers in said.items())
        return f"{'ok  ' if good else 'FAIL'}  {text or 'inputs of other files'}"


class Checker:
    """Checks the files of a folder; files with one base share a compiled graph in each precision."""

    def __init__(self, folder: Path, modes: Sequence[Mode]) -> None:
        self.folder, self.modes = folder, modes
        self._joined: dict[str, Case] = {}
        self._compiled: dict[tuple, Callable] = {}

    def check(self, name: str) -> dict[Mode | None, Errors]:
        """Errors of each group of numbers in one file, by mode; None for what has no mode."""
        file = load(self.folder / f"{name}.npz")
        kind = str(file["kind"])
        if kind in INPUT_KINDS:
            return {}
        if kind in DRAWN:
            return {None: DRAWN[kind](file)}
        if kind == "toy":
            return {mode: toy_errors(file, mode.precision, mode.prepare) for mode in self.modes}
        if kind not in TRAINED:
            raise Uncovered(f"kind {kind}")
        alone = read_case(self.folder, name, file)
        errors_of = trajectory_errors if kind == "trajectory" else forward_errors
        found: dict[Mode | None, Errors] = {}
        for mode in self.modes:
            case = self.joined(name, alone) if mode.compiled else alone
            found[mode] = errors_of(case, file, mode.precision, self.function(case, mode))
        return found

    def joined(self, name: str, alone: Case) -> Case:
        """The case on the plan of all files with its base."""
        if name not in self._joined:
            alike = {}
            for path in sorted(self.folder.glob("*.npz")):
                with suppress(Uncovered, *UNREADABLE):
                    case = read_case(self.folder, path.stem, load(path))
                    alike |= {path.stem: case} if case.base == alone.base else {}
            self._joined |= dict(zip(alike, together(list(alike.values())), strict=True))
        return self._joined[name]

    def function(self, case: Case, mode: Mode) -> Callable:
        """What a case is computed by: a training step, or everything about one batch."""
        if (case.base, mode) not in self._compiled or not mode.compiled:
            name, adam = case.base
            if mode.compiled:
                print(f"compiling the clamps of {name} in {mode}; minutes the first time", file=sys.stderr)
            function = (
                Measured(case)
                if adam is None
                else Step(case.model, case.task, case.plan, AdamW(betas=adam[0], eps=adam[1]))
            )
            self._compiled[case.base, mode] = mode.prepare(function)
        return self._compiled[case.base, mode]


# ---- one batch ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Logits, losses, gradients and activations of one batch, as a function that can be compiled like a step.

    Every site that some file holds is returned, so that one compiled graph does for all clamps.
    """

    case: Case

    def __call__(
        self, leaves: Mapping[str, Tensor], constants: Constants, draw: Mapping[str, Tensor], gates: StepGates
    ) -> tuple[Tensor, Tensor, Sequence[Tensor], dict[int, dict[str, Tensor]]]:
        case, seen = self.case, {}
        batch = case.task.assemble(constants.bank, draw)
        inputs = PassInputs(case.model, leaves, constants, batch, gates.strength, gates.clock)
        tap = run_passes(case.plan, inputs, seen=seen)
        logits = scored_logits(case.model.forward(leaves, constants.table, batch, tap), batch)
        losses = cross_entropy(logits, batch)
        gradients = torch.autograd.grad(losses.mean(), list(leaves.values()))
        held = {
            number: {site: x.detach() for site, x in sites.items() if not site.endswith(UNHELD)}
            for number, sites in seen.items()
        }
        return logits.detach(), losses.detach(), gradients, held


def forward_errors(case: Case, file: File, precision: torch.dtype, measured: Callable) -> Errors:
    """Activations, losses and gradients of one batch."""
    leaves, constants, gates, _ = tensors(case, precision)
    logits, losses, gradients, seen = measured(leaves, constants, case.draws[0], gates)
    compared = activations(file, case)
    slopes = dict(zip(leaves, gradients, strict=True))
    reference = {key.removeprefix("grad/"): value for key, value in file.items() if key.startswith("grad/")}
    scale = max(1.0, *(float(np.abs(value).max()) for value in reference.values()))
    return {
        "activations": max(
            (relative_error(a.found(seen[a.number][a.site]), a.expected(file[a.key])) for a in compared), default=0.0
        ),
        "losses": max(
            relative_error(logits[0, :, 0], file["logits"]),
            relative_error(losses[0, :, 0], file["loss_per_example"]),
            relative_error(losses.mean(), file["loss"]),
        ),
        "gradients": max(
            relative_error(slopes[parameter_name(name)], transposed(value), scale) for name, value in reference.items()
        ),
    }


def tensors(case: Case, precision: torch.dtype) -> tuple[dict[str, Tensor], Constants, StepGates, StepCounts]:
    """Weights that take gradient, the run's constants, the case's interventions in force, and what a step counts."""
    leaves = {name: x.detach().to(precision, copy=True).requires_grad_() for name, x in case.parameters.items()}
    table = case.model.position_table(case.task.layout.positions, precision)
    bank, count = {name: x.to(precision) for name, x in case.bank.items()}, len(case.plan.rows)
    strength = torch.ones(count, 1, dtype=precision)
    strength[[row.gate for row in case.plan.passes[-1].rows if row not in case.rows]] = 0.0
    gates = StepGates(strength, torch.zeros(1, 2).long())
    counts = StepCounts(torch.zeros(count, 1).long(), torch.ones(1).bool())
    return leaves, constants_of(case.plan, bank, table, 1, precision), gates, counts


# ---- some steps ---------------------------------------------------------------------------------------


def trajectory_errors(case: Case, file: File, precision: torch.dtype, step: Callable) -> Errors:
    """Losses, gradient norms and final weights of some Adam steps.

    Adam's first move of a weight is g / (|g| + eps), a sign. A gradient below single precision's rounding can
    have any, so there a tensor's weights are compared as a whole: 2-norm of the difference over its own.
    """
    leaves, constants, gates, counts = tensors(case, precision)
    adam = json.loads(str(file["adam"]))
    part = AdamW(adam["lr"], betas=(adam["b1"], adam["b2"]), eps=adam["eps"])
    optimizer = member_optimizer(leaves.items(), part)
    seen = []
    for draw in case.draws:
        state, hyper = optimizer.members_state(), optimizer.hyper()
        seen.append(optimizer.step(lambda d=draw, s=state, h=hyper: step(s, h, constants, d, gates, counts)))
    losses, _, norms = torch.stack(seen)[..., 0].unbind(1)
    final = dict(parameters(file, "param/"))
    weights_error = relative_error if precision == torch.float64 else norm_error
    return {
        "losses": relative_error(losses, file["loss"]),
        "gradients": relative_error(norms, file["grad_norm"]),
        "weights": max(weights_error(leaves[name], final[name].numpy()) for name in leaves),
    }


# ---- activations --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activation:
    """One array of activations that a file holds: which pass of the plan computes it, and at which site."""

    key: str
    number: int
    site: str

    @property
    def name(self) -> str:
        return self.key.rsplit("/", 1)[1].rsplit(".", 1)[-1]

    def expected(self, array: np.ndarray) -> np.ndarray:
        """What the file holds, without the query's label, which no model is given."""
        return array[:, :-1] if self.name == "label_embedding" else array

    def found(self, x: Tensor) -> Tensor:
        """The site's activation of the only member in the reference's shape."""
        x = x[0]
        if self.name in ("example_embedding", "logits_examples"):
            return x[:, ::2]
        if self.name == "label_embedding":
            return x[:, 1::2]
        if self.name == "z":
            return x.flatten(-2)
        return x.transpose(1, 2) if self.name in BY_HEAD else x


def activations(file: File, case: Case) -> list[Activation]:
    """What the file holds and a model computes.

    Raises:
        Uncovered: an activation without a site, or a pass that our plan has not.
    """
    found = []
    for prefix, number in {"act/": answering_pass(case), "pattern_pass/": pattern_pass(case)}.items():
        for key in (key for key in file if key.startswith(prefix)):
            if number is None:
                raise Uncovered(f"{prefix} without such a pass")
            donor = case.plan.passes[number].donor
            model = case.model if donor is None else case.plan.donors[donor].model
            # without an MLP the reference holds what has no meaning
            if model.neurons is not None or key.rsplit(".", 1)[-1] not in OF_MLP:
                found.append(Activation(key, number, site_name(key.removeprefix(prefix), model)))
    return found


def answering_pass(case: Case) -> int:
    """The last pass of the reference: the donor's where it gives the logits, else the run's own."""
    inner = (address.index for row in case.rows for address in row.inputs if address.kind == "nested")
    return next(inner, len(case.plan.passes) - 1)


def pattern_pass(case: Case) -> int | None:
    """The other pass of the trained model that has interventions."""
    earlier = {address.index for row in case.rows for address in row.inputs if address.kind == "pass"}
    passes = case.plan.passes
    return next((number for number in sorted(earlier) if passes[number].rows and passes[number].donor is None), None)


def site_name(reference: str, model: Transformer) -> str:
    """``layer0.pattern`` as ``blocks.0.attn.hook_pattern``."""
    if reference in SITES:
        return SITES[reference]
    layer, _, leaf = reference.partition(".")
    if leaf not in BLOCK_SITES:
        raise Uncovered(f"activation {reference}")
    # without an MLP the block ends where the reference calls it the middle
    leaf = "block_out" if leaf == "resid_mid" and model.neurons is None else leaf
    return f"blocks.{layer.removeprefix('layer')}.{BLOCK_SITES[leaf]}"


def modes_of(precision: str, mode: str) -> list[Mode]:
    """Every mode that was asked for."""
    precisions = [p for p in LIMITS if precision in (str(p).removeprefix("torch."), "both")]
    compiled = [c for c in (False, True) if mode in ("compiled" if c else "eager", "both")]
    return [Mode(p, c) for p, c in itertools.product(precisions, compiled)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of reference files")
    parser.add_argument("--precision", choices=["float64", "float32", "both"], default="both")
    parser.add_argument("--mode", choices=["eager", "compiled", "both"], default="both")
    settings = parser.parse_args()
    keep_compiled(Path.home() / ".cache" / "opsin" / "kernels")
    torch.set_num_threads(1)
    sys.exit(main(settings.folder, modes_of(settings.precision, settings.mode)))
