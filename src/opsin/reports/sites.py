"""What `opsin sites` prints: every site, its shape, what may be done to it, and the plan."""

from __future__ import annotations

import re
from itertools import zip_longest
from textwrap import wrap

from opsin.interventions.plan import Plan
from opsin.model.sites import AXES, Site, SiteTable
from opsin.reports.columns import aligned

WIDEST_COLUMN = 30  # characters of a column of the plan, which is wrapped


def sites_report(sites: SiteTable, members: int, batch: int, plan: Plan) -> str:
    """The table that ``opsin sites`` prints: every site, the legend of the axes, and the plan.

    Args:
        sites: all activations of the recipe's model.
        members: M, number of members of the run.
        batch: B, number of sequences in a batch of the task.
        plan: what the recipe's writers do, in order of application.
    """
    rows = [("site", "shape", "meaning", "what may be done to it")]
    rows += [(site.name, _shape(site, members, batch), site.meaning, _reached_by(site)) for site in sites]
    used = [axis for axis in AXES if any(axis in site.axes for site in sites)]
    legend = ", ".join(f"{axis} {AXES[axis]}" for axis in used if axis != "1")
    everywhere = (
        "any: Clamp site=SITE value=NUMBER holds it there; Ablate sites=[SITE] silences it by zero, its mean, "
        "another example (resample) or noise\n"
        "weights: Freeze and Reinitialise heads=[LAYER:HEAD], neurons=[LAYER:NEURON] or weights=[NAME or blocks.LAYER]"
    )
    return "\n".join([*aligned(rows), "", f"axes: {legend}", everywhere, "", *_plan_lines(plan)])


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
