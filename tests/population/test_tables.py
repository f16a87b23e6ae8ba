"""Claims about what a population's end writes: tables with known numbers, in which nothing vanishes."""

from __future__ import annotations

import hashlib
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from opsin.errors import ConfigError
from opsin.metrics.compare import bootstrap_interval, mean_interval
from opsin.objective import LogCrossEntropy, LossScale, SquaredError
from opsin.population.folder import merge_metrics, read_population
from opsin.population.tables import summarise
from opsin.records.folder import RunFolder
from opsin.records.history import History
from opsin.records.table import history_from_table
from opsin.reports.population import finish_population, population_report
from tests.helpers.populations import PLATEAU, fall, nan_after, onset_of, record, write_population

NATS = LossScale("nats", 0.0)
ONSETS = {"none": (6000.0, 6500.0, 5500.0), "copy": (4000.0, 4600.0, 3300.0)}
MEMBERS = [(condition, seed) for condition in ONSETS for seed in (1, 2, 3)]
RECORDS = [record(onset) for onsets in ONSETS.values() for onset in onsets]
DIVERGED = record(None, math.nan, status="diverged", stopped_at=900)


@pytest.fixture
def tables(tmp_path):
    """Members and records -> the three tables; the folder is at ``tables.path``."""

    def made(members=MEMBERS, records=RECORDS, losses=None, **settings):
        made.path = write_population(tmp_path / "run", members, records, losses, **settings)
        population = read_population(made.path)
        return summarise(population, merge_metrics(population))

    return made


def row(rows, **which):
    (found,) = [row for row in rows if all(row[name] == value for name, value in which.items())]
    return found


# ---- members --------------------------------------------------------------------------------------


def test_a_members_row_says_what_its_chunk_found(tables):
    found = row(tables()["members"], member=4)
    assert (found["condition"], found["seed"], found["status"], found["outcome"]) == ("copy", 2, "complete", "formed")
    assert (found["onset"], found["onset_low"], found["onset_high"]) == (4600, 4100, 5100)
    assert (found["midpoint"], found["end"]) == pytest.approx((5520, 6900))
    assert (found["plateau"], found["final_loss"]) == (PLATEAU, 0.01)
    assert (found["strongest_head"], found["strongest_strength"]) == ("1:2", 0.9)


def test_below_half_and_the_mean_loss_come_from_the_members_own_curve(tables):
    found = row(tables()["members"], member=4)
    # the made curve is half-way at 1.2 onsets, and samples are 200 sequences apart
    assert 5520 <= found["below_half"] <= 5720
    x = np.arange(20, 2001, 20) * 10.0
    area = np.trapezoid(fall(4600.0)(x).astype(np.float32), x)
    assert found["mean_loss"] == pytest.approx(area / (x[-1] - x[0]), rel=1e-6)


def test_a_chunk_of_one_member_has_its_fields_at_the_top(tables):
    assert tables(per_chunk=1)["members"] == tables()["members"]


def test_a_member_that_descended_smoothly_had_no_plateau_whatever_level_is_named(tables):
    smooth, flat = ({"train/accuracy": {"verdict": verdict}} for verdict in ("smooth", "not by the end"))
    changed = [record(None, 0.6, changes=smooth), record(None, 0.6, changes=smooth, plateau=None)]
    changed += [record(None, 0.6, changes=flat, plateau=None), record(None, 0.6, plateau=None)]
    found = tables(records=[*changed, *RECORDS[4:]])
    outcomes = [row["outcome"] for row in found["members"]]
    assert outcomes == ["no plateau", "no plateau", "not formed", None, "formed", "formed"]


def test_a_member_without_any_plateau_that_came_near_the_lowest_loss_is_not_called_unformed(tables):
    flat = {"train/accuracy": {"verdict": "not by the end"}}
    # the first loss is 0.7: 0.02 is nearly all of the way to 0, and 0.2 is not
    learned, unlearned = (record(None, final, changes=flat, plateau=None) for final in (0.02, 0.2))
    found = tables(records=[learned, unlearned, *RECORDS[2:]], losses=[fall(3000.0)] * 6)
    assert [row["outcome"] for row in found["members"]] == ["no plateau", "not formed", *["formed"] * 4]


