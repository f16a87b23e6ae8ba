"""What Opsin says to its user: errors of one line that names the field, the value and what was expected."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Sequence

log = logging.getLogger("lightning.pytorch.opsin")
"""A child of Lightning's logger, so that it shows where Lightning's does."""


LONGEST_VALUE = 200
"""Characters of a value that a message shows."""

MOST_CHOICES = 12
"""Names that a message lists where none is near."""


def shortened(text: str, length: int) -> str:
    """A text in one line, with its middle left out where it is longer than that.

    Args:
        text: text that is shown.
        length: largest number of characters of the result, at least 20.
    """
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 17]} ... {line[-12:]}"


def nearest(name: str, known: Sequence[str], expected: str) -> str:
    """What was expected, with the names that are like the one that was written, or all where they are few.

    Args:
        name: name that was written.
        known: names that exist where it stands.
        expected: words for what they are.
    """
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    near += [like for like in known if like.lower() == name.lower() and like not in near]
    if near:
        return f"{expected}; nearest: {', '.join(near)}"
    return f"{expected}: {', '.join(known)}" if 0 < len(known) <= MOST_CHOICES else expected


class ConfigError(ValueError):
    """A setting that cannot work. The command line prints it as one line and exits with code 2.

    Args:
        field: what the user wrote it under, for example ``Clamp.heads``.
        value: what the user gave, shown as Python writes it.
        expected: what would have been accepted.
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field}: got {shortened(repr(value), LONGEST_VALUE)}, expected {expected}")
        self.field, self.value, self.expected = field, value, expected


def config_error_behind(error: BaseException | None) -> ConfigError | None:
    """The ConfigError that caused an error, or is the error; None where no wrong setting did."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def check_number(
    field: str, value: float, expected: str, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Refuse a number that is not finite or lies outside of a range.

    Args:
        field: setting that the number was written under.
        value: number that the user gave.
        expected: words for the range, for the message.
        low: smallest number of the range.
        high: largest number of the range.
        open_low: whether the smallest number is outside of the range itself.

    Raises:
        ConfigError: the number cannot be.
    """
    inside = math.isfinite(value) and low <= value <= high
    if not inside or (open_low and value == low):
        raise ConfigError(field, value, expected)


class DivergedError(RuntimeError):
    """The loss of a member stopped being a number; raised at the step, after the run has been written."""


class IdleError(RuntimeError):
    """A writer was active and never changed an activation; raised after the run has been written."""


class Interruption(BaseException):
    """A signal ended what this process did. The command line prints it as one line.

    Args:
        signal: number of the signal, which gives the exit code.
        message: what was ended and how to go on, in one line.
    """

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


class PopulationError(RuntimeError):
    """A process of a population failed; the others came to their end."""
