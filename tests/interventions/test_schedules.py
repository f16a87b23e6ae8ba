"""Claims about schedules: the strength at every step, against exact arithmetic and before and after a resume."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opsin.callbacks import Ablate
from opsin.errors import ConfigError
from opsin.interventions.feedback import Feedback
from opsin.interventions.schedules import Schedule, chances
from opsin.records.history import History
from tests.helpers.toys import SMALL, few_shot, plan_of

STEPS = 70
MEMBERS = 2
TASK = few_shot()
HEADS = ["1:1", "0:0", "1:0"]  # not in order, and not all there are
NONE = st.none()
LEVELS = [-0.5, 0.0, 0.25, 1.0]


@st.composite
def feedbacks(draw):
    metric, head = draw(
        st.sampled_from([("train/loss", None), *(("strength", h) for h in ("0:1", "own", "strongest"))])
    )
    side, level = draw(st.sampled_from(["above", "below"])), draw(st.sampled_from(LEVELS))
    mode = draw(st.sampled_from(["while", "start", "stop", "scale"]))
    full = None if mode != "scale" else level + (0.75 if side == "above" else -0.75)
    return Feedback(metric, head, mode=mode, full=full, **{side: level})


@st.composite
def schedules(draw, feedback=NONE):
    start = draw(st.integers(0, 30))
    stop = draw(st.none() | st.integers(start + 1, 60))
    period = draw(st.none() | st.integers(1, 12))
    return Schedule(
        start=start,
        stop=stop,
        unit=draw(st.sampled_from(["steps", "sequences"])),
        ramp=draw(st.integers(0, 20)),
        ramp_down=0 if stop is None else draw(st.integers(0, 20)),
        period=period,
        duty=draw(st.sampled_from([1 / 8, 1 / 4, 1 / 2, 5 / 8, 1.0])),
        random=None if period is None else draw(st.none() | st.integers(0, 2**64 - 1)),
        feedback=draw(feedback),
    )


@st.composite
def records(draw):
    """Values of both metrics at some steps, as (steps finished, metric, values)."""
    found = []
    for metric, shape in {"train/loss": (MEMBERS,), "strength": (MEMBERS, 2, 2)}.items():
        seed = draw(st.integers(0, 1000))
        for step in sorted(draw(st.sets(st.integers(0, STEPS), max_size=12))):
            # few different values, so that some are equal to each other and to the levels; some are no numbers
            values = np.random.default_rng([seed, step]).choice([*LEVELS, 0.7, 2.0, np.nan], shape)
            found.append((step, metric, values))
    return sorted(found, key=lambda record: record[0])


def slow_chance(seed, number):
    """SplitMix64 in whole numbers of any size."""

    def mixed(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    return Fraction(mixed((mixed(seed) + (number + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11, 2**53)


def slow_strength(schedule, step, batch_size):
    """The strength of one step in exact fractions, apart from feedback."""
    at = step * batch_size if schedule.unit == "sequences" else step
    if at < schedule.start or (schedule.stop is not None and at >= schedule.stop):
        return 0.0
    if schedule.random is not None:
        if slow_chance(schedule.random, (at - schedule.start) // schedule.period) >= Fraction(schedule.duty):
            return 0.0
    elif schedule.period is not None:
        phase = (at - schedule.start) % schedule.period
        if phase >= Fraction(str(schedule.duty)) * schedule.period:
            return 0.0
    parts = [Fraction(1)]
    if schedule.ramp:
        parts.append(Fraction(at - schedule.start, schedule.ramp))
    if schedule.ramp_down:
        parts.append(Fraction(schedule.stop - at, schedule.ramp_down))
    return float(min(parts))


def slow_feedback(feedback, own, step, member, recorded):
    """The factor of one step and member, from all records up to then; ``own`` is the head that is acted on."""
    seen = [values[member] for at, metric, values in recorded if metric == feedback.metric and at <= step]
    level = feedback.above if feedback.above is not None else feedback.below
    sign = 1 if feedback.above is not None else -1

    def at(values, head):
        return float(values if head is None else values[tuple(int(part) for part in head.split(":"))])

    def share(values):
        """How far past the level: above 0 where the condition holds, 1 at ``full``."""
        value = at(values, own if feedback.head in ("own", "strongest") else feedback.head)
        if feedback.head == "strongest":
            ranked = sorted(HEADS, key=lambda head: (not at(values, head) > -np.inf, -at(values, head), head))
            if ranked[0] != own and any(at(values, head) > -np.inf for head in HEADS):
                return 0.0
        past = sign * (value - level)
        if not past > 0:
            return 0.0
        return min(past / abs(feedback.full - level), 1.0) if feedback.full is not None else past

    if feedback.mode == "start":
        return float(any(share(values) > 0 for values in seen))
    if feedback.mode == "stop":
        return float(not any(share(values) > 0 for values in seen))
    if not seen:
        return 0.0
    return share(seen[-1]) if feedback.mode == "scale" else float(share(seen[-1]) > 0)


@given(schedules(), st.integers(1, 5))
def test_every_step_has_the_specified_strength(schedule, batch_size):
    steps = np.arange(STEPS)
    strength = schedule.strength(steps, batch_size)
    assert strength.tolist() == [slow_strength(schedule, step, batch_size) for step in steps.tolist()]
    assert strength.min() >= 0 and strength.max() <= 1


def planned(schedule, batch_size):
    """The plan of an ablation of some heads, in a run of so many sequences a step."""
    assume(schedule.strength(np.arange(STEPS), batch_size).any())
    plan = plan_of(SMALL, few_shot(batch_size=batch_size), Ablate(heads=HEADS, schedule=schedule), steps=STEPS)
    owns = [f"{row.target.split('.')[1]}:{row.intervention.selection.heads[0]}" for row in plan.rows]
    return plan, owns


def with_heads(batch_size):
    """An empty history of a run with one value a head."""
    history = History(batch_size)
    history.declare("strength", {"layer": 2, "head": 2})
    return history


def history_of(recorded, batch_size, until=STEPS):
    history = with_heads(batch_size)
    for step, metric, values in recorded:
        if step <= until:
            history.record(metric, step, values)
    return history


@given(schedules(feedbacks()), records(), st.integers(1, 3))
def test_feedback_multiplies_the_window_by_what_it_says_of_the_records_so_far(schedule, recorded, batch_size):
    plan, owns = planned(schedule, batch_size)
    gates = plan.gates(0, STEPS, MEMBERS, history_of(recorded, batch_size))
    for step, row, member in np.ndindex(*gates.shape):
        window = slow_strength(schedule, step, batch_size)
        factor = slow_feedback(schedule.feedback, owns[row], step, member, recorded)
        assert gates[step, row, member] == pytest.approx(window * factor, abs=1e-6)


@settings(max_examples=40)
@given(schedules(NONE | feedbacks()), records(), st.integers(0, STEPS))
def test_a_run_that_is_resumed_has_the_strengths_of_one_that_is_not(schedule, recorded, resumed_at):
    plan, _ = planned(schedule, 1)
    whole = plan.gates(0, STEPS, MEMBERS, history_of(recorded, 1))
    history, gates = with_heads(1), []
    for step in range(STEPS):
        if step == resumed_at:
            saved, history = history.state_dict(), with_heads(1)
            history.load_state_dict(saved)
        # as in a run: what is measured after so many steps is there before the next, and not earlier
        for at, metric, values in recorded:
            if at == step:
                history.record(metric, at, values)
        gates.append(plan.gates(step, 1, MEMBERS, history)[0])
    assert np.array_equal(np.stack(gates), whole)


@pytest.mark.parametrize(("duty", "period"), [(0.55, 100), (0.07, 100), (0.14, 50)])
def test_a_pulse_is_on_for_its_whole_number_of_steps(duty, period):
    on = Schedule(period=period, duty=duty).strength(np.arange(period), 1)
    assert on.sum() == float(Fraction(str(duty)) * period)


def test_sequences_are_steps_times_the_batch():
    strength = Schedule(start=64, stop=128, unit="sequences").strength(np.arange(6), 32)
    assert strength.tolist() == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("duty", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_random_pulses_are_on_as_often_as_they_should_be_and_forget_their_past(duty, seed):
    cycles, period = 20_000, 3
    on = Schedule(start=5, period=period, duty=duty, random=seed).strength(5 + np.arange(cycles * period), 1)
    assert (on.reshape(cycles, period) == on[::period, None]).all()
    on = on[::period]
    # five standard deviations of independent throws
    assert abs(on.mean() - duty) < 5 * np.sqrt(duty * (1 - duty) / cycles)
    again = (on[1:] * on[:-1]).mean()
    assert abs(again - duty**2) < 5 * np.sqrt(duty**2 * (1 - duty**2) / cycles) * 2


def test_random_pulses_of_different_seeds_are_independent_of_each_other():
    steps = np.arange(20_000)
    a, b, c = (Schedule(period=1, duty=0.5, random=seed).strength(steps, 1) for seed in (0, 1, 2**63))
    for one, other in ((a, b), (a, c), (b, c)):
        assert abs((one == other).mean() - 0.5) < 5 * 0.5 / np.sqrt(len(steps))


def test_a_random_pulse_does_not_depend_on_the_steps_that_are_asked_for_with_it():
    schedule = Schedule(start=7, period=4, duty=0.3, random=11)
    whole = schedule.strength(np.arange(1000), 2)
    assert whole.tolist() == [float(schedule.strength(np.array([step]), 2)[0]) for step in range(1000)]
    assert whole[300:400].tolist() == schedule.strength(np.arange(300, 400), 2).tolist()


def test_chances_are_those_of_the_published_generator():
    # the outputs of splitmix64 from state 1234567, which is what a seed of this value is mixed into
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert chances(unmixed(1234567), np.arange(5)).tolist() == [(output >> 11) / 2**53 for output in first]


def unmixed(z):
    """The seed that is mixed into ``z``."""

    def unshifted(z, by):
        found = z
        for _ in range(64 // by + 1):
            found = z ^ (found >> by)
        return found

    z = unshifted(z, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    return unshifted(unshifted(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64, 30)


@pytest.mark.parametrize(
    ("wrong", "field"),
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
        ({"random": 3}, "random"),
        ({"random": -1, "period": 3}, "random"),
        ({"random": 2**64, "period": 3}, "random"),
    ],
)
def test_an_invalid_setting_is_refused_by_name(wrong, field):
    with pytest.raises(ConfigError) as refused:
        Schedule(**wrong)
    assert refused.value.field == f"schedule.{field}"


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (Schedule(), "always"),
        (Schedule(start=3), "steps 3 to end"),
        (Schedule(stop=9, unit="sequences", ramp=2, ramp_down=4), "sequences 0 to 9, ramps 2/4"),
        (Schedule(period=8, duty=0.25), "steps 0 to end, on for 0.25 of every 8"),
        (
            Schedule(period=8, duty=0.25, random=3),
            "steps 0 to end, cycles of 8 on with probability 0.25 (seed 3)",
        ),
        (Schedule(feedback=Feedback("train/loss", below=1.0)), "while train/loss is below 1"),
        (
            Schedule(start=3, feedback=Feedback("train/loss", below=1.0, mode="start")),
            "steps 3 to end, from when train/loss is below 1",
        ),
        (
            Schedule(feedback=Feedback("induction_strength", "1:2", above=0.3, mode="stop")),
            "until induction_strength of head 1:2 is above 0.3",
        ),
        (
            Schedule(feedback=Feedback("induction_strength", "own", above=0.3, mode="scale", full=0.5)),
            "in proportion to induction_strength of the head itself, 0 at 0.3 and 1 at 0.5",
        ),
    ],
)
def test_a_schedule_says_what_it_does(schedule, text):
    assert str(schedule) == text
