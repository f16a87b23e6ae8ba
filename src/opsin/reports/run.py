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
        rows += _change_rows(summary) + _beside_rows(summary) + _head_rows(summary) + _loss_rows(summary)
    rows += _algorithm_rows(summary["algorithm"]) if "algorithm" in summary else []
    rows += _clustering_rows(_by_member(summary["clustering"])) if "clustering" in summary else []
    rows += _variance_rows(_by_member(summary["feature_variance"])) if "feature_variance" in summary else []
    if "wall_time_seconds" in summary:
        rows.append(("time", f"{_duration(summary['wall_time_seconds'])}, {summary['sequences']:,} sequences"))
    rows.append(("files", str(folder)))
    return "\n".join(f"{label:<13} {text}" for label, text in rows)


def _change_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    changes = list(record.get("changes", {}).items())
    name, reading = changes[0] if changes else ("", {})
    if record["onset"] is None:
        return [("phase change", _no_change(record, reading))]
    names = ("onset", "midpoint", "end")
    numbers = [[f"{record[name][key]:,.0f}" for key in ("value", "low", "high")] for name in names]
    width = [max(len(row[i]) for row in numbers) for i in range(3)]
    texts = [
        f"{name:<8}  {value:>{width[0]}}  [{low:>{width[1]}} to {high:>{width[2]}}]"
        for name, (value, low, high) in zip(names, numbers, strict=True)
    ]
    texts[0] += "  training sequences [95 % interval, of this run alone]"
    if len(steps := reading.get("steps", [])) > 1:
        texts.append(
            f"in {len(steps)} steps, midpoints {', '.join(_value_and_interval(step['midpoint']) for step in steps)}"
        )
    if reading.get("trend", "level") != "level":
        texts.append(f"not over by the end; {reading['final']:.3g} {_at_the_end(reading)}")
    if name.rpartition("/")[2] not in ("", "loss"):
        texts.append(f"of {name}")
    return [("" if i else "phase change", text) for i, text in enumerate(texts)]


def _no_change(record: Mapping[str, Any], reading: Mapping[str, Any]) -> str:
    """What the curve did in place of a phase change; a summary of an earlier version does not say."""
    if not reading or (reading["verdict"], reading["trend"]) == ("not by the end", "level"):
        if record["plateau"] is not None:
            plateau = LossScale.of(record).with_unit(f"{record['plateau']:.3f}")
            return f"none: the loss did not lastingly leave its plateau at {plateau}"
        return "none"
    end = f"{reading['final']:.3g} {_at_the_end(reading)}"
    if reading["verdict"] == "not by the end":
        return f"not by the end; {end}"
    return f"none: {_smooth_change(reading)}, which left no plateau that was held; {end}"


def _at_the_end(reading: Mapping[str, Any]) -> str:
    return "at the end" if reading["trend"] == "level" else f"and still {reading['trend']}"


def _smooth_change(reading: Mapping[str, Any]) -> str:
    return "a smooth descent" if reading["direction"] == "fall" else "a smooth rise"


def _value_and_interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:,.0f} [{estimate['low']:,.0f} to {estimate['high']:,.0f}]"


def _beside_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Further measures, side by side: the midpoint of each and its delay against the first."""
    rows = []
    for index, (name, reading) in enumerate(record.get("changes", {}).items()):
        text = (
            _value_and_interval(reading["change"]["midpoint"])
            if reading["change"]
            else _no_change({"plateau": None}, reading)
        )
        delay = record["delays"].get(name)
        later = "" if delay is None else f": delay {delay['sequences']:,.0f}, {delay['ratio']:.3g}x"
        rows.append(("" if index else "measures", f"{name} {text}{later}"))
    return rows if len(rows) > 1 else []


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
    when = "no single rise" if rise is None else _value_and_interval(rise)
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


def _algorithm_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The change of the nearest reference of a model of in-context regression, over members."""
    members, change, pair = found["members"], found["change"], f"{found['after']} than to {found['before']}"
    last = dict.fromkeys(member["nearest"][-1][0] for member in members if member["nearest"])
    texts = [f"{' or '.join(last)} at the end"]
    if change["value"] is None:
        texts.append(f"not lastingly nearer to {pair}, having been farther")
    else:
        interval = (
            "" if change["low"] is None else f" [{change['low']:,.0f} to {change['high']:,.0f}, 95 % over members]"
        )
        texts.append(f"nearer to {pair} from step {change['value']:,.0f} on{interval}")
        texts[-1] += f" in {change['count']} of {len(members)} members" if len(members) > 1 else ""
    explained = ", ".join(f"{member['r_squared']:.3f}" for member in members if member["r_squared"] is not None)
    texts.append(f"R² of its predictions to {found['after']} after all examples: {explained}")
    return [("" if index else "nearest", text) for index, text in enumerate(texts)]


def _by_member(found: Any) -> list[Mapping[str, Any]]:
    """A part of a summary as a list, also where there is one member, of which it holds no list."""
    return list(found) if isinstance(found, list) else [found]


def _clustering_rows(members: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """How many members of a clustering head are solved, and in how many of these clusters came first."""
    solved = [member for member in members if member["solved_at"] is not None]
    first = [row for row in solved if row["clustered_at"] is not None and row["clustered_at"] < row["solved_at"]]
    rows = [("clusters", f"{len(solved)} of {len(members)} solved; clusters came first in {len(first)} of them")]
    for member in solved[:MOST_LISTED]:
        clustered = "none formed" if member["clustered_at"] is None else f"formed at step {member['clustered_at']:,}"
        rows.append(("", f"{clustered}, solved at step {member['solved_at']:,}"))
    if len(solved) > MOST_LISTED:
        rows.append(("", f"and {len(solved) - MOST_LISTED} more, in summary.json"))
    return rows


def _variance_rows(members: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Share of the last layer's variance that each feature explains, for every member."""
    names = list(members[0])
    cells = [tuple(names)]
    for member in members[:MOST_LISTED]:
        cells.append(tuple("-" if (x := member[name][-1]) is None else f"{100 * x:.1f} %" for name in names))
    lines = [("variance", "of the last layer that each feature explains")]
    return [*lines, *(("", line) for line in aligned(cells))]


def _population_rows(members: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    changed = [member["onset"]["value"] for member in members if member["onset"]]
    if not changed:
        rows = [("phase change", f"none in any of {len(members)} members")]
    else:
        span = f"{min(changed):,.0f} to {max(changed):,.0f}"
        rows = [("phase change", f"in {len(changed)} of {len(members)} members, onset from {span} training sequences")]
    for index, member in enumerate(members[:MOST_LISTED]):
        onset, best = member["onset"], member["strongest_heads"][:1]
        when = (
            f"onset {onset['value']:,.0f} [{onset['low']:,.0f} to {onset['high']:,.0f}]" if onset else _shortly(member)
        )
        head = f", strongest head {best[0]} {member['heads'][best[0]]['strength']:.2f}" if best else ""
        loss = "" if member["final_loss"] is None else f", final loss {member['final_loss']:.4f}"
        rows.append((f"  member {index}", when + head + loss))
    if len(members) > MOST_LISTED:
        rows.append(("", f"and {len(members) - MOST_LISTED} more, in summary.json"))
    return rows


def _shortly(member: Mapping[str, Any]) -> str:
    """Why a member has no onset, in a few words."""
    reading: Mapping[str, Any] = next(iter(member.get("changes", {}).values()), {})
    found = _smooth_change(reading) if reading.get("verdict") == "smooth" else "no change"
    return found if reading.get("trend", "level") == "level" else f"{found}, still {reading['trend']}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
