"""Few-shot induction: exemplar, label, exemplar, label, ..., query exemplar; predict the query's label.

By default, which label a class carries is drawn anew for every sequence (a relabelling), so the only way to the
answer is to find the query's class in the context and copy the label that follows it. Where labels are fixed, a class
carries the same one for ever, which can be learned in the weights; evaluation sets of other kinds of sequences then
tell the strategies apart.

Legend: S steps drawn together, M members, B batch, C (exemplar, label) pairs of the context, N = C + 1
items with the query, L = 2 C + 1 positions, R = S M B sequences, k different classes in one context.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from opsin.errors import ConfigError
from opsin.model.memory import check_memory
from opsin.task import Bank, Batch, Draw, Layout, Reference, Shown, Task, Truth
from opsin.tasks.shared.exemplars import Exemplars, GaussianClusters
from opsin.tasks.shared.references import among_plausible, chance, nearest_label
from opsin.tasks.shared.streams import (
    UINT64_MAX,
    below,
    by_mass,
    check_draw,
    fill_normals,
    of_different_groups,
    stream_key,
    uniforms,
    without_replacement,
    zipf_masses,
)

_CHOICE_STREAM, _CORRUPTION_STREAM, _NOISE_STREAM, _NEW_STREAM = range(4)
"""Separate streams, so that switching corruption or noise on leaves every other choice as it was."""

Uniforms = Mapping[str, Float[np.ndarray, "_ R"]]
"""Numbers in [0, 1) by what they decide."""

LabelSets = Mapping[int, Int64[np.ndarray, "_ _"]]
"""Sets of k labels, ``[sets, k]``, by k; tabulated, hence the next line."""

_MOST_RELABELLINGS = 1_000_000


def _require(holds: bool, field: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(field, value, expected)


KIND_LABELS = ("task", "drawn", "exchanged", "shifted")
"""What the labels of a context can be."""


@dataclass(frozen=True)
class Kind:
    """One kind of sequence; a task mixes one or more.

    Args:
        weight: share of the sequences, relative to the weights of the other kinds.
        matches: how often the query's class occurs in the context (its burstiness).
        distractor_copies: how often each other class of the context occurs; as many distractor
            classes as fill the context. 1: all distinct. None: one class fills the whole rest.
        no_support: probability that the query's class is absent from the context. A further class
            then stands in the context instead, and the target is uniform over all labels.
        random_query: probability that the target of a supported query is replaced by a label drawn
            uniformly from all labels (the right one included).
        label_flip: probability, for each context item alone, that it shows the label of another
            class of the context.
        matched_query: the query shows the same exemplar as one of its copies in the context.
        matched_distractors: all copies of a distractor class show the same exemplar. Exemplars not
            matched are drawn independently.
        labels: what the context shows: the labels that the task's classes carry (``task``), labels drawn for this
            sequence (``drawn``), fixed labels passed on in a circle between the k classes of the context
            (``exchanged``, which swaps those of two), or the fixed label plus 1 modulo the number of labels
            (``shifted``), the target being the one shown for the query's class.
        among: number of labels, the first ones, that drawn labels are taken from, held-out sets and all; None for all
            labels.
        label_present: the class that stands in for an absent one shows the fixed label of the query's class.
        independent: classes of the context and of the query are drawn independently of each other, so that the query's
            class is in the context by chance alone.
        new_classes: all classes are drawn for this sequence and never seen again; their labels are drawn with them.

    With fixed labels, the target of an absent class is its fixed label, which nothing else in the context carries;
    classes of sequences of that kind, and of exchanged ones, all have different labels.

    Raises:
        ConfigError: a value out of its range.
    """

    added_settings: ClassVar[Mapping[str, Any]] = {
        "labels": "task",
        "among": None,
        "label_present": False,
        "independent": False,
        "new_classes": False,
    }

    weight: float = 1.0
    matches: int = 1
    distractor_copies: int | None = 1
    no_support: float = 0.0
    random_query: float = 0.0
    label_flip: float = 0.0
    matched_query: bool = False
    matched_distractors: bool = False
    labels: Literal["task", "drawn", "exchanged", "shifted"] = "task"
    among: int | None = None
    label_present: bool = False
    independent: bool = False
    new_classes: bool = False

    def __post_init__(self) -> None:
        _require(0 < self.weight < math.inf, "Kind.weight", self.weight, "a positive number")
        _require(self.matches >= 1, "Kind.matches", self.matches, "at least 1 (no_support leaves the class out)")
        copies = self.distractor_copies
        _require(copies is None or copies >= 1, "Kind.distractor_copies", copies, "at least 1, or null")
        _require(self.among is None or self.among >= 1, "Kind.among", self.among, "at least 1, or null")
        for name in ("no_support", "random_query", "label_flip"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"Kind.{name}", value, "a probability")
        _require(self.labels in KIND_LABELS, "Kind.labels", self.labels, f"one of {', '.join(KIND_LABELS)}")
        absent = not self.label_present or self.no_support > 0
        _require(absent, "Kind.label_present", True, "false, as no_support is 0: no class is absent")
        plain = replace(self, weight=1.0, independent=False, random_query=0.0) == Kind() if self.independent else True
        _require(plain, "Kind.independent", True, "no other setting beside it but weight and random_query")

    def slots(self, context: int) -> Int64[np.ndarray, " C"]:
        """Which class each context item shows, before shuffling: 0 the query's, 1 .. k - 1 distractors.

        Args:
            context: C, number of (exemplar, label) pairs before the query.
        """
        rest = np.arange(context - self.matches)
        return np.r_[np.zeros(self.matches, np.int64), 1 + rest // (self.distractor_copies or max(len(rest), 1))]

    @property
    def uninformed(self) -> float:
        """Probability that the target is uniform over all labels, whatever the context holds."""
        return self.no_support + (1 - self.no_support) * self.random_query

    def guessing_loss(self, context: int, n_labels: int, uninformed: float | None = None) -> float:
        """Cross-entropy (nats) of guessing evenly among the labels in play, knowing how often that can fail.

        Args:
            context: C, number of (exemplar, label) pairs before the query.
            n_labels: V, number of labels to predict.
            uninformed: probability that the target is uniform over all labels; the property of this name when None.
        """
        in_play = int(self.slots(context)[-1]) + 1
        uninformed = self.uninformed if uninformed is None else uninformed
        outside = uninformed / n_labels
        inside = (1 - uninformed) / in_play + outside
        return -in_play * _xlogx(inside) - (n_labels - in_play) * _xlogx(outside)


def _xlogx(x: float) -> float:
    return x * math.log(x) if x > 0 else 0.0


@dataclass(frozen=True)
class _Pool:
    """What the sequences of one split are drawn from.

    Args:
        first_class: class number of the first entry of ``masses``.
        masses: probability of each class as a whole number, up to a common factor.
        first_exemplar, exemplars: the first exemplar of a class that is shown, and how many are.
        independent: whether no exemplar is matched, whatever the kind says.
        relabellings: label sets that contexts may use.
        kinds: kinds of sequences that are mixed.
    """

    first_class: int
    masses: Int64[np.ndarray, " classes"]
    first_exemplar: int
    exemplars: int
    independent: bool
    relabellings: LabelSets
    kinds: tuple[Kind, ...]


HELDOUT_RELABELLINGS = 0.2
"""Share of the label sets that is held out where a recipe names none."""

SPLIT_SETS = ("train", "relabellings", "exemplars", "classes")
"""Evaluation sets that have the kinds of training."""

FIXED_SETS: Mapping[str, dict[str, Any]] = {
    "icl": {"labels": "drawn"},
    "flip": {"labels": "exchanged"},
    "ciwl": {"no_support": 1.0, "label_present": True},
    "iwl": {"no_support": 1.0},
    "new": {"new_classes": True},
}
"""What sets the kinds of the evaluation sets of fixed labels apart from training's (Singh et al. 2025, Reddy 2024)."""


