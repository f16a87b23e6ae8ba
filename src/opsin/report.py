"""What a run says in the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import Any

from opsin.plan import Plan
from opsin.sites import AXES, Site, SiteTable

MOST_NAMED = 4  # heads, and members, that the final report names
WIDEST = 30  # characters of a column of the plan, which is wrapped


# ---- the end of a run -----------------------------------------------------------------------------


def final_report(summary: Mapping[str, Any], folder: Path) -> str:
    """The lines printed when a run ends: what changed when, the strongest heads, losses, time, files.

    Args:
        summary: of the run; a part that it lacks (no ``PhaseChange`` callback, no trackers) is left out.
        folder: of the run.
    """
    rows: list[tuple[str, str]] = []
    if "members" in summary:
        rows += _population_rows(summary["members"]) if "onset" in summary["members"][0] else []
    elif "onset" in summary:
        rows += _change_rows(summary) + _head_rows(summary) + _loss_rows(summary)
    if "wall_time_seconds" in summary:
        rows.append(("time", f"{_duration(summary['wall_time_seconds'])}, {summary['sequences']:,} sequences"))
    rows.append(("files", str(folder)))
    return "\n".join(f"{label:<13} {text}" for label, text in rows)


def _change_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    if record["onset"] is None:
        return [("phase change", f"none: the loss did not lastingly leave its plateau at {record['plateau']:.3f} nats")]
    names = ("onset", "midpoint", "end")
    numbers = [[f"{record[name][key]:,.0f}" for key in ("value", "low", "high")] for name in names]
    width = [max(len(row[i]) for row in numbers) for i in range(3)]
    texts = [
        f"{name:<8}  {value:>{width[0]}}  [{low:>{width[1]}} to {high:>{width[2]}}]"
        for name, (value, low, high) in zip(names, numbers, strict=True)
    ]
    texts[0] += "  training sequences [95 % interval]"
    return list(zip(("phase change", "", ""), texts, strict=True))


def _head_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not record["heads"]:
        return []
    formed = record["strongest_heads"]
    if not formed:
        name = max(record["heads"], key=lambda head: record["heads"][head]["strength"])
        return [
            ("heads", f"none formed; strongest {name} with induction strength {record['heads'][name]['strength']:.2f}")
        ]
    texts = [_head(name, record["heads"][name]) for name in formed[:MOST_NAMED]]
    texts[0] += "  layer:head, final induction strength, midpoint of its rise"
    rest = len(formed) - len(texts)
    if rest:
        texts.append(f"and {rest} more")
    return [("heads" if i == 0 else "", text) for i, text in enumerate(texts)]


def _head(name: str, head: Mapping[str, Any]) -> str:
    rise = head["midpoint"]
    when = "no single rise" if rise is None else f"{rise['value']:,.0f} [{rise['low']:,.0f} to {rise['high']:,.0f}]"
    return f"{name:<6} {head['strength']:.2f}  {when}"


def _loss_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    cells = []
    if record["final_loss"] is not None:
        cells.append((f"{record['final_loss']:.4f} nats", "training", ""))
    for name, metrics in record["evaluations"].items():
        loss = f"{metrics['loss']:.4f} nats" if "loss" in metrics else ""
        accuracy = f"accuracy {metrics['accuracy']:.3f}" if "accuracy" in metrics else ""
        cells.append((loss, f"held out: {name}", accuracy))
    return [("" if i else "final loss", text) for i, text in enumerate(aligned(cells))]


def _population_rows(members: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    changed = [member["onset"]["value"] for member in members if member["onset"]]
    if not changed:
        rows = [("phase change", f"none in any of {len(members)} members")]
    else:
        span = f"{min(changed):,.0f} to {max(changed):,.0f}"
        rows = [("phase change", f"in {len(changed)} of {len(members)} members, onset from {span} training sequences")]
    for index, member in enumerate(members[:MOST_NAMED]):
        onset, best = member["onset"], member["strongest_heads"][:1]
        when = f"onset {onset['value']:,.0f} [{onset['low']:,.0f} to {onset['high']:,.0f}]" if onset else "no change"
        head = f", strongest head {best[0]} {member['heads'][best[0]]['strength']:.2f}" if best else ""
        loss = "" if member["final_loss"] is None else f", final loss {member['final_loss']:.4f}"
        rows.append((f"  member {index}", when + head + loss))
    if len(members) > MOST_NAMED:
        rows.append(("", f"and {len(members) - MOST_NAMED} more, in summary.json"))
    return rows


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


# ---- opsin sites ----------------------------------------------------------------------------------


def sites_report(sites: SiteTable, members: int, batch: int, plan: Plan) -> str:
    """The table that ``opsin sites`` prints: every site, the legend of the axes, and the plan.

    Args:
        members: M of the run.
        batch: B of the task.
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
    """Callbacks, and the arguments of theirs that mean this site without naming it."""
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
        rows += zip_longest([str(number)], *(wrap(text, WIDEST) for text in plain.values()), fillvalue="")
    return [f"plan {plan.digest()}, in order of application:", *aligned(rows)]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines whose columns start below each other."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
