"""What a reference file holds, in Opsin's words: weights, inputs and options; and how far apart numbers are.

Works from what a file contains (kind, config, base, options, donor) and not from its name.

Legend: M members, B batch, N items with the query, F features.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opsin.callbacks import (
    Ablate,
    Clamp,
    CopyFromPattern,
    Disallow,
    Graft,
    HeadTemperature,
    PerfectPreviousInput,
    Preserve,
)
from opsin.callbacks.writers.preserve import PRESERVED
from opsin.interventions.build_plan import Writer, build_plan
from opsin.interventions.donors import Donor, donor_from
from opsin.interventions.intervention import Intervention
from opsin.interventions.plan import Plan, PlannedIntervention
from opsin.model.sites import SiteTable
from opsin.model.transformer import Transformer
from opsin.tasks import Exemplars, FewShot, Kind

File = dict[str, np.ndarray]

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}
# reference arrays below this are the rounding of numbers that are zero in theory
ZERO, SMALLEST = 1e-12, 1e-6
# entries this large are masks, not measurements; each is compared by itself
MASK = 1e8
# the reference system's own file names
NO_INFORMATION = {"graft_in_model_cfg", "graft_in_model_ckpt", "graft_out_model_cfg", "graft_out_model_ckpt"}
OPTIONS = NO_INFORMATION | {
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
    "graft_in_model_till_layer",
    "graft_out_model_from_layer",
    "specific_fn",
}
PARAMETERS = {
    "example_embed.weight": "embed.W_F",
    "example_embed.bias": "embed.b_F",
    "label_embed.weight": "embed.W_E",
    "pos_embed.weight": "pos_embed.W_pos",
    "final_norm.weight": "ln_final.w",
    "final_norm.bias": "ln_final.b",
    "unembed.weight": "unembed.W_U",
    "unembed.bias": "unembed.b_U",
}
BLOCK_PARAMETERS = {
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
# what a damaged file, a missing base, an entry of another kind and a file without an entry it should have raise
UNREADABLE = (OSError, KeyError, TypeError, ValueError, StopIteration, zipfile.BadZipFile)


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
    """A file's model, its clamps, and the tensors they act on, in double precision.

    Args:
        base: name of the file with its weights and inputs, and betas and eps of Adam where it is trained; cases that
            agree in it differ in their clamps alone.
        rows: rows of the plan's own pass that are the file's.
    """

    base: tuple[str, tuple[tuple[float, float], float] | None]
    model: Transformer
    task: FewShot
    writers: list[Writer]
    plan: Plan
    rows: tuple[PlannedIntervention, ...]
    parameters: dict[str, Tensor]
    bank: dict[str, Tensor]
    draws: list[dict[str, Tensor]]


def load(path: Path) -> File:
    """Everything in a file."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def of_kind(folder: Path, kind: str) -> File:
    """The folder's file of this kind."""
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                found = str(file["kind"]) == kind
        except UNREADABLE:
            continue  # it fails on its own line
        if found:
            return load(path)
    raise KeyError(f"no file of kind {kind}")


def read_case(folder: Path, name: str, file: File) -> Case:
    """The case of the base, clamp or trajectory file of that name.

    Raises:
        Uncovered: options that Opsin does not know.
    """
    name = name if str(file["kind"]) == "base" else str(file["base"])
    base = load(folder / f"{name}.npz")
    options = json.loads(str(file["options"])) if "options" in file else {}
    config, weights = json.loads(str(base["config"])), dict(parameters(base, "param/"))
    bank, draws = inputs(folder, file, base)
    # one distractor class fills the context, so that any number of pairs and labels makes a task
    kinds = [Kind(distractor_copies=None)]
    task = FewShot(Given(bank), config["labels"], context=config["pairs"], train_classes=len(bank), kinds=kinds)
    model = transformer(config, weights)
    writers = writers_for(options, model.layers, read_donor(folder, file) if "donor" in file else None)
    plan = build_plan(writers, model.sites(task), members=1, steps=1, batch_size=1)
    adam, exemplars = json.loads(str(file["adam"])) if "adam" in file else None, {"exemplars": torch.from_numpy(bank)}
    key = (name, ((adam["b1"], adam["b2"]), adam["eps"]) if adam else None)
    return Case(key, model, task, writers, plan, plan.passes[-1].rows, weights, exemplars, draws)