def test_a_diverged_member_is_counted_and_enters_no_mean(tables):
    records = [*RECORDS[:5], DIVERGED]
    losses = [fall(onset_of(record)) for record in records[:5]]
    found = tables(records=records, losses=[*losses, nan_after(fall(None, 0.7), 9000)])
    member, condition = row(found["members"], member=5), row(found["conditions"], condition="copy")
    assert (member["status"], member["stopped_at"], member["outcome"]) == ("diverged", 900, None)
    assert member["final_loss"] is member["mean_loss"] is member["strongest_strength"] is None
    assert (condition["members"], condition["formed"], condition["diverged"]) == (3, 2, 1)
    assert condition["onset"] == pytest.approx(4300)
    # its loss was still high: a mean that held it would be far off
    assert condition["final_loss"] == pytest.approx(0.01) and condition["mean_loss"] < 0.25
    compared = row(found["differences"], quantity="final_loss")
    assert (compared["pairs"], compared["formed_pairs"]) == (2, 2)


def test_a_diverged_member_does_not_change_the_others(tables):
    whole = tables()
    broken = tables(records=[*RECORDS[:5], DIVERGED], losses=[fall(v) for vs in ONSETS.values() for v in vs])
    assert broken["members"][:5] == whole["members"][:5]
    assert broken["conditions"][0] == whole["conditions"][0]


def test_a_member_that_finished_early_is_held_at_its_final_loss(tables):
    early = record(4600.0, 0.02, status="finished early", stopped_at=1000)
    losses = [fall(v) for vs in ONSETS.values() for v in vs]
    losses[4] = nan_after(fall(4600.0), 10_000)
    found = tables(records=[*RECORDS[:4], early, RECORDS[5]], losses=losses)
    x = np.arange(20, 2001, 20) * 10.0
    y = np.where(x < 10_000, fall(4600.0)(x), 0.02)
    member = row(found["members"], member=4)
    assert member["mean_loss"] == pytest.approx(np.trapezoid(y, x) / (x[-1] - x[0]), rel=1e-5)
    assert (member["outcome"], row(found["differences"], quantity="onset")["formed_pairs"]) == ("formed", 3)


def test_members_of_a_chunk_without_a_summary_are_unfinished(tables):
    found = tables(records=[*RECORDS[:5], None])
    assert [row["status"] for row in found["members"]] == ["complete"] * 3 + ["unfinished"] * 3
    assert row(found["conditions"], condition="copy")["unfinished"] == 3
    assert row(found["differences"], quantity="onset")["pairs"] == 0


def test_without_a_phase_change_callback_the_tables_hold_what_there_is(tables):
    found = tables(records=[{"sequences": 20_000}] * 6)
    assert {row["outcome"] for row in found["members"]} == {None}
    assert all(row["onset"] is row["final_loss"] is None for row in found["conditions"])
    assert all(row["mean_loss"] is not None for row in found["conditions"])


# ---- conditions and differences -------------------------------------------------------------------


def test_a_conditions_row_is_the_mean_and_interval_of_its_members(tables):
    found = row(tables()["conditions"], condition="copy")
    expected = mean_interval(ONSETS["copy"])
    assert (found["onset"], found["onset_low"], found["onset_high"]) == (expected.value, expected.low, expected.high)
    assert (found["members"], found["formed"], found["no_plateau"], found["not_formed"]) == (3, 3, 0, 0)


def test_a_difference_is_that_of_members_with_the_same_seed(tables):
    members = [*MEMBERS[:3], ("copy", 3), ("copy", 1), ("copy", 2)]
    found = row(tables(members=members)["differences"], quantity="onset")
    expected = bootstrap_interval([4600 - 6000, 3300 - 6500, 4000 - 5500])
    assert (found["condition"], found["against"], found["formed_pairs"]) == ("copy", "none", 3)
    assert (found["difference"], found["low"], found["high"]) == (expected.value, expected.low, expected.high)


