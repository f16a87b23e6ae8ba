"""Claims about in-context linear regression: what is drawn and shown, and predictors that numpy.linalg has too."""

import numpy as np
import pytest
import torch

from opsin.errors import ConfigError
from opsin.tasks import LinearRegression

SEED = 3
MIXTURE = {"noise": 0.5, "components": 4}


def drawn(task, size=4000, seed=SEED):
    return {
        name: tensor[0, 0].numpy().astype(np.float64) for name, tensor in task.draw([seed], 0, 1, "train", size).items()
    }


def pairs_of(batch):
    """Inputs [B, Q, d] and the answers that are shown [B, n], of the first member."""
    features = batch.features[0].double().numpy()
    return features[:, ::2, 1:], features[:, 1::2, 0]


def predicted(task, name, batch):
    return task.references()[name](batch)[0, :, :, 0].numpy()


# --- what is drawn ---------------------------------------------------------------------------------


def test_inputs_weights_and_noise_are_standard_normal_and_independent():
    task = LinearRegression(dimensions=3, examples=4, noise=0.7)
    found = drawn(task)
    assert found["x"].shape == (4000, 5, 3) and found["w"].shape == (4000, 3) and found["noise"].shape == (4000, 5)
    columns = np.concatenate([found["x"].reshape(4000, -1), found["w"], found["noise"]], 1)
    assert np.abs(columns.mean(0)).max() < 5 / np.sqrt(4000)
    assert np.abs(np.cov(columns.T) - np.eye(columns.shape[1])).max() < 0.12


def test_components_have_norm_sqrt_d_are_equally_likely_and_the_same_for_every_seed():
    task = LinearRegression(**MIXTURE)
    assert np.allclose(task.components.norm(dim=1), np.sqrt(3)) and task.components.shape == (4, 3)
    assert torch.equal(task.components, LinearRegression(**MIXTURE, batch_size=7).components)
    assert not torch.equal(task.components, LinearRegression(**MIXTURE, component_seed=1).components)
    counts = np.bincount(drawn(task)["component"].astype(int), minlength=4)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def test_noise_and_a_mixture_leave_the_inputs_as_they_were():
    plain, noisy, mixed = (drawn(LinearRegression(**options), 8) for options in ({}, {"noise": 0.5}, MIXTURE))
    assert (plain["x"] == noisy["x"]).all() and (plain["w"] == noisy["w"]).all() and (plain["x"] == mixed["x"]).all()
    assert "noise" not in plain and "w" not in mixed


def test_a_sequence_is_x_y_x_y_padded_to_one_width_and_no_query_shows_its_answer():
    task = LinearRegression(dimensions=2, examples=3, noise=0.5)
    batch, choices = task.batch(SEED, 0), task.draw([SEED], 0, 1)
    features = batch.features[0]
    assert features.shape == (64, 7, 3) and task.layout.scored == (0, 2, 4, 6)
    assert (features[:, ::2, 0] == 0).all() and (features[:, 1::2, 1:] == 0).all()
    x, w, noise = (choices[name][0, 0] for name in ("x", "w", "noise"))
    assert torch.equal(features[:, ::2, 1:], x)
    answers = torch.einsum("bqd,bd->bq", x, w) + 0.5 * noise
    assert torch.allclose(batch.targets[0, :, :, 0], answers, atol=1e-6)
    assert torch.equal(features[:, 1::2, 0], batch.targets[0, :, :-1, 0])
    assert not batch.truth.query.any()


def test_the_baseline_is_the_loss_of_predicting_zero():
    for options in ({}, {"noise": 0.7}, {"dimensions": 5, **MIXTURE}):
        task = LinearRegression(**options)
        batch = task.batch(SEED, 0, batch_size=4000)
        zero = task.objective.member_loss(task.references()["zero"](batch), batch).item()
        assert zero == pytest.approx(task.baselines()["zero"], rel=0.05)


# --- references ------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_references_equal_numpy_to_ten_digits(noise):
    task = LinearRegression(dimensions=3, examples=6, noise=noise)
    batch = task.batch(SEED, 0, batch_size=12)
    found = {name: predicted(task, name, batch) for name in task.references()}
    assert ("ridge" in found) == (noise > 0) and not np.concatenate([y[:, 0] for y in found.values()]).any()
    for b, (x, y) in enumerate(zip(*pairs_of(batch), strict=True)):
        for n in range(1, 7):
            seen, answers, query = x[:n], y[:n], x[n]
            weights = {
                "averaging": seen.T @ answers / n,
                "gradient_step": seen.T @ answers / (n + 4 + noise**2),
                "least_squares": np.linalg.lstsq(seen, answers, rcond=None)[0],
            }
            if noise:
                weights["ridge"] = np.linalg.solve(seen.T @ seen + noise**2 * np.eye(3), seen.T @ answers)
            for name, w in weights.items():
                assert found[name][b, n] == pytest.approx(w @ query, abs=1e-10, rel=1e-10), (name, n)
            nearest = answers[np.linalg.norm(seen - query, axis=1).argmin()]
            assert found["nearest_neighbour"][b, n] == nearest


