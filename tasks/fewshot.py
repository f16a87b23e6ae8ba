"""Few-shot induction: exemplar, label, exemplar, label, ..., query exemplar; predict the query's label.

Which label a class carries is drawn anew for every sequence (a relabelling), so the only way to the
answer is to find the query's class in the context and copy the label that follows it.

Legend: S steps drawn together, M members, B batch, C (exemplar, label) pairs of the context, N = C + 1
items with the query, L = 2 C + 1 positions, R = S M B sequences, k different classes in one context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations

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
    check_draw,
    fill_normals,
    stream_key,
    uniforms,
    without_replacement,
    zipf_masses,
)

_CHOICE_STREAM, _CORRUPTION_STREAM, _NOISE_STREAM = range(3)
"""Separate streams, so that switching corruption or noise on leaves every other choice as it was."""

Uniforms = Mapping[str, Float[np.ndarray, "_ R"]]
"""Numbers in [0, 1) by what they decide."""

LabelSets = Mapping[int, Int64[np.ndarray, "_ _"]]
"""Sets of k labels, ``[sets, k]``, by k; tabulated, hence the next line."""

_MOST_RELABELLINGS = 1_000_000


def _require(holds: bool, field: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(field, value, expected)


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

    Raises:
        ConfigError: a value out of its range.
    """

    weight: float = 1.0
    matches: int = 1
    distractor_copies: int | None = 1
    no_support: float = 0.0
    random_query: float = 0.0
    label_flip: float = 0.0
    matched_query: bool = False
    matched_distractors: bool = False

    def __post_init__(self) -> None:
        _require(0 < self.weight < math.inf, "Kind.weight", self.weight, "a positive number")
        _require(self.matches >= 1, "Kind.matches", self.matches, "at least 1 (no_support leaves the class out)")
        copies = self.distractor_copies
        _require(copies is None or copies >= 1, "Kind.distractor_copies", copies, "at least 1, or null")
        for name in ("no_support", "random_query", "label_flip"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"Kind.{name}", value, "a probability")

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

    def guessing_loss(self, context: int, n_labels: int) -> float:
        """Cross-entropy (nats) of guessing evenly among the labels in play, knowing how often that can fail.

        Args:
            context: C, number of (exemplar, label) pairs before the query.
            n_labels: V, number of labels to predict.
        """
        in_play = int(self.slots(context)[-1]) + 1
        outside = self.uninformed / n_labels
        inside = (1 - self.uninformed) / in_play + outside
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
    """

    first_class: int
    masses: Int64[np.ndarray, " classes"]
    first_exemplar: int
    exemplars: int
    independent: bool
    relabellings: LabelSets


class FewShot(Task):
    """The few-shot induction task; its defaults are the reference system's main run.

    Evaluation sets (those that the splits leave room for), all with the same kinds of sequences: ``train``;
    ``relabellings``: held-out label sets, if every kind has some; ``exemplars``: held-out exemplars of the
    training classes, each item's drawn independently; ``classes``: held-out classes, drawn uniformly, with
    the exemplar numbers and label sets of training.

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

    Raises:
        ConfigError: settings that do not fit each other or the exemplars, which are loaded here.
    """

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
        heldout_relabellings: float = 0.2,
        relabelling_seed: int = 55,
        zipf: float = 0.0,
        noise: float = 0.0,
        kinds: Sequence[Kind] = (),
    ) -> None:
        self.kinds = tuple(kinds) or (Kind(),)
        self.context, self.batch_size, self.noise = context, batch_size, noise
        self.n_tokens = self.n_outputs = n_labels
        self._check_numbers(zipf, relabelling_seed)
        # where induction should look, twice, and the numbers that decide about one sequence
        length = 2 * context + 1
        check_memory("FewShot.context", context, 2 * length**2 + 8 * length)
        check_memory("FewShot.batch_size", batch_size, batch_size * (2 * length**2 + 8 * length))
        in_play = self._check_kinds()

        self._bank = {"exemplars": torch.from_numpy(exemplars.load())}
        n_classes, n_exemplars, self.n_features = self._bank["exemplars"].shape
        needed = max(k + (kind.no_support > 0) for k, kind in zip(in_play, self.kinds, strict=True))
        heldout_classes = _heldout_count("classes", train_classes, heldout_classes, n_classes, needed)
        heldout_exemplars = _heldout_count("exemplars", train_exemplars, heldout_exemplars, n_exemplars, 1)
        seen, heldout = _relabellings(set(in_play), n_labels, heldout_relabellings, relabelling_seed)

        masses = zipf_masses(train_classes, zipf)
        train = _Pool(0, masses, 0, train_exemplars, False, seen)
        self._pools = {"train": train, "eval/train": train}
        if heldout:
            self._pools["eval/relabellings"] = _Pool(0, masses, 0, train_exemplars, False, heldout)
        if heldout_exemplars:
            self._pools["eval/exemplars"] = _Pool(0, masses, train_exemplars, heldout_exemplars, True, seen)
        if heldout_classes:
            first, uniform = n_classes - heldout_classes, zipf_masses(heldout_classes, 0.0)
            self._pools["eval/classes"] = _Pool(first, uniform, 0, train_exemplars, False, seen)
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

    def _check_kinds(self) -> list[int]:
        """Different classes in a context of each kind."""
        in_play = []
        for i, kind in enumerate(self.kinds):
            field, rest, copies = f"FewShot.kinds[{i}]", self.context - kind.matches, kind.distractor_copies
            _require(rest >= 0, f"{field}.matches", kind.matches, f"at most {self.context} (pairs in the context)")
            fits = copies is None or rest % copies == 0
            _require(fits, f"{field}.distractor_copies", copies, f"a divisor of {rest} (context less matches)")
            k = int(kind.slots(self.context)[-1]) + 1
            _require(k <= self.n_outputs, "FewShot.n_labels", self.n_outputs, f"at least {k} (classes of kinds[{i}])")
            flips = kind.label_flip == 0 or k > 1
            _require(flips, f"{field}.label_flip", kind.label_flip, "0, as the context holds only one class")
            in_play.append(k)
        return in_play

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
            context. With noise also ``noise``: Float32 [S, M, B, N, F].
        """
        size = self.batch_size if batch_size is None else batch_size
        check_draw("FewShot", self._pools, split, seeds, (first, count, size))
        distinct = sorted(set(seeds))  # conditions of one seed share its data: draw that once
        keys = [stream_key(seed, split, size) for seed in distinct]
        drawn = self._sequences(self._uniforms(keys, first, count, size), self._pools[split])
        shape = (count, len(distinct), size)
        found = {
            name: np.ascontiguousarray(array.T).reshape(*shape, *array.shape[:-1]) for name, array in drawn.items()
        }
        if self.noise:
            found["noise"] = self._noise(keys, first, shape)
        if list(seeds) != distinct:
            member = [distinct.index(seed) for seed in seeds]
            found = {name: array[:, member] for name, array in found.items()}
        return {name: torch.from_numpy(array) for name, array in found.items()}

    def _uniforms(self, keys: list[np.ndarray], first: int, count: int, size: int) -> Uniforms:
        """Every random choice of every sequence as a number in [0, 1), by what it decides."""
        c = self.context
        parts = {"kind": 1, "support": 1, "relabelling": 1, "classes": c + 1, "labels": c, "order": c}
        found = uniforms(keys, _CHOICE_STREAM, first, count, size, parts | {"exemplars": c + 1})
        if any(kind.no_support or kind.random_query or kind.label_flip for kind in self.kinds):
            corruption = {"random_query": 1, "random_label": 1, "flip": c, "flip_to": c}
            found |= uniforms(keys, _CORRUPTION_STREAM, first, count, size, corruption)
        return found

    def _sequences(self, u: Uniforms, pool: _Pool) -> dict[str, Int64[np.ndarray, "... R"]]:
        """The choices by name, each sequence by the rules of its kind."""
        if len(self.kinds) == 1:
            return self._of_kind(self.kinds[0], u, pool)
        shares = np.cumsum([kind.weight for kind in self.kinds])
        which = np.searchsorted(shares[:-1], u["kind"][0] * shares[-1], side="right")
        found: dict[str, np.ndarray] = {}
        for i, kind in enumerate(self.kinds):
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

        # the query's class is drawn first, so that it has the stated distribution whatever else is in play
        drawn = pool.first_class + without_replacement(u["classes"][: k + (kind.no_support > 0)], pool.masses)
        supported = u["support"][0] >= kind.no_support
        shown = np.concatenate([np.where(supported, drawn[0], drawn[-1])[None], drawn[1:k]])

        sets = pool.relabellings[k]
        label_set = sets[below(u["relabelling"][0], len(sets))].T
        label = np.take_along_axis(label_set, u["labels"][:k].argsort(0), 0)  # [k, R]: of each class in play
        answers = np.where(supported, label[0], -1)

        named, target = slot, answers
        if kind.label_flip:
            # another of the k classes: 1 .. k - 1 further on, in a circle
            other = (slot + 1 + below(u["flip_to"], k - 1)) % k
            named = np.where(u["flip"] < kind.label_flip, other, slot)
        if kind.no_support or kind.random_query:
            informed = supported & (u["random_query"][0] >= kind.random_query)
            target = np.where(informed, answers, below(u["random_label"][0], self.n_outputs))
        return {
            "classes": np.concatenate([np.take_along_axis(shown, slot, 0), drawn[:1]]),
            "exemplars": self._exemplars(kind, u["exemplars"], slots, order, supported, pool),
            "labels": np.concatenate([np.take_along_axis(label, named, 0), target[None]]),
            "answers": answers,
        }

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

    def assemble(self, bank: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> Batch:
        """One step's draw (tensors ``[M, B, ...]``, no S) as a batch; features in the dtype of the bank."""
        features = bank["exemplars"][draw["classes"], draw["exemplars"]]
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
        """Losses (nats) without a look-up; the second knows the k labels in play, averaged over the kinds."""
        weighted = sum(kind.weight * kind.guessing_loss(self.context, self.n_outputs) for kind in self.kinds)
        mean = weighted / sum(kind.weight for kind in self.kinds)
        return {"uniform over labels": math.log(self.n_outputs), "labels of the context": mean}

    def references(self) -> Mapping[str, Reference]:
        """``uniform`` over labels, ``context_labels``, and ``nearest_neighbour``: the label of the most similar item.

        The second guesses evenly among the labels that the context shows, knowing how often that can fail, whatever
        the kind of the sequence.
        """
        weights = sum(kind.weight for kind in self.kinds)
        uninformed = sum(kind.weight * kind.uninformed for kind in self.kinds) / weights
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
    """Training's and held-out label sets by size; the latter empty if some size has none to spare."""
    _require(0 <= share < 1, "FewShot.heldout_relabellings", share, "a share, at least 0 and less than 1")
    seen, heldout = {}, {}
    for k in in_play:
        count = math.comb(n_labels, k)
        too_many = f"fewer: there are {count} sets of {k} labels, more than {_MOST_RELABELLINGS}"
        _require(count <= _MOST_RELABELLINGS, "FewShot.n_labels", n_labels, too_many)
        sets = np.fromiter(chain.from_iterable(combinations(range(n_labels), k)), np.int64, count * k).reshape(count, k)
        key = np.array([seed, k], np.uint64)
        shuffled = sets[np.random.Philox(key=key).random_raw(count).argsort()]
        spared = min(round(share * count), count - 1)
        seen[k], heldout[k] = shuffled[spared:], shuffled[:spared]
    return seen, heldout if all(len(sets) for sets in heldout.values()) else {}