class FewShot(Task):
    """The few-shot induction task; its defaults are the reference system's main run.

    Evaluation sets (those that the splits leave room for), all with the same kinds of sequences: ``train``;
    ``relabellings``: held-out label sets, if every kind has some; ``exemplars``: held-out exemplars of the
    training classes, each item's drawn independently; ``classes``: held-out classes, drawn uniformly, with
    the exemplar numbers and label sets of training. Further ones, of training classes and exemplars, have kinds of
    their own (``evaluation_kinds``). With fixed labels these are, unless they are given: ``icl``, relabelled in every
    sequence; ``flip``, fixed labels exchanged in the context; ``ciwl``, the query's class absent but its label present;
    ``iwl``, both absent; ``new``, classes drawn for the sequence, of a source that makes any. Their numbers of copies
    are those of the first kind; one that classes or labels do not suffice for is left out.

    Args:
        exemplars: source of the feature vectors that sequences show.
        n_labels: V, number of labels to predict.
        batch_size: B, sequences in a batch of one member.
        context: C, number of (exemplar, label) pairs before the query.
        train_classes: how many classes training uses, the first of the exemplars.
        heldout_classes: how many classes, the last of the exemplars, are the evaluation set ``classes``; None
            for all that training leaves.
        train_exemplars: how many exemplars of a class training uses, the first of the class.
        heldout_exemplars: how many exemplars of a class, the next after training's, are the evaluation set
            ``exemplars``; None for all the rest.
        heldout_relabellings: share of the unordered label sets that training never uses; rounded to
            a whole number of sets, for each number of classes that a context may hold.
        relabelling_seed: which label sets are held out. The default holds out {0, 2} and {1, 3} of
            the ten pairs of five labels, as the reference system does.
        zipf: training class c (from 0) has probability proportional to 1 / (c + 1) ** zipf; 0 for
            uniform. Classes of one context are drawn one after another without replacement.
        noise: standard deviation of Gaussian noise added to each entry of each feature vector shown.
        kinds: the kinds of sequences that are mixed; none given: one ``Kind()``.
        labels: ``drawn`` anew in every sequence, or ``fixed``: class c (from 0) carries label c mod n_labels for ever,
            and nothing is held out by ``heldout_relabellings``.
        label_seed: seed that deals these labels to the classes in another order; None for class c's c mod n_labels.
        evaluation_kinds: kinds of sequences of further evaluation sets, by the name of the set; None for none, or those
            above where labels are fixed.
        burstiness: how often each class of a context occurs in it, the query's among them; a short form of ``kinds``,
            which None leaves in force.
        bursty: share of the sequences that are so; classes of the others are independent of each other, which takes
            fixed labels.

    Raises:
        ConfigError: settings that do not fit each other or the exemplars, which are loaded here.
    """

    added_settings: ClassVar[Mapping[str, Any]] = {
        "labels": "drawn",
        "label_seed": None,
        "evaluation_kinds": None,
        "burstiness": None,
        "bursty": 1.0,
    }

    def __init__(
        self,
        exemplars: Exemplars = GaussianClusters(),  # noqa: B008 (a source never changes)
        n_labels: int = 5,
        batch_size: int = 32,
        context: int = 2,
        train_classes: int = 50,
        heldout_classes: int | None = None,
        train_exemplars: int = 1,
        heldout_exemplars: int | None = None,
        heldout_relabellings: float = HELDOUT_RELABELLINGS,
        relabelling_seed: int = 55,
        zipf: float = 0.0,
        noise: float = 0.0,
        kinds: Sequence[Kind] = (),
        labels: Literal["drawn", "fixed"] = "drawn",
        label_seed: int | None = None,
        evaluation_kinds: Mapping[str, Sequence[Kind]] | None = None,
        burstiness: int | None = None,
        bursty: float = 1.0,
    ) -> None:
        _check_burstiness(burstiness, bursty, context, labels, kinds)
        self.kinds, self.labels = tuple(kinds) or _bursty_kinds(burstiness, bursty), labels
        self.context, self.batch_size, self.noise = context, batch_size, noise
        self.n_tokens = self.n_outputs = n_labels
        self._source = exemplars
        self._check_numbers(zipf, relabelling_seed)
        # where induction should look, twice, and the numbers that decide about one sequence
        length = 2 * context + 1
        check_memory("FewShot.context", context, 2 * length**2 + 8 * length)
        check_memory("FewShot.batch_size", batch_size, batch_size * (2 * length**2 + 8 * length))
        self._check_labels(label_seed, heldout_relabellings)
        for i, kind in enumerate(self.kinds):
            self._check_kind(f"FewShot.kinds[{i}]", kind)
        self._check_sets(evaluation_kinds or {})

        self._bank = {"exemplars": torch.from_numpy(exemplars.load())}
        n_classes, n_exemplars, self.n_features = self._bank["exemplars"].shape
        needed = max(self._classes_needed(kind) for kind in self.kinds)
        heldout_classes = _heldout_count("classes", train_classes, heldout_classes, n_classes, needed)
        heldout_exemplars = _heldout_count("exemplars", train_exemplars, heldout_exemplars, n_exemplars, 1)
        self._fixed = _fixed_labels(n_classes, n_labels, label_seed) if labels == "fixed" else None
        train = _Pool(0, zipf_masses(train_classes, zipf), 0, train_exemplars, False, {}, self.kinds)
        splits = self._with_heldout(train, heldout_exemplars, n_classes - heldout_classes, heldout_classes)
        further = self._fixed_sets(train) if evaluation_kinds is None else evaluation_kinds
        splits |= {f"eval/{name}": replace(train, kinds=tuple(chosen)) for name, chosen in further.items()}
        self._pools = self._with_labels(splits, heldout_relabellings, relabelling_seed)
        self.evaluations = tuple(split.removeprefix("eval/") for split in self._pools if split != "train")
        odd = tuple(range(1, 2 * context, 2))
        self.layout = Layout(tuple(range(0, 2 * context + 1, 2)), odd, odd, (2 * context,))

    def _check_numbers(self, zipf: float, relabelling_seed: int) -> None:
        for name, count in {"n_labels": self.n_outputs, "batch_size": self.batch_size, "context": self.context}.items():
            _require(count >= 1, f"FewShot.{name}", count, "at least 1")
        labels = self.n_outputs
        _require(labels <= _MOST_RELABELLINGS, "FewShot.n_labels", labels, f"at most {_MOST_RELABELLINGS:,}")
        for name, value in {"zipf": zipf, "noise": self.noise}.items():
            _require(0 <= value < math.inf, f"FewShot.{name}", value, "a finite number, at least 0")
        _require(0 <= relabelling_seed <= UINT64_MAX, "FewShot.relabelling_seed", relabelling_seed, "0 .. 2**64 - 1")

    def _check_labels(self, label_seed: int | None, heldout: float) -> None:
        _require(self.labels in ("drawn", "fixed"), "FewShot.labels", self.labels, "drawn or fixed")
        used = label_seed is None or self.labels == "fixed"
        _require(used, "FewShot.label_seed", label_seed, "null, as labels are drawn")
        in_range = label_seed is None or 0 <= label_seed <= UINT64_MAX
        _require(in_range, "FewShot.label_seed", label_seed, "0 .. 2**64 - 1, or null")
        holds_out = self.labels == "drawn" or heldout in (0, HELDOUT_RELABELLINGS)
        _require(holds_out, "FewShot.heldout_relabellings", heldout, "none, as labels are fixed and none is held out")

    def _check_sets(self, sets: Mapping[str, Sequence[Kind]]) -> None:
        """Refuse names of evaluation sets that are taken, and kinds that do not fit."""
        for name, kinds in sets.items():
            holds = name not in SPLIT_SETS and re.fullmatch(r"[\w-]+", name) is not None and len(kinds) > 0
            expected = f"a name of letters, digits, _ and -, none of {', '.join(SPLIT_SETS)}, with one kind or more"
            _require(holds, "FewShot.evaluation_kinds", name, expected)
            for i, kind in enumerate(kinds):
                self._check_kind(f"FewShot.evaluation_kinds.{name}[{i}]", kind)

    def _with_heldout(self, train: _Pool, exemplars: int, first_class: int, classes: int) -> dict[str, _Pool]:
        """Training's split and those of held-out exemplars and classes, if there are any."""
        splits = {"train": train, "eval/train": train}
        if exemplars:
            splits["eval/exemplars"] = replace(
                train, first_exemplar=train.exemplars, exemplars=exemplars, independent=True
            )
        if classes:
            splits["eval/classes"] = replace(train, first_class=first_class, masses=zipf_masses(classes, 0.0))
        return splits

    def _with_labels(self, splits: dict[str, _Pool], share: float, seed: int) -> dict[str, _Pool]:
        """The splits with the label sets that they draw from, and the set of those held out after ``eval/train``."""
        tabulated = set()
        for split, pool in splits.items():
            setting = "kinds" if pool.kinds == self.kinds else f"evaluation_kinds.{split.removeprefix('eval/')}"
            for i, kind in enumerate(pool.kinds):
                self._check_room(f"FewShot.{setting}[{i}]", kind, pool)
                if self._draws_labels(kind) and kind.among is None:
                    tabulated.add(self._in_play(kind))
        shares = share if self.labels == "drawn" else 0.0
        seen, heldout = _relabellings(tabulated, self.n_outputs, shares, seed)
        found = {split: replace(pool, relabellings=seen) for split, pool in splits.items()}
        if not heldout:
            return found
        first = {name: found.pop(name) for name in ("train", "eval/train")}
        return first | {"eval/relabellings": replace(first["train"], relabellings=heldout)} | found

    def _in_play(self, kind: Kind) -> int:
        """Different classes in a context of a kind; of an independent one at most."""
        return int(kind.slots(self.context)[-1]) + 1

    def _draws_labels(self, kind: Kind) -> bool:
        """Whether labels of a kind are drawn for the sequence."""
        return kind.new_classes or kind.labels == "drawn" or (kind.labels == "task" and self.labels == "drawn")

    def _is_apart(self, kind: Kind) -> bool:
        """Whether all classes of a sequence must have different fixed labels."""
        return not self._draws_labels(kind) and (kind.no_support > 0 or kind.labels == "exchanged")

    def _classes_needed(self, kind: Kind) -> int:
        if kind.new_classes or kind.independent:
            return 1
        return self._in_play(kind) + (kind.no_support > 0)

    def _check_kind(self, field: str, kind: Kind) -> None:
        """Refuse a kind that does not fit the context, the labels, or the source of exemplars."""
        rest, copies = self.context - kind.matches, kind.distractor_copies
        _require(rest >= 0, f"{field}.matches", kind.matches, f"at most {self.context} (pairs in the context)")
        fits = copies is None or rest % copies == 0
        _require(fits, f"{field}.distractor_copies", copies, f"a divisor of {rest} (context less matches)")
        k, drawn = self._in_play(kind), self._draws_labels(kind)
        least = k if drawn else k + (kind.no_support > 0) if self._is_apart(kind) else 1
        labels, name = self.n_outputs, field.removeprefix("FewShot.")
        _require(labels >= least, "FewShot.n_labels", labels, f"at least {least} (classes of {name})")
        flips = kind.label_flip == 0 or k > 1
        _require(flips, f"{field}.label_flip", kind.label_flip, "0, as the context holds only one class")
        self._check_labels_of(field, kind)

    def _check_labels_of(self, field: str, kind: Kind) -> None:
        """Refuse labels that a kind cannot have."""
        k, drawn, labels = self._in_play(kind), self._draws_labels(kind), self.n_outputs
        alone = kind.no_support == 0 and not kind.new_classes and k > 1
        exchanged = kind.labels != "exchanged" or (self.labels == "fixed" and alone)
        expected = "task or drawn: only fixed labels are exchanged, between two or more classes, none absent or new"
        _require(exchanged, f"{field}.labels", kind.labels, expected)
        present = kind.no_support == 0 and not kind.new_classes and labels > 1
        shifted = kind.labels != "shifted" or (self.labels == "fixed" and present)
        expected = (
            "task or drawn: only fixed labels, two or more, are shifted, of classes none of which is absent or new"
        )
        _require(shifted, f"{field}.labels", kind.labels, expected)
        for setting in ("label_present", "independent"):
            on = getattr(kind, setting)
            _require(not (on and drawn), f"{field}.{setting}", on, "false, as its labels are drawn")
        among = kind.among is None or (drawn and k <= kind.among <= labels)
        _require(among, f"{field}.among", kind.among, f"{k} .. {labels}, with drawn labels, or null")
        makes = not kind.new_classes or self._source.makes_classes
        _require(makes, f"{field}.new_classes", True, f"false: {type(self._source).__name__} makes no new classes")

    def _check_room(self, field: str, kind: Kind, pool: _Pool) -> None:
        """Refuse a kind that the classes of a split, or their fixed labels, do not suffice for."""
        classes, needed = len(pool.masses), self._classes_needed(kind)
        _require(classes >= needed, field, f"{classes} classes", f"at least {needed} in one sequence")
        if self._fixed is not None and self._is_apart(kind):
            different = len(np.unique(self._fixed[pool.first_class : pool.first_class + classes]))
            _require(different >= needed, field, f"{different} different labels", f"at least {needed} in one sequence")

    def _fixed_sets(self, train: _Pool) -> dict[str, tuple[Kind, ...]]:
        """The evaluation sets of fixed labels that there is room for; none where labels are drawn."""
        found: dict[str, tuple[Kind, ...]] = {}
        if self._fixed is None:
            return found
        first = self.kinds[0]
        copies = ("matches", "distractor_copies", "matched_query", "matched_distractors")
        base = Kind(**{name: getattr(first, name) for name in copies})
        for name, settings in FIXED_SETS.items():
            kind = replace(base, **settings)
            with suppress(ConfigError):
                self._check_kind(name, kind)
                self._check_room(name, kind, train)
                found[name] = (kind,)
        return found

    def bank(self) -> Bank:
        """``exemplars``: Float32 [classes, exemplars, F], every class of the source, in its order."""
        return self._bank

    def draw(
        self, seeds: Sequence[int], first: int, count: int, split: str = "train", batch_size: int | None = None
    ) -> Draw:
        """The choices behind batches ``first .. first + count - 1``, one member per seed.

        Args:
            seeds: one seed a member, each 0 .. 2**64 - 1.
            first: index of the first batch, at least 0.
            count: S, number of batches to draw.
            split: ``"train"`` or ``"eval/NAME"`` with one of ``evaluations``.
            batch_size: B, sequences in a batch, the task's setting when None; another size is another stream.

        Returns:
            ``classes``, ``exemplars``, ``labels``: Int64 [S, M, B, N], the query last (its label is the
            target); ``answers``: Int64 [S, M, B], the label that a look-up finds: the one drawn for the
            query's class, before flips and random targets, or -1 where that class is absent from the
            context. With noise also ``noise``: Float32 [S, M, B, N, F]. Where a kind has new classes, these are
            numbered -1, -2, .., and there is ``new``: Float32 [S, M, B, N, F], what items of such classes show.
        """
        size = self.batch_size if batch_size is None else batch_size
        check_draw("FewShot", self._pools, split, seeds, (first, count, size))
        distinct = sorted(set(seeds))  # conditions of one seed share its data: draw that once
        keys = [stream_key(seed, split, size) for seed in distinct]
        pool = self._pools[split]
        drawn = self._sequences(self._uniforms(keys, first, count, size, pool.kinds), pool)
        shape = (count, len(distinct), size)
        found = {
            name: np.ascontiguousarray(array.T).reshape(*shape, *array.shape[:-1]) for name, array in drawn.items()
        }
        if self.noise:
            found["noise"] = self._noise(keys, first, shape)
        if any(kind.new_classes for kind in pool.kinds):
            found["new"] = self._new_exemplars(keys, first, found["classes"], found["exemplars"])
        if list(seeds) != distinct:
            member = [distinct.index(seed) for seed in seeds]
            found = {name: array[:, member] for name, array in found.items()}
        return {name: torch.from_numpy(array) for name, array in found.items()}

    def _uniforms(self, keys: list[np.ndarray], first: int, count: int, size: int, kinds: Sequence[Kind]) -> Uniforms:
        """Every random choice of every sequence as a number in [0, 1), by what it decides."""
        c = self.context
        parts = {"kind": 1, "support": 1, "relabelling": 1, "classes": c + 1, "labels": c, "order": c}
        found = uniforms(keys, _CHOICE_STREAM, first, count, size, parts | {"exemplars": c + 1})
        if any(kind.no_support or kind.random_query or kind.label_flip for kind in kinds):
            corruption = {"random_query": 1, "random_label": 1, "flip": c, "flip_to": c}
            found |= uniforms(keys, _CORRUPTION_STREAM, first, count, size, corruption)
        return found

    def _sequences(self, u: Uniforms, pool: _Pool) -> dict[str, Int64[np.ndarray, "... R"]]:
        """The choices by name, each sequence by the rules of its kind."""
        if len(pool.kinds) == 1:
            return self._of_kind(pool.kinds[0], u, pool)
        shares = np.cumsum([kind.weight for kind in pool.kinds])
        which = np.searchsorted(shares[:-1], u["kind"][0] * shares[-1], side="right")
        found: dict[str, np.ndarray] = {}
        for i, kind in enumerate(pool.kinds):
            rows = np.flatnonzero(which == i)
            chosen = self._of_kind(kind, {name: part[:, rows] for name, part in u.items()}, pool)
            for name, array in chosen.items():
                whole = found.setdefault(name, np.empty((*array.shape[:-1], len(which)), np.int64))
                whole[..., rows] = array
        return found

    def _of_kind(self, kind: Kind, u: Uniforms, pool: _Pool) -> dict[str, Int64[np.ndarray, "... R"]]:
        slots = kind.slots(self.context)
        k = int(slots[-1]) + 1
        order = u["order"].argsort(0)
        slot = slots[order]  # [C, R]: which of the k classes each context item shows

        drawn = self._classes(kind, u, pool)
        supported = u["support"][0] >= kind.no_support
        if kind.independent:
            shown = drawn[1:]
        else:
            shown = np.concatenate([np.where(supported, drawn[0], drawn[-1])[None], drawn[1:k]])
        label, fixed_target = self._labels(kind, u, pool, shown, drawn[0], supported)
        found, right = supported, label[0]
        if kind.independent and fixed_target is not None:
            found, right = (shown == drawn[0]).any(0), fixed_target
        answers = np.where(found, right, -1)

        named, target = slot, answers if fixed_target is None else fixed_target
        if kind.label_flip:
            # another of the k classes: 1 .. k - 1 further on, in a circle
            other = (slot + 1 + below(u["flip_to"], k - 1)) % k
            named = np.where(u["flip"] < kind.label_flip, other, slot)
        if kind.no_support or kind.random_query:
            informed = (supported | (fixed_target is not None)) & (u["random_query"][0] >= kind.random_query)
            target = np.where(informed, target, below(u["random_label"][0], self.n_outputs))
        return {
            "classes": np.concatenate([np.take_along_axis(shown, slot, 0), drawn[:1]]),
            "exemplars": self._exemplars(kind, u["exemplars"], slots, order, supported, pool),
            "labels": np.concatenate([np.take_along_axis(label, named, 0), target[None]]),
            "answers": answers,
        }

    def _classes(self, kind: Kind, u: Uniforms, pool: _Pool) -> Int64[np.ndarray, "_ R"]:
        """The query's class, then those of the context, last one that stands in for it where it is absent."""
        if kind.independent:
            return pool.first_class + by_mass(u["classes"], pool.masses)
        count = self._in_play(kind) + (kind.no_support > 0)
        if kind.new_classes:
            return np.repeat(-1 - np.arange(count)[:, None], u["classes"].shape[1], 1)
        # the query's class is drawn first, so that it has the stated distribution whatever else is in play
        if self._fixed is not None and self._is_apart(kind):
            labels = self._fixed[pool.first_class : pool.first_class + len(pool.masses)]
            return pool.first_class + of_different_groups(u["classes"][:count], pool.masses, labels)
        return pool.first_class + without_replacement(u["classes"][:count], pool.masses)

    def _labels(
        self,
        kind: Kind,
        u: Uniforms,
        pool: _Pool,
        shown: Int64[np.ndarray, "k R"],
        query: Int64[np.ndarray, " R"],
        supported: Bool[np.ndarray, " R"],
    ) -> tuple[Int64[np.ndarray, "k R"], Int64[np.ndarray, " R"] | None]:
        """What each class in play shows, and the target where it is a fixed label; None where it is looked up."""
        if self._fixed is None or self._draws_labels(kind):
            return self._drawn_labels(kind, u, pool), None
        label, fixed_target = self._fixed[shown], self._fixed[query]
        if kind.labels == "exchanged":
            return np.roll(label, -1, 0), None
        if kind.labels == "shifted":
            return (label + 1) % self.n_outputs, None
        if kind.label_present:
            label[0] = fixed_target  # a supported query's class carries it anyway
        return label, fixed_target

    def _drawn_labels(self, kind: Kind, u: Uniforms, pool: _Pool) -> Int64[np.ndarray, "k R"]:
        """Different labels, one for each class in play."""
        k = self._in_play(kind)
        if kind.among is not None or k not in pool.relabellings:
            return without_replacement(u["labels"][:k], np.ones(kind.among or self.n_outputs, np.int64))
        sets = pool.relabellings[k]
        label_set = sets[below(u["relabelling"][0], len(sets))].T
        return np.take_along_axis(label_set, u["labels"][:k].argsort(0), 0)

    def _exemplars(
        self,
        kind: Kind,
        u: Float[np.ndarray, "N R"],
        slots: Int64[np.ndarray, " C"],
        order: Int64[np.ndarray, "C R"],
        supported: Bool[np.ndarray, " R"],
        pool: _Pool,
    ) -> Int64[np.ndarray, "N R"]:
        """Which exemplar of its class each item shows."""
        items = pool.first_exemplar + below(u, pool.exemplars)
        query, items = items[-1], items[:-1]
        if kind.matched_distractors and not pool.independent:
            items = items[np.where(slots > 0, np.searchsorted(slots, slots), np.arange(self.context))]
        if kind.matched_query and not pool.independent:
            query = np.where(supported, items[0], query)
        return np.concatenate([np.take_along_axis(items, order, 0), query[None]])

    def _noise(self, keys: list[np.ndarray], first: int, shape: tuple[int, int, int]) -> np.ndarray:
        """Float32 [S, M, B, N, F]; one counter per step, as normals take an unforeseeable number of draws."""
        features = self._bank["exemplars"].shape[-1]
        noise = np.empty((*shape, self.context + 1, features), np.float32)
        for step in range(shape[0]):
            for member, key in enumerate(keys):
                fill_normals(key, _NOISE_STREAM, first + step, out=noise[step, member])
        return noise * np.float32(self.noise)

    def _new_exemplars(
        self,
        keys: list[np.ndarray],
        first: int,
        classes: Int64[np.ndarray, "S M B N"],
        exemplars: Int64[np.ndarray, "S M B N"],
    ) -> Float[np.ndarray, "S M B N F"]:
        """What items of new classes show: one centre a class, one deviation for each of its exemplars."""
        steps, members, size, items = classes.shape
        normals = np.empty((steps, members, size, 2, items, self._bank["exemplars"].shape[-1]), np.float32)
        for step in range(steps):
            for member, key in enumerate(keys):
                fill_normals(key, _NEW_STREAM, first + step, out=normals[step, member])
        number = np.maximum(-1 - classes, 0)
        same = (number[..., None] == number[..., None, :]) & (exemplars[..., None] == exemplars[..., None, :])
        found = (number, same.argmax(-1))  # items that show the same exemplar take the first one's deviation
        centres, deviations = (
            np.take_along_axis(normals[..., part, :, :], index[..., None], -2) for part, index in enumerate(found)
        )
        return self._source.of_new_classes(centres, deviations)

    def assemble(self, bank: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> Batch:
        """One step's draw (tensors ``[M, B, ...]``, no S) as a batch; features in the dtype of the bank."""
        classes = draw["classes"]
        if "new" in draw:
            known = bank["exemplars"][classes.clamp(min=0), draw["exemplars"]]
            features = torch.where((classes < 0)[..., None], draw["new"].to(known.dtype), known)
        else:
            features = bank["exemplars"][classes, draw["exemplars"]]
        if "noise" in draw:
            features = features + draw["noise"].to(features.dtype)
        tokens, targets = draw["labels"][..., :-1], draw["labels"][..., -1:]
        outputs = torch.arange(self.n_outputs, device=tokens.device)
        plausible = (tokens[..., None] == outputs).any(-2)
        return Batch(features, tokens, targets, plausible, _truth(tokens, draw["answers"]), self.layout)

    def shown(self, bank: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> Shown | None:
        """The exemplars that training uses, class by class; None where each is shown with noise of its own."""
        if "noise" in draw:
            return None
        pool = self._pools["train"]
        vectors = bank["exemplars"][: len(pool.masses), : pool.exemplars].flatten(0, 1)
        return Shown(vectors, draw["classes"] * pool.exemplars + draw["exemplars"])

    def baselines(self) -> dict[str, float]:
        """Losses (nats) without a look-up; the second knows the k labels in play, averaged over the kinds.

        With fixed labels neither knows the label of a class. Of independent classes, and where the context may hold
        more classes than there are labels, the second knows no more than the first.
        """
        losses = [kind.guessing_loss(self.context, self.n_outputs, self._uninformed(kind)) for kind in self.kinds]
        weighted = sum(kind.weight * loss for kind, loss in zip(self.kinds, losses, strict=True))
        mean, uniform = weighted / sum(kind.weight for kind in self.kinds), math.log(self.n_outputs)
        most = mean if self.labels == "drawn" else min(mean, uniform)
        return {"uniform over labels": uniform, "labels of the context": most}

    def _uninformed(self, kind: Kind) -> float:
        """The share of targets that guessing evenly among the labels of the context must leave to all labels."""
        if self._draws_labels(kind) or kind.labels in ("exchanged", "shifted"):
            return kind.uninformed
        if kind.independent:
            return 1.0
        k, labels = self._in_play(kind), self.n_outputs
        # the label of an absent class is one of the others
        outside = 0.0 if kind.label_present or not kind.no_support else kind.no_support * labels / (labels - k)
        return outside * (1 - kind.random_query) + kind.random_query

    def unigram(self) -> Float[Tensor, " V"] | None:
        """How often each label is the target in training, with exchanged labels taken as if not; None if drawn."""
        if self._fixed is None:
            return None
        masses, total = self._pools["train"].masses, np.zeros(self.n_outputs)
        of_classes = np.bincount(self._fixed[: len(masses)], masses / masses.sum(), self.n_outputs)
        for kind in self.kinds:
            among = kind.among or self.n_outputs
            even = (np.arange(self.n_outputs) < among) / among
            fixed = np.roll(of_classes, 1) if kind.labels == "shifted" else of_classes
            known = even if self._draws_labels(kind) else fixed
            total += kind.weight * ((1 - kind.random_query) * known + kind.random_query / self.n_outputs)
        return torch.from_numpy(total / total.sum())

    def references(self) -> Mapping[str, Reference]:
        """``uniform`` over labels, ``context_labels``, and ``nearest_neighbour``: the label of the most similar item.

        The second guesses evenly among the labels that the context shows, knowing how often that can fail, whatever
        the kind of the sequence.
        """
        weights = sum(kind.weight for kind in self.kinds)
        uninformed = min(sum(kind.weight * self._uninformed(kind) for kind in self.kinds) / weights, 1.0)
        return {
            "uniform": chance(self.n_outputs),
            "context_labels": among_plausible(uninformed),
            "nearest_neighbour": partial(nearest_label, outputs=self.n_outputs),
        }


def _truth(tokens: Int[Tensor, "M B C"], answers: Int[Tensor, "M B"]) -> Truth:
    """The last row is a query where its class is in the context; it matches the labels that equal the answer."""
    n = 2 * tokens.shape[-1] + 1
    position = torch.arange(n, device=tokens.device)
    labels, last = position % 2 == 1, position == n - 1
    query = last & (answers >= 0)[..., None]
    right = tokens == answers[..., None]
    spread = torch.stack([torch.zeros_like(right), right], -1).flatten(-2)  # exemplar, label, exemplar, label, ...
    right = torch.cat([spread, torch.zeros_like(right[..., :1])], -1)[..., None, :]
    rows = query[..., None]
    return Truth((position - 1).clamp(min=0), labels, query, rows & right, rows & labels & ~right)


def _check_burstiness(burstiness: int | None, bursty: float, context: int, labels: str, kinds: Sequence[Kind]) -> None:
    """Refuse a burstiness that does not fit the context, and one beside kinds."""
    _require(0 <= bursty <= 1, "FewShot.bursty", bursty, "a share, from 0 to 1")
    if burstiness is None:
        _require(bursty == 1, "FewShot.bursty", bursty, "1, as there is no burstiness")
        return
    fits = 1 <= burstiness <= context and context % burstiness == 0
    _require(fits, "FewShot.burstiness", burstiness, f"a divisor of {context} (context), or null")
    _require(not kinds, "FewShot.burstiness", burstiness, "null beside kinds, each of which has its own")
    fixed = bursty == 1 or labels == "fixed"
    _require(fixed, "FewShot.bursty", bursty, "1, as labels are drawn: independent classes carry fixed ones")


def _bursty_kinds(burstiness: int | None, bursty: float) -> tuple[Kind, ...]:
    """What a burstiness stands for (Reddy 2024): B copies of each class, or independent classes."""
    if burstiness is None:
        return (Kind(),)
    found = (Kind(weight=bursty, matches=burstiness, distractor_copies=burstiness),) if bursty > 0 else ()
    return found if bursty == 1 else (*found, Kind(weight=1 - bursty, independent=True))


def _fixed_labels(classes: int, labels: int, seed: int | None) -> Int64[np.ndarray, " classes"]:
    """Label of every class: its number modulo the labels, dealt out in another order by a seed."""
    found = np.arange(classes) % labels
    if seed is not None:
        key = np.array([seed, 0], np.uint64)
        found = found[np.random.Philox(key=key).random_raw(classes).argsort()]
    return found


def _heldout_count(items: str, train: int, heldout: int | None, present: int, needed: int) -> int:
    """How many classes or exemplars are held out; a split is empty or holds the ``needed`` number."""
    field = f"FewShot.train_{items}"
    _require(train >= needed, field, train, f"at least {needed} (different {items} in one sequence)")
    where = "classes in the exemplars" if items == "classes" else "exemplars of a class"
    _require(train <= present, field, train, f"at most {present} ({where})")
    left = present - train
    count = left if heldout is None else heldout
    fits = count == 0 or needed <= count <= left
    room = f"0 or {needed} .. {left}" if left >= needed else "0"
    _require(fits, f"FewShot.heldout_{items}", heldout, f"{room} ({left} of {present} {items} are not trained on)")
    return count


def _relabellings(in_play: set[int], n_labels: int, share: float, seed: int) -> tuple[LabelSets, LabelSets]:
    """Training's and held-out label sets by size, if they can be listed; the latter empty if some size has none."""
    _require(0 <= share < 1, "FewShot.heldout_relabellings", share, "a share, at least 0 and less than 1")
    seen, heldout = {}, {}
    for k in in_play:
        count = math.comb(n_labels, k)
        if count > _MOST_RELABELLINGS and share == 0:
            continue  # none is held out, so that labels can be drawn one by one
        too_many = f"fewer: there are {count} sets of {k} labels, more than {_MOST_RELABELLINGS}"
        too_many += "; or heldout_relabellings 0"
        _require(count <= _MOST_RELABELLINGS, "FewShot.n_labels", n_labels, too_many)
        sets = np.fromiter(chain.from_iterable(combinations(range(n_labels), k)), np.int64, count * k).reshape(count, k)
        key = np.array([seed, k], np.uint64)
        shuffled = sets[np.random.Philox(key=key).random_raw(count).argsort()]
        spared = min(round(share * count), count - 1)
        seen[k], heldout[k] = shuffled[spared:], shuffled[:spared]
    return seen, heldout if all(len(sets) for sets in heldout.values()) else {}
