"""Rewards of users from base rewards: trained users, users with profiles, and the average user."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from openrlhf_pgrpo.core.posterior import Prior
from openrlhf_pgrpo.host.user_rewards import UserRewards, factorized_folder
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.profiles import Answer, Profile

pytestmark = pytest.mark.host

BASE = np.array([[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]])


def options(unknown_user="error", profiles=None, normalize_enable=False):
    return SimpleNamespace(unknown_user=unknown_user, profiles=profiles, normalize_enable=normalize_enable)


def test_a_reward_is_that_of_the_samples_user(factorized):
    folder = factorized_folder(str(factorized))
    ana, _, cleo = folder.coefficients
    rewards = UserRewards(folder, options())
    assert np.array_equal(rewards(BASE, ["cleo", "ana"]), [BASE[0] @ cleo, BASE[1] @ ana])
    with pytest.raises(ValueError, match=r"every sample needs one of the 3 users of .*, got 'eve' \(1 of 2 samples\)"):
        rewards(BASE, ["bob", "eve"])
    with pytest.raises(
        ValueError, match=r"got None \(2 of 2 samples\): .* --reward.profiles, or pass --reward.unknown_user mean"
    ):
        rewards(BASE, [None, None])


def test_the_average_user_is_used_only_if_asked_for(factorized):
    folder = Folder(factorized)
    average = UserRewards(folder, options("mean"))
    expected = [BASE[0] @ folder.coefficients.mean(0), BASE[1] @ folder.coefficients[1]]
    assert np.allclose(average(BASE, ["eve", "bob"]), expected, rtol=1e-12)
    assert np.allclose(average(BASE, [None, "bob"]), expected, rtol=1e-12)


def test_rewards_are_normalised_after_the_users_weighed_them(factorized):
    folder = Folder(factorized)
    folder.config.mean, folder.config.std = 2.0, 4.0
    plain, normal = (UserRewards(folder, options(normalize_enable=on))(BASE, ["ana", "bob"]) for on in (False, True))
    assert np.allclose(normal, (plain - 2) / 4, rtol=1e-12)


def test_profiles_add_users(factorized, tmp_path):
    folder = Folder(factorized)
    profile = Profile.of(
        "eve", folder.fingerprint, [Answer("x", (1.0, 0.0, -1.0), 1.0)], Prior.of(folder.coefficients)
    )
    profile.save(tmp_path / "eve.json")
    rewards = UserRewards(folder, options(profiles=str(tmp_path)))
    assert np.allclose(
        rewards(BASE, ["eve", "ana"]), [BASE[0] @ profile.coefficients, BASE[1] @ folder.coefficients[0]]
    )
    replace(profile, user="ana").save(tmp_path / "ana.json")
    with pytest.raises(ValueError, match="to be of a new user, got 'ana', who is known"):
        UserRewards(folder, options(profiles=str(tmp_path)))
    replace(profile, user="ina", fingerprint="another model").save(tmp_path / "ana.json")
    with pytest.raises(ValueError, match="got one for another model"):
        UserRewards(folder, options(profiles=str(tmp_path)))


def test_rewards_without_mean_and_deviation_are_not_normalised_in_silence(factorized):
    folder = Folder(factorized)
    with pytest.raises(
        ValueError, match="--reward.normalize_enable needs a mean and deviation of rewards in .*, got none: evaluate"
    ):
        UserRewards(folder, options(normalize_enable=True))
