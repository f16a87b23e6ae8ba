#!/usr/bin/env python3
"""Compare Opsin with the reference system's numbers, file by file.

    python scripts/check_reference.py DIR

Works from what a file contains (kind, config, base, options) and not from its name. Prints one line
a file with the largest relative error of activations, losses and gradients, and a last line with
the count and the worst. Exit 0 if every file is covered and passes, else 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opsin.callbacks import Ablate, Clamp, CopyFromPattern, Disallow, HeadTemperature, PerfectPreviousInput, Preserve
from opsin.callbacks.passes import PRESERVED
from opsin.model import Transformer, forward, position_table
from opsin.optim import MemberAdam
from opsin.plan import Plan, Writer, build_plan
from opsin.scene import Scene, constants_of, run_passes
from opsin.step import Moment, Step, cross_entropy, observe, scored_logits
from opsin.task import Batch
from opsin.tasks import Exemplars, FewShot, Kind

LIMIT = 1e-9
# entries this large are masks, not measurements; they must agree exactly
MASK = 1e8
INPUT_KINDS = ("donor", "trajectory_batches")
OPTIONS = {
    "ablate_embedding",
    "ablate_heads",
    "prev_token_heads",
    "prev_token_head_strength",
    "prev_token_only_label",
    "induction_heads",
    "induction_head_strength",
    "match_heads",
    "match_head_temperature",
    "disallow_prev_token_heads",
    "disallow_prev_token_only_label",
    "final_layer_silence_non_label_attn",
    "set_head_temperature",
    "preserve_patterns",
    "preserve_values",
    "preserve_queries",
    "preserve_keys",
    "perfect_copy_from_head_pattern",
    "specific_fn",
}
ACTIVATIONS = {
    "norm_out": "ln1.hook_normalized",
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
    "mlp_norm_out": "ln2.hook_normalized",
    "mlp_out": "hook_mlp_out",
    "block_out": "hook_resid_post",
}
BY_HEAD = {"q_prerope", "k_prerope", "q", "k", "v"}


# what a damaged file, a missing base and a file without an entry it should have raise
UNREADABLE = (OSError, KeyError, ValueError, StopIteration, zipfile.BadZipFile)


class Uncovered(Exception):
    """A file that asks for something Opsin does not do yet."""


class Given(Exemplars):
    """Exemplars that are already in memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def load(self) -> np.ndarray:
        return self.array


@dataclass(frozen=True)
class Case:
    """Model, task and weights of one base file."""

    model: Transformer
    task: FewShot
    parameters: dict[str, Tensor]
    batch: Batch


Errors = dict[str, float]


def main(folder: Path) -> int:
    names = sorted(path.name for path in folder.glob("*.npz"))
    if not names:
        print(f"{folder}: no .npz files")
        return 1
    worst, failed, uncovered = 0.0, 0, 0
    for name in names:
        try:
            errors = check(folder, load(folder / name))
        except Uncovered as reason:
            uncovered += 1
            print(f"{name:48s} uncovered: {reason}")
            continue
        except UNREADABLE as error:
            failed += 1
            print(f"{name:48s} FAIL  unreadable: {type(error).__name__}: {error}")
            continue
        largest = max(errors.values(), default=0.0)
        worst, failed = max(worst, largest), failed + (not largest < LIMIT)
        shown = "  ".join(f"{what} {error:.1e}" for what, error in errors.items()) or "inputs of other files"
        print(f"{name:48s} {'ok  ' if largest < LIMIT else 'FAIL'}  {shown}")
    covered = len(names) - uncovered
    print(f"{len(names)} files, {covered} covered, {failed} failed, {uncovered} uncovered; worst error {worst:.1e}")
    return int(failed + uncovered > 0)


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def check(folder: Path, file: dict[str, np.ndarray]) -> Errors:
    """Largest relative error of each group of numbers in one file."""
    kind = str(file["kind"])
    if kind in INPUT_KINDS:
        return {}
    if kind not in ("base", "clamp", "trajectory"):
        raise Uncovered(f"kind {kind}")
    base = file if kind == "base" else load(folder / f"{file['base']}.npz")
    options = json.loads(str(file["options"])) if "options" in file else {}
    if unknown := set(options) - OPTIONS:
        raise Uncovered(f"options {', '.join(sorted(unknown))}")
    if kind == "trajectory":
        return check_trajectory(folder, file, base, options)
    case = build_case(json.loads(str(base["config"])), base, base["examples"], base["labels"])
    return check_forward(case, file, plan_for(case, options))


