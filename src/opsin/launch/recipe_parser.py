"""The parser of recipes: LightningCLI's, whose messages are one line with the setting, its value and what would do.

jsonargparse makes a parser of its own for every class that a recipe names; each is a ``RecipeParser``, which knows the
name of its class.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import operator
import re
import sys
from argparse import Action
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import DefaultHelpFormatter, Namespace, _loaders_dumpers, set_dumper
from jsonargparse._common import lenient_check
from lightning.pytorch.cli import LightningArgumentParser

from opsin.errors import ConfigError, config_error_behind, nearest, shortened
from opsin.records.recipe_text import RecipeLoader, dump_recipe, read_recipe

LONGEST_MESSAGE = 400
"""Characters of a message of jsonargparse that no rule here makes shorter."""

LARGEST_WHOLE_NUMBER = 2**64
"""Every whole number of a recipe is smaller than this."""

LONGEST_TYPE = 120
"""Characters of a type that the help shows."""

WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number (float)",
    bool: "true or false",
    str: "text (in quotes where it looks like a number)",
    NoneType: "null",
}
"""Plain types as messages call them."""

SECTIONS = {"Population": "population", "Windows": "population.windows", "Condition": "population.conditions"}
"""Sections of a recipe that messages name as the recipe does and not by their class."""

SPEC_KEYS = {"class_path", "init_args", "dict_kwargs"}
"""What stands beside a class path."""

NO_SETTINGS = ("help", "config", "print_config", "==SUPPRESS==", "data")
"""What a parser has beside settings; Lightning's ``data`` is what a task is here."""

USUAL_MODULES = (
    "opsin.tasks",
    "opsin.callbacks",
    "opsin.optimizers",
    "lightning.pytorch.callbacks",
    "torch.optim.lr_scheduler",
)
"""Modules whose classes recipes name."""

_KEY = re.compile(r'Parser key "([^"]+)"')
_VALUE = re.compile(r"Given value: (.*)$|^(?!.*Given value: ).*Got value: (.*?)(?: Subclass types expect .*)?$")
_CLASS = re.compile(r"Problem with given class_path '([^']+)'|Expected a path but (\S+) either|class_path='([^']+)'")
_UNKNOWN = re.compile(r"Option '([^']+)' is not accepted|Group '([^']+)' does not accept option '([^']+)'")
_REQUIRED = re.compile(r"the following arguments are required: (.*)$")
_ARGUMENTS = re.compile(r"unrecognized arguments: (.*)$")


def use_recipe_yaml() -> None:
    """Let jsonargparse read and write YAML as ``opsin.records.recipe_text`` does."""
    # the one place where it decides how a value on the line is read, too
    _loaders_dumpers.yaml_default_loader = RecipeLoader  # type: ignore[assignment]
    set_dumper("yaml", dump_recipe)


class _Written:
    """A value as jsonargparse has written it, for messages."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


class _ParserError(BaseException):
    """What a parser has found, on its way through everything that catches errors of other kinds."""

    def __init__(self, error: ConfigError) -> None:
        super().__init__(str(error))
        self.error = error


_IS_RAISED = ContextVar("parser errors are raised", default=False)


@contextmanager
def parser_errors_raised() -> Iterator[None]:
    """Let parsers raise what is wrong with a setting, where they would print it and end the process.

    Raises:
        ConfigError: names the setting.
    """
    token = _IS_RAISED.set(True)
    try:
        yield
    except _ParserError as refused:
        raise refused.error from None
    finally:
        _IS_RAISED.reset(token)


class ShortHelp(DefaultHelpFormatter):
    """jsonargparse's help with types of one line, and without lists of everything that has been imported."""

    def _expand_help(self, action: Action) -> str:
        text = " ".join(super()._expand_help(action).split())
        text = re.sub(r", known subclasses: [^)]*", "", text)
        found = re.search(r"type: (.*?)(?:, default: |\)$)", text)
        return text if found is None else text.replace(found[1], shortened(found[1], LONGEST_TYPE), 1)