def test_an_onset_that_did_not_happen_is_counted_on_its_side(tables):
    records = [RECORDS[0], record(None, 0.69), record(None, 0.69), RECORDS[3], RECORDS[4], record(None, 0.69)]
    found = tables(records=records)
    compared = row(found["differences"], quantity="onset")
    names = ("pairs", "formed_pairs", "only_condition", "only_against", "neither")
    assert [compared[name] for name in names] == [3, 1, 1, 0, 1]
    assert (compared["difference"], compared["low"]) == (-2000, None)
    assert [row["not_formed"] for row in found["conditions"]] == [2, 1]


def test_where_no_member_formed_the_comparison_stays_and_says_so(tables):
    found = tables(records=[record(None, 0.69)] * 6)
    compared = row(found["differences"], quantity="onset")
    assert (compared["formed_pairs"], compared["neither"], compared["difference"]) == (0, 3, None)
    assert [row["formed"] for row in found["conditions"]] == [0, 0]


def test_a_condition_whose_loss_fell_at_once_is_compared_by_when_it_fell(tables):
    losses = [fall(v) for v in ONSETS["none"]] + [lambda x: 0.01 + 0.69 * np.exp(-x / 300)] * 3
    found = tables(records=[*RECORDS[:3], *[record(None)] * 3], losses=losses)
    assert row(found["conditions"], condition="copy")["no_plateau"] == 3
    onset, below = (row(found["differences"], quantity=name) for name in ("onset", "below_half"))
    assert (onset["only_against"], onset["no_plateau"], onset["difference"]) == (3, 3, None)
    assert below["formed_pairs"] == 3 and below["high"] < 0


def test_one_seed_has_means_and_no_intervals(tables):
    found = tables([("none", 7), ("copy", 7)], [record(6000.0), record(4000.0)])
    assert [(row["onset"], row["onset_low"]) for row in found["conditions"]] == [(6000, None), (4000, None)]
    compared = row(found["differences"], quantity="onset")
    assert (compared["difference"], compared["low"], compared["high"]) == (-2000, None, None)


def test_the_order_of_the_members_and_their_chunks_do_not_matter(tables):
    whole = tables()
    order = np.random.default_rng(0).permutation(6).tolist()
    names = ["none", "copy"]
    shuffled = tables([MEMBERS[i] for i in order], [RECORDS[i] for i in order], conditions=names, per_chunk=2)
    assert (shuffled["conditions"], shuffled["differences"]) == (whole["conditions"], whole["differences"])


@pytest.mark.parametrize(("conditions", "pairs"), [(4, 6), (8, 7)])
def test_few_conditions_are_compared_each_with_each_and_many_with_the_first(tables, conditions, pairs):
    members = [(f"c{i}", seed) for i in range(conditions) for seed in (0, 1)]
    found = tables(members, [record(6000.0)] * len(members))["differences"]
    compared = [(row["condition"], row["against"]) for row in found if row["quantity"] == "onset"]
    assert len(compared) == len(set(compared)) == pairs
    assert compared[0] == ("c1", "c0")


# ---- the merged table -----------------------------------------------------------------------------


def concatenated(path) -> pd.DataFrame:
    members = pd.DataFrame(json.loads((path / "population.json").read_text())["members"])
    frames = []
    for chunk in sorted(members["chunk"].unique()):
        frame = pd.read_csv(path / "chunks" / f"{chunk:02d}" / "metrics.csv")
        number = members[members["chunk"] == chunk].set_index("slot")["member"]
        frames.append(frame.assign(member=frame["member"].map(number)))
    return pd.concat(frames, ignore_index=True)


def test_the_merged_table_is_what_pandas_would_concatenate(tables):
    tables(per_chunk=4, losses=[nan_after(fall(6000.0), 3000), *[fall(5000.0)] * 5])
    pd.testing.assert_frame_equal(pd.read_csv(tables.path / "metrics.csv"), concatenated(tables.path))


