"""Base rewards and coefficients from annotations: the start, the optimum, the canonical form, what is refused."""

import re
import tracemalloc

import numpy as np
import pytest
from scipy.sparse import csr_matrix, identity
from worlds import gradient, names, one_hot, sigmoid, square, world, world_of_texts

from openrlhf_pgrpo.core import factorization, optimum
from openrlhf_pgrpo.core.annotations import Annotations
from openrlhf_pgrpo.core.differences import Differences
from openrlhf_pgrpo.core.factorization import NotCarried, canonical, fit, impute

pytestmark = pytest.mark.core


# --- the start -------------------------------------------------------------------------------------------------------


def test_a_complete_matrix_starts_from_its_svd_of_signed_labels():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 0.3, 0.5, 1], size=(7, 9))
    user, pair = np.indices(labels.shape).reshape(2, -1)
    coefficients, features = impute(Annotations(user, pair, labels.ravel(), names(7)), 9, 3)
    left, strengths, right = np.linalg.svd(2 * labels - 1)
    np.testing.assert_allclose(coefficients @ features.T, (left[:, :3] * strengths[:3]) @ right[:3], atol=1e-9)
    np.testing.assert_allclose(np.square(features).sum(0), strengths[:3], rtol=1e-9)  # sqrt(S) on either side
    np.testing.assert_allclose(np.square(coefficients).sum(0), strengths[:3], rtol=1e-9)


@pytest.mark.parametrize("factors", [1, 2, 6])  # a sparse solver does not find all 6
def test_missing_entries_are_imputed_at_the_same_rank(factors):
    rng = np.random.default_rng(1)
    labels, known = rng.random((6, 8)), rng.random((6, 8)) < 0.7
    user, pair = np.nonzero(known)
    coefficients, features = impute(Annotations(user, pair, labels[known], names(6)), 8, factors)
    filled = np.zeros((6, 8))
    for _ in range(factorization.ROUNDS):
        filled[known] = 2 * labels[known] - 1
        left, strengths, right = np.linalg.svd(filled, full_matrices=False)
        filled = (left[:, :factors] * strengths[:factors]) @ right[:factors]
    np.testing.assert_allclose(coefficients @ features.T, filled, atol=1e-8)


def test_missing_entries_of_a_rank_one_matrix_come_near_what_they_were():
    rng = np.random.default_rng(2)
    truth = np.outer(rng.choice([-1, 1], 30), rng.choice([-1, 1], 40))
    user, pair = np.nonzero(rng.random(truth.shape) < 0.6)
    coefficients, features = impute(Annotations(user, pair, (truth[user, pair] + 1) / 2, names(30)), 40, 1)
    # A missing entry x of a rank-1 matrix grows to 1 - (1 - share)^rounds of it at least, here 1 - .4^10
    assert np.abs(coefficients @ features.T - truth).max() < 0.02


