"""Files that a user names: opened as data, never as code, and with no more memory than they are worth.

What cannot be read raises one of ``UNREADABLE``; who has asked for the file says so in one line, with ``reason``.
"""

from __future__ import annotations

import lzma
import math
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import PickleError
from typing import IO, Any

import numpy as np
import yaml

UNREADABLE: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    MemoryError,
    SyntaxError,
    RuntimeError,  # of zipfile for what is encrypted or compressed in another way, of torch and h5py for most else
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    ImportError,
    PickleError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    yaml.YAMLError,
)
"""What a file raises that is missing, damaged, or something else than it should be, whoever reads it."""

LONGEST_REASON = 200
"""Characters of an error's text that are told."""

NpyHeader = tuple[tuple[int, ...], bool, np.dtype]
"""Shape of an array, whether it is stored in Fortran's order, and its type."""

_NPY_HEADERS: Mapping[tuple[int, int], Callable[[IO[bytes]], NpyHeader]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def reason(error: BaseException) -> str:
    """What an error says, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def real_path(path: str | Path) -> Path:
    """The path without links on the way; one that leads to itself stays as it is, and is refused where it is opened."""
    return Path(os.path.realpath(path))


def check_regular(path: str | Path) -> int:
    """Refuse what is no file that can be read again and again, such as a folder, a pipe or a device.

    Returns:
        The size of the file in bytes.

    Raises:
        OSError: no such file, or none that is regular.
    """
    found = os.stat(path)
    if not Path(path).is_file():
        raise OSError("a folder" if Path(path).is_dir() else "not a regular file")
    return found.st_size


def check_file_memory(needed: int) -> None:
    """Refuse what needs more than half of this machine's memory.

    Args:
        needed: bytes of memory that reading it takes.

    Raises:
        MemoryError: it needs more.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory // 2:
        raise MemoryError(f"it needs {needed / 2**30:,.1f} GiB of memory, more than half of this machine's")


def check_array_memory(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuse an array that would not fit into memory beside its copy in float64.

    Args:
        shape: shape that the array claims to have.
        dtype: type that the array claims to have.

    Raises:
        MemoryError: it would not fit.
    """
    check_file_memory(math.prod(shape) * (dtype.itemsize + np.dtype(np.float64).itemsize))


def is_numeric(dtype: np.dtype) -> bool:
    """Whether an array of this type holds plain real numbers."""
    return dtype.kind in "fiu"


def read_npy_header(stream: IO[bytes]) -> NpyHeader:
    """The header of an array in numpy's format, with nothing allocated and nothing run.

    Raises:
        ValueError: the stream holds no such array.
    """
    version = np.lib.format.read_magic(stream)
    if version not in _NPY_HEADERS:
        raise ValueError(f"an array in numpy's format {version[0]}.{version[1]}, which holds no plain numbers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shape, fortran, dtype = _NPY_HEADERS[version](stream)
    if any(length < 0 for length in shape):
        raise ValueError(f"an array of shape {shape}")
    return shape, fortran, dtype


def read_npy_numbers(stream: IO[bytes], header: NpyHeader, size: int) -> np.ndarray:
    """The numbers that follow the header of an array in numpy's format.

    Args:
        stream: the file, read up to the end of the header.
        header: what the header says.
        size: bytes of the whole file.

    Raises:
        ValueError: the array holds something else than numbers, or the file is shorter than its header says.
        MemoryError: the array would not fit into memory.
    """
    shape, fortran, dtype = header
    if not is_numeric(dtype):
        raise ValueError(f"an array of {dtype}, which are no plain numbers")
    check_array_memory(shape, dtype)
    claimed = math.prod(shape) * dtype.itemsize
    data = stream.read(min(claimed, size))
    if len(data) < claimed:
        raise ValueError(f"{len(data):,} bytes of numbers where the header says {claimed:,}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def read_settings(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """A document of settings by name, in JSON or YAML.

    Args:
        path: where the document lies.
        parse: what makes plain values of its text, ``json.loads`` or ``yaml.safe_load``.

    Raises:
        ValueError: its text is no such document; other errors are among ``UNREADABLE``.
    """
    check_file_memory(32 * check_regular(path))
    content = parse(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__} where settings by name should be")
    return content
