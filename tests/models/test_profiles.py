"""The JSON file of a user: bit for bit what was saved, and nothing else is taken for one."""

import json
import os
from copy import deepcopy
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from common import places

from openrlhf_pgrpo.core.posterior import Prior, posterior
from openrlhf_pgrpo.models.profiles import BOTH_BAD, SKIP, Answer, Profile, Skipped, same_model

pytestmark = pytest.mark.core

PRIOR = Prior(np.array([0.1, 0.2]), np.array([[2.0, 0.3], [0.3, 1.0]]))


@pytest.fixture
def profile():
    chat = [{"role": "user", "content": "why?"}]
    texts = (chat, "so \u00e9\U0001f600", [{"role": "assistant", "content": "no\u2028"}])
    answers = [Answer("p1", (0.1, 2.0), 1.0, *texts), Answer("p2", (1 / 3, -1e-17), 0.5)]
    return Profile.of("ana", "f00d", answers, PRIOR, [Skipped("p3", SKIP, 0), Skipped("p4", BOTH_BAD, 2)])


def test_a_profile_comes_back_to_the_bit(profile, tmp_path):
    profile.save(tmp_path / "ana.json")
    back = Profile.load(tmp_path / "ana.json", "f00d", PRIOR)
    assert (back.user, back.fingerprint, back.answers) == ("ana", "f00d", profile.answers)
    assert back.skipped == profile.skipped
    assert back.coefficients.tobytes() == profile.coefficients.tobytes()
    assert back.covariance.tobytes() == profile.covariance.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["ana.json"]


def test_a_file_from_before_texts_were_kept_is_read_and_written_as_it_was(profile, tmp_path):
    path, again = tmp_path / "ana.json", tmp_path / "again.json"
    answers = [replace(said, prompt=None, a=None, b=None) for said in profile.answers]
    replace(profile, answers=tuple(answers), skipped=()).save(path)
    content = json.loads(path.read_text())
    assert set(content) == {"user", "fingerprint", "coefficients", "covariance", "answers"}
    assert all(set(said) == {"pair", "features", "preference"} for said in content["answers"])
    Profile.load(path, "f00d", PRIOR).save(again)
    assert again.read_bytes() == path.read_bytes()


def test_many_profiles_are_those_that_are_fitted_one_by_one():
    rng = np.random.default_rng(0)
    said = {
        f"u{user}": [
            Answer(f"p{number}", tuple(rng.normal(0, 2, 2).tolist()), rng.choice([0.0, 0.5, 0.9, 1.0]))
            for number in range(rng.integers(0, 25))
        ]
        for user in range(300)
    }
    for profile, (user, answers) in zip(Profile.many(said, "f00d", PRIOR), said.items(), strict=True):
        one = Profile.of(user, "f00d", answers, PRIOR)
        assert (profile.user, profile.fingerprint, profile.answers) == (user, "f00d", tuple(answers))
        assert np.abs(profile.coefficients - one.coefficients).max() < 1e-9
        assert np.abs(profile.covariance - one.covariance).max() < 1e-9
    assert Profile.many({}, "f00d", PRIOR) == []


def test_a_model_that_is_told_its_form_has_profiles_of_that_form(profile, tmp_path):
    assert same_model("f00d", "f00d") and same_model("f00d+a", "f00d+a")
    assert same_model("f00d", "f00d+a") and same_model("f00d+a", "f00d")
    assert not same_model("f00d+a", "f00d+b") and not same_model("f00d", "beef") and not same_model("f00d+a", "beef+a")
    replace(profile, fingerprint="f00d+a").save(tmp_path / "ana.json")
    for fits in ("f00d", "f00d+a"):
        Profile.load(tmp_path / "ana.json", fits, PRIOR)
    with pytest.raises(ValueError, match=r"for the model f00d\+b, got one for f00d\+a: .* openrlhf-pgrpo refit"):
        Profile.load(tmp_path / "ana.json", "f00d+b", PRIOR)