def with_norms(folder: Path, axis: str) -> None:
    """Give a chunk's table a column for an axis, and a metric of two numbers a member that has it."""
    table = folder / "metrics.csv"
    mark = {"bytes": table.stat().st_size, "sha256": hashlib.sha256(table.read_bytes()).hexdigest()}
    history = History(10)
    history.load_state_dict(history_from_table(table, mark["bytes"], mark["sha256"]))
    history.declare("norm", {axis: 2})
    members = len(history["train/loss"].values[0])
    history.record("norm", 2000, np.arange(members * 2.0).reshape(members, 2))
    history.keep_in(RunFolder(folder))


def test_chunks_with_different_axes_become_one_table_with_the_columns_of_all(tables):
    tables(per_chunk=2)
    with_norms(tables.path / "chunks/02", "position")
    with_norms(tables.path / "chunks/01", "concept")
    merge_metrics(read_population(tables.path))
    merged = pd.read_csv(tables.path / "metrics.csv")
    assert [*merged.columns[3:]] == ["member", "layer", "head", "position", "concept", "value"]
    pd.testing.assert_frame_equal(merged, concatenated(tables.path)[merged.columns])
    norms = merged[merged.metric == "norm"].set_index("member").sort_index()
    assert norms.value.tolist() == [0, 1, 2, 3] * 2 and norms.index.tolist() == [2, 2, 3, 3, 4, 4, 5, 5]
    assert norms.concept.dropna().tolist() == norms.position.dropna().tolist() == [0, 1, 0, 1]


def test_the_half_line_of_a_killed_chunk_is_dropped(tables):
    tables()
    before = (tables.path / "metrics.csv").read_text()
    with (tables.path / "chunks/01/metrics.csv").open("a") as file:
        file.write("2020,20200,train/lo")
    merge_metrics(read_population(tables.path))
    assert (tables.path / "metrics.csv").read_text() == before


def test_merging_does_not_hold_the_tables(tables):
    tables()
    table = tables.path / "chunks/00/metrics.csv"
    with table.open("a") as file:
        file.writelines(f"{step},{step * 10},train/accuracy,0,,,0.12345678901234567\n" for step in range(40_000))
    population = read_population(tables.path)
    tracemalloc.start()
    merge_metrics(population)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.25 * table.stat().st_size


@pytest.mark.parametrize(
    ("text", "what"),
    [("20,200,train/loss,9,,,0.5\n", "9"), ("step,value\n1,2\n", "columns")],
)
def test_a_chunks_table_that_does_not_fit_is_named(tables, text, what):
    tables()
    table = tables.path / "chunks/01/metrics.csv"
    table.write_text(table.read_text() + text if text[0].isdigit() else text)
    with pytest.raises(ConfigError, match=what) as error:
        merge_metrics(read_population(tables.path))
    assert "chunks/01" in str(error.value)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: c["members"][0].update(member=9), "each number from 0 once"),
        (lambda c: c["members"][0].update(seed=2), "one member of each condition and seed"),
        (lambda c: c["members"][0].update(condition="other"), "one of none, copy"),
        (lambda c: c["members"][0].update(slot=7), "a slot from 0 to 2"),
    ],
)
def test_a_population_that_contradicts_itself_is_refused(tables, change, what):
    tables()
    file = tables.path / "population.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=what):
        read_population(tables.path)


def test_an_unknown_status_is_refused(tables):
    with pytest.raises(ConfigError, match="got 'asleep'"):
        tables(records=[*RECORDS[:5], record(None, status="asleep")])


# ---- files and report -----------------------------------------------------------------------------