def test_the_posterior_of_a_mixture_is_bayes_rule_and_its_mode_the_least_error():
    task = LinearRegression(**MIXTURE)
    batch, w = task.batch(SEED, 0, batch_size=12), task.components.double().numpy()
    mean, mode = (predicted(task, name, batch) for name in ("posterior_mean", "likeliest_component"))
    assert torch.equal(task.exact(batch), task.references()["posterior_mean"](batch))
    for b, (x, y) in enumerate(zip(*pairs_of(batch), strict=True)):
        assert mean[b, 0] == pytest.approx(w.mean(0) @ x[0], abs=1e-10) and mode[b, 0] == 0
        for n in range(1, 9):
            squares = np.array([sum((y[i] - w[j] @ x[i]) ** 2 for i in range(n)) for j in range(4)])
            likelihood = np.exp(-squares / (2 * 0.25))
            assert mean[b, n] == pytest.approx(likelihood / likelihood.sum() @ (w @ x[n]), abs=1e-10)
            assert mode[b, n] == pytest.approx(w[squares.argmin()] @ x[n], abs=1e-10)


@pytest.mark.parametrize("options", [{}, {"noise": 1.0}, MIXTURE])
def test_the_step_of_the_gradient_reference_is_the_best_there_is(options):
    # the expected error of w = r X'y is a parabola of r: on many sequences, its least is where the formula says
    task = LinearRegression(**options)
    batch = task.batch(SEED, 0, batch_size=20_000)
    step, target = predicted(task, "gradient_step", batch)[:, 1:], batch.targets[0, :, 1:, 0].double().numpy()
    best = (step * target).mean(0) / (step**2).mean(0)
    assert np.abs(best - 1).max() < 0.06


@pytest.mark.parametrize("options", [{}, {"noise": 0.5}, MIXTURE])
def test_no_reference_beats_bayes_rule(options):
    task = LinearRegression(**options)
    batch = task.batch(SEED, 0, batch_size=4000)
    errors = {name: (find(batch) - batch.targets).square().mean((0, 1, 3)) for name, find in task.references().items()}
    exact = (task.exact(batch) - batch.targets).square().mean((0, 1, 3))
    assert all((error > exact - 0.03).all() for error in errors.values())
    # without noise it knows the weights from d examples on
    assert exact[3:].max() < 1e-9 if not options else exact[-1] > 0.25


def test_with_noise_least_squares_has_no_finite_error_about_d_examples():
    assert LinearRegression().unbounded == () and LinearRegression(noise=0.1).unbounded == (2, 3, 4)
    assert LinearRegression(dimensions=1, examples=2, noise=0.1).unbounded == (1, 2)


def test_further_queries_stand_in_the_place_of_one_and_leave_the_context():
    task = LinearRegression(dimensions=2, examples=3)
    batch, x = task.batch(SEED, 0, batch_size=4), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    shown = task.with_queries(batch, 2, x).features[0].unflatten(0, (4, 3))
    assert torch.equal(shown[:, :, 4, 1:], x.expand(4, 3, 2))
    kept = [0, 1, 2, 3, 5, 6]
    assert torch.equal(shown[:, :, kept], batch.features[0, :, None, kept].expand(4, 3, 6, 3))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"dimensions": 0}, "LinearRegression.dimensions: got 0, expected at least 1"),
        ({"examples": 0}, "LinearRegression.examples: got 0, expected at least 1"),
        ({"noise": -0.5}, "LinearRegression.noise: got -0.5, expected a finite number of 0 or more"),
        ({"components": 0, "noise": 0.5}, "LinearRegression.components: got 0, expected at least 1, or null"),
        ({"components": 4}, "LinearRegression.noise: got 0.0, expected more than 0: Bayes' rule for"),
    ],
)
def test_settings_out_of_range_are_refused(options, line):
    with pytest.raises(ConfigError, match=line):
        LinearRegression(**options)
