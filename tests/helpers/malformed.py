"""Recipes with one fault each, made from those that are shipped; ``python -m tests.helpers.malformed`` writes them.

Kinds: type, range, null, unknown, duplicate, structure, encoding, size. The files lie in tests/data/malformed; the same
recipes make the same files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.paths import RECIPES, ROOT

FOLDER = ROOT / "tests" / "data" / "malformed"

SHIPPED = (
    "induction",
    "confidence",
    "neurons",
    "closed_loop",
    "subspace",
    "critical_period",
    "single_heads",
    "progress",
)
"""Recipes that have between them every section and most classes; the others differ from them in few settings."""

UNBOUNDED = ("above", "below", "full", "order")
"""Numbers that may be below zero."""

NULLABLE = ("mlp_ratio", "stop", "period", "tags", "group", "heads", "neurons", "members", "at", "every")
"""Settings that may be null, or that null leaves out."""

TOO_LARGE = {
    "batch_size": 10**12,
    "classes": 10**12,
    "exemplars": 10**12,
    "features": 10**12,
    "context": 10**9,
    "n_labels": 10**12,
    "train_classes": 10**12,
    "vocabulary": 10**12,
    "positions": 10**9,
    "segments": 10**12,
    "longest": 10**12,
    "layers": 10**12,
    "width": 2**50,
    "mlp_ratio": 1.0e15,
    "max_positions": 10**13,
    "seeds": 10**12,
}
"""Sizes of shipped recipes that no machine has memory for."""

ADDED = {"probe_size": 10**13, "evaluation_size": 10**13, "steps_per_batch": 10**13, "threads": 10**9}
"""The same of settings of the model that no shipped recipe has."""


@dataclass(frozen=True)
class Malformed:
    """One recipe with one fault.

    Args:
        name: name of the file, which begins with the kind of the fault.
        content: bytes of the file.
        named: a word that the line which refuses it holds.
    """

    name: str
    content: bytes
    named: str


def dumped(settings: Any) -> str:
    return yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=200)


def shipped() -> dict[str, dict[str, Any]]:
    """The settings of some shipped recipes, by name."""
    return {name: yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in SHIPPED}


Place = tuple[str | int, ...]
"""Keys and indices that lead to a value."""


def places(settings: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value below a recipe with the way to it."""
    entries = (
        settings.items() if isinstance(settings, dict) else enumerate(settings) if isinstance(settings, list) else ()
    )
    for key, value in entries:
        yield (*path, key), value
        yield from places(value, (*path, key))


def inside(settings: Any, path: Place) -> Any:
    for key in path:
        settings = settings[key]
    return settings


def owner_of(recipe: Any, path: Place) -> str:
    """The class, or else the section, that has a setting."""
    for end in range(len(path) - 1, 0, -1):
        above = inside(recipe, path[:end])
        if isinstance(above, dict) and "class_path" in above:
            return above["class_path"].rpartition(".")[2]
    return str(path[0])


def replaced(recipe: Any, path: Place, value: Any) -> Any:
    found = copy.deepcopy(recipe)
    inside(found, path[:-1])[path[-1]] = value
    return found


def renamed(recipe: Any, path: Place, name: str) -> Any:
    found = copy.deepcopy(recipe)
    parent = inside(found, path[:-1])
    entries = [(name if key == path[-1] else key, value) for key, value in parent.items()]
    parent.clear()
    parent.update(entries)
    return found


def different_settings() -> Iterator[tuple[str, Any, Place, Any, str]]:
    """Name of the recipe, the recipe, place, value and owner of every setting, each once over all recipes."""
    seen = set()
    for name, recipe in shipped().items():
        for path, value in places(recipe):
            owner, last = owner_of(recipe, path), path[-1]
            if (
                not isinstance(last, str)
                or last in ("class_path", "init_args")
                or (path[0] == "trainer" and len(path) == 2)
            ):
                continue
            # names of conditions and measures are free
            if path[-2:-1] in (("conditions",), ("by_seed",), ("measures",)) or (owner, last) in seen:
                continue
            seen.add((owner, last))
            yield name, recipe, path, value, f"{owner}.{last}"


def of_settings() -> Iterator[Malformed]:
    """Settings of another type, out of range, null, and misspelled."""
    for _, recipe, path, value, label in different_settings():
        last = str(path[-1])
        wrong = {"a mapping": 1} if isinstance(value, str) else "many"
        yield Malformed(f"type-{label}.yaml", dumped(replaced(recipe, path, wrong)).encode(), last)
        yield Malformed(
            f"unknown-{label}.yaml", dumped(renamed(recipe, path, last[:-1] + "_")).encode(), last[:-1] + "_"
        )
        if isinstance(value, int | float) and not isinstance(value, bool):
            if last not in NULLABLE:
                yield Malformed(f"null-{label}.yaml", dumped(replaced(recipe, path, None)).encode(), last)
            if last not in UNBOUNDED:
                yield Malformed(f"range-{label}-negative.yaml", dumped(replaced(recipe, path, -1)).encode(), last)
            yield Malformed(f"range-{label}-nan.yaml", dumped(replaced(recipe, path, float("nan"))).encode(), last)
        if last in TOO_LARGE:
            large = replaced(recipe, path, TOO_LARGE[last])
            yield Malformed(f"size-{label}.yaml", dumped(large).encode(), "expected")


