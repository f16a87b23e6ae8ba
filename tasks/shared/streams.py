"""Counter-based random choices: numbers that are a function of (seed, split, step) and of nothing else.

Here they are made, and turned into whole numbers, classes in proportion to their masses, and draws without replacement.

Philox turns a key and a 256-bit counter into four 64-bit numbers. The key holds the seed and the
split; the counter's words are, from the lowest, block (two words), step, stream, so that streams of
one key never meet. Legend: R sequences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Float32, Int64, UInt64

from opsin.errors import ConfigError

UINT64_MAX = 2**64 - 1
"""The largest seed, and the largest word of a counter."""


def stream_key(seed: int, split: str, batch_size: int) -> UInt64[np.ndarray, "2"]:
    """Philox key of one seed's draws of one split at one batch size.

    Args:
        seed: seed of the member, 0 .. 2**64 - 1.
        split: name of the split, ``"train"`` or ``"eval/NAME"``.
        batch_size: B, sequences of a step; another one is another stream.
    """
    digest = hashlib.blake2b(f"{split} {batch_size}".encode(), digest_size=8).digest()
    return np.array([seed, int.from_bytes(digest, "little")], np.uint64)


def check_draw(
    task: str, splits: Collection[str], split: str, seeds: Sequence[int], span: tuple[int, int, int]
) -> None:
    """Check the arguments of a task's ``draw``.

    Args:
        task: name of the task's class, for messages.
        splits: names of the splits that the task has.
        split: name of the split that is to be drawn.
        seeds: one seed a member, each 0 .. 2**64 - 1.
        span: first step, number of steps, and sequences of a step.

    Raises:
        ConfigError: an argument that nothing can be drawn from.
    """
    first, count, size = span
    for name, value, holds, expected in (
        ("split", split, split in splits, f"one of {', '.join(splits)}"),
        ("seeds", list(seeds), all(0 <= seed <= UINT64_MAX for seed in seeds), "numbers in 0 .. 2**64 - 1"),
        ("steps", (first, count), first >= 0 and count >= 0, "a first step and a count of at least 0"),
        ("batch_size", size, size >= 1, "at least 1"),
    ):
        if not holds:
            raise ConfigError(f"{task}.{name}", value, expected)


def _generator(key: UInt64[np.ndarray, "2"], block: int, step: int, stream: int) -> np.random.Philox:
    return np.random.Philox(key=key, counter=np.array([block & UINT64_MAX, block >> 64, step, stream], np.uint64))


def uniforms(
    keys: list[UInt64[np.ndarray, "2"]], stream: int, first: int, count: int, size: int, parts: Mapping[str, int]
) -> dict[str, Float[np.ndarray, "_ R"]]:
    """Uniform numbers in [0, 1) for ``size`` sequences of each step and key, ``parts[name]`` of them each.

    A step owns a fixed range of blocks, so consecutive steps come out of one call and each is still
    a function of its index alone. R = count * len(keys) * size, in this order.

    Args:
        keys: Philox keys, as ``stream_key`` makes them, one a seed.
        stream: number of the stream; streams of one key never meet.
        first: index of the first step, at least 0.
        count: number of steps, at least 0.
        size: sequences of each step and key.
        parts: how many numbers a sequence gets, by what they decide.
    """
    width = sum(parts.values())
    blocks = -(-width * size // 4)  # a block yields four numbers
    raw = np.stack([_generator(key, first * blocks, 0, stream).random_raw(count * blocks * 4) for key in keys])
    raw = raw.reshape(len(keys), count, blocks * 4)[..., : width * size].reshape(len(keys), count, width, size)
    found = (raw.transpose(2, 1, 0, 3).reshape(width, -1) >> np.uint64(11)) * 2.0**-53
    edges = np.cumsum(list(parts.values()))[:-1]
    return dict(zip(parts, np.split(found, edges), strict=True))


def fill_normals(key: UInt64[np.ndarray, "2"], stream: int, step: int, out: Float32[np.ndarray, "..."]) -> None:
    """Fill an array with numbers from N(0, 1).

    A step is one word of the counter, because normal numbers take a varying number of blocks.

    Args:
        key: Philox key of the seed, as ``stream_key`` makes it.
        stream: number of the stream; streams of one key never meet.
        step: index of the step, at least 0.
        out: array that is overwritten.
    """
    np.random.Generator(_generator(key, 0, step, stream)).standard_normal(dtype=np.float32, out=out)


def permutation(key: UInt64[np.ndarray, "2"], stream: int, index: int, count: int) -> Int64[np.ndarray, " count"]:
    """The numbers 0 .. ``count`` - 1 in a random order, a function of its arguments alone.

    Args:
        key: Philox key of the seed, as ``stream_key`` makes it.
        stream: number of the stream; streams of one key never meet.
        index: number of the permutation, at least 0, such as an epoch's.
        count: how many numbers are permuted.
    """
    # ties of 64-bit numbers keep their order
    return _generator(key, 0, index, stream).random_raw(count).argsort(kind="stable")


def below(u: Float[np.ndarray, "*shape"], n: int) -> Int64[np.ndarray, "*shape"]:
    """Uniform numbers in [0, 1) as whole numbers in 0 .. n - 1."""
    return (u * n).astype(np.int64)


def zipf_masses(classes: int, exponent: float) -> Int64[np.ndarray, " classes"]:
    """Probabilities proportional to 1 / rank ** exponent, as whole numbers up to a common factor.

    Args:
        classes: number of classes, the likeliest first.
        exponent: exponent of the rank, at least 0; 0 for equal probabilities.
    """
    if exponent == 0:
        return np.ones(classes, np.int64)
    shares = np.arange(1, classes + 1) ** -float(exponent)
    # their sum stays below 2 ** 53, up to which doubles hold whole numbers; no class gets nothing
    return np.maximum(1, np.round(2.0**50 * shares / shares.sum())).astype(np.int64)


def by_mass(u: Float[np.ndarray, "*shape"], masses: Int64[np.ndarray, " classes"]) -> Int64[np.ndarray, "*shape"]:
    """Uniform numbers in [0, 1) as classes, each in proportion to its mass; masses are whole, their sum below 2**53."""
    ends = masses.cumsum()
    return np.searchsorted(ends, (u * ends[-1]).astype(np.int64), side="right")


def without_replacement(
    u: Float[np.ndarray, "draws R"], masses: Int64[np.ndarray, " classes"]
) -> Int64[np.ndarray, "draws R"]:
    """Different classes, drawn one after another, each in proportion to its mass among those left.

    Args:
        u: uniform numbers in [0, 1), one a draw and sequence.
        masses: relative probabilities; whole numbers, which makes the draws exact, and at least as
            many as there are draws.
    """
    ends = masses.cumsum()
    starts = ends - masses
    drawn = np.empty((0, u.shape[1]), np.int64)
    for row in u:
        # a ticket among the mass not yet drawn, which then steps over each class already drawn
        ticket = (row * (ends[-1] - masses[drawn].sum(0))).astype(np.int64)
        for earlier in np.sort(drawn, axis=0):
            ticket += np.where(ticket >= starts[earlier], masses[earlier], 0)
        drawn = np.concatenate([drawn, np.searchsorted(ends, ticket, side="right")[None]])
    return drawn


def of_different_groups(
    u: Float[np.ndarray, "draws R"], masses: Int64[np.ndarray, " classes"], groups: Int64[np.ndarray, " classes"]
) -> Int64[np.ndarray, "draws R"]:
    """Classes of different groups, drawn one after another, each in proportion to its mass in the groups left.

    Args:
        u: uniform numbers in [0, 1), one a draw and sequence.
        masses: relative probabilities of the classes; whole numbers, their sum below 2**53.
        groups: group that each class belongs to, from 0; at least as many different ones as there are draws.
    """
    in_order = groups.argsort(kind="stable")
    ends = masses[in_order].cumsum()
    totals = np.bincount(groups, masses).astype(np.int64)
    starts = totals.cumsum() - totals
    drawn, gone = np.empty((0, u.shape[1]), np.int64), np.empty((0, u.shape[1]), np.int64)
    for row in u:
        # a ticket among the mass of the groups left, which then steps over each group already drawn
        ticket = (row * (ends[-1] - totals[gone].sum(0))).astype(np.int64)
        for earlier in np.sort(gone, axis=0):
            ticket += np.where(ticket >= starts[earlier], totals[earlier], 0)
        drawn = np.concatenate([drawn, in_order[np.searchsorted(ends, ticket, side="right")][None]])
        gone = groups[drawn]
    return drawn