def test_repeated_answers_count_as_their_mean():
    user, pair = np.indices((3, 4)).reshape(2, -1)
    labels = np.array([1, 0, 1, 0.5, 0, 0, 1, 1, 1, 0, 0, 1])
    twice = Annotations(np.r_[user, 0], np.r_[pair, 0], np.r_[labels, 0.5], names(3))  # 1 and a tie
    labels[0] = 0.75
    once = Annotations(user, pair, labels, names(3))
    for one, other in zip(impute(twice, 4, 2), impute(once, 4, 2)):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_no_matrix_of_users_and_pairs_is_ever_made():
    rng, size = np.random.default_rng(0), 30_000
    user, pair = np.r_[np.arange(size), np.arange(size)], np.r_[np.zeros(size, int), rng.integers(size, size=size)]
    known = Annotations(user, pair, rng.random(len(user)), names(size))
    tracemalloc.start()
    coefficients, features = impute(known, size, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert features.shape == coefficients.shape == (size, 2)
    assert peak < 100e6 < 8 * size**2 / 50  # of 7.2 gigabytes


# --- the optimum -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_with_all_base_rewards_the_fit_is_the_convex_optimum_of_the_nuclear_norm(sparse):
    """min loss(theta) + l2 |theta|_* is solved where the slope G has no singular value above l2 and G . theta is
    -l2 |theta|_*; theta (U, H) is in units of X scaled to length 1."""
    X, known, _ = world(users=9, pairs=30, dimensions=4, rewards=4, share=0.8)
    known = Annotations(known.user, known.pair, np.clip(known.preference, 0.1, 0.9), known.users)
    l2, found = 0.05, fit(csr_matrix(X) if sparse else X, known, 4, l2=0.05)
    scale = np.sqrt(square(X))
    theta = found.coefficients @ found.head * scale
    slope = gradient(X / scale, known, theta)
    assert np.linalg.norm(slope, 2) < l2 * (1 + 1e-3)
    np.testing.assert_allclose((slope * theta).sum(), -l2 * np.linalg.norm(theta, "nuc"), rtol=1e-4)


def test_users_of_two_camps_get_opposite_coefficients():
    rng = np.random.default_rng(0)
    X, camp = rng.normal(size=(200, 5)), np.repeat([1, -1], 15)
    user, pair = np.nonzero(rng.random((30, 200)) < 0.15)
    preference = (camp[user] * X[pair, 0] > 0).astype(float)
    known = Annotations(user, pair, preference, names(30))
    fresh = rng.normal(size=(3000, 5))
    rows = rng.integers(30, size=3000)
    truth = camp[rows] * fresh[:, 0] > 0
    found = fit(X, known, 1)
    assert (np.sign(found.coefficients[:, 0]) == camp * np.sign(found.coefficients[0, 0])).all()
    assert np.abs(found.head[0]).argmax() == 0
    assert ((found.predict(fresh, rows) > 0.5) == truth).mean() > 0.95


def test_the_true_base_rewards_are_found_again():
    X, known, logits = world(users=150, pairs=400, dimensions=10, rewards=3, share=0.3)
    found = fit(X, known, 3, l2=1.0)
    predicted = found.features(X) @ found.coefficients.T
    assert np.corrcoef(predicted.ravel(), logits.ravel())[0, 1] > 0.97
    truth = np.linalg.svd(np.linalg.pinv(X) @ logits)[0][:, :3]
    axes = np.linalg.qr(found.head.T)[0]
    assert np.linalg.svd(axes.T @ truth, compute_uv=False).min() > 0.97  # cosine of the largest angle between planes


def test_soft_labels_of_certain_strength_give_that_strength_back():
    """With preference = sigmoid(logit) everywhere and hardly a penalty, the logits themselves are the optimum."""
    X, known, logits = world(strength=1.0)
    exact = Annotations(known.user, known.pair, sigmoid(logits[known.pair, known.user]), known.users)
    found = fit(X, exact, 2, l2=1e-4)
    np.testing.assert_allclose(found.features(X) @ found.coefficients.T, logits, atol=0.02)
    own = np.arange(40)
    np.testing.assert_allclose(found.predict(X[:40], own), sigmoid(logits[own, own]), atol=0.01)


def test_texts_instead_of_pairs_give_the_same_fit():
    texts, known, first, second = world_of_texts()
    X, pairs = Differences.between(texts, first, second), texts[first] - texts[second]
    right, left = np.random.default_rng(0).normal(size=(6, 3)), np.random.default_rng(1).normal(size=(len(pairs), 2))
    for found, expected in (
        (X @ right, pairs @ right),
        (X.T @ left, pairs.T @ left),
        (X.products(), pairs.T @ pairs),
        (X.squares(), np.square(pairs).sum(0)),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert X.squares()[2] == 0  # what all texts share
    one, other = fit(X, known, 2, 1.0), fit(pairs, known, 2, 1.0)
    np.testing.assert_allclose(X @ one.head.T, pairs @ other.head.T, rtol=0, atol=1e-5)
    np.testing.assert_allclose(one.coefficients, other.coefficients, rtol=0, atol=1e-5)

    texts[7, 1] = np.nan
    with pytest.raises(ValueError, match="embeddings need finite numbers, got nan of text 7: embed it again"):
        fit(Differences.between(texts, first, second), known, 2, 1.0)


# --- the canonical form ----------------------------------------------------------------------------------------------


def test_canonical_form_keeps_predictions_and_is_the_same_for_all_equivalent_forms():
    rng = np.random.default_rng(0)
    X, head = rng.normal(size=(50, 7)), rng.normal(size=(4, 7))
    coefficients = rng.normal(size=(30, 4)) * [1, 2, 3, 4]
    first = canonical(head, coefficients, X @ head.T)
    for _ in range(5):
        mix = rng.normal(size=(4, 4))
        other = mix @ head, coefficients @ np.linalg.inv(mix)
        moved = canonical(*other, X @ other[0].T)
        for one, again in zip(first, moved):
            np.testing.assert_allclose(one, again, rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(moved[1] @ moved[0], coefficients @ head, atol=1e-9)  # all predictions, any answer


def test_canonical_form_is_white_sorted_and_signed():
    rng = np.random.default_rng(1)
    X, head, coefficients = rng.normal(size=(50, 7)), rng.normal(size=(3, 7)), rng.normal(size=(30, 3))
    found, own = canonical(head, coefficients, X @ head.T)
    features = X @ found.T
    np.testing.assert_allclose(features.T @ features / 50, np.eye(3), atol=1e-12)
    moment = own.T @ own / 30
    np.testing.assert_allclose(moment, np.diag(np.diag(moment)), atol=1e-12)
    assert (np.diff(np.diag(moment)) < 0).all()
    # the moment of a base reward is the mean square of its share of all logits
    np.testing.assert_allclose(np.diag(moment), np.square(features[:, None] * own).mean((0, 1)), rtol=1e-9)
    assert (np.abs(found).max(1) == found.max(1)).all()


def test_a_fit_is_in_canonical_form():
    X, known, _ = world()
    found = fit(X, known, 2)
    again = canonical(found.head, found.coefficients, X @ found.head.T)
    np.testing.assert_allclose(again[0], found.head, atol=1e-9)
    np.testing.assert_allclose(again[1], found.coefficients, atol=1e-9)
    assert found.head.dtype == found.coefficients.dtype == np.float64 and found.users == known.users


@pytest.mark.parametrize("sparse", [False, True])
def test_the_same_data_give_the_same_factors_in_any_order(sparse):
    """In any order of users, pairs, annotations and the two answers of a pair; to 1e-5 of the largest number."""
    X, known, _ = world(users=80, pairs=120, rewards=3, strength=2.0)
    matrix = csr_matrix if sparse else np.asarray
    found = fit(matrix(X), known, 3, l2=1.0)
    rng = np.random.default_rng(3)
    users, pairs, order = rng.permutation(80), rng.permutation(120), rng.permutation(len(known))
    swapped = rng.random(120) < 0.5
    preference = np.where(swapped[known.pair], 1 - known.preference, known.preference)
    moved = Annotations(
        np.argsort(users)[known.user][order],
        np.argsort(pairs)[known.pair][order],
        preference[order],
        [known.users[row] for row in users],
    )
    signs = np.where(swapped, -1.0, 1.0)[:, None]
    again = fit(matrix((X * signs)[pairs]), moved, 3, l2=1.0)
    assert again.users != found.users
    strengths = np.square(found.coefficients).mean(0)
    assert (strengths[:-1] / strengths[1:]).min() > 1.05  # ties could be rotated
    np.testing.assert_allclose(again.head, found.head, atol=1e-5 * np.abs(found.head).max())
    rows = again.coefficients[np.argsort(users)]
    np.testing.assert_allclose(rows, found.coefficients, atol=1e-5 * np.abs(found.coefficients).max())


def test_any_start_ends_in_the_same_factors(monkeypatch):
    X, known, _ = world(users=80, pairs=120, rewards=3, strength=2.0)
    found = fit(X, known, 3, l2=1.0)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        start = rng.normal(size=(3, 8)), rng.normal(size=(80, 3))
        monkeypatch.setattr(factorization, "start", lambda *_, start=start: start)
        again = fit(X, known, 3, l2=1.0)
        np.testing.assert_allclose(again.head, found.head, atol=1e-4 * np.abs(found.head).max())
        np.testing.assert_allclose(
            again.coefficients, found.coefficients, atol=1e-4 * np.abs(found.coefficients).max()
        )


def test_the_unit_of_the_embeddings_means_nothing():
    X, known, _ = world()
    small, large = fit(X, known, 2), fit((1000 * X).astype(np.float32), known, 2)
    np.testing.assert_allclose(large.head * 1000, small.head, atol=1e-4)
    np.testing.assert_allclose(large.coefficients, small.coefficients, atol=1e-4)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_item_numbers_need_users_who_overlap():
    # users 0 and 1 answer about items 0-2, user 2 about items 3-5
    X = one_hot([(0, 1), (1, 2), (3, 4), (4, 5)], 6)
    known = Annotations(np.array([0, 1, 2, 2]), np.arange(4), np.array([1, 0, 1, 1.0]), names(3))
    message = "2 sets of users, the largest of 2 of 3, share no pair with the others: give embeddings of the answers"
    with pytest.raises(ValueError, match=message):
        fit(X, known, 1, l2=0.1)
    assert fit(X.toarray() + np.eye(4, 6), known, 1, l2=0.1).coefficients.shape == (3, 1)  # embeddings do not
    joined = one_hot([(0, 1), (1, 2), (2, 4), (4, 5)], 6)  # item 2 joins them, though they share no pair
    assert fit(joined, known, 1, l2=0.1).coefficients.shape == (3, 1)
    second = one_hot([(0, 1), (1, 2), (1, 3)], 4)  # item 1, once on either side, is still one that both know
    assert fit(second, Annotations([0, 0, 1], [0, 1, 2], [1, 0, 1.0], names(2)), 1, l2=0.1).users == names(2)
    with pytest.raises(ValueError, match="3 sets of users, the largest of 1 of 3"):
        fit(identity(4, format="csr"), known, 1, l2=0.1)


def refused(message, X, known, factors, error=ValueError, **settings):
    with pytest.raises(error, match=re.escape(message)):
        fit(X, known, factors, **settings)


def test_what_cannot_be_fitted_is_refused():
    X, known, _ = world()
    spoilt = X.copy()
    spoilt[3, 2] = np.nan
    refused("embeddings need finite numbers, got nan of pair 3: embed it again", spoilt, known, 2)
    refused("embeddings need finite numbers, got nan: embed it again", csr_matrix(spoilt), known, 2)
    refused("need numbers that are not 0, got only zeros", 0 * X, known, 2)
    refused("need shape (pairs, dimensions), got (60,)", X[:, 0], known, 2)
    refused("annotations need one of 59 pairs, got row 59", X[:-1], known, 2)
    refused("needs at least one base reward, got 0", X, known, 0)
    refused("9 base rewards need as many independent embedding dimensions, got 8: lower factors", X, known, 9)
    refused("9 base rewards need as many independent embedding dimensions, got 8", np.hstack([X, X]), known, 9)
    refused("9 base rewards need as many independent embedding dimensions, got 8", csr_matrix(X), known, 9)
    refused("41 base rewards need as many users, got 40", np.hstack([X] * 6), known, 41)
    for l2 in (0, -1, np.nan, np.inf):
        refused("l2 needs a finite number above 0", X, known, 2, l2=l2)
    ties = Annotations(known.user, known.pair, np.full(len(known), 0.5), known.users)
    refused("annotations need a preference, got only ties", X, ties, 2)


def test_more_base_rewards_than_the_data_carry_are_refused():
    X, known, _ = world(rewards=1, strength=2.0, share=0.9)
    message = "4 base rewards need data that carry as many, got 1 at this l2: ask for at most 1 (choose_factors tells"
    refused(message, X, known, 4, l2=20)
    with pytest.raises(NotCarried) as caught:
        fit(X, known, 4, l2=20)
    assert fit(X, known, caught.value.carried, l2=20).head.shape == (1, 8)
    refused("1 base rewards need data that carry as many, got 0 at this l2: lower l2", X, known, 1, l2=1e6)
    alike = np.ones((40, 2))
    with pytest.raises(ValueError, match="2 base rewards need data that carry as many, got 1"):
        canonical(X[:2], alike, X @ X[:2].T)


def test_a_search_without_an_end_is_an_error(monkeypatch):
    X, known, _ = world()
    monkeypatch.setattr(optimum, "ITERATIONS", 2)
    said = "the fit needs to converge in 2 iterations, got no end: raise l2, now 3"
    refused(said, X, known, 2, error=ArithmeticError)
