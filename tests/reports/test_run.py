"""Claims about what a run says in the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsin.callbacks import Ablate, Clamp
from opsin.interventions.build_plan import build_plan
from opsin.interventions.plan import Plan
from opsin.interventions.schedules import Schedule
from opsin.model.transformer import Transformer
from opsin.objective import SquaredError
from opsin.reports.run import final_report
from opsin.reports.sites import sites_report
from opsin.tasks import FewShot


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 1000.4, "high": value + 2000.0}


RISE = {"onset": estimate(20_000), "midpoint": estimate(31_000), "end": estimate(40_000)}
NONE = {"onset": None, "midpoint": None, "end": None}
MEMBER = {
    "onset": estimate(25_505),
    "midpoint": estimate(34_976),
    "end": estimate(1_049_839),
    "plateau": 0.693,
    "final_loss": 0.00763,
    "heads": {"0:0": {"strength": 0.02, **NONE}, "1:2": {"strength": 0.79, **RISE}, "1:3": {"strength": 0.4, **NONE}},
    "strongest_heads": ["1:2", "1:3"],
    "evaluations": {"train": {"loss": 0.0067, "accuracy": 1.0}, "classes": {"loss": 1.0007, "accuracy": 0.635}},
}
RUN = {"wall_time_seconds": 3725.2, "sequences": 1_096_000}


def report(summary) -> list[str]:
    return final_report(summary, Path("runs/one")).splitlines()


def test_it_says_when_the_phase_change_happened_with_its_uncertainty():
    lines = report({**MEMBER, **RUN})
    assert lines[0].startswith("phase change  onset        25,505  [   24,505 to    27,505]  training sequences [95 %")
    assert "midpoint     34,976" in lines[1] and "end       1,049,839" in lines[2]


def test_it_names_the_strongest_heads_and_when_they_rose():
    text = "\n".join(report({**MEMBER, **RUN}))
    assert "1:2    0.79  31,000 [30,000 to 33,000]" in text
    assert "1:3    0.40  no single rise" in text
    assert "0:0" not in text


def test_the_algorithm_of_a_model_of_regression_is_told_with_the_interval_over_members():
    member = {"change": 622.6, "r_squared": 0.98, "nearest": [["gradient_step", 200], ["ridge", 650]]}
    found = {"before": "gradient_step", "after": "ridge", "members": [member, {**member, "change": None}]}
    change = {"count": 1, "value": 622.6, "low": None, "high": None}
    text = report({**RUN, "algorithm": {**found, "change": change}})[0:3]
    assert text[0] == "nearest       ridge at the end"
    assert text[1].strip() == "nearer to ridge than to gradient_step from step 623 on in 1 of 2 members"
    assert text[2].strip().endswith("to ridge after all examples: 0.980, 0.980")
    both = {**found, "change": {"count": 2, "value": 600.0, "low": 500.0, "high": 700.0}}
    assert "from step 600 on [500 to 700, 95 % over members] in 2" in report({**RUN, "algorithm": both})[1]
    never = {**found, "change": {"count": 0, "value": None, "low": None, "high": None}}
    assert "not lastingly nearer to ridge than to gradient_step" in report({**RUN, "algorithm": never})[1]


def test_losses_and_measures_are_those_of_the_objective():
    evaluations = {"train": {"loss": 0.5, "r_squared": 0.25, "accuracy": 1.0}}
    for unit, shown in (("", ""), ("m^2", " m^2")):
        changed = {"objective": SquaredError(unit=unit).describe(), "evaluations": evaluations}
        text = "\n".join(report({**MEMBER, **RUN, **changed}))
        assert f"0.0076{shown}  training" in text and "nats" not in text and "accuracy" not in text
        assert f"0.5000{shown}  held out: train  r_squared 0.250" in text
    lines = report({**MEMBER, **RUN, **changed, "onset": None})
    assert lines[0] == "phase change  none: the loss did not lastingly leave its plateau at 0.693 m^2"


def test_it_gives_the_final_losses_the_time_and_the_files():
    text = "\n".join(report({**MEMBER, **RUN}))
    assert "0.0076 nats  training" in text
    assert "1.0007 nats  held out: classes  accuracy 0.635" in text
    assert "1 h 2 min, 1,096,000 sequences" in text
    assert text.endswith("runs/one")


def test_it_says_plainly_when_nothing_changed():
    lines = report({**MEMBER, **NONE, "strongest_heads": [], **RUN})
    assert lines[0] == "phase change  none: the loss did not lastingly leave its plateau at 0.693 nats"
    assert lines[1] == "heads         none formed; strongest 1:2 with induction strength 0.79"


READING = {
    "verdict": "phase change",
    "change": {**RISE, "before": 0.693, "after": 0.0},
    "steps": [{**RISE, "before": 0.693, "after": 0.0}],
    "plateau": 0.693,
    "final": 0.512,
    "trend": "level",
    "direction": "fall",
}


@pytest.mark.parametrize(
    ("reading", "line"),
    [
        ({"verdict": "not by the end", "trend": "falling"}, "not by the end; 0.512 and still falling"),
        ({"verdict": "not by the end"}, "none: the loss did not lastingly leave its plateau at 0.693 nats"),
        ({"verdict": "smooth"}, "none: a smooth descent, which left no plateau that was held; 0.512 at the end"),
        (
            {"verdict": "smooth", "direction": "rise", "trend": "rising"},
            "none: a smooth rise, which left no plateau that was held; 0.512 and still rising",
        ),
    ],
)
def test_it_says_what_a_curve_did_in_place_of_a_phase_change(reading, line):
    changes = {"train/loss": {**READING, "change": None, "steps": [], **reading}}
    lines = report({**MEMBER, **NONE, "strongest_heads": [], "changes": changes, "delays": {}, **RUN})
    assert lines[0] == f"phase change  {line}"


def test_steps_an_unfinished_change_and_measures_side_by_side_are_said():
    changes = {
        "train/accuracy": {**READING, "steps": READING["steps"] * 2, "trend": "rising"},
        "val/classes/accuracy": {**READING, "change": {**RISE, "midpoint": estimate(167_400)}},
        "train/loss": {**READING, "change": None, "verdict": "not by the end", "trend": "falling"},
    }
    delays = {"val/classes/accuracy": {"sequences": 136_400.0, "ratio": 5.4}}
    lines = [line[14:] for line in report({**MEMBER, "changes": changes, "delays": delays, **RUN})]
    assert lines[3:9] == [
        "in 2 steps, midpoints 31,000 [30,000 to 33,000], 31,000 [30,000 to 33,000]",
        "not over by the end; 0.512 and still rising",
        "of train/accuracy",
        "train/accuracy 31,000 [30,000 to 33,000]",
        "val/classes/accuracy 167,400 [166,400 to 169,400]: delay 136,400, 5.4x",
        "train/loss not by the end; 0.512 and still falling",
    ]


def test_a_population_is_summed_up_member_by_member():
    lines = report({"members": [MEMBER, {**MEMBER, **NONE, "strongest_heads": []}] * 3, **RUN})
    assert lines[0] == "phase change  in 3 of 6 members, onset from 25,505 to 25,505 training sequences"
    assert "onset 25,505 [24,505 to 27,505], strongest head 1:2 0.79, final loss 0.0076" in lines[1]
    assert "no change, final loss 0.0076" in lines[2]
    assert "and 2 more, in summary.json" in lines[5]
    smooth = {**READING, "verdict": "smooth", "trend": "falling"}
    nobody = report({"members": [{**MEMBER, **NONE, "changes": {"train/loss": smooth}}] * 2})
    assert "a smooth descent, still falling" in nobody[1]
    assert nobody[0] == "phase change  none in any of 2 members"


def test_without_phase_change_or_trackers_it_gives_what_there_is():
    assert report({}) == report({"members": [{}, {"status": "diverged"}]}) == ["files         runs/one"]
    assert report({**MEMBER, "heads": {}, "strongest_heads": [], "evaluations": {}, "final_loss": None})[3:] == [
        "files         runs/one"
    ]


# ---- opsin sites ----------------------------------------------------------------------------------


SITES = Transformer().sites(FewShot())
WITH_MLP = Transformer(mlp_ratio=4.0).sites(FewShot())


def plan(*writers) -> Plan:
    return build_plan(list(writers), SITES, 1, 1000, 32)


def line(text: str, start: str) -> str:
    return next(row for row in text.splitlines() if row.startswith(start))


def test_every_site_stands_in_the_table_with_its_shape_and_meaning():
    rows = sites_report(SITES, 1, 32, plan()).splitlines()
    for site in SITES:
        row = next(row for row in rows if row.split(" ")[0] == site.name)
        assert site.meaning in row
    assert "[1 M, 32 B, 8 H, 5 L, 5 K]" in line("\n".join(rows), "blocks.1.attn.hook_pattern")


@pytest.mark.parametrize(
    ("site", "reached"),
    [
        ("blocks.0.attn.hook_v", "any, Ablate heads (zero), Preserve"),
        ("blocks.0.attn.hook_z", "any, Ablate heads (all but zero)"),
        ("blocks.1.attn.hook_pattern", "any, Clamp pattern, Preserve"),
        ("blocks.1.attn.hook_attn_scores", "any, Disallow, HeadTemperature"),
        ("blocks.1.mlp.hook_pre", "any, Ablate, Clamp neurons (at pre)"),
        ("blocks.1.mlp.hook_post", "any, Ablate, Clamp neurons"),
        ("hook_embed", "any"),
    ],
)
def test_it_says_what_may_be_done_to_a_site(site, reached):
    assert line(sites_report(WITH_MLP, 1, 32, plan()), site + " ").endswith("  " + reached)


def test_it_explains_only_axes_that_occur():
    legend = line(sites_report(SITES, 1, 32, plan()), "axes:")
    assert "M members" in legend and "K key positions" in legend and "neurons" not in legend


def test_without_writers_it_says_no_interventions():
    empty = plan()
    assert sites_report(SITES, 1, 32, empty).endswith(f"plan {empty.digest()}: no interventions")


def test_the_plan_is_listed_in_order_of_application_and_nothing_of_it_is_cut():
    schedule = Schedule(start=100, stop=500, period=10)
    writers = [
        Ablate(heads=["1:2", "1:7"]),
        Clamp(heads=["0:3"], pattern="previous_token", strength=0.9, schedule=schedule),
    ]
    made = plan(*writers)
    text = sites_report(SITES, 1, 32, made)
    rows = text[text.index("plan ") :].splitlines()
    assert rows[0] == f"plan {made.digest()}, in order of application:"
    assert rows[2].startswith("1  1     Clamp   blocks.0.attn.hook_pattern  heads [3]     PreviousToken(strength=0.9,")
    assert rows[4].startswith("2  1     Ablate  blocks.1.attn.hook_v        heads [2, 7]  Constant(constant=0.0)  ")
    assert {"labels_only=False)", "of", "every", "10"} <= set(rows[3].split())


def test_no_line_is_wider_than_a_wide_terminal():
    writers = [Ablate(heads=["1:2"], value="mean"), Clamp(heads=["0:3"], pattern="match", temperature=0.1)]
    assert max(map(len, sites_report(SITES, 1000, 32, plan(*writers)).splitlines())) <= 150


def test_of_clustering_heads_it_says_how_many_are_solved_and_whether_clusters_came_first():
    rows = [{"clustered_at": 640, "solved_at": 960}, {"clustered_at": None, "solved_at": None}]
    rows.append({"clustered_at": 1280, "solved_at": 1280})
    lines = report({**RUN, "clustering": rows})
    assert "clusters      2 of 3 solved; clusters came first in 1 of them" in lines
    assert f"{'':13} formed at step 640, solved at step 960" in lines
    assert "1 of 1 solved" in "\n".join(report({**RUN, "clustering": rows[0]}))
    many = report({**RUN, "clustering": rows[:1] * 6})
    assert f"{'':13} and 2 more, in summary.json" in many


def test_of_features_it_says_what_each_explains_of_the_last_layer():
    lines = report({**RUN, "feature_variance": {"easy": [0.1, 0.553], "hard": [None, None]}})
    (index,) = [number for number, line in enumerate(lines) if line.startswith("variance")]
    assert lines[index + 1].split() == ["easy", "hard"] and lines[index + 2].split() == ["55.3", "%", "-"]