class RecipeParser(LightningArgumentParser):
    """Says in one line what is wrong with a setting."""

    class_name: str = ""
    """Name of the class whose settings it reads; empty for the recipe itself."""

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, **settings: Any) -> list[str]:
        """Add the settings of a class, and keep its name where they are all the settings there are."""
        if nested_key is None:
            self.class_name = theclass.__name__
        return super().add_class_arguments(theclass, nested_key, **settings)

    def add_function_arguments(  # type: ignore[override]
        self, function: Any, nested_key: str | None = None, **settings: Any
    ) -> list[str]:
        """Add the settings of a function, and keep its name where they are all the settings there are."""
        if nested_key is None:
            self.class_name = getattr(function, "__name__", "")
        return super().add_function_arguments(function, nested_key, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and end the process with code 2; raise it within ``parser_errors_raised``."""
        found = config_error_behind(ex) or self._explained(" ".join(message.split()))
        if _IS_RAISED.get():
            text = shortened(message, LONGEST_MESSAGE)
            raise _ParserError(found or ConfigError("recipe", _Written(text), "settings that it takes"))
        print(f"opsin: {found or shortened(message, LONGEST_MESSAGE)}", file=sys.stderr)
        sys.exit(2)

    def validate(self, namespace: Namespace, *args: Any, **settings: Any) -> None:
        """Check settings, those that are null and numbers that are none among them."""
        super().validate(namespace, *args, **settings)
        if lenient_check.get():
            return
        for action in self._actions:
            if action.dest in namespace and hasattr(action, "_typehint"):
                error = self._out_of_range(action, namespace[action.dest])
                if error is not None:
                    self.error(str(error), error)

    def parse_object(self, obj: Namespace | dict[str, Any], *args: Any, **settings: Any) -> Namespace:
        """Parse settings of a class, none of which may be unknown, even where nothing stands in it."""
        if (error := self.unknown_setting(obj)) is not None:
            self.error(str(error), error)
        return super().parse_object(obj, *args, **settings)

    def unknown_setting(self, settings: Namespace | Mapping[str, Any], path: str = "") -> ConfigError | None:
        """What is wrong with the names of settings; None where all are known.

        Args:
            settings: plain or parsed settings.
            path: names of what they stand in, each with a dot behind it.
        """
        entries = vars(settings) if isinstance(settings, Namespace) else settings
        dests = [action.dest for action in self._actions]
        for name, value in entries.items():
            dest = f"{path}{name}"
            if dest in dests or str(name).startswith("__"):
                continue
            if not any(known.startswith(f"{dest}.") for known in dests):
                return ConfigError(self.named(path[:-1]).strip(".") or "recipe", name, self._known(dest))
            inside = value if isinstance(value, Namespace | dict) and "class_path" not in value else {}
            if (error := self.unknown_setting(inside, f"{dest}.")) is not None:
                return error
        return None

    def named(self, key: str) -> str:
        """A setting as messages name it.

        Args:
            key: name of the setting in this parser.
        """
        name = SECTIONS.get(self.class_name, self.class_name)
        return f"{name}.{key}" if name else key

    def _out_of_range(self, action: Action, value: object) -> ConfigError | None:
        """What is wrong with a value whose type is right."""
        hint = action._typehint  # type: ignore[attr-defined]
        if value is None and not (accepts_null(hint) or action.default is None or action.required):
            return ConfigError(self.named(action.dest), None, described(hint))
        if value == action.default:
            return None
        for number in numbers_in(value):
            if isinstance(number, float) and not math.isfinite(number):
                return ConfigError(self.named(action.dest), number, "a finite number")
            if isinstance(number, int) and abs(number) >= LARGEST_WHOLE_NUMBER:
                return ConfigError(self.named(action.dest), number, "a whole number below 2**64")
        return None

    def _explained(self, message: str) -> ConfigError | None:
        """A message of jsonargparse as the setting, its value and what would do; None where no rule fits."""
        if found := _UNKNOWN.search(message):
            option, group, inside = found.groups()
            key = option or f"{group}.{inside}"
            *path, last = key.split(".")
            return ConfigError(self.named(".".join(path)).strip(".") or "recipe", last, self._known(key))
        if found := _REQUIRED.search(message):
            first = found[1].split(", ")[0]
            return ConfigError(self.named(first), None, f"{self._expected(first)}; it is required")
        if found := _ARGUMENTS.search(message):
            first = found[1].split()[0]
            return ConfigError("opsin fit", first, nearest(first.split("=")[0], self._option_strings(), "a setting"))
        key = _KEY.search(message)
        if key is None:
            return None
        if (named := _CLASS.search(message)) and (
            wrong := wrong_class(self.named(key[1]), _first_group(named.groups()))
        ):
            return wrong
        value = _VALUE.search(message)
        if value is None:
            return None
        text = _first_group(value.groups())
        is_text = "Given value type: <class 'str'>" in message or not re.match(r"[-\d\[{(]|None$|True$|False$", text)
        return ConfigError(self.named(key[1]), _Written(repr(text) if is_text else text), self._expected(key[1]))

    def _expected(self, key: str) -> str:
        action = next((action for action in self._actions if action.dest == key), None)
        return described(getattr(action, "_typehint", None))

    def _known(self, key: str) -> str:
        """Settings beside which an unknown one was written."""
        path = key.rpartition(".")[0]
        known = [action.dest for action in self._actions if action.dest.rpartition(".")[0] == path]
        names = [name.rpartition(".")[2] for name in known if name not in NO_SETTINGS]
        return nearest(key.rpartition(".")[2], names, "one of its settings")

    def _option_strings(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]


def _first_group(groups: Iterable[str | None]) -> str:
    return next(group for group in groups if group is not None)


# ---- types ------------------------------------------------------------------------------------------


def _parts(hint: Any) -> tuple[Any, ...]:
    """The members of a union; a single one of another type."""
    if get_origin(hint) is Annotated:
        return _parts(get_args(hint)[0])
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def accepts_null(hint: Any) -> bool:
    """Whether null is a value of a type."""
    return any(part is NoneType or part is None or part is Any or part is object for part in _parts(hint)) or any(
        get_origin(part) is Literal and None in get_args(part) for part in _parts(hint)
    )


def numbers_in(value: object) -> Iterator[int | float]:
    """Numbers of a value, those of its lists and mappings among them, but not settings of classes."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from numbers_in(entry)
    elif isinstance(value, dict) and "class_path" not in value:
        for entry in value.values():
            yield from numbers_in(entry)


def described(hint: Any) -> str:
    """A type in words."""
    words = dict.fromkeys(_word(part) for part in _parts(hint) if part is not NoneType)
    return " or ".join([*words, *(["null"] if NoneType in _parts(hint) else [])])


def _word(hint: Any) -> str:
    origin, inside = get_origin(hint), get_args(hint)
    if hint in WORDS:
        return WORDS[hint]
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inside))
    if origin is tuple and Ellipsis not in inside:
        return f"{len(inside)} values, each {described(functools.reduce(operator.or_, inside))}"
    if origin is dict or origin is Mapping:
        return f"a mapping of names to {described(inside[1]) if len(inside) == 2 else 'values'}"
    if inside and inspect.isclass(origin) and issubclass(origin, Iterable) and origin is not type:
        return f"a list, each entry {described(inside[0])}"
    if inspect.isclass(hint):
        article = "an" if hint.__name__[0] in "AEIOU" else "a"
        return f"{article} {hint.__name__} (class_path and init_args)"
    return "another value"