@dataclass(frozen=True)
class AllOf:
    """The writers of several files as one, each file's interventions with orders of their own."""

    files: list[list[Writer]]

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        return [
            replace(item, order=FILE * number + (item.order or 0))
            for number, writers in enumerate(self.files)
            for writer in writers
            for item in writer.interventions(sites)
        ]


FILE = 10
"""More than the orders of one file."""


def together(cases: Sequence[Case]) -> list[Case]:
    """The same cases on one plan that has the clamps of all, so that one compiled graph does for all of them."""
    first = cases[0]
    writer = AllOf([case.writers for case in cases])
    plan = build_plan([writer], first.model.sites(first.task), members=1, steps=1, batch_size=1)
    rows = plan.passes[-1].rows
    of_case = [
        tuple(row for row in rows if (row.intervention.order or 0) // FILE == number) for number in range(len(cases))
    ]
    return [replace(case, plan=plan, rows=chosen) for case, chosen in zip(cases, of_case, strict=True)]


def inputs(folder: Path, file: File, base: File) -> tuple[np.ndarray, list[dict[str, Tensor]]]:
    """Feature vectors ``[classes, 1, F]`` and the choices behind each batch."""
    if str(file["kind"]) == "trajectory":
        batches = of_kind(folder, "trajectory_batches")
        pairs = zip(batches["class_idx"], batches["labels"], strict=True)
        return batches["bank"][:, None].astype(np.float64), [draw(classes, labels) for classes, labels in pairs]
    batch_size, items, features = base["examples"].shape
    classes = np.arange(batch_size * items).reshape(batch_size, items)
    bank = base["examples"].reshape(batch_size * items, 1, features).astype(np.float64)
    return bank, [draw(classes, base["labels"])]


def draw(classes: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
    """The reference's choices (``[B, N]``) as the task's own."""
    classes, labels = (torch.from_numpy(array.astype(np.int64))[None] for array in (classes, labels))
    return {"classes": classes, "exemplars": torch.zeros_like(classes), "labels": labels, "answers": labels[..., -1]}


def transformer(config: dict, weights: dict[str, Tensor]) -> Transformer:
    """The model of a config; the weights say how many learned positions it has."""
    settings = ("layers", "width", "heads", "mlp_ratio", "norm", "causal", "positions", "position_base")
    learned = {"max_positions": weights["pos_embed.W_pos"].shape[1]} if "pos_embed.W_pos" in weights else {}
    return Transformer(**{name: config[name] for name in settings}, **learned)


def parameters(file: File, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Opsin's name and ``[1, input, output]`` tensor of every weight the file holds under the prefix."""
    for key, value in file.items():
        if key.startswith(prefix):
            yield parameter_name(key.removeprefix(prefix)), torch.from_numpy(transposed(value).astype(np.float64))


def parameter_name(reference: str) -> str:
    """``layer0.qkv.weight`` as ``blocks.0.attn.W_QKV``."""
    if reference in PARAMETERS:
        return PARAMETERS[reference]
    layer, leaf = reference.split(".", 1)
    return f"blocks.{layer.removeprefix('layer')}.{BLOCK_PARAMETERS[leaf]}"


def transposed(weight: np.ndarray) -> np.ndarray:
    """A weight as Opsin's ``[1, ...]``; matrices are output x input there, tables width x entries."""
    return np.ascontiguousarray(weight.T if weight.ndim == 2 else weight)[None]


# ---- options ------------------------------------------------------------------------------------------


def read_donor(folder: Path, file: File) -> tuple[Donor, dict]:
    """The donor of a graft file, and the clamps it has."""
    name = str(file["donor"])
    donated = load(folder / f"{name}.npz")
    weights = dict(parameters(donated, "param/"))
    donor = donor_from(name, transformer(json.loads(str(donated["config"])), weights), weights)
    return donor, json.loads(str(file["donor_options"])) if "donor_options" in file else {}


def writers_for(options: dict, layers: int, donated: tuple[Donor, dict] | None = None) -> list[Writer]:
    """The callbacks a user would attach to a model of so many layers for these options.

    Raises:
        Uncovered: options that Opsin does not know.
    """
    if unknown := set(options) - OPTIONS:
        raise Uncovered(f"options {', '.join(sorted(unknown))}")
    if options.get("specific_fn") is not None:
        return perfect_input(options)
    writers = [*ablations(options), *patterns(options), *scores(options, layers - 1), *grafts(options, donated)]
    if preserved := [name for name in PRESERVED if options.get(f"preserve_{name}")]:
        writers.append(Preserve(preserved, order=0))
    if head := options.get("perfect_copy_from_head_pattern"):
        writers.append(CopyFromPattern(head, order=0))
    return writers


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
    """Silenced embeddings and heads; after what is preserved."""
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
            chosen = [head for head in heads if (head.split(":")[0] in hot) == void]
            if chosen:
                writers.append(Disallow(chosen, "previous_token", labels_only=labels_only and not void, order=1))
    if silent := options.get("final_layer_silence_non_label_attn"):
        writers.append(Disallow([f"{last}:{head}" for head in silent], "non_labels", order=2))
    return writers


def grafts(options: dict, donated: tuple[Donor, dict] | None) -> list[Writer]:
    """Blocks of a donor, which has clamps of its own where it gives its lower blocks."""
    writers: list[Writer] = []
    for key, part in {"graft_in_model_till_layer": "lower", "graft_out_model_from_layer": "upper"}.items():
        if (layer := options.get(key)) is None:
            continue
        if donated is None:
            raise KeyError("donor")
        donor, donor_options = donated
        # the reference runs a donor of upper blocks without the donor's clamps
        inside = writers_for(donor_options, donor.model.layers) if part == "lower" else []
        writers.append(Graft(donor, layer, part, donor_callbacks=inside, order=1))
    return writers


# ---- errors -------------------------------------------------------------------------------------------


def relative_error(found: Tensor, expected: np.ndarray, scale: float = 1.0) -> float:
    """Largest difference over the larger of the entry and the array's root mean square.

    Where the reference is stored in single precision, its rounding (half a unit in the last place) is not
    counted. A mask is compared with itself alone. Nothing is compared with less than 1e-6, and an array that
    is zero in theory with what puts the limit at five roundings of a number of size ``scale``.
    """
    computed = np.broadcast_to(found.detach().numpy().astype(np.float64), expected.shape)
    wanted = expected.astype(np.float64)
    if not np.isfinite(computed).all():
        return float("inf")
    difference = np.abs(computed - wanted)
    if expected.dtype == np.float32:
        difference = np.maximum(difference - np.spacing(np.abs(expected)) / 2, 0.0)
    masked = np.abs(wanted) >= MASK
    size = root_mean_square(wanted[~masked])
    noise = 5 * torch.finfo(found.dtype).eps * scale / LIMITS[found.dtype]
    size = max(size, SMALLEST, noise if size < ZERO else 0.0)
    return float(np.max(difference / np.maximum(np.abs(wanted), np.where(masked, 0.0, size)), initial=0.0))


def norm_error(found: Tensor, expected: np.ndarray) -> float:
    """2-norm of the difference over that of the array."""
    return root_mean_square(found.detach().numpy() - expected) / root_mean_square(expected)


def root_mean_square(x: np.ndarray) -> float:
    """0 of nothing."""
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0
