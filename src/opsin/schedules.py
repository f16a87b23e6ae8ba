"""When an intervention acts: pure functions from step to strength in [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from opsin.errors import ConfigError
from opsin.feedback import Feedback


@dataclass(frozen=True)
class Schedule:
    """A window with optional ramps and pulses.

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
    """

    start: int = 0
    stop: int | None = None
    unit: Literal["steps", "sequences"] = "steps"
    ramp: int = 0
    ramp_down: int = 0
    period: int | None = None
    duty: float = 0.5
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

    def strength(self, steps: Int[np.ndarray, " S"], batch_size: int) -> Float[np.ndarray, " S"]:
        """Strength in [0, 1] at each optimizer step."""
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
            on &= np.mod(at - self.start, self.period) < self._on()
        return np.where(on, strength, 0.0)

    def _on(self) -> int:
        """Units of a cycle that are on; in decimals as the user wrote them, where 0.55 of 100 is 55."""
        assert self.period is not None
        return math.ceil(Fraction(str(self.duty)) * self.period)

    def __str__(self) -> str:
        if self == Schedule():
            return "always"
        text = f"{self.unit} {self.start} to {'end' if self.stop is None else self.stop}"
        if self.ramp or self.ramp_down:
            text += f", ramps {self.ramp}/{self.ramp_down}"
        if self.period is not None:
            text += f", on for {self.duty:g} of every {self.period}"
        return text
