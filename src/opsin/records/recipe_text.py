"""The text of a recipe: YAML that is read without surprises, and that is written so that it reads back as it was.

Before anything is made of a text its events are looked at one by one: a key that stands twice, an alias of what it
stands in, aliases that unfold to far more than was written, tags and very deep nesting are refused in one line with
their place in the file. Numbers are decimal: ``1:1`` is a head and not sixty-one, and ``010`` is no eight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opsin.errors import ConfigError, shortened

LARGEST_FILE = 16 * 2**20
"""Bytes that a recipe may have."""

DEEPEST = 60
"""Mappings and lists that may stand inside one another."""

UNFOLDED = 10
"""How many times as many values as are written a recipe may have when its aliases are unfolded."""

FEW_VALUES = 10_000
"""Values that aliases may unfold to in any case."""

LONGEST_NUMBER = 100
"""Digits that a number may have."""

LONGEST_PATH = 80
"""Characters of the way to a value that a message shows."""

KNOWN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")}

_C_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class RecipeLoader(_C_LOADER):  # type: ignore[misc,valid-type]
    """PyYAML's safe loader with decimal numbers only, and without dates."""


class RecipeDumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes text that ``RecipeLoader`` alone would read as a number."""


_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*)?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*\.(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_REPLACED = {"tag:yaml.org,2002:int": _INT, "tag:yaml.org,2002:float": _FLOAT}


def _set_resolvers() -> None:
    dropped = {*_REPLACED, "tag:yaml.org,2002:timestamp"}
    RecipeLoader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in dropped]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, pattern in _REPLACED.items():
        RecipeLoader.add_implicit_resolver(tag, pattern, list("-+.0123456789"))
        RecipeDumper.add_implicit_resolver(tag, pattern, list("-+.0123456789"))


_set_resolvers()


def dump_recipe(settings: Mapping[str, Any]) -> str:
    """Plain settings as YAML, in their order, without aliases, and so that they read back as they are."""
    dumper = type("Unaliased", (RecipeDumper,), {"ignore_aliases": lambda self, data: True})
    return yaml.dump(dict(settings), Dumper=dumper, sort_keys=False, default_flow_style=False)


def read_recipe(path: Path, field_name: str = "--config", expected: str = "settings by name") -> dict[str, Any]:
    """The settings of a file.

    Args:
        path: path of the YAML file.
        field_name: setting or argument that names the file, for messages.
        expected: words for what the file should hold, for messages.

    Raises:
        ConfigError: no file, no text in UTF-8, no YAML, or YAML that is no mapping of settings by name.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(field_name, str(path), f"a file of at most {LARGEST_FILE // 2**20} MiB")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(field_name, str(path), f"a YAML file of settings ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            field_name, str(path), f"a text file in UTF-8 ({error.reason}, byte {error.start})"
        ) from error
    return parse_recipe(text, str(path), field_name, expected)


def parse_recipe(
    text: str, name: str, field_name: str = "--config", expected: str = "settings by name"
) -> dict[str, Any]:
    """The settings of a text.

    Args:
        text: YAML, without a byte-order mark.
        name: name of the text, for messages.
        field_name: setting or argument that gives the text, for messages.
        expected: words for what the text should hold, for messages.

    Raises:
        ConfigError: no YAML, or YAML that is no mapping of settings by name.
    """
    try:
        _Events(f"{field_name} {name}").check(text)
        settings = yaml.load(text, Loader=RecipeLoader)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, f"{field_name} {name}") from error
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(field_name, name, f"YAML ({' '.join(str(error).split())})") from error
    if not isinstance(settings, dict):
        kind = "an empty file" if settings is None else f"a {_KINDS.get(type(settings), 'single value')}"
        raise ConfigError(f"{field_name} {name}", kind, expected)
    return settings


_KINDS = {list: "list", str: "text", int: "number", float: "number"}


