"""A text file as tokens, one a character, and the windows of it that sequences show.

Legend: N characters of a text, R sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64

from opsin.errors import ConfigError
from opsin.records.user_files import UNREADABLE, check_file_memory, check_regular, reason
from opsin.tasks.shared.streams import below

MEMORY_PER_BYTE = 40
"""Bytes of memory that each byte of a file takes while its characters are counted and become tokens."""


@dataclass(frozen=True)
class Text:
    """A text as tokens.

    Args:
        characters: the character that each token stands for, the commonest of the training part first.
        train: tokens of the training part, in which every token occurs.
        heldout: tokens of the part that follows it, without characters that are no token.
    """

    characters: str
    train: Int64[np.ndarray, " N"]
    heldout: Int64[np.ndarray, " _"]


def read_text(path: str, field: str, vocabulary: int | None, heldout: float, least: int) -> Text:
    """A UTF-8 file as tokens; a mark of the byte order at its beginning is no character, and a line ends in one.

    Args:
        path: path of the text file.
        field: name of the setting that holds the path, for errors.
        vocabulary: how many of the training part's commonest characters are tokens; the rest is left out. None for all.
        heldout: share of the file, at its end, that is held out.
        least: tokens that the training part must have, and the held-out part unless it is empty.

    Raises:
        ConfigError: a file that cannot be read, is not UTF-8 or is too short.
    """
    try:
        check_file_memory(MEMORY_PER_BYTE * check_regular(path))
        content = Path(path).read_text(encoding="utf-8-sig")
    except UNREADABLE as problem:
        raise ConfigError(field, path, f"a readable text file in UTF-8 ({reason(problem)})") from problem
    if "\0" in content:
        raise ConfigError(field, path, "a text file in UTF-8; it holds NUL characters, as binary files and UTF-16 do")
    codes = np.frombuffer(content.encode("utf-32-le"), np.uint32)
    seen = len(codes) - round(heldout * len(codes))
    kinds, counts = np.unique(codes[:seen], return_counts=True)
    kept = kinds[np.argsort(-counts, kind="stable")[:vocabulary]]
    train, rest = _tokens(codes[:seen], kept), _tokens(codes[seen:], kept)
    if len(train) < least or (seen < len(codes) and len(rest) < least):
        short = f"{path} of {len(train)} training and {len(rest)} held-out characters"
        raise ConfigError(field, short, f"at least {least} of each")
    return Text("".join(map(chr, kept.tolist())), train, rest)


def _tokens(codes: np.ndarray, kept: np.ndarray) -> Int64[np.ndarray, " _"]:
    """The tokens of the characters that are kept; the others are left out."""
    token_of = {kind: token for token, kind in enumerate(kept.tolist())}
    kinds, which = np.unique(codes, return_inverse=True)
    tokens = np.array([token_of.get(kind, -1) for kind in kinds.tolist()], np.int64)[which]
    return tokens[tokens >= 0]


def windows(text: Int64[np.ndarray, " N"], u: Float[np.ndarray, " R"], length: int) -> Int64[np.ndarray, "_ R"]:
    """Stretches of a text that is taken as a ring: its end is followed by its beginning.

    Args:
        text: tokens of the text.
        u: uniform numbers in [0, 1), which decide where each stretch begins.
        length: number of tokens of each stretch.
    """
    return text[(below(u, len(text)) + np.arange(length)[:, None]) % len(text)]