def test_the_files_hold_the_same_as_the_summary_and_no_other_file_stays(tmp_path):
    path = write_population(tmp_path / "run", MEMBERS, [*RECORDS[:5], DIVERGED])
    summary = finish_population(path)
    assert json.loads((path / "summary.json").read_text(), parse_constant=pytest.fail) == summary
    for name, rows in summary.items():
        written = pd.read_csv(path / f"{name}.csv", keep_default_na=False, na_values=[""])
        pd.testing.assert_frame_equal(written, pd.DataFrame(rows), check_dtype=False)
    assert {file.name for file in path.iterdir()} == {
        *("population.json", "chunks", "metrics.csv", "members.csv", "conditions.csv", "differences.csv"),
        *("summary.json", "population.png"),
    }


def test_a_grid_of_windows_has_its_map_beside_the_picture(tmp_path):
    grid = {"none": None, "copy": {"start": 0, "length": 500}}
    path = write_population(tmp_path / "run", MEMBERS, RECORDS, grid=grid)
    finish_population(path)
    assert (path / "critical_period.png").exists()


def test_a_population_of_which_nothing_was_trained_is_written_all_the_same(tmp_path):
    path = write_population(tmp_path / "run", MEMBERS, [None] * 6)
    for chunk in (path / "chunks").iterdir():
        (chunk / "metrics.csv").unlink()
    summary = finish_population(path)
    assert {row["status"] for row in summary["members"]} == {"unfinished"}
    assert "6 in chunks that have not finished" in population_report(summary, path, NATS)


def test_the_report_says_what_was_found_with_its_intervals_and_what_is_missing(tmp_path):
    path = write_population(tmp_path / "run", MEMBERS, [*RECORDS[:5], DIVERGED])
    lines = population_report(finish_population(path), path, NATS).splitlines()
    assert lines[0] == "population    6 members of 2 conditions"
    assert "1 diverged: copy seed 3 at step 900" in lines[1]
    low, high = (f"{getattr(mean_interval(ONSETS['none']), end):,.0f}" for end in ("low", "high"))
    assert any(f"none       3 of 3              6,000 [{low} to {high}]" in line for line in lines)
    assert any("copy       2 of 3, 1 diverged" in line for line in lines)
    assert any("-1,950 [" in line for line in lines if line.strip().startswith("copy"))
    assert lines[-1].endswith(str(path))


def test_the_last_value_of_a_metric_is_compared_where_the_recipe_asks_for_it(tmp_path):
    values = [[9.0] * 6, [1.0, 2.0, 3.0, 1.5, 2.25, 5.0], [1.0, 2.0, 4.0, 1.5, 2.25, math.nan]]
    path = write_population(tmp_path / "run", MEMBERS, RECORDS, compare={"calibration/ece": values})
    summary = finish_population(path)
    assert [entry["calibration/ece"] for entry in summary["members"]] == [1.0, 2.0, 4.0, 1.5, 2.25, None]
    none, copy = summary["conditions"]
    assert none["calibration/ece"] == pytest.approx(7 / 3) and copy["calibration/ece"] == 1.875
    assert none["calibration/ece_low"] == mean_interval([1.0, 2.0, 4.0]).low
    found = row(summary["differences"], condition="copy", quantity="calibration/ece")
    assert (found["difference"], found["formed_pairs"], found["only_against"]) == (0.375, 2, 1)
    lines = population_report(summary, path, NATS).splitlines()
    assert sum("calibration/ece" in line for line in lines) == 2
    assert any(line.split()[:2] == ["copy", "1.8750"] for line in lines)
    assert any("+0.3750" in line and "(2 of 3 pairs)" in line for line in lines)


def test_of_a_member_that_ended_early_the_last_number_is_compared(tmp_path):
    records = [record(6000.0, status="finished early", stopped_at=1), *RECORDS[1:]]
    values = [[1.0] * 6, [2.0] * 6, [math.nan, *[3.0] * 5]]
    summary = finish_population(
        write_population(tmp_path / "run", MEMBERS, records, compare={"train/accuracy": values})
    )
    assert [entry["train/accuracy"] for entry in summary["members"]] == [2.0, *[3.0] * 5]


