"""Claims about the script that measures whether a long run stays flat, and with it about long runs."""

from __future__ import annotations

import pytest

from tests.helpers.toys import script

STEPS = 200_000


def test_a_part_that_grows_is_found_and_its_share_is_stated():
    flat = script("flat")
    rows = [(step, 100.0, 1e-3, 5_000) for step in range(0, 1001, 50)]
    assert [*flat.growth(rows, 1000).values()] == pytest.approx([0, 0, 0])
    rows[-1] = (1000, 120.0, 1e-3, 5_000)
    assert flat.growth(rows, 1000)["memory"] == pytest.approx(0.2)


@pytest.mark.slow
def test_a_short_run_is_measured_in_parts(tmp_path):
    rows = script("flat").measured(1_000, 4, tmp_path)
    assert [row[0] for row in rows] == [250, 500, 750, 1000]
    assert max(row[3] for row in rows) - min(row[3] for row in rows) <= 64


@pytest.mark.slow
def test_memory_time_per_step_and_the_checkpoint_of_a_long_run_are_flat(tmp_path):
    flat = script("flat")
    grown = flat.growth(flat.measured(STEPS, 20, tmp_path), STEPS)
    assert all(share <= flat.ALLOWED for share in grown.values()), grown
