"""Claims about files that are damaged, hostile or of another kind than their setting wants.

Each is read rightly, or refused in one line that names the setting and the file; nothing in them is run.
"""

import io
import os
import struct
import tracemalloc
import zipfile
import zlib
from contextlib import contextmanager

import h5py
import numpy as np
import pytest
from PIL import Image

from opsin.errors import ConfigError
from opsin.tasks import ArrayFile, Characters, Omniglot, Repeats

INK = np.random.default_rng(0).random((21, 21)) < 0.3
NAMES = [f"images_background/Latin/character{c:02}/{c:04}_{d:02}.png" for c in (1, 2) for d in (1, 2)]
MEMORY = 64 * 2**20
"""Bytes that a refusal may take at most."""


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


BLACK_ON_WHITE = png(Image.fromarray(~INK))


def archive(path, content=BLACK_ON_WHITE, names=NAMES, **options):
    with zipfile.ZipFile(path, "w", **options) as out:
        for name in names:
            out.writestr(name, content)
    return path


def patched(path, offset, value, only=None):
    """The archive with bytes of its headers changed; offsets are those of the local header, less 2 in the directory."""
    raw = bytearray(path.read_bytes())
    for sign, start in ((b"PK\x03\x04", offset), (b"PK\x01\x02", offset + 2)):
        found = raw.find(sign)
        while found >= 0:
            if only is None or sign == only:
                raw[found + start : found + start + len(value)] = value
            found = raw.find(sign, found + 4)
    path.write_bytes(raw)
    return path