def _syntax_error(error: yaml.MarkedYAMLError, text: str, name: str) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    number = 0 if mark is None else mark.line
    lines = text.splitlines() or [""]
    line = lines[min(number, len(lines) - 1)]
    tabbed = "\t" in line[: len(line) - len(line.lstrip())]
    expected = "spaces: YAML is not indented by tabs" if tabbed else f"YAML ({error.problem or error.context})"
    return ConfigError(f"{name}, line {number + 1}", line.strip(), expected)


@dataclass
class _Open:
    """A mapping or list of which the end has not been read.

    Args:
        anchor: name by which aliases call it; None without one.
        keys: line of every key of a mapping; None for a list.
        key: key of a mapping whose value comes next; None where a key comes next.
        size: values in it so far, aliases unfolded.
        items: number of entries that have been read so far.
    """

    anchor: str | None
    keys: dict[str, int] | None
    key: str | None = None
    size: int = 1
    items: int = 0


@dataclass
class _Events:
    """Goes through the events of a text and refuses what no recipe needs.

    Args:
        name: name of the text, for messages.
    """

    name: str
    written: int = 0
    open: list[_Open] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    def check(self, text: str) -> None:
        for event in yaml.parse(text, Loader=_C_LOADER):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.CollectionStartEvent):
                self._begin(event, line)
            elif isinstance(event, yaml.CollectionEndEvent):
                ended = self.open.pop()
                if ended.anchor is not None:
                    self.sizes[ended.anchor] = ended.size
                self._add(ended.size, line)
            elif isinstance(event, yaml.AliasEvent):
                self._alias(event.anchor, line)
            elif isinstance(event, yaml.ScalarEvent):
                self._scalar(event, line)

    def _begin(self, event: yaml.CollectionStartEvent, line: int) -> None:
        self._check_tag(event.tag, line)
        if self.open and self.open[-1].keys is not None and self.open[-1].key is None:
            raise self._error(line, "a list or mapping", "a name as key")
        if len(self.open) >= DEEPEST:
            raise self._error(line, f"{DEEPEST + 1} levels", f"at most {DEEPEST} mappings and lists inside one another")
        self.written += 1
        self.open.append(_Open(event.anchor, {} if isinstance(event, yaml.MappingStartEvent) else None))

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> None:
        self._check_tag(event.tag, line)
        self.written += 1
        if event.anchor is not None:
            self.sizes[event.anchor] = 1
        inside = self.open[-1] if self.open else None
        if inside is not None and inside.keys is not None and inside.key is None:
            if (before := inside.keys.get(event.value)) is not None:
                raise self._error(line, event.value, f"every name once; it stands in line {before} already")
            inside.keys[event.value], inside.key = line, event.value
            return
        if event.style is None and len(event.value) > LONGEST_NUMBER and event.value[1:].isdigit():
            raise self._error(line, f"{event.value[:12]}...", f"a number of at most {LONGEST_NUMBER} digits")
        self._add(1, line)

    def _alias(self, anchor: str, line: int) -> None:
        if any(inside.anchor == anchor for inside in self.open):
            raise self._error(line, f"*{anchor}", f"no alias inside of &{anchor}, which would have no end")
        if self.open and self.open[-1].keys is not None and self.open[-1].key is None:
            raise self._error(line, f"*{anchor}", "a name as key")
        self.written += 1
        self._add(self.sizes.get(anchor, 1), line)

    def _add(self, size: int, line: int) -> None:
        """Count a value to what it stands in."""
        if size > FEW_VALUES + UNFOLDED * self.written:
            raise self._error(line, f"{size:,} values", f"no aliases that unfold to more than {FEW_VALUES:,} values")
        if self.open:
            inside = self.open[-1]
            inside.size, inside.items, inside.key = inside.size + size, inside.items + 1, None

    def _check_tag(self, tag: str | None, line: int) -> None:
        if tag not in (None, "!") and tag not in KNOWN_TAGS:
            raise self._error(line, tag, "no tag: settings are plain values")

    def _error(self, line: int, value: object, expected: str) -> ConfigError:
        parts = [str(inside.items) if inside.keys is None else inside.key for inside in self.open]
        path = shortened(".".join(part for part in parts if part is not None), LONGEST_PATH)
        return ConfigError(f"{self.name}, line {line}{': ' + path if path else ''}", value, expected)
