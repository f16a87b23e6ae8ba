"""Sources of exemplars: the feature vectors, several per class, that few-shot sequences show.

A source holds plain settings only; ``load`` makes or reads the array. Legend: F features, P pixels
of a drawing.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import h5py
import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageOps

from opsin.errors import ConfigError, check_number
from opsin.model.memory import check_memory
from opsin.records.user_files import (
    UNREADABLE,
    check_array_memory,
    check_regular,
    is_numeric,
    read_npy_header,
    read_npy_numbers,
    reason,
)

REFERENCE_DATASET = "resnet18/224/feat"
"""Where the reference system's own feature file keeps its array."""

_UNREADABLE_DRAWING: tuple[type[Exception], ...] = (
    *UNREADABLE,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What an archive raises that is damaged or no archive, and a drawing that is none."""

MOST_PIXELS = 2**22
"""Most pixels of a drawing; the official ones have 105 x 105."""

MOST_BYTES = 2**24
"""Most bytes of a drawing's file, unpacked."""

MOST_BYTES_OF_ARCHIVE = 2**30
"""Most bytes of all drawings of an archive, unpacked."""

MOST_NAMES = 10
"""Most names of arrays that an error lists."""

_DRAWING = re.compile(r"images_[^/]+/([^/]+/character\d+)/[^/.]+\.png")
"""A drawing of an official archive; does not fit folders, nor the ``__MACOSX/`` shadow of some archives."""


class Exemplars(ABC):
    """A source of exemplars.

    Attributes:
        makes_classes: whether the source can make classes beyond those of its array, by ``of_new_classes``.
    """

    makes_classes: bool = False

    @abstractmethod
    def load(self) -> Float32[np.ndarray, "classes exemplars F"]:
        """All exemplars, entries of about unit size; an equal array at every call.

        Raises:
            ConfigError: a setting that cannot work, or a file that is missing or holds something else.
        """

    def of_new_classes(
        self, centres: Float32[np.ndarray, "*items F"], deviations: Float32[np.ndarray, "*items F"]
    ) -> Float32[np.ndarray, "*items F"]:
        """Exemplars of classes that the array does not hold.

        Args:
            centres: numbers from N(0, 1), equal for items of one class.
            deviations: numbers from N(0, 1), equal for items that show one exemplar.
        """
        raise NotImplementedError(f"{type(self).__name__} makes no new classes")


def _at_least(source: Exemplars, field: str, value: int | float, least: int) -> None:
    check_number(f"{type(source).__name__}.{field}", value, f"at least {least}", least)


class GaussianClusters(Exemplars):
    """Synthetic classes: a centre drawn from N(0, 1) in every feature, exemplars scattered around it.

    All classes share one further vector, as the rectified features of a vision network do; with
    more of it the matching between classes is learned later and the loss has a longer plateau.
    Entries have a mean square of ``scale`` ** 2; the cosine of two exemplars is about
    common ** 2 / total between classes and (common ** 2 + 1) / total within one, where total is
    common ** 2 + 1 + within ** 2.

    Args:
        classes: number of different classes, at least 1.
        exemplars: number of exemplars of a class, at least 1.
        features: F, entries of a feature vector.
        within: standard deviation inside a class, in units of that between centres.
        common: standard deviation of the shared vector's entries, in units of that between centres.
        seed: seed of all centres and exemplars, at least 0.
        scale: root mean square of the entries, above 0.
    """

    added_settings: ClassVar[Mapping[str, Any]] = {"scale": 1.0}

    def __init__(
        self,
        classes: int = 100,
        exemplars: int = 5,
        features: int = 512,
        within: float = 0.5,
        common: float = 2.0,
        seed: int = 0,
        scale: float = 1.0,
    ) -> None:
        for field, value in (("classes", classes), ("exemplars", exemplars), ("features", features)):
            _at_least(self, field, value, 1)
        _at_least(self, "within", within, 0)
        _at_least(self, "common", common, 0)
        _at_least(self, "seed", seed, 0)
        check_number("GaussianClusters.scale", scale, "more than 0", 0, open_low=True)
        self.shape = (classes, exemplars, features)
        # the normal numbers and the exemplars made from them, in double precision
        sizes = f"{classes} classes, {exemplars} exemplars, {features} features"
        check_memory("GaussianClusters", sizes, 2 * 8 * math.prod(self.shape))
        self.within, self.common, self.seed, self.scale = within, common, seed, scale

    makes_classes = True

    def load(self) -> Float32[np.ndarray, "classes exemplars F"]:
        """Draw the exemplars; a pure function of the settings."""
        return self._scaled(*self._normals())

    def _normals(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers behind the classes, behind their exemplars, and behind the vector that all share."""
        normal = np.random.Generator(np.random.Philox(self.seed)).standard_normal
        classes, exemplars, features = self.shape
        return normal((classes, 1, features)), normal((classes, exemplars, features)), normal(features)

    def _scaled(self, centres: np.ndarray, deviations: np.ndarray, shared: np.ndarray) -> np.ndarray:
        scattered = centres + self.within * deviations + self.common * shared
        return (self.scale * (scattered / np.sqrt(1 + self.within**2 + self.common**2))).astype(np.float32)

    @cached_property
    def _shared(self) -> np.ndarray:
        """Numbers of the vector that all classes share."""
        return self._normals()[2]

    def of_new_classes(
        self, centres: Float32[np.ndarray, "*items F"], deviations: Float32[np.ndarray, "*items F"]
    ) -> Float32[np.ndarray, "*items F"]:
        return self._scaled(centres, deviations, self._shared)


class Omniglot(Exemplars):
    """Handwritten characters from official Omniglot archives; a class is a character of an alphabet.

    Each drawing becomes ink (1) on paper, is moved so that the box around its ink is in the middle,
    averaged down to ``size`` x ``size`` pixels, and projected to ``features`` numbers by a fixed
    Gaussian matrix, which keeps angles to about 1 / sqrt(features); with size * size == features the
    pixels themselves are kept. One common factor then makes the root mean square of all entries 1.

    The paper is what all drawings share. With some of it, as with the rectified features of a vision
    network, drawings of different characters have a high cosine and the matching between them is
    learned late; with none it is learned at once and the loss shows no plateau.

    Classes are sorted by alphabet, then character; drawings by file name.

    Args:
        archives: paths of zip files (``images_background*.zip``, ``images_evaluation.zip``); a
            character that lies in several of them counts once, as in the first that has it.
        size: pixels along an edge, at most the drawing's own; few, so that two drawings of a character overlap.
        features: F, entries of a feature vector.
        paper: grey value of the paper, at least 0 and less than 1.
        seed: seed of the projection, at least 0.
    """

    path_settings = ("archives",)

    def __init__(
        self, archives: list[str], size: int = 14, features: int = 512, paper: float = 0.2, seed: int = 0
    ) -> None:
        if not archives or isinstance(archives, str):
            raise ConfigError("Omniglot.archives", archives, "a list of at least one archive")
        _at_least(self, "size", size, 1)
        _at_least(self, "features", features, 1)
        _at_least(self, "seed", seed, 0)
        if not 0 <= paper < 1:
            raise ConfigError("Omniglot.paper", paper, "at least 0 and less than 1")
        check_memory("Omniglot", f"size {size}, features {features}", 4 * size**2 * features)
        self.archives, self.size, self.features = list(archives), size, features
        self.paper, self.seed = paper, seed

    def load(self) -> Float32[np.ndarray, "classes exemplars F"]:
        """Read the archives (about a second per thousand drawings or less)."""
        characters: dict[str, Float32[np.ndarray, "exemplars P"]] = {}
        for archive in self.archives:
            characters = self._read(archive) | characters
        drawings = {name: len(pixels) for name, pixels in characters.items()}
        if len(set(drawings.values())) > 1:
            fewest, most = min(drawings, key=drawings.__getitem__), max(drawings, key=drawings.__getitem__)
            found = f"{drawings[fewest]} of {fewest}, {drawings[most]} of {most} in {', '.join(self.archives)}"
            raise ConfigError("Omniglot.archives", found, "the same number of drawings of every character")
        ink = np.stack([characters[name] for name in sorted(characters)])
        return self._project(self.paper + (1 - self.paper) * ink)

    def _read(self, archive: str) -> dict[str, Float32[np.ndarray, "exemplars P"]]:
        """The drawings of one archive by ``alphabet/character``."""
        try:
            check_regular(archive)
            with zipfile.ZipFile(archive) as opened:
                drawings = _drawings(opened)
                found = {
                    character: np.stack([self._ink(opened, drawing) for drawing in of_character])
                    for character, of_character in drawings.items()
                }
        except ConfigError:
            raise
        except _UNREADABLE_DRAWING as error:
            expected = f"a readable Omniglot zip file ({reason(error)})"
            raise ConfigError("Omniglot.archives", archive, expected) from error
        if not found:
            layout = "a zip file with images_*/ALPHABET/characterNN/*.png"
            raise ConfigError("Omniglot.archives", archive, layout)
        return found

    def _ink(self, opened: zipfile.ZipFile, drawing: zipfile.ZipInfo) -> Float32[np.ndarray, " P"]:
        try:
            grey = _read_grey(opened, drawing)
        except _UNREADABLE_DRAWING as error:
            raise ValueError(f"{drawing.filename}: {reason(error)}") from error
        if self.size > min(grey.size):
            expected = f"at most {min(grey.size)}, the drawings' own in {opened.filename}"
            raise ConfigError("Omniglot.size", self.size, expected)
        ink = ImageOps.invert(grey)
        small = _ink_in_the_middle(ink).resize((self.size, self.size), Image.Resampling.BOX)
        return np.asarray(small, np.float32).ravel() / 255

    def _project(self, ink: Float32[np.ndarray, "classes exemplars P"]) -> Float32[np.ndarray, "classes exemplars F"]:
        pixels = ink.shape[-1]
        if pixels != self.features:
            normal = np.random.Generator(np.random.Philox(self.seed)).standard_normal
            ink = ink @ normal((pixels, self.features), dtype=np.float32)
        size = np.sqrt(np.mean(ink**2))
        if not size > 0:
            raise ConfigError("Omniglot.archives", self.archives, "drawings with ink, or paper above 0")
        return ink / size


def _drawings(opened: zipfile.ZipFile) -> dict[str, list[zipfile.ZipInfo]]:
    """The drawings of an archive in the order of their names, by ``alphabet/character``.

    Of a character that lies in several folders ``images_*`` the first folder counts.
    """
    for name, times in Counter(opened.namelist()).items():
        if ".." in PurePosixPath(name).parts:
            raise ValueError(f"the name {name} leaves the archive")
        if times > 1:
            raise ValueError(f"{name} occurs {times} times")
    found: dict[str, list[zipfile.ZipInfo]] = {}
    folders: dict[str, str] = {}
    for drawing in sorted(opened.infolist(), key=lambda drawing: drawing.filename):
        if _DRAWING.fullmatch(drawing.filename):
            folder, path = drawing.filename.split("/", 1)
            character = path.rsplit("/", 1)[0]
            if folders.setdefault(character, folder) == folder:
                found.setdefault(character, []).append(drawing)
    unpacked = sum(drawing.file_size for of_character in found.values() for drawing in of_character)
    if unpacked > MOST_BYTES_OF_ARCHIVE:
        raise ValueError(f"{unpacked:,} bytes of drawings; at most {MOST_BYTES_OF_ARCHIVE:,}")
    return found


def _read_grey(opened: zipfile.ZipFile, drawing: zipfile.ZipInfo) -> Image.Image:
    """A drawing in shades of grey on white paper, whatever its own colours are."""
    if drawing.file_size > MOST_BYTES:
        raise ValueError(f"{drawing.file_size:,} bytes; at most {MOST_BYTES:,}")
    png = opened.read(drawing)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # no other format, since some of those run programs
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; at most {MOST_PIXELS:,} in all")
            return _on_white(image)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits; Pillow would cut them off instead of scaling them
        deep, paper = np.asarray(image).astype(np.int64), image.info.get("transparency")
        grey = np.where(deep == paper, 255, deep // 257) if isinstance(paper, int) else deep // 257
        return Image.fromarray(grey.astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("L")
    ink = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", ink.size, "white"), ink).convert("L")


def _ink_in_the_middle(ink: Image.Image) -> Image.Image:
    """The same drawing with the box around its ink in the middle; nothing of it is lost."""
    box = ink.getbbox()
    if box is None:
        return ink
    centred = Image.new("L", ink.size)
    corner = (ink.width - (box[2] - box[0])) // 2, (ink.height - (box[3] - box[1])) // 2
    centred.paste(ink.crop(box), corner)
    return centred


class ArrayFile(Exemplars):
    """Features computed elsewhere: one array, classes x exemplars x features, of an ``.npz`` or ``.h5`` file.

    Args:
        path: path of the file, whose suffix says which kind it is.
        dataset: name of the array. None: in ``.npz`` the only array there is, in ``.h5``
            ``resnet18/224/feat``, where the reference system's feature file has it.
    """

    path_settings = ("path",)

    def __init__(self, path: str, dataset: str | None = None) -> None:
        if Path(path).suffix not in (".npz", ".h5"):
            raise ConfigError("ArrayFile.path", path, "a file that ends in .npz or .h5")
        self.path, self.dataset = path, dataset

    def load(self) -> Float32[np.ndarray, "classes exemplars F"]:
        """Read the array, as float32, neither centred nor scaled."""
        read = self._npz if Path(self.path).suffix == ".npz" else self._h5
        try:
            check_regular(self.path)
            array = read()
        except ConfigError:
            raise
        except UNREADABLE as error:
            raise ConfigError("ArrayFile.path", self.path, f"a readable file ({reason(error)})") from error
        with np.errstate(over="ignore"):  # a number too large for float32 becomes inf, caught below
            array = np.ascontiguousarray(array, np.float32)
        if not np.isfinite(array).all():
            bad = f"{int((~np.isfinite(array)).sum())} non-finite values in {self.path}"
            raise ConfigError("ArrayFile.dataset", bad, "finite float32 numbers only")
        return array

    def _npz(self) -> np.ndarray:
        with zipfile.ZipFile(self.path) as arrays:
            members = [member for member in arrays.infolist() if not member.is_dir()]
            names = [member.filename.removesuffix(".npy") for member in members]
            name = self._named(self.dataset or (names[0] if len(names) == 1 else None), names)
            if names.count(name) > 1:
                raise ValueError(f"{name} occurs {names.count(name)} times")
            member = members[names.index(name)]
            with arrays.open(member) as stream:
                header = read_npy_header(stream)
                self._check(*header[::2])
                return read_npy_numbers(stream, header, member.file_size)

    def _h5(self) -> np.ndarray:
        with h5py.File(self.path, "r") as file:
            names: list[str] = []
            # follows no link into another file
            file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
            array = file[self._named(self.dataset or REFERENCE_DATASET, names)]
            self._check(array.shape, array.dtype)
            if array.external or array.is_virtual:
                raise ValueError(f"the numbers of {array.name} lie in another file")
            check_array_memory(array.shape, array.dtype)
            return array[()]

    def _check(self, shape: tuple[int, ...] | None, dtype: np.dtype) -> None:
        """Refuse an array that cannot be exemplars, before it is read."""
        if shape is None or len(shape) != 3 or 0 in shape or not is_numeric(dtype):
            found = f"{dtype} array of shape {shape} in {self.path}"
            objects = ", not pickled objects" if dtype.hasobject else ""
            raise ConfigError("ArrayFile.dataset", found, f"numbers, classes x exemplars x features{objects}")

    def _named(self, name: str | None, names: list[str]) -> str:
        if name not in names:
            shown = [*sorted(names)[:MOST_NAMES], *(["..."] if len(names) > MOST_NAMES else [])]
            listed = ", ".join(shown) or "(the file is empty)"
            raise ConfigError("ArrayFile.dataset", name, f"one of {listed} in {self.path}")
        return name