def claiming(width, height, data=b"\0" * 8):
    """A PNG that claims so many pixels and holds almost none."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def bomb(path):
    """Drawings of 32 MB of zeros each, in a few kilobytes."""
    return archive(path, b"\0" * 2**25, compression=zipfile.ZIP_DEFLATED)


def many(path):
    """One small file that a directory of 100 entries calls a drawing of 15 MB each."""
    archive(path, names=[f"images_x/A/character01/{number:04}.png" for number in range(100)])
    return patched(path, 22, struct.pack("<I", 15 * 2**20))


def truncated(path):
    archive(path)
    path.write_bytes(path.read_bytes()[:-300])
    return path


def with_text_that_unpacks(path):
    text = b"a\0\0" + zlib.compress(b"\0" * 2**26)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    return archive(path, BLACK_ON_WHITE[:33] + chunk + BLACK_ON_WHITE[33:])


def other(kind, name):
    def build(path):
        image = io.BytesIO()
        Image.fromarray(INK).convert("RGB").save(image, kind)
        return archive(path, image.getvalue())

    build.__name__ = name
    return build


def made(name, build):
    build.__name__ = name
    return build


def write(content):
    return lambda path: path.write_bytes(content) and path


BAD_ARCHIVES = [
    made("encrypted", lambda path: patched(archive(path), 6, b"\x01")),
    made("deflate64", lambda path: patched(archive(path), 8, struct.pack("<H", 9))),
    made("method_99", lambda path: patched(archive(path), 8, struct.pack("<H", 99))),
    made("lzma_that_is_none", lambda path: patched(archive(path), 8, struct.pack("<H", 14))),
    made("bzip2_that_is_none", lambda path: patched(archive(path), 8, struct.pack("<H", 12))),
    made("zip_version_99", lambda path: patched(archive(path), 4, struct.pack("<H", 99))),
    truncated,
    made("crc_wrong", lambda path: patched(archive(path), 14, b"abcd")),
    made("directory_and_file_disagree", lambda path: patched(archive(path), 30, b"other", only=b"PK\x03\x04")),
    made("empty_archive", lambda path: archive(path, names=[])),
    made("empty_file", lambda path: path.touch() or path),
    made("text", write(b"once upon a time")),
    made("folder", lambda path: path.mkdir() or path),
    made("missing", lambda path: path),
    made("pipe", lambda path: os.mkfifo(path) or path),
    made("device", lambda path: path.symlink_to("/dev/zero") or path),
    made("no_drawings", lambda path: archive(path, names=["images_background/readme.txt"])),
    made("name_with_dots", lambda path: archive(path, names=[*NAMES, "images_background/../../character01/1.png"])),
    made("a_drawing_missing", lambda path: archive(path, names=NAMES[:3])),
    made("blank_png", lambda path: archive(path, b"")),
    made("half_a_png", lambda path: archive(path, BLACK_ON_WHITE[:60])),
    made("png_without_data", lambda path: archive(path, claiming(20, 20, b""))),
    made("png_of_40000_pixels", lambda path: archive(path, claiming(40_000, 40_000))),
    made("png_of_10000_pixels", lambda path: archive(path, claiming(10_000, 10_000))),
    made("png_of_3000_pixels", lambda path: archive(path, claiming(3_000, 3_000))),
    made("png_of_no_pixels", lambda path: archive(path, claiming(0, 0))),
    with_text_that_unpacks,
    other("GIF", "gif"),
    other("EPS", "eps"),
    other("TIFF", "tiff"),
    bomb,
    many,
]


@contextmanager
def refused(pattern):
    """Refused in one line that has the pattern, with no more memory than a refusal may take."""
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=pattern) as caught:
            yield caught
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < MEMORY
    text = str(caught.value)
    assert "\n" not in text and len(text) < 900, text


@pytest.mark.parametrize("build", BAD_ARCHIVES, ids=lambda build: build.__name__)
@pytest.mark.filterwarnings("error")
def test_an_archive_that_cannot_be_read_is_refused_by_setting_and_file(build, tmp_path):
    path = build(tmp_path / "images.zip")
    with refused(r"^Omniglot\.archives: got .*images\.zip"):
        Omniglot([str(path)]).load()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_drawing_that_occurs_twice_is_refused(tmp_path):
    path = archive(tmp_path / "images.zip", names=[*NAMES, NAMES[0]])
    with pytest.raises(ConfigError, match=r"Omniglot.archives: got .*images\.zip.*0001_01\.png occurs 2 times"):
        Omniglot([str(path)]).load()


def test_a_character_in_two_folders_of_an_archive_counts_once(tmp_path):
    once, twice = archive(tmp_path / "once.zip"), tmp_path / "twice.zip"
    archive(twice, names=[*NAMES, *(name.replace("background", "evaluation") for name in NAMES)])
    assert (Omniglot([str(once)]).load() == Omniglot([str(twice)]).load()).all()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_compression_that_can_be_read_gives_the_same(method, tmp_path):
    plain, packed = archive(tmp_path / "plain.zip"), archive(tmp_path / "packed.zip", compression=method)
    assert (Omniglot([str(plain)]).load() == Omniglot([str(packed)]).load()).all()


def test_archives_are_a_list_and_no_letters_of_one_name():
    with pytest.raises(ConfigError, match=r"Omniglot\.archives: got 'images\.zip', expected a list"):
        Omniglot("images.zip")


def transparent(mode):
    alpha = Image.fromarray(np.where(INK, 255, 0).astype(np.uint8))
    colours = (0, 0, 0)[: len(mode) - 1]
    image = Image.new(mode, INK.shape, (*colours, 0))
    for band in range(len(mode) - 1):
        assert not np.asarray(image.getchannel(band)).any()
    image.putalpha(alpha)
    return image


def transparent_palette():
    image = Image.fromarray(INK.astype(np.uint8) * 3, "P")
    image.putpalette([0, 0, 0] * 256)
    return image, {"transparency": 0}


def sixteen_bits(paper=65_535):
    return Image.fromarray(np.where(INK, 0, paper).astype(np.uint16))


GREY = Image.fromarray(np.where(INK, 0, 255).astype(np.uint8))
DRAWINGS = {
    "grey": GREY,
    "colours": GREY.convert("RGB"),
    "palette": GREY.convert("P"),
    "palette_of_another_order": GREY.convert("RGB").quantize(2),
    "16_bits": sixteen_bits(),
    "transparent_grey": transparent("LA"),
    "transparent_colours": transparent("RGBA"),
    "opaque_alpha": GREY.convert("RGBA"),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_the_same_in_every_kind_of_png(name, tmp_path):
    plain = Omniglot([str(archive(tmp_path / "plain.zip"))], size=21, features=441).load()
    path = archive(tmp_path / "images.zip", png(DRAWINGS[name]))
    assert np.array_equal(Omniglot([str(path)], size=21, features=441).load(), plain)


@pytest.mark.parametrize("image, options", [transparent_palette(), (sixteen_bits(1000), {"transparency": 1000})])
def test_a_colour_that_counts_as_transparent_is_paper(image, options, tmp_path):
    plain = Omniglot([str(archive(tmp_path / "plain.zip"))], size=21, features=441).load()
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    path = archive(tmp_path / "images.zip", buffer.getvalue())
    assert np.array_equal(Omniglot([str(path)], size=21, features=441).load(), plain)


def test_16_bits_are_scaled_and_not_cut_off(tmp_path):
    half = archive(tmp_path / "half.zip", png(sixteen_bits(128 * 257)))
    same = archive(tmp_path / "same.zip", png(Image.fromarray(np.where(INK, 0, 128).astype(np.uint8))))
    assert np.array_equal(Omniglot([str(half)], size=21).load(), Omniglot([str(same)], size=21).load())


def test_drawings_without_ink_on_paper_of_grey_0_are_refused(tmp_path):
    path = archive(tmp_path / "images.zip", png(Image.new("1", (21, 21), 1)))
    with pytest.raises(ConfigError, match=r"Omniglot\.archives: got .*images\.zip.*expected drawings with ink"):
        Omniglot([str(path)], paper=0).load()
    assert np.isfinite(Omniglot([str(path)]).load()).all()


# ---- arrays ---------------------------------------------------------------------------------------


class RunsWhenUnpickled:
    """Ends the process of whoever unpickles it."""

    def __reduce__(self):
        return os._exit, (13,)


FEATURES = np.random.default_rng(1).normal(size=(4, 3, 2))


def npy(header, data=b""):
    """An array file with this header, whatever its data."""
    text = repr(header).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def claimed(shape, descr="<f8", data=b"\0" * 64):
    return npy({"descr": descr, "fortran_order": False, "shape": shape}, data)


def saved(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


BAD_ARRAYS = {
    "terabytes": claimed((10**4, 10**4, 10**4)),
    "more_than_there_is": claimed((4, 3, 2)),
    "negative": claimed((-4, -3, 2)),
    "overflow": claimed((2**62, 2**62, 4), data=b""),
    "pickled": saved(np.array([[[RunsWhenUnpickled()]]], object), allow_pickle=True),
    "pickle": b"\x80\x04c" + b"os\nsystem\n",
    "objects_claimed": claimed((1, 1, 1), "|O"),
    "records": claimed((1, 1, 1), [("a", "<f8")]),
    "text": saved(np.full((1, 1, 1), "a")),
    "complex": saved(FEATURES.astype(complex)),
    "booleans": saved(FEATURES > 0),
    "dates": saved(np.zeros((1, 1, 1), "M8[s]")),
    "no_axes": saved(np.array(1.0)),
    "two_axes": saved(FEATURES[0]),
    "four_axes": saved(FEATURES[None]),
    "nothing": saved(FEATURES[:0]),
    "nan": saved(np.full((1, 1, 1), np.nan)),
    "infinite": saved(np.full((1, 1, 1), -np.inf)),
    "too_large_for_float32": saved(np.full((1, 1, 1), 1e300)),
    "header_cut_off": claimed((4, 3, 2))[:20],
    "header_of_code": npy("__import__('os')._exit(13)"),
    "header_of_much": npy({"descr": "<f8", "fortran_order": False, "shape": (1,) * 9000}),
    "version_9": b"\x93NUMPY\x09\x00" + b"\0" * 80,
    "no_array": b"once upon a time",
    "empty": b"",
}


def check_array(path, *dataset):
    with refused(rf"^ArrayFile\.(path|dataset): got .*{path.name}"):
        ArrayFile(str(path), *dataset).load()


@pytest.mark.parametrize("name", BAD_ARRAYS)
@pytest.mark.filterwarnings("error")
def test_an_npz_that_is_no_exemplars_is_refused_by_setting_and_file(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as out:
        out.writestr("features.npy", BAD_ARRAYS[name])
    check_array(tmp_path / "a.npz")


BAD_NPZ = [
    made("encrypted", lambda path: patched(path, 6, b"\x01")),
    made("deflate64", lambda path: patched(path, 8, struct.pack("<H", 9))),
    made("crc_wrong", lambda path: patched(path, 14, b"abcd")),
    made("cut_off", lambda path: path.write_bytes(path.read_bytes()[:-100]) and path),
    made("an_npy", lambda path: path.write_bytes(saved(FEATURES))),
    made("text", write(b"once upon a time")),
    made("empty", write(b"")),
    made("empty_zip", lambda path: zipfile.ZipFile(path, "w").close()),
    made("missing", lambda path: path.unlink()),
    made("folder", lambda path: path.unlink() or path.mkdir()),
    made("pipe", lambda path: path.unlink() or os.mkfifo(path)),
]


@pytest.mark.parametrize("build", BAD_NPZ, ids=lambda build: build.__name__)
@pytest.mark.filterwarnings("error")
def test_an_npz_that_cannot_be_read_is_refused_by_setting_and_file(build, tmp_path):
    np.savez(tmp_path / "a.npz", FEATURES)
    build(tmp_path / "a.npz")
    check_array(tmp_path / "a.npz")


def test_an_npz_with_one_name_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as out, pytest.warns(UserWarning, match="Duplicate"):
        out.writestr("a.npy", saved(FEATURES))
        out.writestr("a.npy", saved(FEATURES + 1))
    check_array(tmp_path / "a.npz", "a")


@pytest.mark.parametrize("kind", ["<f4", ">f4", ">f8", "<f2", ">i4", "u1", "g"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("packed", [np.savez, np.savez_compressed])
def test_every_type_and_order_of_numbers_is_read_as_it_is(kind, order, packed, tmp_path):
    array = np.array(np.round(np.abs(FEATURES) * 8), kind, order=order)
    packed(tmp_path / "a.npz", array)
    found = ArrayFile(str(tmp_path / "a.npz")).load()
    assert (found == array).all() and found.dtype == np.float32 and found.flags.c_contiguous
    if kind != "g":
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["resnet18/224/feat"] = array
        assert (ArrayFile(str(tmp_path / "a.h5")).load() == array).all()


def linked_outside(file, folder):
    with h5py.File(folder / "other.h5", "w") as other:
        other["feat"] = FEATURES
    file["feat"] = h5py.ExternalLink("other.h5", "feat")


def stored_outside(file, folder):
    (folder / "secret").write_bytes(b"\1" * 192)
    file.create_dataset("feat", (4, 3, 2), "f8", external=[(str(folder / "secret"), 0, 192)])


def virtual(file, folder):
    with h5py.File(folder / "other.h5", "w") as other:
        other["feat"] = FEATURES
    layout = h5py.VirtualLayout((4, 3, 2), "f8")
    layout[:] = h5py.VirtualSource(folder / "other.h5", "feat", (4, 3, 2))
    file.create_virtual_dataset("feat", layout)


def terabytes(file, folder):
    file.create_dataset("feat", (10**6, 10**3, 10**3), "f8", chunks=(1, 1, 1000))


def reference_to_nothing(file, folder):
    file["feat"] = h5py.SoftLink("/nowhere")


def circle(file, folder):
    file["group/again"] = file["/"]
    file["feat"] = h5py.SoftLink("/feat")


def put(array, **options):
    def build(file, folder):
        file.create_dataset("feat", data=array, **options)

    return build


BAD_H5 = [
    linked_outside,
    stored_outside,
    virtual,
    terabytes,
    reference_to_nothing,
    circle,
    made("strings", put(np.full((1, 1, 1), b"a"))),
    made("objects", put(np.full((1, 1, 1), "a", object), dtype=h5py.string_dtype())),
    made("no_numbers", put(h5py.Empty("f8"))),
    made("one_number", put(1.0)),
    made("nan", put(np.full((1, 1, 1), np.nan))),
    made("group", lambda file, folder: file.create_group("feat")),
    made("many_others", lambda file, folder: [file.create_dataset(f"{n:04}", data=1) for n in range(300)]),
]


@pytest.mark.parametrize("build", BAD_H5, ids=lambda build: build.__name__)
@pytest.mark.filterwarnings("error")
def test_an_h5_that_is_no_exemplars_is_refused_by_setting_and_file(build, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        build(file, tmp_path)
    check_array(tmp_path / "a.h5", "feat")


@pytest.mark.parametrize(
    "content", [b"", b"once upon a time", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + b"\xff" * 99]
)
def test_an_h5_that_cannot_be_read_is_refused_by_setting_and_file(content, tmp_path):
    (tmp_path / "a.h5").write_bytes(content)
    check_array(tmp_path / "a.h5")


def test_an_h5_that_is_cut_off_is_refused_by_setting_and_file(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["resnet18/224/feat"] = FEATURES
    whole = (tmp_path / "a.h5").read_bytes()
    for length in range(0, len(whole) - 1, 97):
        (tmp_path / "a.h5").write_bytes(whole[:length])
        check_array(tmp_path / "a.h5")


# ---- texts ----------------------------------------------------------------------------------------

WORDS = "to be or not to be, that is the question\nwhether it is nobler in the mind to suffer\n" * 4


@pytest.mark.parametrize("content", [WORDS.encode("utf-8-sig"), WORDS.replace("\n", "\r\n").encode()])
def test_a_mark_of_the_byte_order_is_no_character_and_a_line_ends_in_one(content, tmp_path):
    (tmp_path / "plain.txt").write_bytes(WORDS.encode())
    (tmp_path / "other.txt").write_bytes(content)
    plain, other = (Characters(str(tmp_path / name), positions=8).text for name in ("plain.txt", "other.txt"))
    assert plain.characters == other.characters and (plain.train == other.train).all()


def sparse(path):
    """A text of a terabyte of nothing."""
    with path.open("wb") as file:
        file.truncate(2**40)


BAD_TEXTS = {
    "utf_16": lambda path: path.write_text(WORDS, "utf-16"),
    "utf_16_without_a_mark": lambda path: path.write_text(WORDS, "utf-16-le"),
    "utf_32": lambda path: path.write_text(WORDS, "utf-32"),
    "latin_1": lambda path: path.write_text("für" + WORDS, "latin-1"),
    "nul": lambda path: path.write_bytes(WORDS.encode() + b"\0"),
    "surrogates": lambda path: path.write_bytes(b"\xed\xa0\x80" + WORDS.encode()),
    "zip": lambda path: archive(path),
    "empty": lambda path: path.touch(),
    "only_a_mark": lambda path: path.write_bytes(b"\xef\xbb\xbf"),
    "one_character": lambda path: path.write_text("a"),
    "one_kind_of_character": lambda path: path.write_text("a" * 99),
    "folder": lambda path: path.mkdir(),
    "missing": lambda path: None,
    "pipe": os.mkfifo,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "circle": lambda path: path.symlink_to(path),
    "terabyte": sparse,
}


@pytest.mark.parametrize("name", BAD_TEXTS)
@pytest.mark.parametrize("field", ["Characters.path", "Repeats.text"])
def test_a_text_that_cannot_be_tokens_is_refused_by_setting_and_file(name, field, tmp_path):
    path = tmp_path / "text.txt"
    BAD_TEXTS[name](path)
    with refused(rf"^({field}: got .*text\.txt|Repeats.vocabulary: .* characters of .*text\.txt)"):
        Characters(str(path)) if field == "Characters.path" else Repeats(text=str(path))
