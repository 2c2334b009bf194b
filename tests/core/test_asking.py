"""New users asked in the order of expected information, or at random: the same as one user after the other."""

import numpy as np
import pytest

from openrlhf_pgrpo.core.asking import coefficients_after, hold_out, pools
from openrlhf_pgrpo.core.posterior import Prior, posterior
from openrlhf_pgrpo.core.questions import next_question

pytestmark = pytest.mark.core

PRIOR = Prior(np.array([0.5, -0.2]), np.array([[2.0, 0.3], [0.3, 1.0]]))


def made(sizes=(6, 1, 4, 9), seed=0):
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(len(sizes)), sizes)
    return user, rng.normal(size=(len(user), 2)), rng.integers(0, 3, len(user)) / 2


def ratings(*prompts, users=1):
    """user (N,) and texts (N, 2): all pairs of so many answers to each prompt."""
    ends = np.cumsum(prompts)
    pairs = np.concatenate([np.transpose(np.triu_indices(size, 1)) + end - size for size, end in zip(prompts, ends)])
    return np.repeat(np.arange(users), len(pairs)), np.tile(pairs, (users, 1))


def test_of_pairs_with_texts_of_their_own_a_third_of_each_user_is_held_out():
    """Those of before; and so are the numbers that are drawn next."""
    user = np.random.default_rng(0).permutation(np.repeat(np.arange(5), (1, 2, 3, 10, 30)))
    rng, other = np.random.default_rng(1), np.random.default_rng(1)
    asked, held = hold_out(user, np.arange(2 * len(user)).reshape(-1, 2), rng)
    order = np.lexsort((other.random(len(user)), user))
    place, counts = np.empty(len(user)), np.bincount(user)
    place[order] = np.concatenate([np.arange(count) for count in counts])
    assert np.array_equal(held, place < np.array([1, 1, 1, 4, 10])[user]) and np.array_equal(asked, ~held)
    assert rng.random() == other.random()


@pytest.mark.parametrize("prompts", [(2,), (3,), (12,), (5, 2, 2), (6,) * 10, (2,) * 8 + (9,)])
def test_no_text_of_a_user_is_asked_about_and_held_out(prompts):
    user, texts = ratings(*prompts, users=20)
    asked, held = hold_out(user, texts, np.random.default_rng(0))
    assert not (asked & held).any()
    for number in range(20):
        mine = user == number
        assert not np.isin(texts[mine & asked], texts[mine & held]).any()
        assert held[mine].any()


def test_of_one_prompt_a_third_of_the_responses_is_held_out():
    user, texts = ratings(12, users=50)
    asked, held = hold_out(user, texts, np.random.default_rng(0))
    assert {*np.bincount(user[held]).tolist()} == {6, 10}  # pairs of 4 or 5 responses: two come at once
    assert {*np.bincount(user[asked]).tolist()} == {28, 21}
    assert (held.reshape(50, -1) != held[user == 0]).any(1).sum() > 40  # each has others


def test_of_several_prompts_whole_ones_are_held_out():
    user, texts = ratings(*(6,) * 9, users=50)
    asked, held = hold_out(user, texts, np.random.default_rng(0))
    assert (asked | held).all() and (np.bincount(user[held]) == 3 * 15).all()
    prompts = texts[:, 0] // 6
    assert not set(zip(user[held], prompts[held])) & set(zip(user[asked], prompts[asked]))


def test_two_users_may_share_texts():
    user, texts = np.arange(8), np.tile([0, 1], (8, 1))
    asked, held = hold_out(user, texts, np.random.default_rng(0))
    assert held.all() and not asked.any()


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
                asked.append(next_question(pool, belief, asked)[0])
                belief = posterior(pool[asked], said[asked], PRIOR)


def test_random_questions_use_up_the_pool_and_depend_on_the_seed_alone():
    user, v, y = made()
    packed = pools(user, v, y, 4)
    found, again = (coefficients_after(*packed, PRIOR, (0, 3, 6), np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(found, again, equal_nan=True)
    assert np.isnan(found).any(2).tolist() == [[False] * 4, [False, True, False, False], [False, True, True, False]]
    assert found[2, 0] == pytest.approx(posterior(v[:6], y[:6], PRIOR).mean)  # all six of the first user
