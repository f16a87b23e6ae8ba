"""Claims about where exemplars come from."""

import io
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image

from opsin.errors import ConfigError
from opsin.tasks import ArrayFile, GaussianClusters, Omniglot
from tests.helpers.paths import OMNIGLOT as REAL


def png(seed):
    ink = np.random.default_rng(seed).random((21, 21)) < 0.2
    buffer = io.BytesIO()
    Image.fromarray(~ink).save(buffer, "PNG")
    return buffer.getvalue()


def archive(path, characters, drawings=3, junk=True):
    """An archive of the official layout; a drawing depends on its character and number alone."""
    with zipfile.ZipFile(path, "w") as out:
        for name in characters:
            out.writestr(f"{path.stem}/{name}/", "")
            for i in range(drawings):
                out.writestr(f"{path.stem}/{name}/{len(name):04}_{i + 1:02}.png", png([*name.encode(), i]))
                if junk:
                    out.writestr(f"__MACOSX/{path.stem}/{name}/._{len(name):04}_{i + 1:02}.png", b"junk")
        out.writestr(f"{path.stem}/.DS_Store", b"junk")
    return str(path)


@pytest.fixture
def two(tmp_path):
    first = archive(tmp_path / "images_background_small1.zip", ["Greek/character02", "Latin/character01"])
    second = archive(tmp_path / "images_background_small2.zip", ["Balinese/character01", "Greek/character02"])
    return [first, second]


@pytest.mark.parametrize("common", [0.0, 1.5])
def test_clusters_have_unit_size_and_alike_exemplars_within_a_class(common):
    array = GaussianClusters(classes=20, exemplars=4, within=0.5, common=common).load()
    assert array.shape == (20, 4, 512) and array.dtype == np.float32
    assert abs(np.mean(array**2) - 1) < 0.1
    unit = array / np.linalg.norm(array, axis=-1, keepdims=True)
    total = common**2 + 1.25
    assert np.allclose(np.einsum("cf,cf->c", unit[:, 0], unit[:, 1]), (common**2 + 1) / total, atol=0.1)
    between = np.einsum("cf,df->cd", unit[:, 0], unit[:, 1])[~np.eye(20, dtype=bool)]
    assert np.allclose(between, common**2 / total, atol=0.25)


def test_clusters_are_a_function_of_their_settings():
    assert (GaussianClusters(9, 2, 8).load() == GaussianClusters(9, 2, 8).load()).all()
    assert (GaussianClusters(9, 2, 8).load() != GaussianClusters(9, 2, 8, seed=1).load()).any()


@pytest.mark.parametrize("setting", [{"classes": 0}, {"features": 0}, {"exemplars": -1}, {"within": -0.1}])
def test_clusters_refuse_a_size_that_makes_no_array(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=f"GaussianClusters.{name}: got "):
        GaussianClusters(**setting)


def test_a_class_in_two_archives_counts_once(two):
    assert Omniglot(two).load().shape == (3, 3, 512)


def test_classes_are_sorted_by_alphabet_whatever_the_order_of_archives(two):
    assert (Omniglot(two).load() == Omniglot(two[::-1]).load()).all()


def test_a_class_keeps_its_place_when_the_archive_that_repeats_it_is_left_out(two):
    alone = Omniglot(two[:1], size=7, features=49).load()  # pixels: Greek, Latin
    joined = Omniglot(two, size=7, features=49).load()  # Balinese, Greek, Latin
    for i, j in ((0, 1), (1, 2)):  # up to the scale, which belongs to what was loaded
        a, b = alone[i, 0] - alone[i, 1], joined[j, 0] - joined[j, 1]
        assert np.isclose(a @ b, np.linalg.norm(a) * np.linalg.norm(b), rtol=1e-5)


@pytest.mark.parametrize("features", [16, 49, 100])
def test_drawings_have_unit_size(two, features):
    array = Omniglot(two, size=7, features=features).load()
    assert array.dtype == np.float32 and array.shape[-1] == features
    assert np.isclose(np.mean(array**2), 1, rtol=1e-4)


def drawings(path, inks):
    """One character per array of ink (True) on paper."""
    with zipfile.ZipFile(path, "w") as out:
        for i, ink in enumerate(inks):
            buffer = io.BytesIO()
            Image.fromarray(~ink).save(buffer, "PNG")
            out.writestr(f"images_background/A/character{i:02}/0001_01.png", buffer.getvalue())
    return str(path)


@pytest.mark.parametrize("paper", [0.0, 0.2])
def test_ink_is_one_on_paper_of_the_given_grey(tmp_path, paper):
    path = drawings(tmp_path / "images_background.zip", [np.ones((4, 4), bool), np.zeros((4, 4), bool)])
    array = Omniglot([path], size=2, features=4, paper=paper).load()
    assert np.allclose(array[1] / array[0], paper)


def test_where_a_character_stands_on_the_paper_does_not_matter(tmp_path):
    corner, middle = np.zeros((2, 7, 7), bool)
    corner[:3, :2] = middle[2:5, 2:4] = [[1, 0], [1, 1], [0, 1]]
    array = Omniglot([drawings(tmp_path / "images_background.zip", [corner, middle])], size=7, features=49).load()
    assert np.array_equal(array[0], array[1]) and (array[0] > array.min()).sum() == 4


