"""Claims about changes found by a cumulative sum: announced once, soon, where they were, and not without reason."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.metrics.cusum import Watch, first_lasting_fall, watch
from opsin.metrics.onset import LASTING_SHARE
from tests.helpers.curves import LN2, LN5, MIDDLE, head_curve, loss_curve


def announce(x: np.ndarray, y: np.ndarray, **options: float) -> tuple[Watch, list[float]]:
    state, alarms = Watch(), []
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        state, fired = watch(state, a, b, **{"before": LN2, "after": 0.0, **options})
        alarms += [a] if fired else []
    return state, alarms


def test_a_plateau_raises_no_false_alarm() -> None:
    x = 320 * np.arange(1, 3001.0)  # 30 000 steps of 32 sequences, every tenth
    fall = (LN5 - LN2) * np.exp(-x / 2500)
    for seed in range(200):
        y = LN2 + fall - 0.05 * x / x[-1] + 0.15 * np.random.default_rng(seed).standard_normal(3000)
        assert announce(x, y)[1] == []


def test_the_change_is_announced_once_soon_and_where_it_was() -> None:
    for seed in range(40):
        state, alarms = announce(*loss_curve(seed))
        assert len(alarms) == 1
        assert MIDDLE <= alarms[0] <= MIDDLE + 60 * 320
        assert state.announced is not None and abs(state.announced - MIDDLE) < 5_000


def test_a_rising_head_is_announced() -> None:
    x, y = head_curve(0)
    _, alarms = announce(x, y, before=0.0, after=1.0, way=0.3, patience=3.0)
    assert len(alarms) == 1 and 370_000 < alarms[0] < 430_000


def test_a_spike_announces_nothing() -> None:
    y = np.full(300, LN2)
    y[50], y[100:105], y[200] = -1e9, 0.0, np.nan
    assert announce(np.arange(300.0), y)[1] == []


@given(st.integers(0, 3000))
@settings(max_examples=15, deadline=None)
def test_a_watch_goes_on_from_its_stored_state(cut: int) -> None:
    x, y = loss_curve(2)
    whole, alarms = announce(x, y)
    state, before_cut = announce(x[:cut], y[:cut])
    state = Watch(**json.loads(json.dumps(state.to_dict())))
    after_cut = []
    for a, b in zip(x[cut:].tolist(), y[cut:].tolist(), strict=True):
        state, fired = watch(state, a, b, before=LN2, after=0.0)
        after_cut += [a] if fired else []
    assert state == whole and before_cut + after_cut == alarms


def test_a_watch_holds_python_scalars_even_if_fed_arrays() -> None:
    state, _ = watch(Watch(), np.float64(1), np.float64(0.1), before=LN2, after=0.0)
    assert {type(v) for v in state.to_dict().values()} <= {float, type(None)}


def test_a_watch_refuses_to_go_back_and_levels_that_say_nothing() -> None:
    state, _ = watch(Watch(), 10.0, 0.7, before=0.7, after=0.0)
    with pytest.raises(ValueError, match="ascend"):
        watch(state, 10.0, 0.7, before=0.7, after=0.0)
    for broken in (dict(after=0.7), dict(way=0.0), dict(patience=0.0)):
        with pytest.raises(ValueError, match="expected"):
            watch(state, 11.0, 0.7, **{"before": 0.7, "after": 0.0, **broken})


# ---- the first lasting fall -------------------------------------------------------------------------

X = np.arange(10, 1010, 10)  # 100 samples, of which 5 are lasting


def test_a_loss_falls_where_it_goes_below_the_level_to_stay():
    y = np.where(X < 400, 1.0, 0.1)
    assert first_lasting_fall(X, y, 0.5) == 400


def test_a_loss_that_is_low_at_once_falls_at_the_first_sample():
    assert first_lasting_fall(X, np.full(100, 0.1), 0.5) == 10


def test_a_loss_that_dips_does_not_fall():
    y = np.ones(100)
    y[20:24] = 0.1
    assert first_lasting_fall(X, y, 0.5) is None
    y[60:] = 0.1
    assert first_lasting_fall(X, y, 0.5) == X[60]


def test_the_first_of_two_lasting_falls_counts():
    y = np.where((X > 200) & (X < 500) | (X > 900), 0.1, 1.0)
    assert first_lasting_fall(X, y, 0.5) == 210


def test_samples_that_are_no_numbers_are_left_out():
    y = np.where(X < 400, 1.0, 0.1)
    y[::3] = math.nan
    assert first_lasting_fall(X, y, 0.5) == 410  # 400 is missing
    assert first_lasting_fall(X, np.full(100, math.nan), 0.5) is None


@given(st.lists(st.booleans(), min_size=0, max_size=80))
def test_a_fall_is_the_one_that_counting_sample_by_sample_finds(below):
    x, y = np.arange(len(below)), np.where(below, 0.0, 1.0)
    need, count, start, expected = max(3, math.ceil(LASTING_SHARE * len(below))), 0, 0, None
    for i, low in enumerate(below):
        if low:
            start = i if count == 0 else start
            count += 1
        else:
            count = max(count - 1, 0)
        if count >= need:
            expected = start
            break
    assert first_lasting_fall(x, y, 0.5) == expected
