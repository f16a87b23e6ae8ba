"""What the reference system's files hold beside the transformer's numbers: random draws, and the toy of tensor factors.

Legend: n dimensions of a factor, N items of a sequence with the query.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from reference_files import File, Given, Uncovered, parameter_name, relative_error, transposed
from torch import Tensor

from opsin.interventions.apply import overwrite
from opsin.model.parameters import TRUNCATED_STD
from opsin.model.protocol import init_parameters
from opsin.model.transformer import Transformer
from opsin.tasks import FewShot

STANDARD_ERRORS = 5.0
"""How far a measured frequency or moment may lie from what it should be; once in two million by chance."""

# ---- the toy ------------------------------------------------------------------------------------------

FACTORS = ("a", "b", "c")


@dataclass(frozen=True)
class ToyStep:
    """One step of gradient descent on three factors of a tensor, some of them held at the truth.

    Loss 0.5 mean (a* b* c* - a b c)^2, rate 1 (the toy of Singh et al. 2024).
    """

    def __call__(
        self, vectors: Float[Tensor, "3 n"], truth: Float[Tensor, "3 n"], gates: Float[Tensor, "3 1"]
    ) -> tuple[Float[Tensor, "3"], Float[Tensor, "3 n"]]:
        """Loss and both progress measures before the step, and the factors after it."""
        held = overwrite(vectors, truth, gates)
        loss = toy_loss(held, truth)
        (slope,) = torch.autograd.grad(loss, [vectors])
        with torch.no_grad():
            a, right = held[0], truth[0]
            angle = 1 - (a * right).sum() ** 2 / ((a * a).sum() * (right * right).sum())
            weights = torch.stack([truth.new_zeros(1), truth.new_ones(1), truth.new_ones(1)])
            ends = [toy_loss(overwrite(sign * held, truth, weights), truth) for sign in (1, -1)]
            return torch.stack([loss, angle, torch.minimum(*ends)]), held - slope


def toy_loss(vectors: Float[Tensor, "3 n"], truth: Float[Tensor, "3 n"]) -> Tensor:
    """Half the mean square of the difference between two products of three vectors."""
    opsin, reference = (x[0][:, None, None] * x[1][:, None] * x[2] for x in (vectors, truth))
    return 0.5 * (reference - opsin).square().mean()


def toy_errors(file: File, precision: torch.dtype, prepare: Callable) -> dict[str, float]:
    """Losses and progress measures of every clamp, against those of the same precision."""
    prefix = "float32_" if precision == torch.float32 else ""
    names = {"losses": "loss", "angles": "progress1_cos", "losses with b and c true": "progress2_loss"}
    truth, start = (
        torch.stack([torch.from_numpy(file[f"{what}_{name}"]).to(precision) for name in FACTORS])
        for what in ("true", "init")
    )
    step, errors = prepare(ToyStep()), dict.fromkeys(names, 0.0)
    for held in sorted(key.removeprefix("loss_") for key in file if key.startswith("loss_")):
        gates = torch.tensor([[float(name in held and held != "none")] for name in FACTORS], dtype=precision)
        vectors, seen = start, []
        for _ in range(len(file[f"loss_{held}"])):
            measured, vectors = step(vectors.detach().requires_grad_(), truth, gates)
            seen.append(measured.detach())
        for (group, name), found in zip(names.items(), torch.stack(seen, 1), strict=True):
            errors[group] = max(errors[group], relative_error(found, file[f"{prefix}{name}_{held}"]))
    return errors


# ---- the sampler --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequences:
    """Class and label of every item, the query last: ``[sequences, N]`` each."""

    classes: np.ndarray
    labels: np.ndarray

    @property
    def types(self) -> np.ndarray:
        """1 for a context item of the query's class, 2 for another, 3 for the query."""
        types = np.where(self.classes == self.classes[:, -1:], 1, 2)
        types[:, -1] = 3
        return types

    @property
    def first(self) -> np.ndarray:
        """Whether the item of the query's class comes first."""
        return (self.types[:, 0] == 1).astype(int)

    @property
    def distractor(self) -> np.ndarray:
        """Place in the context of the other class."""
        return self.first[:, None]

    def well_formed(self) -> bool:
        """One context item has the query's class and label, the other has neither."""
        same = self.labels[:, :-1] == self.labels[:, -1:]
        return bool(np.array_equal(same, self.types[:, :-1] == 1) and (same.sum(1) == 1).all())