def of_classes() -> Iterator[Malformed]:
    """Classes that are misspelled, and sizes that no recipe sets."""
    seen = set()
    for recipe in shipped().values():
        for path, value in places(recipe):
            if path[-1] == "class_path" and value not in seen:
                seen.add(value)
                name = value.rpartition(".")[2]
                changed = replaced(recipe, path, value[:-1])
                yield Malformed(f"unknown-class-{name}.yaml", dumped(changed).encode(), f"nearest: {name}")
    recipe = shipped()["induction"]
    for setting, value in ADDED.items():
        changed = replaced(recipe, ("model", setting), value)
        yield Malformed(f"size-model.{setting}.yaml", dumped(changed).encode(), setting)


def of_duplicates() -> Iterator[Malformed]:
    """A line that stands twice, in every section of a recipe."""
    seen = set()
    for name, recipe in shipped().items():
        lines = dumped(recipe).splitlines()
        for index, line in enumerate(lines):
            key = line.strip().partition(":")[0]
            if line.lstrip().startswith("- ") or ": " not in line or key in seen or key == "class_path":
                continue
            seen.add(key)
            twice = "\n".join([*lines[: index + 1], line, *lines[index + 1 :]]) + "\n"
            yield Malformed(f"duplicate-{name}-{key}.yaml", twice.encode(), "once")


def of_structure() -> Iterator[Malformed]:
    """Sections of another form, and YAML that is none or has no end."""
    recipe = shipped()["induction"]
    for section in ("task", "model", "trainer"):
        for kind, value in {"list": [1], "number": 3, "null": None, "true": True}.items():
            changed = recipe | {section: value}
            yield Malformed(f"structure-{section}-{kind}.yaml", dumped(changed).encode(), section)
    for path in (("trainer", "callbacks", 0), ("task",), ("task", "init_args", "exemplars")):
        for kind, value in {"list": [1], "number": 3, "text": "many"}.items():
            label = str(path[-1])
            changed = replaced(recipe, (*path, "init_args"), value)
            yield Malformed(f"structure-init_args-{label}-{kind}.yaml", dumped(changed).encode(), "init_args")
        changed = replaced(recipe, (*path, "class_path"), 3)
        yield Malformed(f"structure-class_path-{label}.yaml", dumped(changed).encode(), "class_path")
    for section in ("modell", "tasks", "trainers", "populations", "callbacks"):
        yield Malformed(f"unknown-section-{section}.yaml", dumped(recipe | {section: {}}).encode(), section)
    text = dumped(recipe)
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(8)
    )
    texts = {
        "empty": ("", "empty"),
        "comment": ("# nothing\n", "empty"),
        "list": ("- task\n- model\n", "list"),
        "text": ("induction\n", "text"),
        "number": ("3\n", "number"),
        "tab": (text.replace("\n  ", "\n\t", 1), "tab"),
        "unclosed": (text + "tags: [a, b\n", "YAML"),
        "no-colon": (text + "model\n", "YAML"),
        "indented": (text.replace("model:", " model:", 1), "YAML"),
        "two-documents": (text + "---\n" + text, "document"),
        "recursion": ("task: &a\n  init_args: *a\n", "*a"),
        "recursion-list": ("task: &a [*a]\n", "*a"),
        "unknown-alias": ("task: *nobody\n", "nobody"),
        "bomb": (bomb + text, "unfold"),
        "deep": ("task: " + "[" * 500 + "]" * 500 + "\n", "levels"),
        "deep-mapping": ("task: " + "{a: " * 500 + "1" + "}" * 500 + "\n", "levels"),
        "tag": (text + "extra: !!python/object/apply:os.getcwd []\n", "tag"),
        "tag-name": (text + "extra: !!python/name:os.getcwd\n", "tag"),
        "list-as-key": (text + "? [a, b]\n: 1\n", "key"),
        "long-number": (text.replace("seed: 1", "seed: " + "9" * 5000), "digits"),
        "huge-number": (text.replace("seed: 1", "seed: " + "9" * 50), "seed"),
        "infinite-rate": (text.replace("3.0e-05", "1.0e+999"), "learning_rate"),
        "time-as-steps": (text.replace("max_steps: 12000", "max_steps: 3:20"), "max_steps"),
        "octal-as-steps": (text.replace("max_steps: 12000", "max_steps: 0o17"), "max_steps"),
        "date-as-steps": (text.replace("max_steps: 12000", "max_steps: 2026-11-25"), "max_steps"),
    }
    for name, (content, named) in texts.items():
        yield Malformed(f"structure-{name}.yaml", content.encode(), named)


def of_encoding() -> Iterator[Malformed]:
    """Bytes that are no text in UTF-8, or that YAML does not take."""
    text = "# Grün\n" + dumped(shipped()["induction"])
    for encoding in ("latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp037"):
        yield Malformed(f"encoding-{encoding}.yaml", text.encode(encoding), "encoding")
    yield Malformed("encoding-half-a-character.yaml", text.encode() + "ü".encode()[:1], "UTF-8")
    yield Malformed("encoding-zip.yaml", b"PK\x03\x04" + bytes(range(256)), "encoding")
    yield Malformed("encoding-control.yaml", text.encode() + b"extra: \x07\n", "YAML")
    yield Malformed("encoding-nul.yaml", text.encode() + b"\x00", "YAML")


def corpus() -> list[Malformed]:
    """Every recipe of the corpus."""
    made = [*of_settings(), *of_classes(), *of_duplicates(), *of_structure(), *of_encoding()]
    assert len({each.name for each in made}) == len(made), "two recipes of one name"
    return made


def write(folder: Path) -> int:
    """Write the corpus, and take away what no longer belongs to it."""
    made = corpus()
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for each in made:
        (folder / each.name).write_bytes(each.content)
    return len(made)


if __name__ == "__main__":
    print(f"{write(FOLDER)} recipes in {FOLDER.relative_to(ROOT)}")
