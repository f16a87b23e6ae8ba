"""Claims about calibration: cases whose answer is known, slow versions, and fits that find what was hidden."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.metrics.calibration import (
    VectorScaling,
    at_temperature,
    brier_score,
    expected_calibration_error,
    fit_neural_clamping,
    fit_temperature,
    fit_vector_scaling,
    mean_entropy,
    mean_loss,
)


def random_case(seed, members=2, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(members, 5, 3, 4, generator=generator, dtype=torch.float64)
    return logits, torch.randint(4, (members, 5, 3), generator=generator)


def graded(shares, members=1):
    """Log-probabilities over three outputs and answers of exactly these frequencies: ``[M, len(shares), 12, 3]``."""
    shares = torch.tensor(shares, dtype=torch.float64)
    answers = [[v for v, share in enumerate(row) for _ in range(round(12 * float(share)))] for row in shares]
    logits = shares.log()[:, None].expand(-1, 12, -1)
    return logits.expand(members, -1, -1, -1).clone(), torch.tensor(answers).expand(members, -1, -1).clone()


SHARES = [[6 / 12, 3 / 12, 3 / 12], [8 / 12, 3 / 12, 1 / 12], [2 / 12, 9 / 12, 1 / 12], [1 / 12, 1 / 12, 10 / 12]]


def test_a_predictor_whose_confidence_is_its_accuracy_has_no_calibration_error():
    logits, answers = graded(SHARES)
    assert expected_calibration_error(logits, answers) < 1e-12
    # and where it is never right the error is its confidence
    never = (logits.argmax(-1) + 1) % 3
    expected = sum(max(row) for row in SHARES) / len(SHARES)
    assert expected_calibration_error(logits, never).item() == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 2**16), st.integers(1, 20), st.floats(0.1, 5))
def test_the_calibration_error_is_that_of_a_loop_over_bins(seed, bins, sharpness):
    logits, targets = random_case(seed, sharpness=sharpness)
    for member, found in enumerate(expected_calibration_error(logits, targets, bins)):
        inside = {index: [] for index in range(bins)}
        for row, answer in zip(logits[member].flatten(0, 1), targets[member].flatten(), strict=True):
            exponents = [math.exp(float(z)) for z in row]
            confidence = max(exponents) / sum(exponents)
            (index,) = [p for p in range(bins) if p / bins < confidence <= (p + 1) / bins]
            inside[index].append((confidence, int(row.argmax()) == int(answer)))
        error = 0.0
        for cases in filter(None, inside.values()):
            gap = sum(right for _, right in cases) / len(cases) - sum(c for c, _ in cases) / len(cases)
            error += len(cases) / 15 * abs(gap)
        assert float(found) == pytest.approx(error, abs=1e-12)


@given(st.integers(0, 2**16))
def test_brier_score_entropy_and_loss_are_those_of_loops(seed):
    logits, targets = random_case(seed)
    for member in range(2):
        scores, entropies, losses = [], [], []
        for row, answer in zip(logits[member].flatten(0, 1), targets[member].flatten(), strict=True):
            p = [math.exp(float(z)) / sum(math.exp(float(y)) for y in row) for z in row]
            scores.append(sum((share - (v == int(answer))) ** 2 for v, share in enumerate(p)))
            entropies.append(-sum(share * math.log(share) for share in p))
            losses.append(-math.log(p[int(answer)]))
        for found, slow in ((brier_score, scores), (mean_loss, losses)):
            assert float(found(logits, targets)[member]) == pytest.approx(sum(slow) / len(slow), abs=1e-12)
        assert float(mean_entropy(logits)[member]) == pytest.approx(sum(entropies) / 15, abs=1e-12)


def test_the_entropy_of_log_probabilities_does_not_mind_outputs_ruled_out():
    exact = torch.tensor([0.5, 0.5, 0.0, 0.0]).log().expand(1, 2, 3, 4)
    assert mean_entropy(exact).item() == pytest.approx(math.log(2))


def test_a_scaled_model_recovers_its_temperature():
    hidden = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    logits, answers = graded(SHARES, members=3)
    assert (fit_temperature(at_temperature(logits, 1 / hidden), answers) - hidden).abs().max() < 1e-4
    # single precision in, single precision out, the same to its rounding
    single = fit_temperature(at_temperature(logits, 1 / hidden).float(), answers)
    assert single.dtype == torch.float32 and (single - hidden).abs().max() < 1e-4


@settings(max_examples=25)
@given(st.integers(0, 2**16), st.floats(0.3, 5))
def test_no_other_temperature_has_a_lower_loss(seed, sharpness):
    logits, targets = random_case(seed, sharpness=sharpness)
    best = fit_temperature(logits, targets)
    lowest = mean_loss(at_temperature(logits, best), targets)
    for factor in (0.5, 0.99, 1.01, 2.0):
        other = (best * factor).clamp(0.01, 100)
        assert (mean_loss(at_temperature(logits, other), targets) >= lowest - 1e-9).all()


def test_a_model_that_is_never_or_always_wrong_gets_the_last_temperature_there_is():
    logits = torch.tensor([5.0, 0.0, 0.0]).expand(2, 1, 1, 3)
    found = fit_temperature(logits, torch.tensor([[[0]], [[1]]]))
    torch.testing.assert_close(found, torch.tensor([0.01, 100.0]))


def test_vector_scaling_undoes_a_scale_and_a_shift_of_every_output():
    logits, answers = graded(SHARES)
    hidden = VectorScaling(
        torch.tensor([[0.7, 1.2, 1.5]], dtype=torch.float64), torch.tensor([[0.5, -0.4, 0.2]], dtype=torch.float64)
    )
    shown = (logits - hidden.shift) / hidden.scale
    calibrated = fit_vector_scaling(shown, answers)(shown)
    assert (calibrated.softmax(-1) - logits.exp()).abs().max() < 0.01
    by_heat = at_temperature(shown, fit_temperature(shown, answers))
    assert mean_loss(calibrated, answers) < mean_loss(by_heat, answers) - 1e-3


READ_OUT = torch.tensor([[1.0, -0.5, 0.2], [-0.3, 0.8, -1.0]], dtype=torch.float64)


def shifted(shift, heat):
    """A linear model of inputs from which ``shift`` was taken and whose logits were heated; and the answers."""
    logits, answers = graded(SHARES)
    # three logits of any level follow from two inputs: solve, with the level free
    target = torch.cat([READ_OUT, torch.ones(1, 3, dtype=torch.float64)])
    inputs = (logits @ torch.linalg.inv(target))[..., :2]
    return (lambda delta: heat * ((inputs - shift + delta) @ READ_OUT)), answers


def test_neural_clamping_finds_the_shift_of_the_input_and_the_temperature():
    shift = torch.tensor([0.4, -0.3], dtype=torch.float64)
    logits_at, answers = shifted(shift, heat=2.0)
    start = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    found = fit_neural_clamping(logits_at, start, answers, focus=0.0, penalty=0.0, steps=400, rate=0.05)
    assert (found.perturbation.flatten() - shift).abs().max() < 1e-3
    assert found.temperature.item() == pytest.approx(2.0, abs=1e-3)
    assert (start == 0).all()


def test_a_large_penalty_leaves_temperature_scaling():
    logits_at, answers = shifted(torch.tensor([0.4, -0.3], dtype=torch.float64), heat=2.0)
    zeros = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    found = fit_neural_clamping(logits_at, zeros, answers, focus=0.0, penalty=1e4)
    assert found.perturbation.abs().max() < 1e-3
    assert found.temperature.item() == pytest.approx(fit_temperature(logits_at(zeros), answers).item(), rel=1e-3)


def test_the_focal_loss_is_at_its_minimum_and_less_sure_than_the_answers_warrant():
    logits, answers = graded(SHARES)
    # an input that the logits do not see
    found = fit_neural_clamping(
        lambda delta: logits + 0 * delta, torch.zeros(1, 1, 1, 1, dtype=torch.float64), answers, steps=200, rate=0.05
    )

    def focal(heat):
        p = (logits / heat).softmax(-1).flatten(1, 2)[0]
        right = [float(row[answer]) for row, answer in zip(p, answers.flatten(), strict=True)]
        return sum(-(1 - share) * math.log(share) for share in right) / len(right)

    heat = found.temperature.item()
    assert heat > 1.2
    assert focal(heat) < min(focal(heat * 1.01), focal(heat / 1.01))


def test_members_do_not_meet_in_any_fit():
    logits, targets = random_case(3)
    weight = torch.ones(2, 1, 1, 4, dtype=torch.float64)
    for fit in (
        fit_temperature,
        lambda z, y: fit_vector_scaling(z, y).shift,
        lambda z, y: fit_neural_clamping(lambda d: z + d * weight[: len(z)], 0 * weight[: len(z)], y).perturbation,
    ):
        together, alone = fit(logits, targets), fit(logits[:1], targets[:1])
        torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-12)
