"""The search behind a factorization: everybody's best coefficients for a head, the best head, a search without end."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from worlds import names, world

from openrlhf_pgrpo.core import optimum
from openrlhf_pgrpo.core.annotations import Annotations
from openrlhf_pgrpo.core.optimum import Problem, minimum, strongest

pytestmark = pytest.mark.core


def penalised(problem, head, coefficients, l2):
    """The loss with its penalty, and its slopes by head and by coefficients."""
    loss, by_head, by_coefficients = problem.loss_and_slopes(head, coefficients)
    penalty = l2 / 2 * (np.square(head).sum() + np.square(coefficients).sum())
    return loss + penalty, by_head + l2 * head, by_coefficients + l2 * coefficients


@pytest.mark.parametrize("sparse", [False, True])
def test_slopes_are_those_of_the_loss(sparse):
    X, known, _ = world()
    problem = Problem.of(csr_matrix(X) if sparse else X, known)
    rng = np.random.default_rng(0)
    head, coefficients = rng.normal(size=(2, 8)), rng.normal(size=(40, 2))
    _, by_head, by_coefficients = problem.loss_and_slopes(head, coefficients)
    for table, slope in ((head, by_head), (coefficients, by_coefficients)):
        for place in [(0, 0), (1, 3 % table.shape[1])]:
            losses = []
            for step in (1e-6, -2e-6):
                table[place] += step
                losses.append(problem.loss_and_slopes(head, coefficients)[0])
            table[place] += 1e-6
            assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope[place], rel=1e-4)


@pytest.mark.parametrize("l2", [1e-4, 1.0, 100.0])
def test_coefficients_are_the_best_of_each_user_from_any_start(l2):
    """Of users with one answer, many answers, ties and answers that any large coefficient explains."""
    X, known, _ = world(users=50, pairs=90, share=0.3, strength=20.0)
    extra = Annotations(
        np.r_[known.user, 50, 51, 51], np.r_[known.pair, 3, 5, 6], np.r_[known.preference, 1, 0.5, 0.5], names(52)
    )
    problem = Problem.of(X, extra)
    rng = np.random.default_rng(0)
    head = rng.normal(size=(3, 8))
    features = problem.X @ head.T
    for first in (np.zeros((52, 3)), 1e5 * rng.normal(size=(52, 3))):
        found = problem.best_coefficients(features, first, l2)
        assert np.abs(penalised(problem, head, found, l2)[2]).max() < 1e-5 * max(1, l2)
    np.testing.assert_allclose(found[51], 0, atol=1e-8)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("l2", [0.3, 3.0])
def test_no_direction_leads_below_the_minimum(sparse, l2):
    """Both slopes are zero there, and a search for head and coefficients at once finds nothing lower."""
    X, known, _ = world(users=60, pairs=80, rewards=3)
    problem = Problem.of(csr_matrix(X) if sparse else X, known)
    rng = np.random.default_rng(0)
    head, coefficients = rng.normal(size=(3, 8)), rng.normal(size=(60, 3))
    found = minimum(problem, head, coefficients, l2)
    least, *slopes = penalised(problem, *found, l2)
    assert max(np.abs(slope).max() for slope in slopes) < 1e-2

    def together(numbers):
        loss, *slopes = penalised(problem, numbers[:24].reshape(3, 8), numbers[24:].reshape(60, 3), l2)
        return loss, np.concatenate([*map(np.ravel, slopes)])

    other = minimize(together, np.r_[head.ravel(), coefficients.ravel()], jac=True, method="L-BFGS-B",
                     options={"maxiter": 5000, "maxfun": 9999, "ftol": 1e-13, "gtol": 1e-8})  # fmt: skip
    assert least == pytest.approx(other.fun, rel=1e-9)


def test_of_a_start_only_the_product_matters():
    X, known, _ = world()
    problem = Problem.of(X, known)
    rng = np.random.default_rng(0)
    head, coefficients, mix = rng.normal(size=(2, 8)), rng.normal(size=(40, 2)), rng.normal(size=(2, 2))
    one = minimum(problem, head, coefficients, 1.0)
    other = minimum(problem, mix @ head, coefficients @ np.linalg.inv(mix), 1.0)
    np.testing.assert_allclose(one[1] @ one[0], other[1] @ other[0], atol=1e-4)


def test_the_strongest_are_the_leading_triplets_on_both_sides():
    rng = np.random.default_rng(0)
    head, coefficients = rng.normal(size=(4, 9)), rng.normal(size=(20, 4))
    left, strengths, right = np.linalg.svd(coefficients @ head)
    for factors in (4, 2):
        first, second = strongest(head, coefficients, factors)
        np.testing.assert_allclose(
            second @ first, left[:, :factors] * strengths[:factors] @ right[:factors], atol=1e-9
        )
        np.testing.assert_allclose(first @ first.T, np.diag(strengths[:factors]), atol=1e-9)
        np.testing.assert_allclose(second.T @ second, np.diag(strengths[:factors]), atol=1e-9)
    nothing = strongest(0 * head, 0 * coefficients, 2)
    assert not nothing[0].any() and not nothing[1].any()


def test_a_search_without_an_end_is_an_error(monkeypatch):
    X, known, _ = world()
    problem, start = Problem.of(X, known), (np.eye(2, 8), np.ones((40, 2)))
    monkeypatch.setattr(optimum, "MOST_STEPS", 1)
    with pytest.raises(ArithmeticError, match="coefficients need to converge in 1 steps, got no end: raise l2, now 3"):
        minimum(problem, *start, 3.0)
    for l2 in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="l2 needs a finite number above 0"):
            minimum(problem, *start, l2)