def check_sampler(file: File) -> dict[str, float]:
    """Our sequences and the file's: what can occur is the same, and each is as frequent as it should be.

    Returns:
        ``structure``: 0 where every set and every sequence agrees, else infinity; ``frequencies``: the largest
        distance from the stated law, of ours or the file's, in units of five standard errors.
    """
    pairs, tests, shown = file["relabel_pairs_all"], file["test_class_idx"], file["val_exemplar_idx"]
    if file["class_idx"].shape[1] != 3:
        raise Uncovered("sequences of other than two pairs and a query")
    task = FewShot(
        Given(np.zeros((int(tests.max()) + 1, int(shown.max()) + 1, 1), np.float32)),
        n_labels=int(pairs.max()) + 1,
        train_classes=int(file["class_idx"].max()) + 1,
        heldout_classes=int(tests.max()) + 1 - int(tests.min()),
        train_exemplars=int(file["exemplar_idx"].max()) + 1,
        batch_size=len(tests),
    )
    splits = {name: task.draw([0], 0, 1, name) for name in ("train", *(f"eval/{e}" for e in task.evaluations))}
    drawn = {name: {what: x[0, 0].numpy() for what, x in split.items()} for name, split in splits.items()}
    train = drawn["train"]
    opsin, reference = Sequences(train["classes"], train["labels"]), Sequences(file["class_idx"], file["labels"])
    heldout, exemplars = drawn["eval/classes"]["classes"], drawn["eval/exemplars"]["exemplars"]
    same = [
        (opsin.classes, reference.classes),
        (train["exemplars"], file["exemplar_idx"]),
        (heldout, tests),
        (exemplars, shown),
        (label_pairs(train["labels"]), label_pairs(file["relabel_pairs_train"])),
        (label_pairs(reference.labels), label_pairs(file["relabel_pairs_train"])),
        (label_pairs(drawn["eval/relabellings"]["labels"]), label_pairs(file["relabel_pairs_val"])),
    ]
    agree = all(np.array_equal(np.unique(a), np.unique(b)) for a, b in same)
    agree &= opsin.well_formed() and reference.well_formed() and np.array_equal(reference.types, file["types"])
    distances = [
        *(
            apart
            for sequences in (opsin, reference)
            for apart in law_distances(sequences, label_pairs(file["relabel_pairs_train"]))
        ),
        *(even_distance(x[:, -1] - tests.min(), tests.max() - tests.min() + 1) for x in (heldout, tests)),
        *(even_distance(*joint(x - shown.min(), shown.max() - shown.min() + 1)) for x in (exemplars, shown)),
    ]
    return {"structure": 0.0 if agree else float("inf"), "frequencies": max(distances) / STANDARD_ERRORS}


def law_distances(sequences: Sequences, pairs: np.ndarray) -> Iterator[float]:
    """Standard errors from the law: even classes, order of types and label pairs in either order, and their labels."""
    query, count = sequences.classes[:, -1], int(sequences.classes.max()) + 1
    other = np.take_along_axis(sequences.classes, sequences.distractor, 1)[:, 0]
    yield even_distance(query, count)
    yield even_distance(other, count)
    yield even_distance((other - query) % count - 1, count - 1)
    yield even_distance(sequences.first, 2)
    label, another = sequences.labels[:, -1], np.take_along_axis(sequences.labels, sequences.distractor, 1)[:, 0]
    named = np.searchsorted(np.sort(pairs), label_pairs(np.stack([label, another], 1)))
    yield even_distance(2 * named + (label > another), 2 * len(pairs))
    yield distance(label, np.bincount(np.ravel([divmod(pair, LABELS) for pair in pairs])) / (2 * len(pairs)))


LABELS = 1000
"""More than there are, so that two labels make one number."""


def label_pairs(labels: np.ndarray) -> np.ndarray:
    """The first two labels of each row as one number, whatever their order."""
    return labels[:, :2].min(1).astype(int) * LABELS + labels[:, :2].max(1)


