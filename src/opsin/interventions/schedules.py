"""When an intervention acts: pure functions from step to strength in [0, 1].

Legend: M members, S optimizer steps, n numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from opsin.errors import ConfigError
from opsin.interventions.feedback import Feedback
from opsin.records.history import History

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Schedule:
    """A window with optional ramps and pulses, and a closed loop that multiplies them.

    The strength at optimizer step k (the first step is 0) is evaluated at the position p = k, or
    p = k x batch size when ``unit`` is sequences: the sequences seen before that step.

    Args:
        start: first position at which the intervention acts.
        stop: first position at which it no longer acts; None for never.
        unit: what ``start``, ``stop``, ``ramp``, ``ramp_down`` and ``period`` count.
        ramp: over this length after ``start`` the strength grows linearly from 0 to 1.
        ramp_down: over this length before ``stop`` it falls linearly from 1 to 0.
        period: length of one on-off cycle, counted from ``start``; None for always on.
        duty: share of each cycle, from its beginning, in which the intervention is on; a fraction of
            a unit counts as a whole one.
        random: a seed; then each whole cycle is on with probability ``duty`` and off otherwise. Which
            ones are is a function of the seed and the number of the cycle alone.
        feedback: strength that follows from what the run measures; None for none.
    """

    start: int = 0
    stop: int | None = None
    unit: Literal["steps", "sequences"] = "steps"
    ramp: int = 0
    ramp_down: int = 0
    period: int | None = None
    duty: float = 0.5
    random: int | None = None
    feedback: Feedback | None = None

    def __post_init__(self) -> None:
        if self.unit not in ("steps", "sequences"):
            raise ConfigError("schedule.unit", self.unit, "'steps' or 'sequences'")
        for name in ("start", "ramp", "ramp_down"):
            if getattr(self, name) < 0:
                raise ConfigError(f"schedule.{name}", getattr(self, name), "0 or more")
        if self.stop is not None and self.stop <= self.start:
            raise ConfigError("schedule.stop", self.stop, f"more than schedule.start = {self.start}")
        if self.ramp_down and self.stop is None:
            raise ConfigError("schedule.ramp_down", self.ramp_down, "0 while schedule.stop is not given")
        if self.period is not None and self.period < 1:
            raise ConfigError("schedule.period", self.period, "at least 1")
        if not 0 < self.duty <= 1:
            raise ConfigError("schedule.duty", self.duty, "a share above 0 and at most 1")
        if self.random is not None and not 0 <= self.random < 2**64:
            raise ConfigError("schedule.random", self.random, "a seed from 0 to 2**64 - 1")
        if self.random is not None and self.period is None:
            raise ConfigError("schedule.random", self.random, "null while schedule.period is not given")

    def strength(self, steps: Int[np.ndarray, " S"], batch_size: int) -> Float[np.ndarray, " S"]:
        """Strength in [0, 1] at each optimizer step, apart from the feedback."""
        at = steps.astype(np.float64) * (batch_size if self.unit == "sequences" else 1)
        on = at >= self.start
        strength = np.ones_like(at)
        if self.ramp:
            strength = np.minimum(strength, (at - self.start) / self.ramp)
        if self.stop is not None:
            on &= at < self.stop
            if self.ramp_down:
                strength = np.minimum(strength, (self.stop - at) / self.ramp_down)
        if self.period is not None:
            on &= self._pulse(at - self.start)
        return np.where(on, strength, 0.0)

    def gates(self, first: int, count: int, members: int, history: History) -> Float[np.ndarray, "S M"]:
        """Strength at steps ``first .. first + count - 1`` in every member, from what the history holds now."""
        window = self.strength(np.arange(first, first + count), history.batch_size)[:, None]
        if self.feedback is None:
            return np.repeat(window, members, axis=1)
        return window * self.feedback.strengths(first, count, members, history)

    def _pulse(self, passed: Float[np.ndarray, " S"]) -> Bool[np.ndarray, " S"]:
        """Whether the cycle is on, so far after the start."""
        assert self.period is not None
        if self.random is None:
            return np.mod(passed, self.period) < self._on()
        return chances(self.random, np.floor_divide(passed, self.period).astype(np.int64)) < self.duty

    def _on(self) -> int:
        """Units of a cycle that are on; in decimals as the user wrote them, where 0.55 of 100 is 55."""
        assert self.period is not None
        return math.ceil(Fraction(str(self.duty)) * self.period)

    def __str__(self) -> str:
        window = replace(self, feedback=None)
        parts = [] if window == Schedule() else [self._window()]
        parts += [] if self.feedback is None else [str(self.feedback)]
        return ", ".join(parts) or "always"

    def _window(self) -> str:
        text = f"{self.unit} {self.start} to {'end' if self.stop is None else self.stop}"
        if self.ramp or self.ramp_down:
            text += f", ramps {self.ramp}/{self.ramp_down}"
        if self.random is not None:
            text += f", cycles of {self.period} on with probability {self.duty:g} (seed {self.random})"
        elif self.period is not None:
            text += f", on for {self.duty:g} of every {self.period}"
        return text


def chances(seed: int, numbers: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """For each number one of [0, 1), evenly spread and independent, a function of it and the seed alone.

    SplitMix64 (Steele, Lea and Flood 2014; constants: Stafford's mix 13), started at the mixed seed.
    """
    state = _mixed(np.array([seed], dtype=np.uint64))
    return (_mixed(state + (numbers.astype(np.uint64) + np.uint64(1)) * GOLDEN) >> np.uint64(11)) * 2.0**-53


def _mixed(z: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