def test_a_profile_holds_the_posterior_of_its_answers(profile):
    features, answers = [answer.features for answer in profile.answers], [1.0, 0.5]
    fitted = posterior(features, answers, PRIOR)
    assert np.array_equal(profile.posterior.mean, fitted.mean)
    assert np.array_equal(profile.posterior.covariance, fitted.covariance)
    assert Profile.of("ben", "f00d", [], PRIOR).coefficients == pytest.approx([0.1, 0.2])


def test_a_profile_for_another_model_is_refused_with_both_named(profile, tmp_path):
    profile.save(tmp_path / "ana.json")
    with pytest.raises(ValueError, match="for the model beef, got one for f00d"):
        Profile.load(tmp_path / "ana.json", "beef", PRIOR)


def test_every_truncation_is_refused_and_the_file_stays(profile, tmp_path):
    path = tmp_path / "ana.json"
    profile.save(path)
    whole = path.read_bytes()
    for length in range(len(whole) - 2):  # without the last newline it is still whole
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="needs to be a whole profile"):
            Profile.load(path, "f00d", PRIOR)
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
        dict(skipped={}),
        dict(skipped=[{"pair": "p", "reason": "skip"}]),
        dict(skipped=[{"pair": "p", "reason": "tie", "after": 0}]),
        dict(skipped=[{"pair": 7, "reason": "skip", "after": 0}]),
        dict(skipped=[{"pair": "p", "reason": "skip", "after": 3}]),
        dict(skipped=[{"pair": "p", "reason": "skip", "after": -1}]),
        dict(skipped=[{"pair": "p", "reason": "skip", "after": True}]),
        dict(skipped=[{"pair": "p", "reason": "skip", "after": n} for n in (2, 1)]),
        dict(answers=[{"pair": "p", "features": [1.0, 2.0], "preference": 1.0, "prompt": "p"}]),
        *(
            dict(answers=[{"pair": "p", "features": [1.0, 2.0], "preference": 1.0, "prompt": "p", "a": a, "b": "b"}])
            for a in (None, 3, " ", [], [{"role": "user"}], "\ud800")
        ),
    ],
)
def test_e5_what_is_no_profile_is_refused(profile, tmp_path, change):
    path = tmp_path / "ana.json"
    profile.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="ana.json needs to be a whole profile, got .*: restore it or ask again"):
        Profile.load(path, "f00d", PRIOR)


@pytest.mark.parametrize("answers", [0, 2])
def test_coefficients_that_do_not_follow_from_the_answers_are_refused(profile, tmp_path, answers):
    """Edited by hand, or left when answers were taken out: it would be two users, one for each who reads the file."""
    path = tmp_path / "ana.json"
    whole = Profile.of("ana", "f00d", profile.answers[:answers], PRIOR)
    replace(whole, coefficients=whole.coefficients + [0.0, 1e-5]).save(path)  # as another machine may compute it
    Profile.load(path, "f00d", PRIOR)
    replace(whole, coefficients=whole.coefficients + [0.0, 1e-3]).save(path)
    before, first, second = path.read_bytes(), whole.coefficients[1] + 1e-3, whole.coefficients[1]
    needs = f"needs the coefficients that follow from its {answers} answers"
    with pytest.raises(ValueError, match=f"ana.json {needs}, got {first:g} instead of {second:g} as coefficient 1: "):
        Profile.load(path, "f00d", PRIOR)
    assert path.read_bytes() == before


def test_a_profile_needs_as_many_coefficients_as_the_model_and_answers_to_fit(profile, tmp_path):
    path = tmp_path / "ana.json"
    profile.save(path)
    with pytest.raises(ValueError, match="ana.json needs 3 coefficients, as the model has, got 2: restore it"):
        Profile.load(path, "f00d", Prior(np.zeros(3), np.eye(3)))
    replace(profile, answers=(Answer("p1", (1e99, 0.0), 1.0),), skipped=()).save(path)
    with pytest.raises(ValueError, match="ana.json needs answers to fit a user to, got .*: restore it or ask again"):
        Profile.load(path, "f00d", PRIOR)


