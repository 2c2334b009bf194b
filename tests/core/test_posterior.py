"""The belief about a new user: prior and posterior against scipy, numerical integration and the formulas by hand."""

import sys

import numpy as np
import pytest
from scipy import optimize
from scipy.special import expit
from worlds import some_prior

from openrlhf_pgrpo.core.posterior import Prior, posterior, posteriors

pytestmark = pytest.mark.core

MODULE = sys.modules[posterior.__module__]


def loss(coefficients, features, answers, prior):
    logits = features @ coefficients
    off = coefficients - prior.mean
    bce = np.logaddexp(0, logits) - answers * logits
    return bce.sum() + 0.5 * off @ np.linalg.solve(prior.covariance, off)


# --- the prior -------------------------------------------------------------------------------------------------------


def test_prior_by_hand():
    prior = Prior.of([[1.0, 0.0], [3.0, 0.0], [2.0, 6.0]])
    assert prior.mean == pytest.approx([2, 2])
    # deviations (-1,-2), (1,-2), (0,4): scatter [[2, 0], [0, 24]], C = half of it, t = (1 + 12) / 2 = 6.5,
    # more than the mean square (1 + 9 + 4 + 36) / 6 = 8.33 divided by 3 users; (2 C + 2 * 6.5 I) / (2 + 2)
    assert prior.covariance == pytest.approx(np.array([[15 / 4, 0], [0, 37 / 4]]))


def test_prior_of_few_and_of_equal_users():
    alone = Prior.of([[3.0, 4.0]])  # t = mean square 12.5 / 1; (0 + 2 t I) / (0 + 2)
    assert alone.mean == pytest.approx([3, 4]) and alone.covariance == pytest.approx(12.5 * np.eye(2))
    equal = Prior.of([[3.0, 4.0]] * 5)  # t = 12.5 / 5 = 2.5; 2 t / (4 + 2)
    assert equal.covariance == pytest.approx(2.5 / 3 * np.eye(2))
    few = Prior.of(np.random.default_rng(0).normal(0, 1, (3, 8)))  # rank 2 of their own
    assert np.linalg.eigvalsh(few.covariance)[0] > 0.1


def test_many_users_outweigh_the_floor():
    coefficients = np.random.default_rng(1).normal(0, [1, 5], (20000, 2))
    assert Prior.of(coefficients).covariance == pytest.approx(np.cov(coefficients.T), rel=2e-3, abs=1e-2)


@pytest.mark.parametrize(
    "coefficients, message",
    [
        (np.zeros((0, 3)), r"shape \(users, base rewards\), got \(0, 3\)"),
        (np.zeros(3), r"got \(3,\)"),
        ([[1.0, 2.0], [np.nan, 1.0]], "finite coefficients, got .* of user 1"),
        (np.zeros((4, 2)), "other than 0"),
    ],
)
def test_a_prior_needs_users_and_finite_numbers(coefficients, message):
    with pytest.raises(ValueError, match=message):
        Prior.of(coefficients)


# --- the posterior ---------------------------------------------------------------------------------------------------