def build_case(config: dict, weights: dict, examples: np.ndarray, labels: np.ndarray) -> Case:
    """The model of a config with a base file's weights, and these examples ``[B, N, F]`` as one batch."""
    batch_size, items, features = examples.shape
    bank = examples.reshape(batch_size * items, 1, features).astype(np.float64)
    task = few_shot(config, bank)
    classes = np.arange(batch_size * items).reshape(1, batch_size, items)
    batch = task.assemble({"exemplars": torch.from_numpy(bank)}, draw(classes, labels[None]))
    model = Transformer(
        layers=config["layers"],
        width=config["width"],
        heads=config["heads"],
        mlp_ratio=config["mlp_ratio"],
        norm=config["norm"],
        causal=config["causal"],
        positions=config["positions"],
        position_base=config["position_base"],
    )
    return Case(model, task, dict(parameters(weights, "param/")), batch)


def few_shot(config: dict, bank: np.ndarray) -> FewShot:
    # one distractor class fills the context, so that any number of pairs and labels makes a task
    kinds = [Kind(distractor_copies=None)]
    return FewShot(Given(bank), config["labels"], context=config["pairs"], train_classes=len(bank), kinds=kinds)


def draw(classes: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
    """The reference's choices (``[M, B, N]``) as the task's own."""
    return {
        "classes": torch.from_numpy(classes.astype(np.int64)),
        "exemplars": torch.zeros(classes.shape, dtype=torch.int64),
        "labels": torch.from_numpy(labels.astype(np.int64)),
        "answers": torch.from_numpy(labels[..., -1].astype(np.int64)),
    }


def parameters(file: dict[str, np.ndarray], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Opsin's name and ``[1, input, output]`` tensor of every weight the file holds under the prefix."""
    for key, value in file.items():
        if not key.startswith(prefix):
            continue
        name, tensor = opsin_name(key.removeprefix(prefix)), torch.from_numpy(value.astype(np.float64))
        # matrices are output x input there; the position table and the label embedding are d x entries
        yield name, (tensor.T if tensor.dim() == 2 else tensor)[None].contiguous()


def opsin_name(reference: str) -> str:
    """``layer0.qkv.weight`` as ``blocks.0.attn.W_QKV``."""
    outside = {
        "example_embed.weight": "embed.W_F",
        "example_embed.bias": "embed.b_F",
        "label_embed.weight": "embed.W_E",
        "pos_embed.weight": "pos_embed.W_pos",
        "final_norm.weight": "ln_final.w",
        "final_norm.bias": "ln_final.b",
        "unembed.weight": "unembed.W_U",
        "unembed.bias": "unembed.b_U",
    }
    if reference in outside:
        return outside[reference]
    inside = {
        "norm.weight": "ln1.w",
        "norm.bias": "ln1.b",
        "qkv.weight": "attn.W_QKV",
        "proj.weight": "attn.W_O",
        "mlp_norm.weight": "ln2.w",
        "mlp_norm.bias": "ln2.b",
        "mlp.fc1.weight": "mlp.W_in",
        "mlp.fc1.bias": "mlp.b_in",
        "mlp.fc2.weight": "mlp.W_out",
        "mlp.fc2.bias": "mlp.b_out",
    }
    layer, leaf = reference.split(".", 1)
    return f"blocks.{layer.removeprefix('layer')}.{inside[leaf]}"


def plan_for(case: Case, options: dict) -> Plan:
    """The callbacks a user would attach for these options, as a plan."""
    sites = case.model.sites(case.task)
    if options.get("specific_fn") is not None:
        return build_plan(perfect_input(options), sites, members=1, steps=1, batch_size=1)
    writers = [*ablations(options), *patterns(options), *scores(options, case.model.layers - 1)]
    if preserved := [name for name in PRESERVED if options.get(f"preserve_{name}")]:
        writers.append(Preserve(preserved, order=0))
    if head := options.get("perfect_copy_from_head_pattern"):
        writers.append(CopyFromPattern(head))
    return build_plan(writers, sites, members=1, steps=1, batch_size=1)


def perfect_input(options: dict) -> list[Writer]:
    """The mode in which the reference ignores all other options but two."""
    if options["specific_fn"] != "perfect_prev_token_input":
        raise Uncovered(f"specific_fn {options['specific_fn']}")
    if head := options.get("perfect_copy_from_head_pattern"):
        return [CopyFromPattern(head, perfect_input=True)]
    writers: list[Writer] = [PerfectPreviousInput()]
    if heads := [head for head in options.get("ablate_heads") or () if head.startswith("1:")]:
        writers.append(Ablate(heads=heads))
    return writers


def ablations(options: dict) -> list[Writer]:
    writers: list[Writer] = []
    if options.get("ablate_embedding"):
        writers.append(Ablate(sites=["hook_embed"]))
    if heads := options.get("ablate_heads"):
        writers.append(Ablate(heads=heads, order=1))
    return writers


def patterns(options: dict) -> list[Writer]:
    """Clamped patterns; where two touch one head the later of the reference's order wins."""
    writers: list[Writer] = []
    if heads := options.get("prev_token_heads"):
        # beside preserved patterns the reference's flag is void
        labels_only = options.get("prev_token_only_label", False) and not options.get("preserve_patterns")
        strength = options.get("prev_token_head_strength", 1.0)
        writers.append(Clamp(heads, "previous_token", strength=strength, labels_only=labels_only, order=1))
    if heads := options.get("induction_heads"):
        writers.append(Clamp(heads, "induction", strength=options.get("induction_head_strength", 1.0), order=2))
    if heads := options.get("match_heads"):
        writers.append(Clamp(heads, "match", temperature=options.get("match_head_temperature", 0.0), order=3))
    return writers


def scores(options: dict, last: int) -> list[Writer]:
    """Changed scores; temperatures first."""
    writers: list[Writer] = []
    triplets = [text.rsplit(":", 1) for text in options.get("set_head_temperature") or ()]
    tempered = {head: float(temperature) for head, temperature in triplets}
    if tempered:
        writers.append(HeadTemperature(tempered, order=0))
    if heads := options.get("disallow_prev_token_heads"):
        labels_only = options.get("disallow_prev_token_only_label", False)
        # in a layer whose temperature is set the reference's flag is void
        hot = {head.split(":")[0] for head in tempered}
        for void in (True, False):
            some = [head for head in heads if (head.split(":")[0] in hot) == void]
            if some:
                writers.append(Disallow(some, "previous_token", labels_only=labels_only and not void, order=1))
    if silent := options.get("final_layer_silence_non_label_attn"):
        writers.append(Disallow([f"{last}:{head}" for head in silent], "non_labels", order=2))
    return writers


def check_forward(case: Case, file: dict[str, np.ndarray], plan: Plan) -> Errors:
    """Activations, losses and gradients of one batch."""
    table = position_table(case.model, case.task.layout.positions, torch.float64)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.parameters.items()}
    moment = moment_of(plan)
    constants = constants_of(plan, {}, table, 1, torch.float64)
    tap = run_passes(plan, Scene(case.model, leaves, constants, case.batch, moment.gates, moment.clock))
    logits = scored_logits(forward(leaves, table, case.batch, case.model, tap), case.batch)
    losses = cross_entropy(logits, case.batch)[0, :, 0]
    gradients = dict(zip(leaves, torch.autograd.grad(losses.mean(), list(leaves.values())), strict=True))
    sites = [site.name for site in case.model.sites(case.task)]
    seen = observe(case.model, leaves, table, case.batch, tap, sites)
    found = activations(seen, case)
    compared = [key for key in file if key.startswith("act/") and key in found]
    return {
        "activations": max((relative_error(found[key], file[key]) for key in compared), default=0.0),
        "losses": max(
            relative_error(logits[0, :, 0], file["logits"]),
            relative_error(losses, file["loss_per_example"]),
            relative_error(losses.mean(), file["loss"]),
        ),
        "gradients": max(relative_error(gradients[name], value) for name, value in reference_gradients(file)),
    }


def moment_of(plan: Plan) -> Moment:
    """Every intervention in force."""
    count = len(plan.masks)
    return Moment(torch.ones(count, 1, dtype=torch.float64), torch.zeros(1, 2).long(), torch.zeros(count, 1).long())


def reference_gradients(file: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for key, value in file.items():
        if key.startswith("grad/"):
            yield opsin_name(key.removeprefix("grad/")), (value.T if value.ndim == 2 else value)[None]


def activations(seen: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """What was seen at the sites, under the reference's names and in its shapes ``[B, ...]``."""
    one = {name: tensor[0] for name, tensor in seen.items()}
    every_other = slice(0, None, 2)
    found = {
        "act/token_embedding": one["hook_embed"],
        "act/example_embedding": one["hook_embed"][:, every_other],
        "act/embedding": one["blocks.0.hook_resid_pre"],
        "act/final_norm_out": one["ln_final.hook_normalized"],
        "act/logits_all_tokens": one["hook_logits"],
        "act/logits_examples": one["hook_logits"][:, every_other],
    }
    if "hook_pos_embed" in one:
        found["act/pos_embedding"] = one["hook_pos_embed"]
    for layer in range(case.model.layers):
        block = {
            name: one[f"blocks.{layer}.{site}"] for name, site in ACTIVATIONS.items() if f"blocks.{layer}.{site}" in one
        }
        block = {name: x.transpose(1, 2) if name in BY_HEAD else x for name, x in block.items()}
        block["z"] = block["z"].flatten(-2)
        # without an MLP the block ends where the reference calls it the middle
        block.setdefault("resid_mid", block["block_out"])
        found |= {f"act/layer{layer}.{name}": x for name, x in block.items()}
    return found


def check_trajectory(folder: Path, file: dict, base: dict, options: dict) -> Errors:
    """Losses, gradient norms and final weights of some Adam steps."""
    inputs = next(data for path in folder.glob("*.npz") if str((data := load(path))["kind"]) == "trajectory_batches")
    config, adam = json.loads(str(file["config"])), json.loads(str(file["adam"]))
    bank = inputs["bank"][:, None].astype(np.float64)
    case = build_case(config, base, base["examples"], base["labels"])
    task, plan = few_shot(config, bank), plan_for(case, options)
    leaves = [(name, tensor.requires_grad_()) for name, tensor in case.parameters.items()]
    betas = (adam["b1"], adam["b2"])
    optimizer = MemberAdam(leaves, adam["lr"], 0.0, None, betas)
    step = Step(case.model, task, plan, betas, adam["eps"])
    table = position_table(case.model, task.layout.positions, torch.float64)
    constants = constants_of(plan, {"exemplars": torch.from_numpy(bank)}, table, 1, torch.float64)
    moment = moment_of(plan)
    seen = []
    for classes, labels in zip(inputs["class_idx"], inputs["labels"], strict=True):
        drawn = draw(classes[None], labels[None])
        state, hyper = optimizer.adam_state(), optimizer.hyper()
        seen.append(optimizer.step(lambda d=drawn, s=state, h=hyper: step(s, h, constants, d, moment)))
    losses, _, norms = torch.stack(seen)[..., 0].unbind(1)
    final = dict(parameters(file, "param/"))
    return {
        "losses": relative_error(losses, file["loss"]),
        "gradients": relative_error(norms, file["grad_norm"]),
        "weights": max(relative_error(tensor, final[name].numpy()) for name, tensor in leaves),
    }


def relative_error(found: Tensor, expected: np.ndarray) -> float:
    """Largest difference over the larger of the entry and the array's root mean square.

    Where the reference is stored in single precision, its rounding (half a unit in the last place)
    is not counted. Masked entries must agree exactly.
    """
    ours = np.broadcast_to(found.detach().numpy(), expected.shape)
    theirs = expected.astype(np.float64)
    masked = np.abs(theirs) >= MASK
    if not np.array_equal(ours[masked], theirs[masked]) or not np.isfinite(ours).all():
        return float("inf")
    difference = np.abs(ours - theirs)[~masked]
    if expected.dtype == np.float32:
        difference = np.maximum(difference - np.spacing(np.abs(expected[~masked])) / 2, 0.0)
    # gradients that are zero in theory are rounding noise, so below this size the tolerance is absolute (1e-15)
    size = max(float(np.sqrt(np.mean(theirs[~masked] ** 2))) if (~masked).any() else 0.0, 1e-6)
    return float(np.max(difference / np.maximum(np.abs(theirs[~masked]), size), initial=0.0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of reference files")
    sys.exit(main(parser.parse_args().folder))
