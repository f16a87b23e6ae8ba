"""What a population leaves behind when it ends: its files, and its lines in the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from opsin.figures.comparison import comparison_figure
from opsin.figures.critical_period import critical_period_figure
from opsin.figures.grid import grid_figure
from opsin.figures.population import population_figure
from opsin.figures.scaling import scaling_figure
from opsin.figures.style import save_figure
from opsin.objective import LossScale
from opsin.population.folder import merge_metrics, read_population
from opsin.population.order import order_rows
from opsin.population.scaling import scaling_curves
from opsin.population.tables import Row, as_csv, compared_metrics, summarise
from opsin.records.folder import write_atomically
from opsin.records.schema import COMPLETE, DIVERGED, FINISHED_EARLY, SUMMARY_FILE, UNFINISHED
from opsin.reports.columns import aligned

MOST_NAMED_MEMBERS = 4  # members of one status that the report names
STATUS_WORDS = {
    COMPLETE: "trained to the end",
    FINISHED_EARLY: "finished early",
    DIVERGED: "diverged",
    UNFINISHED: "in chunks that have not finished",
}


def finish_population(path: Path) -> dict[str, list[Row]]:
    """Write what a population found, each file replaced at once.

    ``metrics.csv``; ``members.csv``, ``conditions.csv`` and ``differences.csv``; ``summary.json``;
    ``population.png``; ``order.csv`` and ``comparison.png`` of the metrics that are compared,
    ``critical_period.png`` of windows, and ``grid.png`` of a grid; ``scaling.csv`` and ``scaling.png``, power laws of
    compared metrics along the grid's keys of numbers. ``summary.json`` has the rows of every table.

    Args:
        path: folder of the population; members of chunks that have not finished are counted and enter no mean.

    Returns:
        The content of ``summary.json``.

    Raises:
        ConfigError: the folder does not hold what ``population.json`` says.
    """
    population = read_population(path)
    losses = merge_metrics(population)
    summary = summarise(population, losses)
    if losses.compared:
        summary["order"] = order_rows(population, losses.compared)
    curves = scaling_curves(population.crossed, population.compare, summary["members"]) if population.crossed else []
    if curves:
        summary["scaling"] = [curve.row() for curve in curves]
    for name, rows in summary.items():
        write_atomically(path / f"{name}.csv", as_csv(rows))
    write_atomically(path / SUMMARY_FILE, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    save_figure(population_figure(losses, summary), path / "population.png")
    if losses.compared:
        save_figure(comparison_figure(losses.compared, summary), path / "comparison.png")
    if population.windows:
        save_figure(critical_period_figure(population.windows, summary, population.scale), path / "critical_period.png")
    if population.crossed:
        save_figure(grid_figure(population.crossed, summary, population.scale), path / "grid.png")
    if curves:
        save_figure(scaling_figure(curves), path / "scaling.png")
    return summary


def population_report(summary: Mapping[str, Sequence[Row]], folder: Path, scale: LossScale) -> str:
    """The lines printed when a population ends: its members, every condition, the differences from the first, files.

    Args:
        summary: rows of the tables by name of the table, as ``finish_population`` returns them.
        folder: folder of the population, where its files are.
        scale: unit of the losses, and where they end.
    """
    rows, final_loss = _member_lines(summary["members"]), f"final loss, {scale.unit}".rstrip(", ")
    rows += _condition_lines(summary["conditions"], final_loss)
    rows += _order_lines(summary.get("order", ()))
    rows += _scaling_lines(summary.get("scaling", ()))
    rows += _difference_lines(summary, final_loss)
    rows.append(("files", str(folder)))
    return "\n".join(f"{label:<13} {text}" for label, text in rows)


def _member_lines(members: Sequence[Row]) -> list[tuple[str, str]]:
    conditions = len({row["condition"] for row in members})
    rows = [("population", f"{_count(len(members), 'member')} of {_count(conditions, 'condition')}")]
    for status, words in STATUS_WORDS.items():
        ended = [row for row in members if row["status"] == status]
        if status == COMPLETE or not ended:
            continue
        names = [f"{row['condition']} seed {row['seed']}{_stopped(row)}" for row in ended[:MOST_NAMED_MEMBERS]]
        more = [f"and {len(ended) - MOST_NAMED_MEMBERS} more"] if len(ended) > MOST_NAMED_MEMBERS else []
        rows.append(("", f"{len(ended)} {words}: {', '.join(names + more)}"))
    return rows


def _stopped(row: Row) -> str:
    return "" if row["stopped_at"] is None else f" at step {row['stopped_at']:,}"


def _condition_lines(conditions: Sequence[Row], final_loss: str) -> list[tuple[str, str]]:
    cells = [("condition", "formed", "onset, sequences", "below half the plateau", final_loss)]
    for row in conditions:
        cells.append(
            (
                row["condition"],
                f"{row['formed']} of {row['members']}{_without_onset(row)}",
                _interval(row, "onset", ",.0f"),
                _interval(row, "below_half", ",.0f"),
                _interval(row, "final_loss", ".4f"),
            )
        )
    lines = [("conditions", "means over seeds [95 % interval]"), *(("", line) for line in aligned(cells))]
    if not (compared := compared_metrics(conditions)):
        return lines
    found = [(row["condition"], *(_interval(row, name, ".4f") for name in compared)) for row in conditions]
    return [*lines, ("", "last values"), *(("", line) for line in aligned([("condition", *compared), *found]))]


def _order_lines(order: Sequence[Row]) -> list[tuple[str, str]]:
    """When each compared metric had gone half of its way, the earliest first within a condition."""
    if not any(row["changed"] or row["formed"] for row in order):
        return []
    cells = [("condition", "metric", "changed", "half way, sequences", "onset, sequences")]
    for condition in dict.fromkeys(row["condition"] for row in order):
        rows = [row for row in order if row["condition"] == condition]
        for row in sorted(rows, key=lambda row: math.inf if row["halfway"] is None else row["halfway"]):
            times = (_interval(row, "halfway", ",.0f"), _interval(row, "onset", ",.0f"))
            cells.append((condition, row["metric"], f"{row['changed']} of {row['members']}", *times))
    return [("order", "means over seeds [95 % interval]"), *(("", line) for line in aligned(cells))]


def _scaling_lines(scaling: Sequence[Row]) -> list[tuple[str, str]]:
    """The exponent of every metric along every key of the grid."""
    if not scaling:
        return []
    cells = [("metric", "along", "at", "exponent")]
    for row in scaling:
        cells.append((row["metric"], row["key"], row["fixed"], _interval(row, "exponent", ".3f", "low", "high")))
    return [("scaling", "power laws over seeds [95 % interval]"), *(("", line) for line in aligned(cells))]


def _without_onset(row: Row) -> str:
    """Why members of a condition have no onset, where the reason is not that nothing formed."""
    reasons = {"no_plateau": "without a plateau", "diverged": "diverged", "unfinished": "unfinished"}
    return "".join(f", {row[name]} {reason}" for name, reason in reasons.items() if row[name])


def _difference_lines(summary: Mapping[str, Sequence[Row]], final_loss: str) -> list[tuple[str, str]]:
    if len(summary["conditions"]) < 2:
        return []
    first = summary["conditions"][0]["condition"]
    rows = [row for row in summary["differences"] if row["against"] == first]
    compared = compared_metrics(summary["conditions"])
    shown = {"onset": ("onset, sequences", "+,.0f"), "below_half": ("below half the plateau", "+,.0f")}
    shown |= {"final_loss": (final_loss, "+.4f")} | {name: (name, "+.4f") for name in compared}
    cells = [("condition", *(heading for heading, _ in shown.values()))]
    for condition in dict.fromkeys(row["condition"] for row in rows):
        by_quantity = {row["quantity"]: row for row in rows if row["condition"] == condition}
        cells.append((condition, *(_difference(by_quantity[name], style) for name, (_, style) in shown.items())))
    heading = f"from {first}, paired by seed [95 % bootstrap interval]"
    return [("differences", heading), *(("", line) for line in aligned(cells))]


def _difference(row: Row, style: str) -> str:
    if not row["formed_pairs"]:
        return f"none of {_count(row['pairs'], 'pair')}"
    text = _interval(row, "difference", style, "low", "high")
    return text if row["formed_pairs"] == row["pairs"] else f"{text} ({row['formed_pairs']} of {row['pairs']} pairs)"


def _interval(row: Row, name: str, style: str, low: str | None = None, high: str | None = None) -> str:
    value, low, high = (row[key] for key in (name, low or f"{name}_low", high or f"{name}_high"))
    if value is None:
        return "-"
    return f"{value:{style}}" + ("" if low is None else f" [{low:{style}} to {high:{style}}]")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
