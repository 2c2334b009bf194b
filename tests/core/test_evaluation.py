"""Measures of preferences by hand and against scikit-learn, and their errors against a bootstrap over users."""

from itertools import product

import numpy as np
import pytest

from openrlhf_pgrpo.core.evaluation import (
    calibration_bins,
    contributions,
    majority,
    mean_and_error,
    of_users,
    quantile,
    reliability,
    shares_won,
)

pytestmark = pytest.mark.core


def value(name, z, preference):
    return np.nanmean(contributions(np.array(z, float), np.array(preference, float))[name])


def made(users=60, seed=0):
    """Logits, preferences and users of annotations; users differ in how many they gave and in how well they fit."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rng.integers(3, 30, users))
    z = rng.normal(0, 2, len(user))
    fit = rng.normal(0.7, 0.7, users)[user]
    y = (rng.random(len(user)) < 1 / (1 + np.exp(-fit * z))).astype(float)
    y[rng.random(len(y)) < 0.1] = 0.5
    return z, y, user


def test_four_measures_by_hand():
    z, y = [2.0, -1.0, 0.0, 3.0], [1.0, 1.0, 0.0, 0.5]
    # s = 2, -1, 0; the tie does not count
    assert value("accuracy", z, y) == pytest.approx((1 + 0 + 0.5) / 3)
    # s_n + s_m: (4, 1, 2), (1, -2, -1), (2, -1, 0)
    assert value("auc", z, y) == pytest.approx((3 + 1 + 1.5) / 9)
    loss = [np.log1p(np.exp(-2)), np.log1p(np.exp(1)), np.log(2), np.log1p(np.exp(3)) - 1.5]
    assert value("log_loss", z, y) == pytest.approx(np.mean(loss))
    # four annotations, each alone in a bin: |c - o| with o = 1, 0, 1/2, 1/2
    sigmoid = 1 / (1 + np.exp(-np.array([2.0, 1, 0, 3])))
    assert value("calibration_error", z, y) == pytest.approx(np.abs(sigmoid - [1, 0, 0.5, 0.5]).mean())


def test_a_soft_preference_counts_as_what_is_preferred():
    assert value("accuracy", [1.0, 1.0], [0.8, 0.3]) == 0.5
    assert value("log_loss", [1.0], [0.8]) == pytest.approx(np.log1p(np.e) - 0.8)


def test_measures_are_those_of_scikit_learn_on_pairs_shown_both_ways_round():
    metrics = pytest.importorskip("sklearn.metrics")
    z, y, user = made()
    z = z.round(1)  # equal ones
    some = y != 0.5
    both_z, both_y = np.r_[z[some], -z[some]], np.r_[y[some], 1 - y[some]]
    assert value("auc", z, y) == pytest.approx(metrics.roc_auc_score(both_y, both_z), abs=1e-12)
    chance = 1 / (1 + np.exp(-both_z))
    assert value("log_loss", z[some], y[some]) == pytest.approx(metrics.log_loss(both_y, chance), abs=1e-12)
    own = of_users(z, y, user, user.max() + 1)
    for number in (0, 7, 31):
        mine = some & (user == number)
        both = np.r_[y[mine], 1 - y[mine]], np.r_[z[mine], -z[mine]]
        assert own["auc"][number] == pytest.approx(metrics.roc_auc_score(*both), abs=1e-12)
        assert own["accuracy"][number] == pytest.approx(((1 + np.sign(z * (y - 0.5))) / 2)[mine].mean())


def test_shares_won_by_a_loop():
    rng = np.random.default_rng(1)
    s, among = rng.integers(-3, 4, 80) / 1.0, rng.integers(0, 6, 80)
    for n, share in enumerate(shares_won(s, among)):
        sums = s[n] + s[among == among[n]]
        assert share == pytest.approx(((sums > 0) + 0.5 * (sums == 0)).mean())


def test_the_order_of_answers_and_of_rows_does_not_matter():
    z, y, user = made()
    z[:40] = 0
    rng = np.random.default_rng(2)
    swap, order = rng.random(len(z)) < 0.5, rng.permutation(len(z))
    other = contributions(np.where(swap, -z, z)[order], np.where(swap, 1 - y, y)[order])
    for name, x in contributions(z, y).items():
        assert other[name] == pytest.approx(x[order], nan_ok=True, abs=1e-12), name
        assert mean_and_error(other[name], user[order]) == pytest.approx(mean_and_error(x, user))


def test_the_error_of_equally_many_answers_is_that_of_the_means_of_users():
    rng = np.random.default_rng(3)
    x, user = rng.normal(size=200), np.repeat(np.arange(20), 10)
    means = x.reshape(20, 10).mean(1)
    assert mean_and_error(x, user) == pytest.approx((means.mean(), means.std(ddof=1) / np.sqrt(20)))


def test_errors_are_those_of_a_bootstrap_over_users():
    z, y, user = made()
    rows = [np.flatnonzero(user == number) for number in range(60)]
    rng = np.random.default_rng(4)
    drawn = [np.concatenate([rows[number] for number in rng.integers(0, 60, 60)]) for _ in range(400)]
    for name in ("accuracy", "auc", "log_loss"):
        error = mean_and_error(contributions(z, y)[name], user)[1]
        assert error == pytest.approx(np.std([value(name, z[some], y[some]) for some in drawn]), rel=0.15), name


def test_one_user_has_no_error_and_ties_have_no_accuracy():
    x = contributions(np.array([1.0, 2.0]), np.array([0.5, 0.5]))
    assert np.isnan(mean_and_error(x["accuracy"], np.array([0, 1]))).all()
    assert np.isnan(mean_and_error(x["auc"], np.array([0, 1]))).all()
    mean, error = mean_and_error(x["log_loss"], np.array([3, 3]))
    assert mean > 0 and np.isnan(error)
    own = of_users(np.array([1.0, 2.0]), np.array([0.5, 1.0]), np.array([0, 2]), 3)
    assert np.isnan(own["accuracy"]).tolist() == [True, True, False]
    assert np.isnan(own["log_loss"]).tolist() == [False, True, False]


def test_quantiles_and_their_errors_are_those_of_a_bootstrap():
    x = np.random.default_rng(5).normal(size=41)
    rng = np.random.default_rng(6)
    drawn = np.sort(x[rng.integers(0, 41, (4000, 41))], 1)
    for share, place in ((0.1, 5), (0.5, 21), (0.9, 37)):
        found, error = quantile(np.r_[x, np.nan], share)
        assert found == np.sort(x)[place - 1]
        assert error == pytest.approx(drawn[:, place - 1].std(), rel=0.05)
    assert np.isnan(quantile(np.array([np.nan]), 0.5)).all() and quantile(np.array([2.0]), 0.5)[0] == 2


def test_calibration_bins_are_even_and_keep_equal_chances_together():
    z = np.random.default_rng(7).normal(size=1000)
    assert np.bincount(calibration_bins(z)[0]).tolist() == [100] * 10
    assert len(np.unique(calibration_bins(np.r_[np.zeros(500), z])[0][:500])) == 1
    rng = np.random.default_rng(8)
    z = rng.normal(0, 2, 100_000)
    y = (rng.random(len(z)) < 1 / (1 + np.exp(-z))).astype(float)
    assert value("calibration_error", z, y) < 0.01
    assert value("calibration_error", 3 * z, y) > 0.1  # too sure
    curve = reliability(z, y)
    assert sum(count for *_, count in curve) == len(z) and len(curve) == 10
    assert all(abs(expected - observed) < 0.02 for expected, observed, _ in curve)


def test_the_majority_is_that_of_the_others():
    user, pair = np.array([0, 1, 2, 0, 3, 3]), np.array([0, 0, 0, 1, 2, 2])
    y = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 0.5])
    # pair 0: the others of user 0 say 1 and 0, those of user 2 say 1 and 1; pairs 1 and 2: nobody else
    assert majority(user, pair, y) == pytest.approx([0, 0, np.log(3), 0, 0, 0])


def test_others_who_are_of_two_minds_are_no_majority():
    """(0.1 + 0.7) - 0.1 is not 0.7: rounding made a majority of either side."""
    for own, one, other in product(np.arange(11) / 10, repeat=3):
        z = majority(np.arange(3), np.zeros(3, int), np.array([own, one, other]))[0]
        assert (z == 0) == (abs(one + other - 1) < 1e-9)
