"""The JSON file of a user: bit for bit what was saved, and nothing else is taken for one."""

import json
from dataclasses import replace

import numpy as np
import pytest

from openrlhf_pgrpo.core.posterior import Prior, posterior
from openrlhf_pgrpo.models.profiles import Answer, Profile

pytestmark = pytest.mark.core


@pytest.fixture
def profile():
    answers = [Answer("p1", (0.1, 2.0), 1.0), Answer("p2", (1 / 3, -1e-17), 0.5)]
    return Profile.of("ana", "f00d", answers, Prior(np.array([0.1, 0.2]), np.array([[2.0, 0.3], [0.3, 1.0]])))


def test_a_profile_comes_back_to_the_bit(profile, tmp_path):
    profile.save(tmp_path / "ana.json")
    back = Profile.load(tmp_path / "ana.json", "f00d")
    assert (back.user, back.fingerprint, back.answers) == ("ana", "f00d", profile.answers)
    assert back.coefficients.tobytes() == profile.coefficients.tobytes()
    assert back.covariance.tobytes() == profile.covariance.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["ana.json"]


def test_a_profile_holds_the_posterior_of_its_answers(profile):
    features, answers = [answer.features for answer in profile.answers], [1.0, 0.5]
    prior = Prior(np.array([0.1, 0.2]), np.array([[2.0, 0.3], [0.3, 1.0]]))
    fitted = posterior(features, answers, prior)
    assert np.array_equal(profile.posterior.mean, fitted.mean)
    assert np.array_equal(profile.posterior.covariance, fitted.covariance)
    assert Profile.of("ben", "f00d", [], prior).coefficients == pytest.approx([0.1, 0.2])


def test_a_profile_for_another_model_is_refused_with_both_named(profile, tmp_path):
    profile.save(tmp_path / "ana.json")
    with pytest.raises(ValueError, match="for the model beef, got one for f00d"):
        Profile.load(tmp_path / "ana.json", "beef")


def test_every_truncation_is_refused_and_the_file_stays(profile, tmp_path):
    path = tmp_path / "ana.json"
    profile.save(path)
    whole = path.read_bytes()
    for length in range(len(whole) - 2):  # without the last newline it is still whole
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="needs to be a whole profile"):
            Profile.load(path, "f00d")
        assert path.read_bytes() == whole[:length]


@pytest.mark.parametrize(
    "change",
    [
        dict(user=3),
        dict(user=" "),
        dict(user="\ud800"),
        dict(coefficients=[1e101, 1.0]),
        dict(covariance=[[2.0, 0.3], [0.4, 1.0]]),
        dict(answers=[{"pair": "p", "features": [1e300, 2.0], "preference": 1.0}]),
        dict(fingerprint=None),
        dict(answers={}),
        dict(answers=[{}]),
        dict(answers=[{"pair": "p", "features": [1.0], "preference": 1.0}]),
        dict(answers=[{"pair": "p", "features": [1.0, 2.0], "preference": 1.5}]),
        dict(answers=[{"pair": "p", "features": [1.0, 2.0], "preference": [1.0, 0.0]}]),
        dict(answers=[{"pair": 7, "features": [1.0, 2.0], "preference": 1.0}]),
        dict(coefficients=[1.0, float("nan")]),
        dict(coefficients=["1.0", "2.0"]),
        dict(coefficients=[True, False]),
        dict(coefficients=[1.0]),
        dict(coefficients=3.0),
        dict(coefficients=[10**400, 1]),
        dict(covariance=[[1.0, 0.0], [0.0, -1.0]]),
        dict(covariance=[[1.0, 0.0], [0.0]]),
        dict(extra=1),
    ],
)
def test_e5_what_is_no_profile_is_refused(profile, tmp_path, change):
    path = tmp_path / "ana.json"
    profile.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="ana.json needs to be a whole profile, got .*: restore it or ask again"):
        Profile.load(path, "f00d")


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b"[" * 100000, b"null"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "ana.json").write_bytes(content)
    with pytest.raises(ValueError, match="needs to be a whole profile"):
        Profile.load(tmp_path / "ana.json", "f00d")


def test_a_failed_save_leaves_the_old_profile(profile, tmp_path):
    path = tmp_path / "ana.json"
    profile.save(path)
    whole = path.read_bytes()
    with pytest.raises(ValueError):
        replace(profile, coefficients=np.array([np.nan, 1.0])).save(path)
    assert path.read_bytes() == whole


def test_a_profile_is_on_the_disk_before_it_replaces_the_old_one(profile, tmp_path, monkeypatch):
    from openrlhf_pgrpo import files

    done = []
    fsync, rename = files.os.fsync, files.os.replace
    monkeypatch.setattr(files.os, "fsync", lambda number: (done.append("fsync"), fsync(number)))
    monkeypatch.setattr(files.os, "replace", lambda *paths: (done.append("replace"), rename(*paths)))
    profile.save(tmp_path / "ana.json")
    assert done == ["fsync", "replace", "fsync"]
