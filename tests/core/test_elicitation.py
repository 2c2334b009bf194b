"""A new user: posterior, questions and stopping against numerical integration, scipy and the formulas by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import integrate, optimize
from scipy.special import expit

from openrlhf_pgrpo.core import elicitation
from openrlhf_pgrpo.core.elicitation import (
    RULES,
    Answer,
    Posterior,
    Prior,
    Profile,
    enough,
    information,
    next_questions,
    posterior,
    posteriors,
    predict,
    predictive_entropy,
)

pytestmark = pytest.mark.core


def some_prior(rng, rewards):
    root = rng.normal(0, 1, (rewards, rewards))
    return Prior(rng.normal(0, 1, rewards), root @ root.T + 0.1 * np.eye(rewards))


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
def test_no_prior_of_nothing(coefficients, message):
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
    """Where a full Newton step overshoots: the prior is sure of what every answer denies."""
    prior = Prior(np.array([30.0, 0.0]) / scale, np.diag([1.0, 1e4]) / scale**2)
    features, answers = scale * np.array([[1.0, 0.1], [1.0, -0.1], [2.0, 0.0], [0.0, 50.0]]), np.array([0, 0, 0, 1.0])
    fitted = posterior(features, answers, prior)
    pull = features.T @ (answers - expit(features @ fitted.mean))
    assert prior.covariance @ pull * scale == pytest.approx((fitted.mean - prior.mean) * scale, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("far", [0, 300, 5000])
@pytest.mark.parametrize("wide", [1e-3, 1, 30, 3000])
def test_a_step_of_newton_from_the_map_goes_nowhere(wide, far):
    """200 users with logits of that size, whom the prior expects that far off; half the answers deny it."""
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
    monkeypatch.setattr(elicitation, "MOST_STEPS", 2)
    with pytest.raises(ArithmeticError, match="no end in 2 steps"):
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
    monkeypatch.setattr(elicitation, "USERS_AT_ONCE", 7)
    rng = np.random.default_rng(5)
    prior, features = some_prior(rng, 3), rng.normal(0, 2, (30, 9, 3))
    answers = rng.choice([0, 0.5, 1, np.nan], (30, 9))
    answers[4] = np.nan
    features[11, np.isnan(answers[11])] = np.inf  # of what was not answered, nothing matters
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
def test_no_posterior_of_bad_numbers(features, answers, prior, message):
    with pytest.raises(ValueError, match=message):
        posterior(features, answers, prior)


def test_the_bad_answer_is_named_by_its_user():
    answers = np.full((5000, 2), 1.0)
    answers[4321, 1] = -1
    with pytest.raises(ValueError, match="got -1.0 as answer 1 of user 4321"):
        posteriors(np.ones((5000, 2, 1)), answers, Prior(np.zeros(1), np.eye(1)))


# --- the next question -----------------------------------------------------------------------------------------------


def entropy(chance):
    return -chance * np.log(chance) - (1 - chance) * np.log(1 - chance)


@pytest.mark.parametrize("mean, deviation", [(0, 0.1), (0.3, 1), (-4, 1), (2, 3), (-1, 5), (0, 5), (12, 5), (3, 10)])
def test_predictions_and_information_by_numerical_integration(mean, deviation):
    def expect(value):
        def weighted(x):
            return value(expit(mean + deviation * x)) * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)

        points = np.clip([-mean / deviation, -mean / deviation + 1, -mean / deviation - 1], -8, 8)
        return integrate.quad(weighted, -8, 8, points=points, limit=400)[0]

    tolerance = 1e-5 if deviation <= 5 else 2e-3

    chance = expect(lambda p: p)
    belief = Posterior(np.array([float(mean)]), np.array([[deviation**2]]))
    assert predict([[1.0], [-1.0]], belief) == pytest.approx([chance, 1 - chance], abs=tolerance)
    expected = entropy(chance) - expect(lambda p: entropy(np.clip(p, 1e-300, 1 - 1e-16)))
    got = information(np.array([mean]), np.array([deviation**2]))
    assert got == pytest.approx(expected, abs=tolerance)


def test_information_is_what_the_posterior_gains():
    """In D = 1, the expected shrinkage of the entropy of the coefficient's exact posterior."""
    grid = np.linspace(-12, 12, 20001)
    prior = np.exp(-((grid - 0.4) ** 2) / 2 / 1.7)
    prior /= prior.sum()
    gain = 0.0
    for answer in (0, 1):
        joint = prior * (expit(1.3 * grid) if answer else expit(-1.3 * grid))
        after = joint / joint.sum()
        gain += joint.sum() * (np.sum(after * np.log(after + 1e-300)) - np.sum(prior * np.log(prior + 1e-300)))
    assert information(np.array([1.3 * 0.4]), np.array([1.3**2 * 1.7])) == pytest.approx(gain, rel=1e-5)


