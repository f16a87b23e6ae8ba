"""What `opsin sites` prints: every site and every parameter, its shape, what may be done to it, and the plan."""

from __future__ import annotations

import re
from itertools import zip_longest
from textwrap import wrap

from opsin.interventions.plan import Plan
from opsin.model.parameters import WEIGHT_AXES, NamedWeight
from opsin.model.sites import AXES, Site, SiteTable
from opsin.reports.columns import aligned

WIDEST_COLUMN = 30  # characters of a column of the plan, which is wrapped


def sites_report(sites: SiteTable, members: int, batch: int, plan: Plan) -> str:
    """The table that ``opsin sites`` prints: every site and parameter, the legend of the axes, and the plan.

    Args:
        sites: all activations and weights of the recipe's model.
        members: M, number of members of the run.
        batch: B, number of sequences in a batch of the task.
        plan: what the recipe's writers do, in order of application.
    """
    rows = [("site", "shape", "meaning", "what may be done to it")]
    rows += [(site.name, _shape(site, members, batch), site.meaning, _reached_by(site)) for site in sites]
    letters = {axis for site in sites for axis in site.axes} | {axis for named in _named(sites) for axis in named.axes}
    legend = ", ".join(f"{axis} {word}" for axis, word in {**AXES, **WEIGHT_AXES}.items() if axis in letters - {"1"})
    everywhere = (
        "any: Clamp site=SITE value=NUMBER holds it there; Ablate sites=[SITE] silences it by zero, its mean, "
        "another example (resample) or noise\n"
        "weights: Freeze and Reinitialise heads=[LAYER:HEAD], neurons=[LAYER:NEURON] or weights=[NAME or blocks.LAYER]"
    )
    parameters = [] if not sites.weights.parameters else [*aligned(_parameter_rows(sites, members)), ""]
    return "\n".join([*aligned(rows), "", *parameters, f"axes: {legend}", everywhere, "", *_plan_lines(plan)])


def _named(sites: SiteTable) -> list[NamedWeight]:
    """Every weight as it is reached: a parameter that holds several side by side is not shown beside them."""
    weights = sites.weights.weights
    packed = {named.parameter for named in weights.values() if named.before or named.after}
    return [named for name, named in weights.items() if name not in packed]


def _parameter_rows(sites: SiteTable, members: int) -> list[tuple[str, ...]]:
    """One line per weight: name, shape, part of the model, what it starts from, and whether it is trained."""
    kinds = {parameter.name: parameter for parameter in sites.weights}
    rows: list[tuple[str, ...]] = [("parameter", "shape", "part", "starts from", "trained")]
    for named in _named(sites):
        stored = kinds[named.parameter]
        sizes = ", ".join(f"{size} {axis}" for size, axis in zip(named.shape, named.axes, strict=True))
        held = "yes" if stored.trained else "no"
        shape, whole = f"[{members} M, {sizes}]", named.name == named.parameter or named.before or named.after
        rows.append((named.name, shape, stored.kind, str(stored.initial) if whole else named.parameter, held))
    return rows


def _shape(site: Site, members: int, batch: int) -> str:
    sizes = zip(site.axes, site.shape(members, batch), strict=True)
    return "[" + ", ".join("1" if axis == "1" else f"{size} {axis}" for axis, size in sizes) + "]"


def _reached_by(site: Site) -> str:
    """Callbacks, and their arguments, that mean this site without naming it."""
    special = {
        "attn.hook_v": ", Ablate heads (zero), Preserve",
        "attn.hook_rot_q": ", Preserve",
        "attn.hook_rot_k": ", Preserve",
        "attn.hook_z": ", Ablate heads (all but zero)",
        "attn.hook_attn_scores": ", Disallow, HeadTemperature",
        "attn.hook_pattern": ", Clamp pattern, Preserve",
        "mlp.hook_pre": ", Ablate, Clamp neurons (at pre)",
        "mlp.hook_post": ", Ablate, Clamp neurons",
        "hook_logits": ", CopyFromPattern",
    }
    return "any" + next((text for ending, text in special.items() if site.name.endswith(ending)), "")


def _plan_lines(plan: Plan) -> list[str]:
    described = plan.describe()
    if not described:
        return [f"plan {plan.digest()}: no interventions"]
    rows = [("", *described[0])]
    for number, row in enumerate(described, 1):
        # the value's gradient rule has a column of its own
        plain = {**row, "value": re.sub(r",? ?gradient='\w+'", "", row["value"]).removesuffix("()")}
        rows += zip_longest([str(number)], *(wrap(text, WIDEST_COLUMN) for text in plain.values()), fillvalue="")
    return [f"plan {plan.digest()}, in order of application:", *aligned(rows)]
