"""What an intervention is, as text: two that have the same text do the same.

Passes are shared, branches find the counts of their run, and a checkpoint knows its plan by this text, so it is stated
and not left to ``repr``: the name of a part (``identity_name``, else the name of its class) and its fields in order,
without those that follow from other fields or are for people only (``metadata=DERIVED``). A class or a ``repr`` may
change; a text that has been written to a checkpoint may not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum

from opsin.model.protocol import Model, changed_settings

DERIVED: Mapping[str, bool] = {"derived": True}
"""Metadata of a dataclass field that is no part of the identity."""


NORMALISED = ".hook_normalized"
"""Name that the output of a norm had once, and by which checkpoints still know it."""


def known_site(name: str) -> str:
    """The name by which checkpoints know a site.

    Args:
        name: name of the site in the model's table.
    """
    if name.endswith(".hook_out"):
        return name.removesuffix(".hook_out") + NORMALISED
    return name + "_before_weight" if name.endswith(NORMALISED) else name


def identity(part: object, members: bool = True) -> str:
    """The text of a value, an intervention, a change of weights, a pass, or a tuple or list of them.

    Args:
        part: anything that a plan is made of.
        members: whether selected members count; a branch has one member alone, whatever its number was in the run.
    """
    if isinstance(part, (tuple, list)):
        inside = ", ".join(identity(item, members) for item in part)
        if isinstance(part, list):
            return f"[{inside}]"
        return f"({inside},)" if len(part) == 1 else f"({inside})"
    if isinstance(part, Enum):
        return f"<{type(part).__name__}.{getattr(part, 'identity_name', part.name)}: {part.value!r}>"
    if not is_dataclass(part):
        return repr(part)
    name = getattr(part, "identity_name", type(part).__qualname__)
    unstated = {item.name for item in fields(part) if item.metadata.get("derived")}
    if isinstance(part, Model):
        unstated = {item.name for item in fields(part)} - changed_settings(part).keys()
    stated = [item.name for item in fields(part) if item.name not in unstated]
    values = {item: getattr(part, item) for item in stated}
    if isinstance(values.get("site"), str):
        values["site"] = known_site(values["site"])
    texts = [
        item if item == "members" and not members else f"{item}={identity(value, members)}"
        for item, value in values.items()
    ]
    return f"{name}({', '.join(texts)})"
