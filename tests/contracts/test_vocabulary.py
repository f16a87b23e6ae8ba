"""Claims about words: those of the field, each for one thing, and no pronoun as a name."""

from __future__ import annotations

import re
from collections import defaultdict

from tests.contracts.house import (
    Binding,
    bindings,
    documents,
    modules,
    modules_of_tests,
    recipes,
    report,
    scripts,
    top_level_names,
    words,
)
from tests.helpers.paths import ROOT

RETIRED_WORDS = {
    *("crew", "fleet", "scene", "scenes", "teller", "carried", "met"),
    *("arrange", "arranged", "arrangement", "arrangements", "place", "places"),
}
"""No identifier has one of them among its words."""

RETIRED_NAMES = {"acting", "lay_out", "moment", "moments"}
"""No identifier is one of them, whole."""

MOMENTS_OF_ADAM = re.compile(r"\bexp_avg\b|\bparam_groups\b|\bmoments of\b|\brunning moments\b|\bsecond moment\b")
"""A file that speaks of these may call them moments, but no class is a ``Moment``."""

RETIRED_MODULES = {"looking", "watching", "checks", "last_neurons"}

RETIRED_TEXT = re.compile(r"\b(crew|fleet|scenes?|teller)\b|\b(Crew|Fleet|Scene|Teller|Moment|Carried|Acting|_Met)\b")
"""In prose; ``carried``, ``acting`` and ``at any moment`` are plain English."""

PRONOUNS = {
    *("told", "asked", "those", "these", "this", "that", "own", "here", "there", "taken", "theirs", "ours", "others"),
    *("each", "both", "some", "who", "whose", "whom", "them", "they", "it", "its", "mine", "everybody", "somebody"),
    *("everyone", "someone"),
}
"""No identifier is one of them, whole."""

ON_DISK = {"Start.place", "Member.place", "Ledger.told"}
"""Fields that are keys of files or of recipes, which users have."""

SHARED_NAMES = {"main"}


def names() -> list[Binding]:
    found = [binding for module in (*modules(), *scripts()) for binding in bindings(module)]
    return [binding for binding in found if f"{binding.owner}.{binding.name}" not in ON_DISK]


def test_no_name_has_a_retired_word():
    retired = [binding for binding in names() if RETIRED_WORDS & {*words(binding.name)}]
    retired += [binding for binding in names() if _plain(binding.name) in RETIRED_NAMES and not _of_adam(binding)]
    # the control of a comparison is the field's word; the class that hands out gates has another name
    retired += [binding for binding in names() if binding.name.strip("_") == "Control"]
    report("retired words in names", retired)


def _of_adam(binding: Binding) -> bool:
    text = (ROOT / binding.where.rsplit(":", 1)[0]).read_text()
    return binding.name in ("moment", "moments") and "Moment" not in text and bool(MOMENTS_OF_ADAM.search(text))


def test_no_module_has_a_retired_name():
    report("retired names of modules", (m.shown for m in modules() if m.path.stem in RETIRED_MODULES))


def test_no_text_has_a_retired_word():
    sources = [module.path for module in (*modules(), *scripts(), *modules_of_tests())]
    offences = []
    for path in (*sources, *documents(), *recipes()):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if found := RETIRED_TEXT.search(line):
                offences.append(f"{path.relative_to(ROOT)}:{number}: {found[0]}: {line.strip()[:90]}")
    report("retired words in text", offences)


def test_no_name_is_a_pronoun():
    report("pronouns as names", (binding for binding in names() if _plain(binding.name) in PRONOUNS))


def _plain(name: str) -> str:
    return name.strip("_").lower()


def test_every_top_level_name_has_one_owner():
    owners: dict[str, list[str]] = defaultdict(list)
    for module in modules():
        for name, line in top_level_names(module):
            if not (name.startswith("__") or name in SHARED_NAMES):
                owners[name].append(f"{module.shown}:{line}")
    shared = {name: dict.fromkeys(where.split(":")[0] for where in found) for name, found in owners.items()}
    report(
        "names defined in more than one module",
        (f"{name}: {', '.join(owners[name])}" for name in sorted(owners) if len(shared[name]) > 1),
    )


def test_the_words_of_an_identifier_are_told_apart():
    assert words("_EveryOne_else2") == ["every", "one", "else", "2"]
    assert words("WINDOW_PLACES") == ["window", "places"] and "place" not in words("replaced")