# ---- classes ----------------------------------------------------------------------------------------


def wrong_class(field: str, class_path: str) -> ConfigError | None:
    """What is wrong with the path of a class; None where there is such a class.

    Args:
        field: setting that names the class, for messages.
        class_path: path of the class as the user wrote it, with dots.
    """
    module_name, _, name = class_path.rpartition(".")
    if not module_name:
        return None
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        # an outer class, or a module that is not there or cannot be imported
        outer = wrong_class(field, module_name) if "." in module_name else None
        if isinstance(error, ModuleNotFoundError) and outer is None and "." in module_name:
            return None
        reason = "" if isinstance(error, ModuleNotFoundError) else f" in a module that can be imported ({error})"
        return ConfigError(field, class_path, nearest(module_name, USUAL_MODULES, f"the path of a class{reason}"))
    if hasattr(module, name):
        return None
    known = getattr(module, "__all__", None) or [public for public in vars(module) if not public.startswith("_")]
    if module_name == "opsin":
        known = ["tasks", "callbacks"]
    return ConfigError(field, class_path, nearest(name, list(known), f"a class of {module_name}"))


def check_structure(settings: object, field: str) -> None:
    """Refuse class paths of nothing, and settings of classes that are no settings.

    Args:
        settings: plain settings, as they are read from a file.
        field: where they stand, for messages.

    Raises:
        ConfigError: names the place.
    """
    if isinstance(settings, list):
        for index, entry in enumerate(settings):
            check_structure(entry, f"{field}[{index}]")
    if not isinstance(settings, dict):
        return
    if "class_path" in settings:
        _check_spec(settings, field)
    for name, entry in settings.items():
        inside = f"{field}.{name}" if field else str(name)
        check_structure(entry, field if name == "init_args" else inside)