def test_one_answer_by_hand():
    # N(0, 1), v = 2, answer 1: sigmoid(-2 x) 2 = x at x = 0.7388...; curvature 1 + 4 s'(2 x)
    fitted = posterior([[2.0]], [1.0], Prior(np.zeros(1), np.eye(1)))
    (x,) = fitted.mean
    assert 2 * expit(-2 * x) == pytest.approx(x, rel=1e-12)
    assert fitted.covariance[0, 0] == pytest.approx(1 / (1 + 4 * expit(2 * x) * expit(-2 * x)), rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_map_is_the_minimum_and_covariance_the_inverse_hessian(seed):
    rng = np.random.default_rng(seed)
    rewards, n = int(rng.integers(1, 5)), int(rng.integers(1, 25))
    prior, features = some_prior(rng, rewards), rng.normal(0, 3, (n, rewards))
    answers = rng.choice([0, 0.5, 1, 0.2, 0.93], n)
    fitted = posterior(features, answers, prior)

    found = optimize.minimize(loss, prior.mean, (features, answers, prior), method="BFGS", options={"gtol": 1e-9})
    assert fitted.mean == pytest.approx(found.x, abs=1e-5)
    gradient = optimize.approx_fprime(fitted.mean, loss, 1e-7, features, answers, prior)
    assert gradient == pytest.approx(0, abs=1e-4)

    step, hessian = 1e-3, np.empty((rewards, rewards))
    for i, a in enumerate(step * np.eye(rewards)):
        for j, b in enumerate(step * np.eye(rewards)):
            around = [loss(fitted.mean + x * a + y * b, features, answers, prior) for x in (1, -1) for y in (1, -1)]
            hessian[i, j] = (around[0] - around[1] - around[2] + around[3]) / (4 * step**2)
    assert np.linalg.inv(fitted.covariance) == pytest.approx(hessian, rel=1e-3, abs=1e-3)
    assert np.array_equal(fitted.covariance, fitted.covariance.T)


@pytest.mark.parametrize("rewards", [1, 2])
def test_with_many_answers_laplace_is_the_exact_posterior(rewards):
    rng = np.random.default_rng(3)
    prior, features = some_prior(rng, rewards), rng.normal(0, 1, (400, rewards))
    answers = (rng.random(400) < expit(features @ prior.mean)).astype(float)
    fitted = posterior(features, answers, prior)
    spread = np.sqrt(np.diag(fitted.covariance))
    axes = [np.linspace(m - 7 * s, m + 7 * s, 81) for m, s in zip(fitted.mean, spread)]
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], 1)
    density = -np.array([loss(point, features, answers, prior) for point in grid])
    density = np.exp(density - density.max())
    density /= density.sum()
    mean = density @ grid
    assert np.abs(mean - fitted.mean).max() < 0.1 * spread.max()
    assert (grid - mean).T @ ((grid - mean) * density[:, None]) == pytest.approx(fitted.covariance, rel=0.1, abs=1e-3)


