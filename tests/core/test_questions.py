"""Questions and stopping, against numerical integration and the formulas by hand."""

import numpy as np
import pytest
from scipy import integrate
from scipy.special import expit
from worlds import some_prior

from openrlhf_pgrpo.core import questions
from openrlhf_pgrpo.core.posterior import Posterior, Prior, posterior
from openrlhf_pgrpo.core.questions import (
    enough,
    information,
    next_question,
    predict,
    predictive_entropy,
)

pytestmark = pytest.mark.core


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


@pytest.mark.parametrize("deviation", [0, 1e-8, 0.3, 4, 30, 150])
def test_the_chance_is_the_sum_over_all_nodes(deviation):
    """Which is taken in pairs of nodes, and stays a number for any mean."""
    rng = np.random.default_rng(3)
    mean = np.concatenate([rng.normal(0, 10, 3000), [0, -0.0, 40, -40, 800, -800, 1e6, -1e6]])
    belief = Posterior(np.array([1.0, 0.0]), np.diag([1e-40, 1.0]))
    chance = predict(np.stack([mean, np.full_like(mean, deviation)], 1), belief)
    nodes = expit(mean[:, None] + deviation * questions.NODES)
    np.testing.assert_allclose(chance, nodes @ questions.WEIGHTS, rtol=0, atol=1e-14)
    wide = predict(np.array([[1e5, 1e5]]), belief)
    assert wide == pytest.approx(0.8413, abs=0.05)  # the normal distribution's, at a standard deviation


@pytest.mark.parametrize("scale", [0, 1e-6, 0.3, 2, 30, 1e4])
def test_the_bound_spares_work_and_never_the_best_pair(scale, monkeypatch):
    rng = np.random.default_rng(11)
    rows = []
    monkeypatch.setattr(questions, "information", lambda *of: rows.append(len(of[0])) or information(*of))
    for _ in range(40):
        pool = np.repeat(scale * rng.standard_t(3, (300, 3)), 2, axis=0)  # each twice: the first is asked
        belief, asked = Posterior(*some_prior(rng, 3)), rng.choice(600, rng.integers(600), replace=False)
        free = np.isin(np.arange(600), asked, invert=True)
        logits, variance = pool @ belief.mean, np.einsum("pd,de,pe->p", pool, belief.covariance, pool)
        exact = np.where(free, information(logits, variance), -np.inf)
        row, entropy = next_question(pool, belief, asked)
        assert exact[row] == pytest.approx(exact.max(), abs=1e-12)
        assert entropy == predictive_entropy(pool, belief)
    if 0.3 <= scale <= 2:
        assert np.mean(rows) < 30  # of 300 on average, the one that sets the bar included
    assert next_question(pool, belief, range(600)) == (None, entropy)


def test_the_next_question_by_hand():
    belief = Posterior(np.array([1.0, 0.0]), np.diag([1.0, 4.0]))
    # logits 0, 0, 3 with variances 4, 1, 13
    pool = np.array([[0.0, 1.0], [0.0, 0.5], [3.0, 1.0]])
    # at 0 +- 2 the answer is less expected than at 3 +- 3.6, but it also depends less on the user
    assert next_question(pool, belief)[0] == 2
    assert next_question(pool, belief, asked=[2])[0] == 0


@pytest.mark.parametrize(
    "pool, message",
    [
        (np.ones((3, 5)), r"2 base rewards need a pool of shape \(P, 2\), got \(3, 5\)"),
        (np.array([[1.0, 1.0], [1.0, np.nan]]), "finite features, got .* in row 1"),
    ],
)
def test_bad_input_is_refused(pool, message):
    with pytest.raises(ValueError, match=message):
        next_question(pool, Posterior(np.zeros(2), np.eye(2)))


def test_questions_chosen_by_information_teach_more_than_random_ones():
    rng = np.random.default_rng(7)
    prior, pool = Prior(np.zeros(4), np.diag([4.0, 2.0, 1.0, 0.5])), rng.normal(0, 1, (300, 4))
    errors = {"information": [], "random": []}
    for user in rng.multivariate_normal(prior.mean, prior.covariance, 60):
        for rule, error in errors.items():
            asked, answers, belief = [], [], Posterior(*prior)
            for _ in range(8):
                left = np.setdiff1d(np.arange(300), asked)
                asked.append(int(rng.choice(left)) if rule == "random" else next_question(pool, belief, asked)[0])
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