def test_archives_that_cannot_be_read_are_named(two, tmp_path):
    missing, wrong, empty = tmp_path / "none.zip", tmp_path / "wrong.zip", tmp_path / "empty.zip"
    wrong.write_bytes(b"not a zip")
    with zipfile.ZipFile(empty, "w") as out:
        out.writestr("other/file.png", b"")
    broken = tmp_path / "images_x.zip"
    with zipfile.ZipFile(broken, "w") as out:
        out.writestr("images_x/A/character01/0001_01.png", b"not a png")
    for path in (missing, wrong, empty, broken):
        with pytest.raises(ConfigError, match=rf"Omniglot.archives: got '.*{path.name}', expected") as caught:
            Omniglot([*two, str(path)]).load()
        assert "\n" not in str(caught.value)


def test_archives_are_required_and_pixels_are_not_invented(two):
    with pytest.raises(ConfigError, match=r"Omniglot.archives"):
        Omniglot([])
    with pytest.raises(ConfigError, match=r"Omniglot.size: got 22, expected at most 21"):
        Omniglot(two, size=22).load()


def test_characters_with_fewer_drawings_than_others_are_refused(two, tmp_path):
    third = archive(tmp_path / "images_more.zip", ["Zulu/character01"], drawings=2)
    with pytest.raises(ConfigError, match="2 of Zulu/character01, 3 of"):
        Omniglot([*two, third]).load()


def test_paper_as_dark_as_ink_is_refused(two):
    with pytest.raises(ConfigError, match=r"Omniglot.paper: got 1, expected"):
        Omniglot(two, paper=1)


def test_the_official_archives_hold_242_characters_of_20_drawings():
    archives = sorted(str(path) for path in REAL.glob("images_background_small[12].zip"))
    if len(archives) != 2:
        pytest.skip(f"no images_background_small1.zip and ..2.zip in {REAL} (set OPSIN_OMNIGLOT to their folder)")
    array = Omniglot(archives).load()
    assert array.shape == (242, 20, 512)
    unit = array / np.linalg.norm(array, axis=-1, keepdims=True)
    same = np.einsum("cf,cef->ce", unit[:, 0], unit[:, 1:])
    other = np.einsum("cf,cef->ce", unit[:, 0], np.roll(unit, 40, axis=0)[:, 1:])
    assert (same > other).mean() > 0.68  # a raw cosine tells drawings of one character from those of another


@pytest.fixture
def features():
    return np.random.default_rng(0).normal(size=(4, 3, 2))


def test_the_only_array_of_an_npz_needs_no_name(features, tmp_path):
    np.savez(tmp_path / "one.npz", some=features)
    assert (ArrayFile(str(tmp_path / "one.npz")).load() == features.astype(np.float32)).all()


def test_an_array_among_others_is_found_by_name(features, tmp_path):
    path = str(tmp_path / "two.npz")
    np.savez(path, some=features, other=features[0])
    assert (ArrayFile(path, "some").load() == features.astype(np.float32)).all()
    for name in (None, "third"):
        with pytest.raises(ConfigError, match=rf"ArrayFile.dataset: got {name!r}, expected one of other, some"):
            ArrayFile(path, name).load()


def test_the_references_feature_file_opens_unchanged(features, tmp_path):
    path = str(tmp_path / "omniglot.h5")
    with h5py.File(path, "w") as file:
        file["resnet18/224/feat"] = features.astype(np.float32)
        file["labels"] = np.arange(4)
    assert (ArrayFile(path).load() == features.astype(np.float32)).all()
    with pytest.raises(ConfigError, match=r"got 'resnet18', expected one of labels, resnet18/224/feat"):
        ArrayFile(path, "resnet18").load()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_values_that_are_no_finite_float32_are_refused(features, tmp_path, bad):
    features[1, 2, 0] = bad
    np.savez(tmp_path / "bad.npz", features)
    with pytest.raises(ConfigError, match=r"1 non-finite values in .*bad\.npz', expected finite"):
        ArrayFile(str(tmp_path / "bad.npz")).load()


@pytest.mark.parametrize("array", [np.ones((2, 2)), np.ones((0, 2, 2)), np.full((1, 1, 1), "a")], ids=str)
def test_an_array_of_another_shape_or_type_is_refused(tmp_path, array):
    np.savez(tmp_path / "bad.npz", array)
    with pytest.raises(ConfigError, match="expected numbers, classes x exemplars x features"):
        ArrayFile(str(tmp_path / "bad.npz")).load()


def test_pickled_objects_are_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", np.array([[[None]]], object))
    with pytest.raises(ConfigError, match="not pickled objects"):
        ArrayFile(str(tmp_path / "bad.npz")).load()


@pytest.mark.parametrize("name", ["none.npz", "none.h5", "text.npz", "text.h5", "plain.npz"])
def test_files_that_cannot_be_read_are_named(tmp_path, name):
    for suffix in ("npz", "h5"):
        (tmp_path / f"text.{suffix}").write_bytes(b"text")
    np.save(tmp_path / "plain.npy", np.ones((1, 1, 1)))
    (tmp_path / "plain.npy").rename(tmp_path / "plain.npz")
    with pytest.raises(ConfigError, match=rf"ArrayFile.path: got '.*{name}', expected a readable file"):
        ArrayFile(str(tmp_path / name)).load()


def test_a_file_of_unknown_kind_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"ArrayFile.path: got 'a.csv', expected a file that ends in .npz or .h5"):
        ArrayFile("a.csv")