def test_members_whose_records_are_at_other_sequences_have_a_mean_loss_of_their_own(tables):
    flat = [lambda x, level=level: np.where(x % 400 == 0, level, math.nan) for level in (1.0, 2.0)]
    every = [lambda x, level=level: np.full(len(x), level) for level in (3.0, 4.0, 5.0, 6.0)]
    members = tables(losses=[*flat, *every])["members"]
    assert [entry["mean_loss"] for entry in members] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_a_metric_that_no_member_recorded_is_compared_to_nothing(tmp_path):
    path = write_population(tmp_path / "run", MEMBERS, RECORDS, compare={"val/train/loss": []})
    summary = finish_population(path)
    assert {entry["val/train/loss"] for entry in summary["members"]} == {None}
    assert "none of 3 pairs" in population_report(summary, path, NATS)


def test_a_diverged_member_s_last_value_enters_no_mean(tmp_path):
    path = write_population(tmp_path / "run", MEMBERS, [*RECORDS[:5], DIVERGED], compare={"x": [[1.0] * 5 + [7.0]]})
    summary = finish_population(path)
    assert summary["members"][5]["x"] is None and row(summary["conditions"], condition="copy")["x"] == 1.0


def test_losses_are_told_in_the_unit_of_the_objective(tmp_path):
    described = [SquaredError(unit="m^2").describe()]
    path = write_population(tmp_path / "run", MEMBERS, RECORDS, objectives=described)
    scale = read_population(path).scale
    assert scale == LossScale("m^2", 0.0)
    assert "final loss, m^2" in population_report(finish_population(path), path, scale)
    # nobody knows how to read the losses of two objectives side by side
    mixed = write_population(tmp_path / "b", MEMBERS, RECORDS, objectives=[*described, LogCrossEntropy().describe()])
    assert read_population(mixed).scale == LossScale("", None)
    report = population_report(finish_population(mixed), mixed, read_population(mixed).scale)
    assert "final loss" in report and "final loss," not in report


def test_a_loss_without_a_lower_bound_has_no_half_and_its_interval_no_floor(tmp_path):
    records = [record(6000.0, final) for final in (-5.0, 0.5, -9.0)]
    path = write_population(tmp_path, MEMBERS[:3], records, objectives=[LogCrossEntropy().describe()])
    summary = finish_population(path)
    assert [entry["below_half"] for entry in summary["members"]] == [None] * 3
    assert summary["conditions"][0]["final_loss_low"] < -9 < summary["conditions"][0]["final_loss"]
    assert [entry["outcome"] for entry in summary["members"]] == ["formed"] * 3


def test_the_report_counts_pairs_that_could_not_be_compared(tmp_path):
    records = [*RECORDS[:4], record(None, 0.69), record(None, 0.69)]
    report = population_report(finish_population(write_population(tmp_path / "a", MEMBERS, records)), tmp_path, NATS)
    assert "-2,000 (1 of 3 pairs)" in report
    none = population_report(
        finish_population(write_population(tmp_path / "b", MEMBERS, [*RECORDS[:3], *[record(None)] * 3])),
        tmp_path,
        NATS,
    )
    assert "0 of 3, 3 without a plateau" in none and "none of 3 pairs" in none


def test_a_grid_has_a_column_for_each_key_and_its_figure_beside_the_picture(tmp_path):
    crossed = {"copy": {"model.learning_rate": 3e-4, "model.betas": [0.9, 0.98]}}
    path = write_population(tmp_path / "run", MEMBERS, RECORDS, crossed=crossed)
    finish_population(path)
    conditions, members = (pd.read_csv(path / f"{name}.csv") for name in ("conditions", "members"))
    assert [*conditions.columns[:3]] == ["condition", "model.learning_rate", "model.betas"]
    rows = conditions.set_index("condition")
    assert rows.loc["copy", "model.learning_rate"] == 3e-4 and rows.loc["copy", "model.betas"] == "[0.9, 0.98]"
    assert rows.drop("copy")["model.learning_rate"].isna().all()
    assert set(members[members["condition"] == "copy"]["model.learning_rate"]) == {3e-4}
    assert (path / "grid.png").exists() and not (path / "critical_period.png").exists()