def _check_spec(settings: Mapping[Any, Any], field: str) -> None:
    path, init_args = settings["class_path"], settings.get("init_args")
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{field}.class_path", path, "the path of a class, such as opsin.callbacks.Ablate")
    if (error := wrong_class(field, path)) is not None:
        raise error
    if init_args is not None and not isinstance(init_args, dict):
        raise ConfigError(f"{field}.init_args", init_args, f"settings of {path.rpartition('.')[2]} by name")
    for name in settings:
        if name not in SPEC_KEYS:
            raise ConfigError(field, name, nearest(str(name), sorted(SPEC_KEYS), "class_path and init_args"))
    for name in init_args or ():
        if not isinstance(name, str):
            raise ConfigError(f"{field}.init_args", name, "the name of a setting")


# ---- files ------------------------------------------------------------------------------------------


def recipe_files(args: Sequence[str]) -> list[Path]:
    """Files that ``--config`` names on the line, in order."""
    values = [args[index + 1] for index, arg in enumerate(args[:-1]) if arg in ("--config", "-c")]
    values += [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    # settings can stand on the line themselves
    return [Path(value) for value in values if not value.lstrip().startswith("{") and "\n" not in value]


def check_recipe(path: Path, parser: RecipeParser) -> None:
    """Refuse a file that is no recipe, before its settings are compared with what classes take.

    Args:
        path: path of the file.
        parser: parser of the recipe, which knows its sections.

    Raises:
        ConfigError: names the place and what stands there.
    """
    settings = read_recipe(path)
    known = list(dict.fromkeys(action.dest.partition(".")[0] for action in parser._actions))
    sections = [name for name in known if name not in NO_SETTINGS]
    for name, value in settings.items():
        if name not in sections:
            raise ConfigError(str(path), name, nearest(str(name), sections, "a section of a recipe"))
        if name in ("task", "model", "trainer") and not isinstance(value, dict | str):
            raise ConfigError(name, value, "settings by name")
        if name == "population" and not isinstance(value, dict | str | None):
            raise ConfigError(name, value, "settings by name, or null")
        for setting in value if isinstance(value, dict) else ():
            if not isinstance(setting, str):
                raise ConfigError(name, setting, "the name of a setting")
    check_structure(settings, "")
    if (error := parser.unknown_setting(settings)) is not None:
        raise error
