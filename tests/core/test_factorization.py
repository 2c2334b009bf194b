"""Base rewards and coefficients from annotations: the start, the optimum, the canonical form, the number of factors."""

import re
import tracemalloc

import numpy as np
import pytest
from scipy.sparse import csr_matrix, identity

from openrlhf_pgrpo.core import factorization
from openrlhf_pgrpo.core.factorization import (
    Annotations,
    Choice,
    Factorization,
    NotCarried,
    canonical,
    choose_factors,
    fit,
    initial_factors,
    per_user,
)

pytestmark = pytest.mark.core


def names(users):
    return [f"user {u:03}" for u in range(users)]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def world(users=40, pairs=60, dimensions=8, rewards=2, share=0.5, seed=0, strength=3.0):
    """X (P, H), annotations of a share of all cells, and the true logits (P, U)."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(pairs, dimensions))
    logits = X @ rng.normal(size=(dimensions, rewards)) @ rng.normal(size=(rewards, users))
    logits *= strength / logits.std()
    user, pair = np.nonzero(rng.random((users, pairs)) < share)
    preference = (rng.random(len(user)) < sigmoid(logits[pair, user])).astype(float)
    return X, Annotations(user, pair, preference, names(users)), logits


def square(X):
    """Mean square length of the rows: the unit of the penalty."""
    return np.square(X).sum(1).mean()


# --- annotations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "user, pair, preference, users, message",
    [
        ([0, 1], [0], [1, 0], "ab", "user, pair and preference of one length above 0, got shapes [(2,), (1,), (2,)]"),
        ([], [], [], "", "user, pair and preference of one length above 0, got shapes [(0,), (0,), (0,)]"),
        ([0.0, 1.0], [0, 1], [1, 0], "ab", "annotations need row numbers as user, got float64"),
        ([0, 1], [0, 1], [1, 1.5], "ab", "annotation 1 needs a preference from 0 to 1, got 1.5"),
        ([0, 1], [0, 1], [-0.1, 0], "ab", "annotation 0 needs a preference from 0 to 1, got -0.1"),
        ([0, 1], [0, 1], [1, np.nan], "ab", "annotation 1 needs a preference from 0 to 1, got nan"),
        ([0, 1], [0, -1], [1, 0], "ab", "annotation 1 needs a row of the pairs, got -1"),
        ([0, 1], [0, 1], [1, 0], "aa", "users need different names, got 2 with 1 names"),
        ([0, 2], [0, 1], [1, 0], "ab", "annotations need one of 2 users, got row 2"),
        ([0, -1], [0, 1], [1, 0], "ab", "annotations need one of 2 users, got row -1"),
        ([0, 2], [0, 1], [1, 0], "abcd", "every user needs pairs, got none of 'b', 'd': leave them out, and let"),
    ],
)
def test_annotations_that_cannot_be_are_refused(user, pair, preference, users, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Annotations(np.array(user), np.array(pair), np.array(preference), list(users))


def test_annotations_by_name_are_in_the_order_of_names():
    known = Annotations.of(["zoe", "ana", "zoe", "ben"], [0, 1, 2, 1], [1, 0, 0.5, 0.2])
    assert known.users == ["ana", "ben", "zoe"] and known.user.tolist() == [2, 0, 2, 1] and len(known) == 4
    part = known.take(np.array([True, True, False, True]))
    assert part.pair.tolist() == [0, 1, 1] and part.preference.tolist() == [1, 0, 0.2] and part.users == known.users


# --- the start -------------------------------------------------------------------------------------------------------


def test_a_complete_matrix_starts_from_its_svd_of_signed_labels():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 0.3, 0.5, 1], size=(7, 9))
    user, pair = np.indices(labels.shape).reshape(2, -1)
    features, coefficients = initial_factors(Annotations(user, pair, labels.ravel(), names(7)), 9, 3)
    left, strengths, right = np.linalg.svd(2 * labels - 1)
    np.testing.assert_allclose(coefficients @ features.T, (left[:, :3] * strengths[:3]) @ right[:3], atol=1e-9)
    np.testing.assert_allclose(np.square(features).sum(0), strengths[:3], rtol=1e-9)  # sqrt(S) on either side
    np.testing.assert_allclose(np.square(coefficients).sum(0), strengths[:3], rtol=1e-9)


@pytest.mark.parametrize("factors", [1, 2, 6])  # 6 is all there are, which no sparse solver finds
def test_missing_entries_are_imputed_at_the_same_rank(factors):
    rng = np.random.default_rng(1)
    labels, known = rng.random((6, 8)), rng.random((6, 8)) < 0.7
    user, pair = np.nonzero(known)
    features, coefficients = initial_factors(Annotations(user, pair, labels[known], names(6)), 8, factors)
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
    features, coefficients = initial_factors(
        Annotations(user, pair, (truth[user, pair] + 1) / 2, names(30)), 40, 1
    )
    # A missing entry x of a rank-1 matrix grows to 1 - (1 - share)^rounds of it at least, here 1 - .4^10
    assert np.abs(coefficients @ features.T - truth).max() < 0.02


def test_repeated_answers_count_as_their_mean():
    user, pair = np.indices((3, 4)).reshape(2, -1)
    labels = np.array([1, 0, 1, 0.5, 0, 0, 1, 1, 1, 0, 0, 1])
    twice = Annotations(np.r_[user, 0], np.r_[pair, 0], np.r_[labels, 0.5], names(3))  # 1 and a tie
    labels[0] = 0.75
    once = Annotations(user, pair, labels, names(3))
    for one, other in zip(initial_factors(twice, 4, 2), initial_factors(once, 4, 2)):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_no_matrix_of_users_and_pairs_is_ever_made():
    rng, size = np.random.default_rng(0), 30_000
    user, pair = np.r_[np.arange(size), np.arange(size)], np.r_[np.zeros(size, int), rng.integers(size, size=size)]
    known = Annotations(user, pair, rng.random(len(user)), names(size))
    tracemalloc.start()
    features, coefficients = initial_factors(known, size, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert features.shape == coefficients.shape == (size, 2)
    assert peak < 100e6 < 8 * size**2 / 50  # of 7.2 gigabytes


# --- the optimum -----------------------------------------------------------------------------------------------------


def gradient(X, known, theta):
    """Of the sum of cross-entropies by theta (U, H), where the logit is theta[user] . X[pair]; by a loop."""
    found = np.zeros_like(theta)
    for user, pair, preference in zip(known.user, known.pair, known.preference):
        found[user] += (sigmoid(theta[user] @ X[pair]) - preference) * X[pair]
    return found


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


def test_one_reward_for_all_is_ridge_logistic_regression():
    X, known, _ = world()
    found = fit(X, known, 1, l2=2.0, kind="shared")
    np.testing.assert_array_equal(found.coefficients, np.ones((40, 1)))
    slope = gradient(X, known, np.repeat(found.head, 40, 0)).sum(0)
    np.testing.assert_allclose(slope, -2 * square(X) * found.head[0], atol=1e-3)


@pytest.mark.parametrize("dimensions", [3, 50])  # fewer and more than a user has pairs
def test_one_model_per_user_is_ridge_logistic_regression_of_each_alone(dimensions, monkeypatch):
    X, known, _ = world(users=12, pairs=30, dimensions=dimensions)
    heads = per_user(X, known, l2=2.0)
    np.testing.assert_allclose(gradient(X, known, heads), -2 * square(X) * heads, atol=1e-6)
    assert len(set(np.bincount(known.user))) > 3
    monkeypatch.setattr(factorization, "NUMBERS_AT_ONCE", 1)  # user by user, without padding
    np.testing.assert_allclose(per_user(X, known, l2=2.0), heads, atol=1e-9)


def test_simplex_coefficients_are_weights_and_an_optimum():
    X, known, _ = world(share=0.9)
    found = fit(X, known, 3, l2=1.0, kind="simplex")
    np.testing.assert_allclose(found.coefficients.sum(1), 1)
    assert found.coefficients.min() > 0 and np.ptp(found.coefficients) > 0.3

    def loss(head, table):
        weights = np.exp(table) / np.exp(table).sum(1, keepdims=True)
        z = np.einsum("nd,nd->n", (X @ head.T)[known.pair], weights[known.user])
        entropy = np.logaddexp(0, z) - known.preference * z
        return entropy.sum() + (np.square(head).sum() * square(X) + np.square(table).sum()) / 2

    table = np.log(found.coefficients)
    table -= table.mean(1, keepdims=True)  # what a penalty makes of a level that changes nothing
    best, rng = loss(found.head, table), np.random.default_rng(0)
    for size in (1e-3, 1e-1):
        for _ in range(20):
            head = found.head + size * rng.normal(size=found.head.shape)
            assert loss(head, table + size * rng.normal(size=table.shape)) > best


def test_users_of_two_camps_get_opposite_coefficients_and_beat_one_reward_for_all():
    rng = np.random.default_rng(0)
    X, camp = rng.normal(size=(200, 5)), np.repeat([1, -1], 15)
    user, pair = np.nonzero(rng.random((30, 200)) < 0.15)
    preference = (camp[user] * X[pair, 0] > 0).astype(float)
    known = Annotations(user, pair, preference, names(30))
    fresh = rng.normal(size=(3000, 5))
    rows = rng.integers(30, size=3000)
    truth = camp[rows] * fresh[:, 0] > 0
    found, shared = fit(X, known, 1), fit(X, known, 1, kind="shared")
    assert (np.sign(found.coefficients[:, 0]) == camp * np.sign(found.coefficients[0, 0])).all()
    assert np.abs(found.head[0]).argmax() == 0
    assert ((found.predict(fresh, rows) > 0.5) == truth).mean() > 0.95
    assert ((shared.predict(fresh, rows) > 0.5) == truth).mean() < 0.6  # the camps are of one size


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


# --- the canonical form ----------------------------------------------------------------------------------------------


def test_canonical_form_keeps_predictions_and_does_not_depend_on_the_form_it_came_from():
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
    """Of users, pairs, annotations, and of the two answers of a pair; to 1e-5 of the largest number."""
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
    assert (strengths[:-1] / strengths[1:]).min() > 1.05  # no ties, which could be rotated
    np.testing.assert_allclose(again.head, found.head, atol=1e-5 * np.abs(found.head).max())
    rows = again.coefficients[np.argsort(users)]
    np.testing.assert_allclose(rows, found.coefficients, atol=1e-5 * np.abs(found.coefficients).max())


def test_any_start_ends_in_the_same_factors(monkeypatch):
    X, known, _ = world(users=80, pairs=120, rewards=3, strength=2.0)
    found = fit(X, known, 3, l2=1.0)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        start = rng.normal(size=(3, 8)), rng.normal(size=(80, 3))
        monkeypatch.setattr(factorization, "_start", lambda *_: start)
        again = fit(X, known, 3, l2=1.0)
        np.testing.assert_allclose(again.head, found.head, atol=1e-4 * np.abs(found.head).max())
        np.testing.assert_allclose(again.coefficients, found.coefficients, atol=1e-4 * np.abs(found.coefficients).max())


def test_the_unit_of_the_embeddings_means_nothing():
    X, known, _ = world()
    small, large = fit(X, known, 2), fit((1000 * X).astype(np.float32), known, 2)
    np.testing.assert_allclose(large.head * 1000, small.head, atol=1e-4)
    np.testing.assert_allclose(large.coefficients, small.coefficients, atol=1e-4)


# --- how many --------------------------------------------------------------------------------------------------------


def test_the_number_of_base_rewards_is_found_by_cross_validation():
    X, known, _ = world(users=120, pairs=150, dimensions=12, rewards=3, share=0.4)
    choice = choose_factors(X, known, factors=(1, 2, 3, 4, 5), l2=(1.0, 3.0), folds=3)
    assert choice.recommended == 3 and choice.l2 in (1.0, 3.0)
    assert choice.loss.argmin() in (2, 3, 4) and choice.loss[0] > choice.loss[1] > choice.loss[2]
    within = choice.loss <= choice.loss.min() + choice.error[choice.loss.argmin()]
    assert choice.factors[within][0] == 3
    again = choose_factors(X, known, factors=(3,), l2=(choice.l2,), folds=3)
    assert again.loss[0] == choice.loss[2] and again.recommended == 3
    other = choose_factors(X, known, factors=(3,), l2=(choice.l2,), folds=3, seed=1)
    assert other.loss[0] != choice.loss[2]


def test_held_out_losses_by_hand(monkeypatch):
    """A fit that predicts 0 has the loss log 2, whatever is held out; one of a logit 1 for 1 base reward has
    log(1 + e) - preference."""
    X, known, _ = world()

    def made_up(X, training, factors, l2, kind):
        assert len(training) < len(known) and kind == "factorized"
        z = {1: 0.0, 2: 1.0}[factors] if l2 == 1 else 5.0
        return np.zeros((1, X.shape[1])), np.full((40, 1), z)

    monkeypatch.setattr(factorization, "_fit", made_up)
    monkeypatch.setattr(factorization, "_logits", lambda features, coefficients, pair, user: coefficients[user, 0])
    choice = choose_factors(X, known, factors=(1, 2), l2=(1.0, 2.0), folds=4)
    assert choice.loss[0] == pytest.approx(np.log(2)) and choice.error[0] == pytest.approx(0)
    assert choice.loss[1] == pytest.approx(np.log(1 + np.e) - known.preference.mean(), abs=0.01)
    assert choice.l2s.tolist() == [1, 1] and choice.recommended == 1


def test_the_fewest_within_one_standard_error_are_recommended(monkeypatch):
    """More base rewards lower the loss from 1.00 to 0.90 (4) with an error of 0.02: folds of 0.88, 0.88, 0.94 have a
    standard deviation of 0.0346 and an error of 0.0346 / sqrt(3). 3 with 0.91 are within it, 2 with 0.93 are not."""
    X, known, _ = world()
    losses = {1: [1.0, 1.0, 1.0], 2: [0.93, 0.93, 0.93], 3: [0.9, 0.9, 0.93], 4: [0.88, 0.88, 0.94]}
    fits = iter(losses[count][k] for k in range(3) for count in (4, 1, 3, 2))
    monkeypatch.setattr(factorization, "_fit", lambda *_: (np.zeros((1, 8)), np.zeros((40, 1))))
    monkeypatch.setattr(factorization, "_bce", lambda z, preference: next(fits) * len(z))
    choice = choose_factors(X, known, factors=(4, 1, 3, 2), l2=(1.0,), folds=3)
    np.testing.assert_allclose(choice.loss, [0.9, 1.0, 0.91, 0.93])
    np.testing.assert_allclose(choice.error, [0.02, 0, 0.01, 0], atol=1e-12)
    assert choice.recommended == 3


def test_annotations_are_dealt_evenly_by_user_and_pair():
    user = np.r_[np.zeros(10, int), np.ones(10, int), 2, np.zeros(3, int)]
    pair = np.r_[np.arange(10), np.arange(10), 5, 0, 1, 2]  # the first user answered three pairs twice
    known = Annotations(user, pair, np.ones(len(user)), names(3))
    for seed in range(5):
        fold = factorization._deal(known, 5, np.random.default_rng(seed))
        for one in (0, 1):
            assert np.bincount(fold[10 * one : 10 * one + 10]).tolist() == [2] * 5
        assert fold[20] == -1 and fold[21:].tolist() == fold[:3].tolist()
    assert (fold != factorization._deal(known, 5, np.random.default_rng(0))).any()
    pairs = Annotations(np.repeat(np.arange(500), 2), np.tile([0, 1], 500), np.ones(1000), names(500))
    counts = np.bincount(factorization._deal(pairs, 5, np.random.default_rng(0)))
    assert len(counts) == 5 and np.ptp(counts) < 80  # 200 each, but for a standard deviation of about 15


def test_what_belongs_together_is_held_out_together():
    pair = np.r_[np.arange(20), np.arange(20), 3, 2]  # the last user has two pairs of one prompt
    known = Annotations(np.r_[np.zeros(20, int), np.ones(20, int), 2, 2], pair, np.ones(42), names(3))
    prompt = np.repeat([f"p{i}" for i in range(10)], 2)
    for seed in range(5):
        fold = factorization._deal_together(known, prompt, 5, np.random.default_rng(seed))
        assert (fold[0:40:2] == fold[1:40:2]).all() and (fold[:20] == fold[20:40]).all()
        assert np.bincount(fold[:20]).tolist() == [4] * 5  # two prompts each
        assert fold[40:].tolist() == [-1, -1]
    assert (fold != factorization._deal_together(known, prompt, 5, np.random.default_rng(0))).any()


def test_texts_that_are_known_from_other_pairs_flatter():
    """Labels are noise of the prompt: whoever has seen the prompt knows them, nobody else can."""
    rng = np.random.default_rng(0)
    prompt, user = np.repeat(np.arange(60), 4), np.tile(np.arange(4), 60)
    X = np.eye(60)[prompt]
    known = Annotations(user, np.arange(240), rng.integers(2, size=60)[prompt].astype(float), names(4))
    leaky = choose_factors(X, known, factors=(1,), l2=(0.3,), folds=3)
    clean = choose_factors(X, known, factors=(1,), l2=(0.3,), folds=3, together=prompt)
    assert leaky.loss[0] < 0.5 < np.log(2) == pytest.approx(clean.loss[0])


def test_a_choice_prints_its_curve():
    columns = np.array([1, 2]), np.array([0.65, 0.6]), np.array([0.01, 0.02]), np.array([3.0, 10.0])
    assert str(Choice(*columns, 2, 10.0)).splitlines() == [
        "base rewards held-out log loss     l2",
        "           1    0.6500 ±0.0100      3",
        "           2    0.6000 ±0.0200     10  <- recommended: the fewest within one standard error of the best",
    ]


# --- what is refused, and what is served -----------------------------------------------------------------------------


def one_hot(pairs, items):
    rows = np.arange(len(pairs)).repeat(2)
    return csr_matrix((np.tile([1.0, -1.0], len(pairs)), (rows, np.ravel(pairs))), (len(pairs), items))


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
    with pytest.raises(ValueError, match="3 sets of users, the largest of 1 of 3"):
        initial_factors(known, 4, 1)
    with pytest.raises(ValueError, match="2 sets of users"):
        choose_factors(X, known, factors=(1,), folds=2)
    assert fit(X, known, 1, kind="shared").head.shape == (1, 6)  # which compares no users


def refused(message, X, known, factors, error=ValueError, **settings):
    with pytest.raises(error, match=re.escape(message)):
        fit(X, known, factors, **settings)


def test_what_cannot_be_fitted_is_refused():
    X, known, _ = world()
    spoilt = X.copy()
    spoilt[3, 2] = np.nan
    refused("embeddings need finite numbers, got nan of pair 3: embed it anew", spoilt, known, 2)
    refused("embeddings need finite numbers, got nan: embed it anew", csr_matrix(spoilt), known, 2)
    refused("need numbers other than 0, got only zeros", 0 * X, known, 2)
    refused("need shape (pairs, dimensions), got (60,)", X[:, 0], known, 2)
    refused("annotations need one of 59 pairs, got row 59", X[:-1], known, 2)
    refused("needs at least one base reward, got 0", X, known, 0)
    refused("9 base rewards need as many independent embedding dimensions, got 8: lower factors", X, known, 9)
    refused("9 base rewards need as many independent embedding dimensions, got 8", np.hstack([X, X]), known, 9)
    refused("9 base rewards need as many independent embedding dimensions, got 8", csr_matrix(X), known, 9)
    refused("41 base rewards need as many users, got 40", np.hstack([X] * 6), known, 41)
    refused("kind needs one of factorized, shared, simplex, got 'bt'", X, known, 2, kind="bt")
    refused("one reward for all needs factors=1, got 2", X, known, 2, kind="shared")
    for l2 in (0, -1, np.nan, np.inf):
        refused("l2 needs a finite number above 0", X, known, 2, l2=l2)
    ties = Annotations(known.user, known.pair, np.full(len(known), 0.5), known.users)
    refused("annotations need a preference, got only ties", X, ties, 2)
    with pytest.raises(ValueError, match="only ties"):
        initial_factors(ties, 60, 2)
    with pytest.raises(ValueError, match="61 base rewards need as many users, got 40"):
        initial_factors(known, 60, 61)
    with pytest.raises(ValueError, match="annotations need one of 59 pairs, got row 59"):
        initial_factors(known, 59, 2)
    with pytest.raises(ValueError, match="at least 2 folds, got 1"):
        choose_factors(X, known, folds=1)


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
    monkeypatch.setattr(factorization, "ITERATIONS", 2)
    refused("the fit needs fewer than 2 iterations, got no end: raise l2, now 3", X, known, 2, error=RuntimeError)


def test_users_with_too_few_pairs_to_hold_out():
    known = Annotations(np.arange(3), np.zeros(3, int), np.array([1, 0, 1.0]), names(3))
    with pytest.raises(ValueError, match="users with 5 pairs or fewer folds, got too few pairs"):
        choose_factors(np.ones((1, 2)), known)


def test_coefficients_of_strangers_only_if_the_mean_is_asked_for():
    found = Factorization(np.ones((2, 3)), np.array([[1.0, 2], [3, 6]]), ["ana", "ben"])
    np.testing.assert_array_equal(found.coefficients_of(["ben", "ana", "ben"]), [[3, 6], [1, 2], [3, 6]])
    with pytest.raises(ValueError, match="rewards need a trained user, got 'zoe': elicit them, or ask for the mean"):
        found.coefficients_of(["ben", "zoe"])
    np.testing.assert_array_equal(found.coefficients_of(["ben", "zoe"], unknown="mean"), [[3, 6], [2, 4]])
    with pytest.raises(ValueError, match="'refuse' or 'mean', got 'zero'"):
        found.coefficients_of(["ben"], unknown="zero")


def test_the_prior_is_that_of_the_trained_users():
    X, known, _ = world(users=100)
    found = fit(X, known, 2)
    prior = found.prior()
    np.testing.assert_allclose(prior.mean, found.coefficients.mean(0))
    np.testing.assert_allclose(prior.covariance, np.cov(found.coefficients.T), atol=0.05 * prior.covariance.max())