def test_rules_by_hand():
    belief = Posterior(np.array([1.0, 0.0]), np.diag([1.0, 4.0]))
    # logits 0, 0, 3 with variances 4, 1, 13
    pool = np.array([[0.0, 1.0], [0.0, 0.5], [3.0, 1.0]])
    slope = expit(3) * expit(-3)
    for rule, scores in (("released", [4 / 16, 1 / 16, 13 * slope**2]), ("d_optimal", [1, 1 / 4, 13 * slope])):
        got = RULES[rule](pool @ belief.mean, np.array([4.0, 1.0, 13.0]))
        assert got == pytest.approx(scores)
        assert list(next_questions(pool, belief, rule=rule)) == [int(np.argmax(scores))]
    # at 0 +- 2 the answer is less expected than at 3 +- 3.6, but it also depends less on the user
    assert list(next_questions(pool, belief, rule="information")) == [2]
    assert list(next_questions(pool, belief, asked=[2], rule="information")) == [0]
    assert list(next_questions(pool, belief, asked=[0], rule="d_optimal")) == [2]  # 0.587 above 0.25


def test_d_optimal_orders_as_the_determinant_does():
    rng = np.random.default_rng(2)
    pool, belief = rng.normal(0, 1, (40, 3)), Posterior(*some_prior(rng, 3))
    precision, slopes = np.linalg.inv(belief.covariance), expit(pool @ belief.mean) * expit(-pool @ belief.mean)
    after = [np.linalg.slogdet(precision + s * np.outer(v, v))[1] for s, v in zip(slopes, pool)]
    assert list(next_questions(pool, belief, rule="d_optimal")) == [int(np.argmax(after))]


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_is_greedy_on_the_updated_covariance(rule):
    rng = np.random.default_rng(4)
    pool, belief = rng.normal(0, 1, (60, 4)), Posterior(*some_prior(rng, 4))
    chosen, covariance = [], belief.covariance
    for _ in range(5):
        (best,) = next_questions(pool, Posterior(belief.mean, covariance), chosen, rule)
        chosen.append(int(best))
        v, slope = pool[best], expit(pool[best] @ belief.mean) * expit(-pool[best] @ belief.mean)
        covariance = np.linalg.inv(np.linalg.inv(covariance) + slope * np.outer(v, v))
        covariance = (covariance + covariance.T) / 2
    assert list(next_questions(pool, belief, rule=rule, count=5)) == chosen


def test_a_batch_does_not_ask_the_same_twice():
    belief = Posterior(np.zeros(2), np.eye(2))
    pool = np.array([[3.0, 0.0], [3.0, 0.0], [0.0, 2.0]])  # variance 9, then 9 / (1 + 9/4) = 2.8; 4
    assert set(next_questions(pool, belief, count=2).tolist()) == {0, 2}


def test_random_is_uniform_over_what_is_left_and_needs_a_generator():
    belief, pool = Posterior(np.zeros(1), np.eye(1)), np.ones((5, 1))
    rng = np.random.default_rng(0)
    drawn = [tuple(next_questions(pool, belief, [1, 3], "random", 2, rng)) for _ in range(600)]
    assert {row for pair in drawn for row in pair} == {0, 2, 4}
    assert all(one != other for one, other in drawn)
    assert np.bincount([one for one, _ in drawn])[[0, 2, 4]].min() > 150
    with pytest.raises(ValueError, match="needs rng"):
        next_questions(pool, belief, rule="random")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rule="best"), "information, released, d_optimal, random, got 'best'"),
        (dict(asked=[0, 1, 2]), "pool of 3 pairs needs 1 that were not asked yet, got 0"),
        (dict(count=4), "needs 4 that were not asked yet, got 3"),
        (dict(count=0), "needs 0"),
        (dict(pool=np.ones((3, 5))), r"2 base rewards need a pool of shape \(P, 2\), got \(3, 5\)"),
        (dict(pool=np.array([[1.0, 1.0], [1.0, np.nan]])), "finite features, got .* in row 1"),
    ],
)
def test_no_question_from_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        next_questions(**{"pool": np.ones((3, 2)), "belief": Posterior(np.zeros(2), np.eye(2)), **change})


def test_questions_chosen_by_information_teach_more_than_random_ones():
    rng = np.random.default_rng(7)
    prior, pool = Prior(np.zeros(4), np.diag([4.0, 2.0, 1.0, 0.5])), rng.normal(0, 1, (300, 4))
    errors = {"information": [], "random": []}
    for user in rng.multivariate_normal(prior.mean, prior.covariance, 60):
        for rule, error in errors.items():
            asked, answers, belief = [], [], Posterior(*prior)
            for _ in range(8):
                asked.extend(next_questions(pool, belief, asked, rule, rng=rng))
                answers.append(float(rng.random() < expit(pool[asked[-1]] @ user)))
                belief = posterior(pool[asked], answers, prior)
            error.append(np.square(belief.mean - user).sum())
    assert np.mean(errors["information"]) < 0.9 * np.mean(errors["random"])


