"""Synthetic losses and head strengths whose change is at ``MIDDLE`` sequences."""

from __future__ import annotations

import math

import numpy as np

LN2, LN5 = math.log(2), math.log(5)
MIDDLE = 400_000.0


def sigmoid(x: np.ndarray, middle: float, width: float) -> np.ndarray:
    """0 to 1, from 10 to 90 % within ``width``."""
    return 1 / (1 + np.exp(-np.clip((x - middle) / width * 2 * math.log(9), -60, 60)))


def correlated(rng: np.random.Generator, n: int, memory: float) -> np.ndarray:
    """Normal noise of unit variance, correlated from sample to sample by ``memory``."""
    noise = rng.standard_normal(n)
    for i in range(1, n):
        noise[i] = memory * noise[i - 1] + math.sqrt(1 - memory**2) * noise[i]
    return noise


def loss_curve(
    seed: int, *, n: int = 3000, spacing: float = 320, width: float = 20_000, sd: float = 0.15, memory: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """ln 5, soon the plateau at ln 2, at 400 000 sequences the drop; less noise after it."""
    rng = np.random.default_rng(seed)
    x = spacing * np.arange(1, n + 1.0)
    left = 1 - sigmoid(x, MIDDLE, width)
    clean = LN2 * left + (LN5 - LN2) * np.exp(-x / 2500)
    return x, clean + sd * (0.15 + 0.85 * left) * correlated(rng, n, memory)


def head_curve(seed: int, *, memory: float = 0.5, bump: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A head's strength: 0.02, then 0.95, with a bump after the rise."""
    rng = np.random.default_rng(seed)
    x = 6400 * np.arange(1, 151.0)
    y = 0.02 + 0.93 * sigmoid(x, MIDDLE, 60_000) + bump * np.exp(-(((x - 520_000) / 40_000) ** 2))
    return x, y + 0.02 * correlated(rng, 150, memory)