def change(content, place, action, value):
    """Replaces, scales, nudges, loses or doubles what is at a place, if it is still there."""
    if place not in places(content):
        return
    *above, key = place
    for step in above:
        content = content[step]
    old = content[key]
    if action == "lose":
        del content[key]
    elif action == "double" and isinstance(content, list):
        content.insert(key, deepcopy(old))
    elif action == "scale" and isinstance(old, float) and isinstance(value, float):
        content[key] = old * value
    elif action == "nudge" and isinstance(old, float):
        content[key] = old + 1e-7
    else:
        content[key] = deepcopy(value)


def fit(content):
    """Gives a profile the coefficients that follow from its answers, where any do."""
    try:
        answers = [Answer(**answer) for answer in content["answers"]]
        content["coefficients"] = Profile.of("ana", "f00d", answers, PRIOR).coefficients.tolist()
    except (KeyError, TypeError, ValueError, ArithmeticError):
        pass


ODD = [
    -1,
    0,
    None,
    True,
    "",
    " ",
    "x",
    "ana",
    "\ud800",
    [],
    {},
    [1.0, 2.0],
    [[1.0, 0.0], [0.0, 1.0]],
    [[1e9]],
    10**400,
]
NUMBERS = [-1.0, 0.0, 0.5, 1.0, 1 + 1e-9, 1.001, 1e-200, 1e6, 1e99, 1e101, 1e300, float("inf"), float("nan")]


def any_profile(rng, whole):
    """A profile with one to three changes, from `random`, because hypothesis repeats most of what it draws."""
    content = deepcopy(whole)
    for _ in range(rng.choice([1, 1, 2, 3])):
        action = rng.choice(["replace", "scale", "scale", "nudge", "lose", "double"])
        value = rng.choice([rng.choice(NUMBERS), rng.lognormvariate(0, 1), rng.random(), rng.choice(ODD)])
        change(content, rng.choice([*places(whole)]), action, value)
    if rng.random() < 0.5:
        fit(content)
    return content


def test_e5_a_changed_profile_is_refused_by_name_or_comes_back_to_the_bit(
    profile, tmp_path, monkeypatch, record_property
):
    """Thousands of profiles with changed, lost and doubled values."""
    path, again = tmp_path / "ana.json", tmp_path / "again.json"
    profile.save(path)
    whole, rng, inputs, accepted = json.loads(path.read_text()), Random(0), set(), 0
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here has to outlive the machine
    while len(inputs) < 9_000:
        text = json.dumps(any_profile(rng, whole))
        if text in inputs:
            continue
        inputs.add(text)
        path.unlink()  # to cut a file to nothing waits for the disk
        path.write_text(text)
        try:
            found = Profile.load(path, "f00d", PRIOR)
        except ValueError as error:
            assert "ana.json needs " in str(error) and "got" in str(error) and str(error).isprintable(), text
            continue
        accepted += 1
        assert np.isfinite(found.coefficients).all() and np.isfinite(found.covariance).all(), text
        found.save(again)
        back = Profile.load(again, "f00d", PRIOR)
        assert (back.user, back.answers, back.skipped) == (found.user, found.answers, found.skipped), text
        assert back.coefficients.tobytes() == found.coefficients.tobytes(), text
        assert back.covariance.tobytes() == found.covariance.tobytes(), text
    record_property("inputs", len(inputs))
    assert accepted > len(inputs) / 100


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b"[" * 100000, b"null"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "ana.json").write_bytes(content)
    with pytest.raises(ValueError, match="needs to be a whole profile"):
        Profile.load(tmp_path / "ana.json", "f00d", PRIOR)


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