def test_predictive_entropy_by_hand_and_when_it_is_enough():
    belief = Posterior(np.zeros(2), np.eye(2))
    assert predictive_entropy(np.ones((4, 2)), belief) == pytest.approx(1)  # every chance is 1/2
    sure = Posterior(np.array([np.log(3), 0.0]), 1e-12 * np.eye(2))
    # chances 3/4, 1/4 and 1/2: 0.8113 bits twice, and 1
    assert predictive_entropy([[1, 0], [-1, 0], [0, 1]], sure) == pytest.approx((2 * 0.8112781 + 1) / 3)
    assert not enough(5, 0.4) and not enough(5, 0.4, questions=6, level=0.3)
    assert enough(6, 0.4, questions=6) and enough(1, 0.4, level=0.5) and not enough(1, 0.5, level=0.5)


# --- the file of a user ----------------------------------------------------------------------------------------------


@pytest.fixture
def profile():
    answers = [Answer("p1", (0.1, 2.0), 1.0), Answer("p2", (1 / 3, -1e-17), 0.5)]
    return Profile.of("ana", "f00d", answers, Prior(np.array([0.1, 0.2]), np.array([[2.0, 0.3], [0.3, 1.0]])))


def test_a_profile_comes_back_to_the_bit(profile, tmp_path):
    profile.save(tmp_path / "ana.json")
    back = Profile.load(tmp_path / "ana.json", "f00d")
    assert (back.user, back.fingerprint, back.answers) == ("ana", "f00d", profile.answers)
    assert back.coefficients.tobytes() == profile.coefficients.tobytes()
    assert back.covariance.tobytes() == profile.covariance.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["ana.json"]


def test_a_profile_holds_the_posterior_of_its_answers(profile):
    features, answers = [answer.features for answer in profile.answers], [1.0, 0.5]
    prior = Prior(np.array([0.1, 0.2]), np.array([[2.0, 0.3], [0.3, 1.0]]))
    fitted = posterior(features, answers, prior)
    assert np.array_equal(profile.posterior.mean, fitted.mean)
    assert np.array_equal(profile.posterior.covariance, fitted.covariance)
    assert Profile.of("ben", "f00d", [], prior).coefficients == pytest.approx([0.1, 0.2])


def test_a_profile_for_another_model_is_refused_with_both_named(profile, tmp_path):
    profile.save(tmp_path / "ana.json")
    with pytest.raises(ValueError, match="for the model beef, got one for f00d"):
        Profile.load(tmp_path / "ana.json", "beef")


def test_every_truncation_is_refused_and_the_file_stays(profile, tmp_path):
    path = tmp_path / "ana.json"
    profile.save(path)
    whole = path.read_bytes()
    for length in range(len(whole) - 2):  # without the last newline it is still whole
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="needs to be a whole profile"):
            Profile.load(path, "f00d")
        assert path.read_bytes() == whole[:length]


@pytest.mark.parametrize(
    "change",
    [
        dict(user=3),
        dict(fingerprint=None),
        dict(answers={}),
        dict(answers=[{}]),
        dict(answers=[{"pair": "p", "features": [1.0], "preference": 1.0}]),
        dict(answers=[{"pair": "p", "features": [1.0, 2.0], "preference": 1.5}]),
        dict(answers=[{"pair": "p", "features": [1.0, 2.0], "preference": [1.0, 0.0]}]),
        dict(answers=[{"pair": 7, "features": [1.0, 2.0], "preference": 1.0}]),
        dict(coefficients=[1.0, float("nan")]),
        dict(coefficients=["1.0", "2.0"]),
        dict(coefficients=[True, False]),
        dict(coefficients=[1.0]),
        dict(coefficients=3.0),
        dict(coefficients=[10**400, 1]),
        dict(covariance=[[1.0, 0.0], [0.0, -1.0]]),
        dict(covariance=[[1.0, 0.0], [0.0]]),
        dict(extra=1),
    ],
)
def test_what_is_no_profile_is_refused(profile, tmp_path, change):
    path = tmp_path / "ana.json"
    profile.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="ana.json needs to be a whole profile, got .*: restore it or ask again"):
        Profile.load(path, "f00d")


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b"[" * 100000, b"null"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "ana.json").write_bytes(content)
    with pytest.raises(ValueError, match="needs to be a whole profile"):
        Profile.load(tmp_path / "ana.json", "f00d")


def test_a_failed_save_leaves_the_old_profile(profile, tmp_path):
    path = tmp_path / "ana.json"
    profile.save(path)
    whole = path.read_bytes()
    with pytest.raises(ValueError):
        replace(profile, coefficients=np.array([np.nan, 1.0])).save(path)
    assert path.read_bytes() == whole


def test_a_profile_is_on_the_disk_before_it_replaces_the_old_one(profile, tmp_path, monkeypatch):
    from openrlhf_pgrpo.core import files

    done = []
    fsync, rename = files.os.fsync, files.os.replace
    monkeypatch.setattr(files.os, "fsync", lambda number: (done.append("fsync"), fsync(number)))
    monkeypatch.setattr(files.os, "replace", lambda *paths: (done.append("replace"), rename(*paths)))
    profile.save(tmp_path / "ana.json")
    assert done == ["fsync", "replace", "fsync"]
