"""Claims about the picture of a run: its size, what stands in it, and that missing pieces do not stop it."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opsin.figures.run import MEASURE_COLOURS, summary_figure
from opsin.figures.style import ACCENT, as_image, save_figure, short_count, spread
from opsin.objective import LogCrossEntropy, SquaredError
from opsin.records.history import History

ONSET = {"value": 32_000.0, "low": 30_000.0, "high": 34_000.0}


def history(members: int = 1, heads: bool = True, held_out: bool = True) -> History:
    recorded = History(batch_size=32)
    recorded.declare("induction_strength", {"layer": 2, "head": 3})
    for step in range(0, 2001, 50):
        rise = 1 / (1 + np.exp(-(step - 1000) / 80))
        if heads:
            strength = np.full((members, 2, 3), 0.02)
            strength[:, 1, 1] += 0.9 * rise
            recorded.record("induction_strength", step, strength)
        if step:
            recorded.record("train/loss", step, np.full(members, 0.7 - 0.65 * rise))
        if step and held_out and step % 200 == 0:
            recorded.record("val/train/loss", step, np.full(members, 0.72 - 0.6 * rise))
            recorded.record("val/new_classes/loss", step, np.full(members, 1.1))
            recorded.record("val/new_classes/accuracy", step, np.full(members, 0.5))
    return recorded


def summary(**changes):
    return {"onset": ONSET, "plateau": 0.693, "strongest_heads": ["1:1"], **changes}


def draw(recorded, outcome):
    """The panels of the figure."""
    return summary_figure(recorded, outcome).axes


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_it_is_1600_by_700_pixels_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "summary.png"
    save_figure(summary_figure(history(), summary()), path)
    assert Image.open(path).size == (1600, 700)
    assert list(tmp_path.iterdir()) == [path]


def test_the_onset_stands_in_both_panels_with_its_interval_as_a_band():
    figure = summary_figure(history(), summary())
    for axes in figure.axes:
        assert [line.get_xdata() for line in axes.lines if line.get_color() == ACCENT] == [[32_000, 32_000]]
        (band,) = axes.patches
        assert (band.get_x(), band.get_x() + band.get_width()) == (30_000, 34_000)
    loss, heads = figure.axes
    assert "onset at 32,000 sequences\n95 %, this run: 30,000 to 34,000" in texts(loss)
    assert loss.get_xlabel() == heads.get_xlabel() == "training sequences"


def test_every_line_is_named_at_its_end():
    loss, heads = draw(history(), summary())
    assert {"training", "train, new draws", "new classes", "plateau 0.693"} <= set(texts(loss))
    assert set(texts(heads)) == {"1:1  0.92", "5 others"}


@pytest.mark.parametrize("measures", [{}, {"m" * 40: 50.0, "match": 0.0}])
def test_no_label_leaves_the_picture(measures):
    for members in (1, 3):
        outcome = summary() if members == 1 else {"members": [summary()] * 3}
        figure = summary_figure(with_measures(members, **measures), outcome)
        as_image(figure)
        for axes in figure.axes:
            for text in (*axes.texts, axes.title, axes.xaxis.label):
                box = text.get_window_extent()
                assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1600 and box.y1 <= 700, text.get_text()


def test_without_an_onset_nothing_is_marked():
    for axes in draw(history(), summary(onset=None, strongest_heads=[])):
        assert not axes.patches
        assert not any("onset" in text for text in texts(axes))


def test_a_loss_is_drawn_in_the_unit_of_its_objective_and_below_zero():
    recorded = history(heads=False, held_out=False)
    for step in range(50, 2001, 50):
        recorded.record("train/loss", step + 5000, np.full(1, -step / 100))
    (loss,) = draw(recorded, summary(objective=LogCrossEntropy().describe()))
    assert loss.get_title(loc="left") == "Training loss (log nats)" and loss.get_ylim()[0] <= -20
    (loss,) = draw(history(heads=False), summary(objective=SquaredError().describe()))
    assert loss.get_title(loc="left") == "Loss, training and held out" and loss.get_ylim()[0] == 0


def with_measures(members: int = 1, **ends: float) -> History:
    recorded = history(members)
    for step in range(0, 2001, 100):
        for name, end in ends.items():
            recorded.record(f"progress/{name}/loss", step, np.full(members, 0.7 + (end - 0.7) * step / 2000))
            recorded.record(f"progress/{name}/accuracy", step, np.full(members, 0.5))
    return recorded


def test_progress_measures_are_dashed_lines_and_the_base_line_is_left_out():
    loss, _ = draw(with_measures(none=0.04, match=0.2, no_layer_0=0.6), summary())
    dashed = [line for line in loss.lines if line.get_color() in MEASURE_COLOURS]
    assert [line.get_ydata()[-1] for line in dashed] == pytest.approx([0.2, 0.6])
    assert all(line.is_dashed() for line in dashed)
    assert {"match", "no layer 0"} <= set(texts(loss)) and "none" not in texts(loss)
    assert loss.get_title(loc="left") == "Loss (nats); dashed: progress measures"


def test_a_measure_of_a_crippled_model_does_not_flatten_the_loss():
    height = {end: draw(with_measures(crippled=end), summary())[0].get_ylim()[1] for end in (0.1, 1.2, 50.0)}
    assert height[0.1] < height[1.2] < height[50.0] < 1.8


def test_without_heads_the_loss_has_the_picture_to_itself():
    assert len(draw(history(heads=False), summary())) == 1


@pytest.mark.parametrize("recorded", [History(32), history(held_out=False)])
def test_an_empty_summary_and_a_short_record_are_drawn_all_the_same(recorded):
    assert draw(recorded, {})


def test_members_are_thin_lines_their_mean_a_bold_one_and_each_onset_a_tick():
    loss, heads = draw(history(members=3), {"members": [summary(), summary(onset=None), summary()]})
    widths = sorted(line.get_linewidth() for line in heads.lines)
    assert len(widths) == 4 and widths[2] < widths[3]
    assert "onset in 2 of 3 members" in texts(loss)
    assert len(loss.collections[0].get_segments()) == 2


def test_pyplot_is_never_imported():
    code = "import sys, opsin.figures.run; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@given(st.lists(st.floats(0, 0.8), max_size=8))
def test_labels_are_moved_apart_in_order_and_stay_above_the_axis(heights):
    placed = spread(sorted(heights), 0.05)
    assert all(b - a > 0.05 - 1e-9 for a, b in itertools.pairwise(placed))
    assert min(placed, default=0) >= 0


def test_labels_with_room_stay_where_they_are():
    assert spread([0.1, 0.3, 0.9], 0.05) == pytest.approx([0.1, 0.3, 0.9])


@pytest.mark.parametrize(("x", "text"), [(0, "0"), (500, "500"), (20_000, "20k"), (1_500_000, "1.5M"), (2e9, "2G")])
def test_counts_on_the_axis_are_short(x, text):
    assert short_count(x) == text


def test_the_axis_counts_what_the_task_says_in_round_numbers():
    loss, heads = draw(history(), summary(axis={"unit": "epochs", "sequences": 160}))
    assert loss.get_xlabel() == heads.get_xlabel() == "training epochs"
    # 2,000 steps of 32 sequences are 400 epochs of 160; lines stay where their sequences are
    assert [tick / 160 for tick in loss.get_xticks()] == [0, 80, 160, 240, 320, 400]
    assert [loss.xaxis.get_major_formatter()(tick, 0) for tick in loss.get_xticks()][1] == "80"
    assert "onset at 200 epochs\n95 %, this run: 188 to 212" in texts(loss)
