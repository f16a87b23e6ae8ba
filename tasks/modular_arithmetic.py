"""ModularArithmetic and PermutationTable: the table of an operation, learned from a share of its entries.

A sequence is "a b =", three tokens; what is predicted at "=" is the answer (Power et al. 2022, "Grokking:
Generalization beyond overfitting on small algorithmic datasets"). The share is that of a seeded permutation of all
pairs, the same for every member, and by default a step sees the whole of it.

Legend: M members, B batch, E pairs of the table, n elements that a permutation permutes.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opsin.errors import ConfigError
from opsin.objective import CLASS_MEASURES, CrossEntropy, LogCrossEntropy, Measure, least_margin
from opsin.task import Bank, Batch, Layout, Reference, Truth
from opsin.tasks.shared.finite import FiniteTask
from opsin.tasks.shared.references import as_logits, chance

LARGEST_MODULUS = 1_000
LARGEST_PERMUTED = 6
LONGEST_OPERATION = 200
"""Most characters of an operation as a user writes it."""

TABLE_MEASURES = (*CLASS_MEASURES, Measure("margin", "up", least_margin))
"""Measures of a table: beside accuracy the smallest margin, logit of the answer less the highest other (Lyu 2024)."""

TableLoss = Literal["cross_entropy", "log_cross_entropy"]


@dataclass(frozen=True)
class TableCrossEntropy(CrossEntropy):
    """Cross-entropy (nats), with the smallest margin among its measures.

    Args:
        in_float64: whether the loss is computed in double precision.
    """

    measures = TABLE_MEASURES


@dataclass(frozen=True)
class LogTableCrossEntropy(LogCrossEntropy):
    """Logarithm of the mean cross-entropy, with the smallest margin among its measures.

    Args:
        in_float64: whether the loss is computed in double precision.
    """

    measures = TABLE_MEASURES


class OperationTable(FiniteTask):
    """Pairs (a, b) with their answers, as tokens "a b =" or "a b"; a base of tasks.

    References: ``chance``, and ``exact``, which knows the operation. Evaluation sets are ``train``, all training pairs,
    and ``test``, all others.

    Args:
        pairs: numbers of a, b and answer of every defined pair, in the order of a, then b.
        elements: number of elements of the set that a, b and the answer are from.
        train_share: share of the pairs that training uses, more than 0 and less than 1.
        split_seed: seed of the permutation that parts them, 0 .. 2**64 - 1.
        batch_size: pairs of a training step; None for the whole training set.
        equals: whether a token "=" follows the two operands, at which the answer is predicted; else it is at b.
        loss: the cross-entropy, or its logarithm, which goes on falling when the cross-entropy is tiny.
        in_float64: whether the loss is computed in double precision.

    Raises:
        ConfigError: a value out of its range, or a share that leaves nothing to train on or to test on.
    """

    n_features = None

    def __init__(
        self,
        pairs: Int64[np.ndarray, "E 3"],
        elements: int,
        train_share: float,
        split_seed: int,
        batch_size: int | None,
        equals: bool,
        loss: TableLoss,
        in_float64: bool,
    ) -> None:
        super().__init__(len(pairs), train_share, split_seed, batch_size)
        kinds = {"cross_entropy": TableCrossEntropy, "log_cross_entropy": LogTableCrossEntropy}
        self._refuse_unless(loss in kinds, "loss", loss, " or ".join(kinds))
        self.objective = kinds[loss](in_float64)
        self.pairs, self.equals = pairs, equals
        self.n_tokens, self.n_outputs = elements + equals, elements
        positions = tuple(range(2 + equals))
        self.layout = Layout(features=(), tokens=positions, labels=(), scored=positions[-1:])

    def bank(self) -> Bank:
        return {"pairs": torch.from_numpy(self.pairs).float()}

    def assemble(self, bank: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> Batch:
        pairs = bank["pairs"][draw["example"]].long()  # M B 3
        operands, answer = pairs[..., :2], pairs[..., 2:]
        shown = (operands, torch.full_like(answer, self.n_outputs)) if self.equals else (operands,)
        members, size, _ = answer.shape
        truth = Truth.without_queries(self.layout, members, size, answer.device)
        return Batch(None, torch.cat(shown, -1), answer, None, truth, self.layout)

    def table(self, bank: Mapping[str, Tensor]) -> Batch:
        """All pairs as the batch of one member, in the order of a, then b.

        Args:
            bank: constants of the task.
        """
        every = torch.arange(len(self.pairs), device=bank["pairs"].device)
        return self.assemble(bank, {"example": every[None]})

    def references(self) -> Mapping[str, Reference]:
        return {"chance": chance(self.n_outputs), "exact": self._answered}

    def _answered(self, batch: Batch) -> Float[Tensor, "M B Q V"]:
        """All probability on the right answer."""
        return as_logits(torch.nn.functional.one_hot(batch.targets, self.n_outputs).double())

    def baselines(self) -> dict[str, float]:
        return {"uniform": math.log(self.n_outputs)}

    def unigram(self) -> Float[Tensor, " V"]:
        answers = self.pairs[self.examples_of("train"), 2]
        return torch.from_numpy(np.bincount(answers, minlength=self.n_outputs) / len(answers))


class ModularArithmetic(OperationTable):
    """An operation on the numbers 0 .. p - 1, modulo p, of which a share of the table is trained on.

    Args:
        modulus: p, how many numbers there are.
        operation: expression of ``a`` and ``b`` with whole numbers and ``+ - * / **``, such as ``a**2 + a*b + b**2``.
            ``/`` multiplies by the inverse modulo p; pairs for which there is none are not in the table.
        train_share: share of the pairs that training uses, more than 0 and less than 1.
        split_seed: seed of the permutation that parts them, 0 .. 2**64 - 1.
        batch_size: pairs of a training step; None for the whole training set.
        equals: whether a token "=", number p, follows the two operands; without it the answer is predicted at b, and
            a model that reads one-hot vectors has 2p inputs.
        loss: the cross-entropy, or its logarithm (Lyu et al. 2024).
        in_float64: whether the loss is computed in double precision.

    Raises:
        ConfigError: an operation that cannot be read, a value out of its range, or a share that leaves nothing.
    """

    def __init__(
        self,
        modulus: int = 37,
        operation: str = "a + b",
        train_share: float = 0.5,
        split_seed: int = 0,
        batch_size: int | None = None,
        equals: bool = True,
        loss: TableLoss = "cross_entropy",
        in_float64: bool = True,
    ) -> None:
        in_range = 2 <= modulus <= LARGEST_MODULUS
        self._refuse_unless(in_range, "modulus", modulus, f"2 .. {LARGEST_MODULUS:,}")
        self.modulus = modulus
        pairs = self._table_of(operation)
        super().__init__(pairs, modulus, train_share, split_seed, batch_size, equals, loss, in_float64)

    def _table_of(self, operation: str) -> Int64[np.ndarray, "E 3"]:
        """The defined pairs and their answers."""
        a, b = np.divmod(np.arange(self.modulus**2), self.modulus)
        try:
            if len(operation) > LONGEST_OPERATION:
                raise ValueError(operation)
            answers = _evaluate(ast.parse(operation.strip(), mode="eval").body, {"a": a, "b": b}, self.modulus)
        except (SyntaxError, ValueError) as error:
            expected = "an expression of a and b with whole numbers and + - * / **, such as 'a**2 + a*b + b**2'"
            raise ConfigError("ModularArithmetic.operation", operation, expected) from error
        defined = ~np.ma.getmaskarray(answers)
        self._refuse_unless(defined.sum() >= 2, "operation", operation, "one that is defined for two pairs or more")
        return np.stack([a, b, np.ma.getdata(answers)], 1)[defined]


def _evaluate(node: ast.expr, values: Mapping[str, np.ndarray], modulus: int) -> np.ndarray:
    """What an expression is, modulo a number, for every pair; masked where an inverse that it needs does not exist.

    Args:
        node: part of the expression.
        values: numbers 0 .. modulus - 1 of each name, one a pair.
        modulus: p, what all numbers are taken modulo.

    Raises:
        ValueError: something else than a, b, whole numbers and the five operations.
    """
    match node:
        case ast.Name(id=name) if name in values:
            return np.ma.MaskedArray(values[name])
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return np.ma.MaskedArray(np.full_like(values["a"], number % modulus))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, values, modulus) % modulus
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(exponent))) if exponent >= 0:
            powers = np.array([pow(base, exponent, modulus) for base in range(modulus)])
            return _looked_up(powers, _evaluate(left, values, modulus))
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() as operator, right=right):
            first, second = _evaluate(left, values, modulus), _evaluate(right, values, modulus)
            return _combined(operator, first, second, modulus) % modulus
    raise ValueError(ast.dump(node))


def _combined(operator: ast.operator, first: np.ndarray, second: np.ndarray, modulus: int) -> np.ndarray:
    match operator:
        case ast.Add():
            return first + second
        case ast.Sub():
            return first - second
        case ast.Mult():
            return first * second
    inverses = [pow(x, -1, modulus) if math.gcd(x, modulus) == 1 else 0 for x in range(modulus)]
    return first * np.ma.masked_equal(_looked_up(np.array(inverses), second), 0)


def _looked_up(table: Int64[np.ndarray, " P"], numbers: np.ndarray) -> np.ndarray:
    """The entry of a table for every number, masked where the number is."""
    return np.ma.MaskedArray(table[np.ma.getdata(numbers)], np.ma.getmaskarray(numbers))


class PermutationTable(OperationTable):
    """Products of permutations of n things, the group S_n, of which a share of the table is trained on.

    Elements are numbered in the lexicographic order of what they permute 0, 1, .. into; in a product ab, b comes first:
    (ab)(i) = a(b(i)).

    Args:
        permuted: n, how many things are permuted; there are n! elements.
        operation: the product ``ab``, ``aba^-1``, or ``aba`` (Power et al. 2022).
        train_share: share of the pairs that training uses, more than 0 and less than 1.
        split_seed: seed of the permutation that parts them, 0 .. 2**64 - 1.
        batch_size: pairs of a training step; None for the whole training set.
        equals: whether a token "=", number n!, follows the two operands, at which the answer is predicted; else it is
            at b.
        loss: the cross-entropy, or its logarithm (Lyu et al. 2024).
        in_float64: whether the loss is computed in double precision.

    Raises:
        ConfigError: an unknown operation, a value out of its range, or a share that leaves nothing.
    """

    def __init__(
        self,
        permuted: int = 4,
        operation: Literal["ab", "aba^-1", "aba"] = "ab",
        train_share: float = 0.5,
        split_seed: int = 0,
        batch_size: int | None = None,
        equals: bool = True,
        loss: TableLoss = "cross_entropy",
        in_float64: bool = True,
    ) -> None:
        in_range = 2 <= permuted <= LARGEST_PERMUTED
        self._refuse_unless(in_range, "permuted", permuted, f"2 .. {LARGEST_PERMUTED}")
        known = operation in ("ab", "aba^-1", "aba")
        self._refuse_unless(known, "operation", operation, "ab, aba^-1 or aba")
        elements = np.array(list(permutations(range(permuted))))  # n! n
        a, b = np.divmod(np.arange(len(elements) ** 2), len(elements))
        first, second = elements[a], elements[b]
        answers = _composed(first, second)
        if operation != "ab":
            # argsort of a permutation is its inverse
            answers = _composed(answers, first if operation == "aba" else first.argsort(-1))
        digits = permuted ** np.arange(permuted)[::-1]
        numbers = np.searchsorted(elements @ digits, answers @ digits)
        pairs = np.stack([a, b, numbers], 1)
        super().__init__(pairs, len(elements), train_share, split_seed, batch_size, equals, loss, in_float64)


def _composed(first: Int64[np.ndarray, "E n"], second: Int64[np.ndarray, "E n"]) -> Int64[np.ndarray, "E n"]:
    """Permutations that do the second, then the first."""
    return np.take_along_axis(first, second, -1)
