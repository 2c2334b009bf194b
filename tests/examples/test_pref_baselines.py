"""The baselines of the reproductions: each is the optimum of its loss."""

import numpy as np
import pytest
from worlds import gradient, names, one_hot, square, world

import pref_baselines
from openrlhf_pgrpo.core.annotations import Annotations
from openrlhf_pgrpo.core.factorization import fit
from pref_baselines import per_user, released, shared, simplex

pytestmark = pytest.mark.core


def test_one_reward_for_all_is_ridge_logistic_regression():
    X, known, _ = world()
    found = shared(X, known, l2=2.0)
    np.testing.assert_array_equal(found.coefficients, np.ones((40, 1)))
    slope = gradient(X, known, np.repeat(found.head, 40, 0)).sum(0)
    np.testing.assert_allclose(slope, -2 * square(X) * found.head[0], atol=1e-3)


@pytest.mark.parametrize("dimensions", [3, 50])  # fewer and more than a user has pairs
def test_one_model_per_user_is_ridge_logistic_regression_of_each_alone(dimensions, monkeypatch):
    X, known, _ = world(users=12, pairs=30, dimensions=dimensions)
    heads = per_user(X, known, l2=2.0)
    np.testing.assert_allclose(gradient(X, known, heads), -2 * square(X) * heads, atol=1e-6)
    assert len(set(np.bincount(known.user))) > 3
    monkeypatch.setattr(pref_baselines, "NUMBERS_AT_ONCE", 1)  # user by user, without padding
    np.testing.assert_allclose(per_user(X, known, l2=2.0), heads, atol=1e-9)


def test_simplex_coefficients_are_weights_and_an_optimum():
    X, known, _ = world(share=0.9)
    found = simplex(X, known, 3, l2=1.0)
    np.testing.assert_allclose(found.coefficients.sum(1), 1)
    assert found.coefficients.min() > 0 and np.ptp(found.coefficients) > 0.3

    def loss(head, table):
        weights = np.exp(table) / np.exp(table).sum(1, keepdims=True)
        z = np.einsum("nd,nd->n", (X @ head.T)[known.pair], weights[known.user])
        entropy = np.logaddexp(0, z) - known.preference * z
        return entropy.sum() + (np.square(head).sum() * square(X) + np.square(table).sum()) / 2

    table = np.log(found.coefficients)
    table -= table.mean(1, keepdims=True)  # the penalty removes a level that changes nothing
    best, rng = loss(found.head, table), np.random.default_rng(0)
    for size in (1e-3, 1e-1):
        for _ in range(20):
            head = found.head + size * rng.normal(size=found.head.shape)
            assert loss(head, table + size * rng.normal(size=table.shape)) > best


def test_one_reward_for_all_compares_no_users():
    apart = Annotations(np.array([0, 1, 2, 2]), np.arange(4), np.array([1, 0, 1, 1.0]), names(3))
    X = one_hot([(0, 1), (1, 2), (3, 4), (4, 5)], 6)
    assert shared(X, apart, l2=0.1).head.shape == (1, 6)
    with pytest.raises(ValueError, match="2 sets of users"):
        simplex(X, apart, 1, l2=0.1)


def test_one_reward_for_all_fails_for_users_of_two_camps():
    rng = np.random.default_rng(0)
    X, camp = rng.normal(size=(200, 5)), np.repeat([1, -1], 15)
    user, pair = np.nonzero(rng.random((30, 200)) < 0.15)
    known = Annotations(user, pair, (camp[user] * X[pair, 0] > 0).astype(float), names(30))
    fresh, rows = rng.normal(size=(3000, 5)), rng.integers(30, size=3000)
    truth = camp[rows] * fresh[:, 0] > 0
    hits = [
        ((found.predict(fresh, rows) > 0.5) == truth).mean() for found in (fit(X, known, 1), shared(X, known, 3.0))
    ]
    assert hits[0] > 0.95 and hits[1] < 0.6  # the camps are of one size


def test_the_released_rule_by_hand():
    slope = np.exp(-3) / (1 + np.exp(-3)) ** 2
    scores = released(np.array([0.0, 0.0, 3.0]), np.array([4.0, 1.0, 13.0]))
    assert scores == pytest.approx([4 / 16, 1 / 16, 13 * slope**2])