def joint(items: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """All items of a row as one number, and how many such numbers there are."""
    return items @ count ** np.arange(items.shape[1]), count ** items.shape[1]


def even_distance(drawn: np.ndarray, count: int) -> float:
    """Standard errors from all of ``0 .. count - 1`` being equally frequent."""
    return distance(drawn, np.full(count, 1 / count))


def distance(drawn: np.ndarray, law: np.ndarray) -> float:
    """Standard errors from these probabilities: of the most distant number, or of all together.

    The latter is the chi-square as a normal variable (Wilson and Hilferty 1931).
    """
    expected, free = len(drawn) * law, len(law) - 1
    off = (np.bincount(drawn.astype(int), minlength=len(law)) - expected) ** 2
    one = np.sqrt((off / (expected * (1 - law))).max())
    spread = 2 / (9 * free)
    return float(max(one, (((off / expected).sum() / free) ** (1 / 3) - 1 + spread) / np.sqrt(spread)))


# ---- initial weights ----------------------------------------------------------------------------------

# of a standard normal truncated at two sigma: its variance, and the fourth moment
VARIANCE, DENSITY = TRUNCATED_STD**2, np.exp(-2) / np.sqrt(2 * np.pi) / 0.9544997361036416
FOURTH = 3 * VARIANCE - 2 * 2**3 * DENSITY
SEEDS = 8
SINGLE = 1e-6
"""Relative rounding of what is compared exactly."""


def check_initialisation(file: File) -> dict[str, float]:
    """Our fresh weights and the file's, each against the stated law.

    Every random weight, divided by the sigma of its law, is a standard normal truncated at two sigma (a learned
    position table: even within its bounds).

    Returns:
        ``structure``: 0 where names, shapes and all weights that are not random agree and none lies beyond its
        bounds, else infinity; ``moments``: largest distance of a mean or a standard deviation from the law, of
        ours or the file's, in units of five standard errors; ``extremes``: the largest distance between the
        outermost weight and the bound, in units of what chance exceeds once in two million.
    """
    seeds = sorted({key.split("/")[0] for key in file if "/" in key})
    reference = {}
    for key in (key for key in file if key.startswith(f"{seeds[0]}/")):
        leaf = key.removeprefix(f"{seeds[0]}/")
        reference[parameter_name(leaf)] = np.concatenate([transposed(file[f"{seed}/{leaf}"]) for seed in seeds])
    opsin = fresh_weights(reference)
    agree, found = opsin.keys() == reference.keys(), {"moments": 0.0, "extremes": 0.0}
    for name, weights in itertools.chain(opsin.items(), reference.items()):
        agree &= name in reference and weights.shape[1:] == reference[name].shape[1:]
        law = law_of(name, weights.shape)
        if law is None:
            agree &= bool((weights == (1 if name.endswith(".w") else 0)).all())
            continue
        bounded, apart = against(law, weights)
        agree &= bounded
        found = {group: max(found[group], apart[group]) for group in found}
    return {"structure": 0.0 if agree else float("inf")} | found


def fresh_weights(like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our initial weights for several seeds, of the model that has weights of these shapes."""
    features, width = like["embed.W_F"].shape[1:]
    labels = like["embed.W_E"].shape[1]
    neurons = like["blocks.0.mlp.W_in"].shape[2] if "blocks.0.mlp.W_in" in like else None
    table = like["pos_embed.W_pos"].shape[1] if "pos_embed.W_pos" in like else None
    model = Transformer(
        layers=1 + max(int(name.split(".")[1]) for name in like if name.startswith("blocks.")),
        width=width,
        heads=1,
        mlp_ratio=None if neurons is None else neurons / width,
        norm="ln_final.w" in like,
        positions="rope" if table is None else "learned",
        max_positions=table or 32,
    )
    task = FewShot(Given(np.zeros((2, 1, features), np.float32)), labels, train_classes=2)
    return {name: x.numpy() for name, x in init_parameters(model, task, range(SEEDS)).items()}


@dataclass(frozen=True)
class Law:
    """A distribution around 0: its bound, variance and fourth moment, and its density at the bound."""

    bound: float
    variance: float
    fourth: float
    density: float


def law_of(name: str, shape: tuple[int, ...]) -> Law | None:
    """What README section 1 says about a weight ``[seeds, input, output]``; None for what is not random."""
    if name == "pos_embed.W_pos":
        bound = 1 / np.sqrt(shape[1])
        return Law(bound, bound**2 / 3, bound**4 / 5, 1 / (2 * bound))
    if len(shape) == 2:
        return None
    sigma = 0.02 if name == "embed.W_E" else 1 / np.sqrt(shape[1]) / TRUNCATED_STD
    return Law(2 * sigma, VARIANCE * sigma**2, FOURTH * sigma**4, DENSITY / sigma)


def against(law: Law, weights: np.ndarray) -> tuple[bool, dict[str, float]]:
    """Whether all weights lie within the bounds, and how far they are from the law."""
    x = weights.astype(np.float64).ravel()
    count, std = x.size, np.sqrt(law.variance)
    mean_off = abs(x.mean()) / (std / np.sqrt(count))
    spread = np.sqrt((law.fourth - law.variance**2) / count) / (2 * std)
    std_off = abs(np.sqrt((x**2).mean()) - std) / spread
    # near each bound the gap to the outermost of the weights is exponential with this mean
    gap, mean_gap = max(law.bound - x.max(), law.bound + x.min()), 1 / (count * law.density)
    apart = {
        "moments": max(mean_off, std_off) / STANDARD_ERRORS,
        "extremes": gap / (mean_gap * np.log(2e6)),
    }
    return bool(np.abs(x).max() <= law.bound * (1 + SINGLE)), apart
