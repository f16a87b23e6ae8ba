"""What a run prints in the terminal when it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsin.objective import LossScale, measures_in
from opsin.reports.columns import aligned

MOST_LISTED = 4  # heads, and members, that the final report names


def final_report(summary: Mapping[str, Any], folder: Path) -> str:
    """The lines printed when a run ends: what changed when, the strongest heads, losses, time, files.

    Args:
        summary: content of ``summary.json``; a part that it lacks (no ``PhaseChange`` callback, no trackers) is left
            out.
        folder: run folder, where the files are.
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
        plateau = LossScale.of(record).with_unit(f"{record['plateau']:.3f}")
        return [("phase change", f"none: the loss did not lastingly leave its plateau at {plateau}")]
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
    texts = [_head(name, record["heads"][name]) for name in formed[:MOST_LISTED]]
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
    scale, measures = LossScale.of(record), measures_in(record)
    shown = [name for name, measure in measures.items() if measure["while_training"]] or list(measures)[:1]
    cells = []
    if record["final_loss"] is not None:
        cells.append((scale.with_unit(f"{record['final_loss']:.4f}"), "training", ""))
    for name, metrics in record["evaluations"].items():
        loss = scale.with_unit(f"{metrics['loss']:.4f}") if "loss" in metrics else ""
        found = [f"{item} {metrics[item]:.3f} {measures[item]['unit']}".rstrip() for item in shown if item in metrics]
        cells.append((loss, f"held out: {name}", "  ".join(found)))
    return [("" if i else "final loss", text) for i, text in enumerate(aligned(cells))]


def _population_rows(members: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    changed = [member["onset"]["value"] for member in members if member["onset"]]
    if not changed:
        rows = [("phase change", f"none in any of {len(members)} members")]
    else:
        span = f"{min(changed):,.0f} to {max(changed):,.0f}"
        rows = [("phase change", f"in {len(changed)} of {len(members)} members, onset from {span} training sequences")]
    for index, member in enumerate(members[:MOST_LISTED]):
        onset, best = member["onset"], member["strongest_heads"][:1]
        when = f"onset {onset['value']:,.0f} [{onset['low']:,.0f} to {onset['high']:,.0f}]" if onset else "no change"
        head = f", strongest head {best[0]} {member['heads'][best[0]]['strength']:.2f}" if best else ""
        loss = "" if member["final_loss"] is None else f", final loss {member['final_loss']:.4f}"
        rows.append((f"  member {index}", when + head + loss))
    if len(members) > MOST_LISTED:
        rows.append(("", f"and {len(members) - MOST_LISTED} more, in summary.json"))
    return rows


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