def test_separable_answers_stay_finite():
    prior = Prior(np.zeros(2), np.eye(2))
    fitted = posterior(np.tile([1.0, 0.0], (50, 1)), np.ones(50), prior)
    (x, y) = fitted.mean
    assert 50 * expit(-x) == pytest.approx(x) and y == 0
    assert fitted.covariance[1, 1] == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_contradictions_and_far_priors_converge_at_any_scale(scale):
    """A full Newton step overshoots here: every answer contradicts a prior that is sure."""
    prior = Prior(np.array([30.0, 0.0]) / scale, np.diag([1.0, 1e4]) / scale**2)
    features, answers = scale * np.array([[1.0, 0.1], [1.0, -0.1], [2.0, 0.0], [0.0, 50.0]]), np.array([0, 0, 0, 1.0])
    fitted = posterior(features, answers, prior)
    pull = features.T @ (answers - expit(features @ fitted.mean))
    assert prior.covariance @ pull * scale == pytest.approx((fitted.mean - prior.mean) * scale, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("far", [0, 300, 5000])
@pytest.mark.parametrize("wide", [1e-3, 1, 30, 3000])
def test_a_newton_step_from_the_map_is_zero(wide, far):
    """200 users with logits up to `wide`. The prior expects logits up to `far`, and half the answers contradict it."""
    rng = np.random.default_rng(9)
    features = rng.normal(0, 1, (200, 6, 3))
    features *= wide / np.abs(features).max()
    features[..., 2] = rng.uniform(-far, far, (200, 6))
    expected = features[..., 2] > 0
    answers = np.where(rng.random((200, 6)) < 0.5, expected, rng.choice([0, 0.5, 1], (200, 6)))
    prior = Prior(np.array([0, 0, 1.0]), np.diag([1, 1, 1e-12]))
    means, covariances = posteriors(features, answers, prior)
    surprise = answers - expit(np.einsum("und,ud->un", features, means))
    pull = np.einsum("un,und->ud", surprise, features) - (means - prior.mean) / np.diag(prior.covariance)
    steps = np.einsum("uij,uj->ui", covariances, pull)
    assert (steps / np.sqrt(np.diag(prior.covariance))) == pytest.approx(0, abs=1e-8)


def test_newton_without_an_end_is_an_error(monkeypatch):
    monkeypatch.setattr(MODULE, "MOST_STEPS", 2)
    with pytest.raises(ArithmeticError, match="did not converge in 2 steps"):
        posterior([[5.0, 1.0]], [1.0], GOOD_PRIOR)


def test_without_answers_the_posterior_is_the_prior():
    prior = some_prior(np.random.default_rng(0), 3)
    fitted = posterior(np.empty((0, 3)), [], prior)
    assert fitted.mean == pytest.approx(prior.mean) and fitted.covariance == pytest.approx(prior.covariance)


def test_a_tie_narrows_without_taking_sides_and_swapping_a_pair_changes_nothing():
    prior = Prior(np.zeros(2), np.eye(2))
    tie = posterior([[1.0, 0.0]], [0.5], prior)
    assert tie.mean == pytest.approx(0) and np.diag(tie.covariance) == pytest.approx([1 / 1.25, 1])
    rng = np.random.default_rng(0)
    features, answers = rng.normal(0, 1, (6, 2)), rng.random(6)
    one, other = posterior(features, answers, prior), posterior(-features, 1 - answers, prior)
    assert one.mean == pytest.approx(other.mean) and one.covariance == pytest.approx(other.covariance)


def test_many_users_in_one_call_are_each_alone(monkeypatch):
    monkeypatch.setattr(MODULE, "USERS_AT_ONCE", 7)
    rng = np.random.default_rng(5)
    prior, features = some_prior(rng, 3), rng.normal(0, 2, (30, 9, 3))
    answers = rng.choice([0, 0.5, 1, np.nan], (30, 9))
    answers[4] = np.nan
    features[11, np.isnan(answers[11])] = np.inf  # features without an answer do not matter
    means, covariances = posteriors(features, answers, prior)
    for user in range(30):
        asked = ~np.isnan(answers[user])
        alone = posterior(features[user, asked], answers[user, asked], prior)
        assert means[user] == pytest.approx(alone.mean, rel=1e-9, abs=1e-12)
        assert covariances[user] == pytest.approx(alone.covariance, rel=1e-9, abs=1e-12)
    assert means[4] == pytest.approx(prior.mean)


BAD_PRIOR = Prior(np.zeros(2), np.diag([1.0, -1.0]))
GOOD_PRIOR = Prior(np.zeros(2), np.eye(2))


@pytest.mark.parametrize(
    "features, answers, prior, message",
    [
        ([[1.0, 2.0]], [1.5], GOOD_PRIOR, "answers from 0 to 1, got 1.5 as answer 0 of user 0"),
        ([[1.0, 2.0]], [np.nan], GOOD_PRIOR, "leave out what was not answered"),
        ([[1.0, np.nan]], [1.0], GOOD_PRIOR, "finite features"),
        ([[1.0, 2.0, 3.0]], [1.0], GOOD_PRIOR, r"2 base rewards need features \(U, n, 2\)"),
        ([[1.0, 2.0]], [1.0, 0.0], GOOD_PRIOR, r"got \(1, 1, 2\) and \(1, 2\)"),
        ([[1.0, 2.0]], [1.0], BAD_PRIOR, "a prior needs a positive definite covariance, got an eigenvalue of -1"),
        ([[1.0, 2.0]], [1.0], Prior(np.array([0, np.inf]), np.eye(2)), "a prior needs finite numbers"),
        ([[1.0, 2.0]], [1.0], Prior(np.zeros(2), np.eye(3)), r"got \(2,\), \(3, 3\)"),
        ([[1e200, 0.0]], [0.0], Prior(np.ones(2), np.eye(2)), "logits up to 10000, got 1e"),
    ],
)
def test_bad_numbers_are_refused(features, answers, prior, message):
    with pytest.raises(ValueError, match=message):
        posterior(features, answers, prior)


def test_the_bad_answer_is_named_by_its_user():
    answers = np.full((5000, 2), 1.0)
    answers[4321, 1] = -1
    with pytest.raises(ValueError, match="got -1.0 as answer 1 of user 4321"):
        posteriors(np.ones((5000, 2, 1)), answers, Prior(np.zeros(1), np.eye(1)))


@pytest.mark.parametrize("features", [[1e300, -1e300], [1e308, 1e308], [1e5, 0.0], [1e160, 1e160]])
def test_e5_features_whose_logits_overflow_are_refused(features):
    """Also where the logit is not a number, because inf - inf is none."""
    prior = Prior(np.array([1e10, 1e10]), np.array([[4.0, -1.0], [-1.0, 4.0]]) * 1e4)
    with pytest.raises(ValueError, match="logits up to 10000"):
        posterior([features], [1.0], prior)
