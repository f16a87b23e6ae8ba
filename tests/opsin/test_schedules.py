"""Claims about schedules: the strength at every step, against exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.errors import ConfigError
from opsin.schedules import Schedule


@st.composite
def schedules(draw):
    start = draw(st.integers(0, 30))
    stop = draw(st.none() | st.integers(start + 1, 60))
    return Schedule(
        start=start,
        stop=stop,
        unit=draw(st.sampled_from(["steps", "sequences"])),
        ramp=draw(st.integers(0, 20)),
        ramp_down=0 if stop is None else draw(st.integers(0, 20)),
        period=draw(st.none() | st.integers(1, 12)),
        duty=draw(st.sampled_from([1 / 8, 1 / 4, 1 / 2, 5 / 8, 1.0])),
    )


def slow_strength(schedule, step, batch_size):
    """The strength of one step in exact fractions."""
    at = step * batch_size if schedule.unit == "sequences" else step
    if at < schedule.start or (schedule.stop is not None and at >= schedule.stop):
        return 0.0
    if schedule.period is not None:
        phase = (at - schedule.start) % schedule.period
        if phase >= Fraction(str(schedule.duty)) * schedule.period:
            return 0.0
    parts = [Fraction(1)]
    if schedule.ramp:
        parts.append(Fraction(at - schedule.start, schedule.ramp))
    if schedule.ramp_down:
        parts.append(Fraction(schedule.stop - at, schedule.ramp_down))
    return float(min(parts))


@given(schedules(), st.integers(1, 5))
def test_every_step_has_the_specified_strength(schedule, batch_size):
    steps = np.arange(70)
    strength = schedule.strength(steps, batch_size)
    assert strength.tolist() == [slow_strength(schedule, step, batch_size) for step in steps.tolist()]
    assert strength.min() >= 0 and strength.max() <= 1


@pytest.mark.parametrize(("duty", "period"), [(0.55, 100), (0.07, 100), (0.14, 50)])
def test_a_pulse_is_on_for_its_whole_number_of_steps(duty, period):
    on = Schedule(period=period, duty=duty).strength(np.arange(period), 1)
    assert on.sum() == float(Fraction(str(duty)) * period)


def test_sequences_are_steps_times_the_batch():
    strength = Schedule(start=64, stop=128, unit="sequences").strength(np.arange(6), 32)
    assert strength.tolist() == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"unit": "epochs"}, "unit"),
        ({"start": -1}, "start"),
        ({"ramp": -1}, "ramp"),
        ({"stop": 10, "ramp_down": -1}, "ramp_down"),
        ({"start": 5, "stop": 5}, "stop"),
        ({"ramp_down": 5}, "ramp_down"),
        ({"period": 0}, "period"),
        ({"duty": 0.0}, "duty"),
        ({"duty": 1.1}, "duty"),
        ({"duty": float("nan")}, "duty"),
    ],
)
def test_an_invalid_setting_is_refused_by_name(settings, field):
    with pytest.raises(ConfigError) as refused:
        Schedule(**settings)
    assert refused.value.field == f"schedule.{field}"


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (Schedule(), "always"),
        (Schedule(start=3), "steps 3 to end"),
        (Schedule(stop=9, unit="sequences", ramp=2, ramp_down=4), "sequences 0 to 9, ramps 2/4"),
        (Schedule(period=8, duty=0.25), "steps 0 to end, on for 0.25 of every 8"),
    ],
)
def test_a_schedule_says_what_it_does(schedule, text):
    assert str(schedule) == text
