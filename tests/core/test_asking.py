"""New users asked in the order of expected information, or at random: the same as one user after the other."""

import numpy as np
import pytest

from openrlhf_pgrpo.core.asking import coefficients_after, hold_out, pools
from openrlhf_pgrpo.core.posterior import Prior, posterior
from openrlhf_pgrpo.core.questions import next_questions

pytestmark = pytest.mark.core

PRIOR = Prior(np.array([0.5, -0.2]), np.array([[2.0, 0.3], [0.3, 1.0]]))


def made(sizes=(6, 1, 4, 9), seed=0):
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(len(sizes)), sizes)
    return user, rng.normal(size=(len(user), 2)), rng.integers(0, 3, len(user)) / 2


def test_a_third_of_each_user_is_held_out():
    user = np.random.default_rng(0).permutation(np.repeat(np.arange(4), (1, 2, 3, 10)))
    held = hold_out(user, np.random.default_rng(1))
    assert np.bincount(user[held]).tolist() == [1, 1, 1, 4]


def test_pools_keep_what_each_user_said():
    user, v, y = made()
    features, answers = pools(user, v, y, 5)
    assert features.shape == (5, 9, 2)
    for number in range(5):
        known = ~np.isnan(answers[number])
        assert np.array_equal(features[number, known], v[user == number])
        assert np.array_equal(answers[number, known], y[user == number])


def test_asking_many_users_is_asking_each_as_elicit_does():
    user, v, y = made()
    counts = (0, 1, 3, 5)
    found = coefficients_after(*pools(user, v, y, 4), PRIOR, counts)
    for number in range(4):
        pool, said, asked, belief = v[user == number], y[user == number], [], PRIOR
        for count in range(6):
            if count in counts:
                expected = belief.mean if count <= len(pool) else [np.nan] * 2
                assert found[counts.index(count), number] == pytest.approx(expected, nan_ok=True, abs=1e-9)
            if count < len(pool):
                asked.append(int(next_questions(pool, belief, asked)[0]))
                belief = posterior(pool[asked], said[asked], PRIOR)


def test_random_questions_use_up_the_pool_and_depend_on_the_seed_alone():
    user, v, y = made()
    packed = pools(user, v, y, 4)
    found, again = (coefficients_after(*packed, PRIOR, (0, 3, 6), np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(found, again, equal_nan=True)
    assert np.isnan(found).any(2).tolist() == [[False] * 4, [False, True, False, False], [False, True, True, False]]
    assert found[2, 0] == pytest.approx(posterior(v[:6], y[:6], PRIOR).mean)  # all six of the first user
