"""Claims about what is installed: every folder of the house, and nothing that git or setuptools overlooks."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from tests.contracts.house import ROOMS, SETUPTOOLS, modules, python_files, report
from tests.helpers.paths import ROOT

NO_WINGS = {"contracts", "helpers", "docs", "recipes", "scripts"}
"""Folders of tests that are about no wing of the package."""


def package_of(folder: Path) -> str:
    """The dotted name of a folder with Python files."""
    holders = [(name, room) for name, room in ROOMS.items() if folder.is_relative_to(room)]
    name, room = max(holders, key=lambda item: len(item[1].parts))
    return ".".join([name, *folder.relative_to(room).parts])


FOLDERS = sorted({module.path.parent for module in modules()})


def test_the_packages_that_are_installed_are_the_folders_with_python_files():
    assert sorted(SETUPTOOLS["packages"]) == sorted(map(package_of, FOLDERS))


def test_every_folder_with_python_files_is_a_package():
    report("folders without __init__.py", (folder for folder in FOLDERS if not (folder / "__init__.py").exists()))


def test_every_room_that_is_installed_exists():
    report("rooms of pyproject.toml that are no folders", (room for room in ROOMS.values() if not room.is_dir()))


def test_the_type_hints_are_installed():
    assert "py.typed" in SETUPTOOLS["package-data"]["opsin"]
    assert (ROOMS["opsin"] / "py.typed").exists()


def test_the_tests_mirror_the_tree():
    wings = {package_of(folder).removeprefix("opsin.").replace(".", "/") for folder in FOLDERS}
    folders = {path.parent.relative_to(ROOT / "tests") for path in python_files(ROOT / "tests")}
    strangers = sorted(
        str(folder)
        for folder in folders
        if folder.parts and folder.parts[0] not in NO_WINGS and str(folder) not in wings
    )
    report("folders of tests that are no wing", strangers)


def test_a_test_file_at_the_top_is_about_a_module_at_the_top():
    tops = {path.stem for path in ROOMS["opsin"].glob("*.py")}
    found = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    # the shapes in signatures are everybody's
    assert found - tops <= {"shapes"}


def ignored() -> list[str]:
    lines = [line.strip() for line in (ROOT / ".gitignore").read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_what_git_ignores_by_a_plain_word_is_anchored_at_the_top():
    # a word such as `runs/` would also hide a folder of the package
    plain = [line for line in ignored() if line.rstrip("/").isidentifier() and not line.startswith("__")]
    report("lines of .gitignore without a slash at their beginning", plain)


def test_git_ignores_no_folder_of_the_house():
    offences = []
    for folder in FOLDERS:
        parts = folder.relative_to(ROOT).parts
        for line in ignored():
            name, anchored = line.strip("/"), line.startswith("/")
            if any(fnmatch(part, name) for part in (parts[:1] if anchored else parts)):
                offences.append(f"{'/'.join(parts)}: ignored by {line}")
    report("folders that git ignores", offences)
