"""The controls: P-GRPO without preference groups, and without history."""

import numpy as np
import pytest
from batches import batch, estimator, random_batch

from openrlhf_pgrpo.core.estimator import RewardBatch

pytestmark = pytest.mark.core


def test_pgrpo_global_does_not_look_at_preference_groups():
    named, nameless = estimator("pgrpo_global"), estimator("pgrpo")
    for seed in range(3):
        new = random_batch(seed)
        everybody = RewardBatch(new.rewards, new.prompt_groups, ["all"] * len(new.users), new.users, new.labels)
        np.testing.assert_array_equal(named(new), nameless(everybody))


@pytest.mark.parametrize("other", ["pgrpo_global", "pref_group_norm"])
def test_the_first_batch_of_one_preference_group_is_plain_normalisation(other):
    new = random_batch(0, "aaaa")
    expected = (new.rewards - new.rewards.mean()) / (new.rewards.std() + 1e-6)
    np.testing.assert_allclose(estimator("pgrpo")(new), expected, rtol=1e-13)
    np.testing.assert_allclose(estimator(other)(new), expected, rtol=1e-13)


def test_with_one_preference_group_pgrpo_is_pgrpo_global():
    pgrpo, everybody = estimator("pgrpo"), estimator("pgrpo_global")
    for seed in range(3):
        np.testing.assert_array_equal(pgrpo(random_batch(seed, "aaa")), everybody(random_batch(seed, "aaa")))


def test_pref_group_norm_by_hand_and_without_memory():
    norm = estimator("pref_group_norm", eps=0.5)
    new = batch([[1, 5], [1, 5], [7, 7], [9]], "aabc")
    for _ in range(2):  # a: mean 3, standard deviation 2; b constant; c alone
        np.testing.assert_allclose(norm(new), [-0.8, 0.8, -0.8, 0.8, 0, 0, 0])


def test_true_labels_matter_and_random_ones_do_not():
    # 64 preference groups of 100 samples each; a random one has the mean of everybody, up to chance
    rng = np.random.default_rng(0)
    offset = 3 * rng.standard_normal(64)

    def mean_difference(true_labels):
        """Mean over each label of (advantage by label - advantage by one history for everybody), (64,)."""
        personal, everybody = estimator("pgrpo", update="after"), estimator("pgrpo_global", update="after")
        for _ in range(2):
            users = np.repeat(np.arange(64), 100)
            rewards = offset[users] + rng.standard_normal(6400)
            labels = users if true_labels else rng.permutation(users)
            new = RewardBatch(rewards, np.arange(6400), list(map(str, labels)), labels, labels)
            difference = personal(new) - everybody(new)
        return np.bincount(labels, difference) / 100

    random, true = mean_difference(False), mean_difference(True)
    assert abs(random.mean()) < 4 * random.std() / np.sqrt(64)
    assert random.std() < 2 * np.sqrt(1 / 100)  # chance: a mean of 100 samples, in standard deviations of everybody
    assert true.std() > 0.8  # the history of everybody keeps the offsets
