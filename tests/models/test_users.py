"""Whose coefficients: trained users, new users with profiles, and the average user."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from openrlhf_pgrpo.core.posterior import Prior
from openrlhf_pgrpo.models.profiles import Answer, Profile
from openrlhf_pgrpo.models.users import MEAN, Users, coefficients_for

pytestmark = pytest.mark.core

ANA, BOB = [2.0, -1.0], [-1.0, 3.0]
PRIOR = Prior.of(np.array([ANA, BOB]))


def of_answers(user, preference, fingerprint="f00d"):
    """The profile of a user with one answer."""
    return Profile.of(user, fingerprint, [Answer("x", (1.0, 2.0), preference)], PRIOR)


@pytest.fixture
def model():
    """What `Users` reads of a folder; its average user is (0.5, 1)."""
    return SimpleNamespace(name="rm", users=["ana", "bob"], coefficients=np.array([ANA, BOB]), fingerprint="f00d")


@pytest.fixture
def profile(tmp_path):
    """Writes the profile of a user who gave one answer."""

    def profile(user, preference=1.0, fingerprint="f00d", folder=tmp_path):
        folder.mkdir(exist_ok=True)
        of_answers(user, preference, fingerprint).save(folder / f"{user}.json")
        return folder / f"{user}.json"

    return profile


def test_trained_and_new_users_have_their_own_coefficients(model, profile, tmp_path):
    folder = tmp_path / "profiles"
    profile("cid", 0.5, folder=folder)
    profile("dora", 0.0, folder=folder)
    (folder / "notes.txt").write_text("not a profile")
    users = Users(model, [folder, profile("eve")])
    assert list(users.names) == ["ana", "bob", "cid", "dora", "eve"] and len(users) == 5
    assert "eve" in users and "zoe" not in users and None not in users
    eve, dora = of_answers("eve", 1.0).coefficients, of_answers("dora", 0.0).coefficients
    assert users.of(["eve", "ana", "dora"]).tolist() == [eve.tolist(), ANA, dora.tolist()]
    assert [one.user for one in users.profiles] == ["cid", "dora", "eve"]


def test_the_average_user_is_the_mean_of_the_trained_ones_and_used_only_on_demand(model, profile):
    users = Users(model, [profile("eve")])
    assert users.of(["zoe", "bob", None], MEAN).tolist() == [[0.5, 1], BOB, [0.5, 1]]
    with pytest.raises(ValueError, match="every sample needs one of the 3 users of rm and its profiles, got 'zoe' "):
        users.of(["zoe", "bob", None])
    with pytest.raises(ValueError, match=r"got 'zoe' \(2 of 3 samples\): ask them with openrlhf-pgrpo elicit"):
        users.of(["zoe", "bob", None])


def test_an_error_says_where_and_what_to_do(model):
    users = Users(model, remedies="look again")
    users.check(["ana", "bob"], "line 3")
    with pytest.raises(
        ValueError, match="^line 3 needs one of the 2 users of rm and its profiles, got None: look again$"
    ):
        users.check([None], "line 3")


def test_a_new_user_is_new(model, profile):
    with pytest.raises(ValueError, match="ana.json needs to be of a new user, got 'ana', who is known: leave it out"):
        Users(model, [profile("ana")])
    twice = profile("eve")
    with pytest.raises(ValueError, match="of a new user, got 'eve', who is known"):
        Users(model, [twice, twice])


def test_a14_a_folder_of_hidden_files_holds_no_profile_and_all_that_is_broken_is_named(model, profile, tmp_path):
    """A folder without profiles never means the average user; a folder with many faults is mended in one go."""
    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / "._eve.json").write_text("left by a file system")
    with pytest.raises(ValueError, match="profiles need a file, or a folder with .*.json files, got .*profiles"):
        Users(model, [folder])
    profile("eve", folder=folder)
    assert list(Users(model, [folder]).names) == ["ana", "bob", "eve"]
    profile("ana", folder=folder)
    (folder / "broken.json").write_text("{")
    (folder / "twin.json").write_bytes((folder / "eve.json").read_bytes())
    with pytest.raises(ValueError) as caught:
        Users(model, [folder])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "ana.json needs to be of a new user, got 'ana', who is known" in lines[0]
    assert "broken.json needs to be a whole profile" in lines[1]
    assert "twin.json needs to be of a new user, got 'eve'" in lines[2]


def test_a14_a_profile_needs_as_many_coefficients_as_the_model(model, tmp_path):
    path = tmp_path / "eve.json"
    Profile("eve", "f00d", np.ones(3), np.eye(3), ()).save(path)
    for use in (lambda: Users(model, [path]), lambda: coefficients_for(model, None, path)):
        with pytest.raises(ValueError, match="eve.json needs 2 coefficients, as the model has, got 3: restore it"):
            use()


def test_a_profile_whose_coefficients_are_not_those_of_its_answers_is_refused(model, tmp_path):
    path = tmp_path / "eve.json"
    replace(of_answers("eve", 1.0), coefficients=np.array([5.0, 7.0])).save(path)
    for use in (lambda: Users(model, [path]), lambda: coefficients_for(model, None, path)):
        with pytest.raises(ValueError, match="eve.json needs the coefficients that follow from its 1 answers, got 5 "):
            use()


def test_a14_a_profile_without_an_answer_makes_nobody_known(model, profile, tmp_path, capsys):
    """Its coefficients are the average user's, which must not be taken for somebody's without a word."""
    folder = tmp_path / "profiles"
    profile("eve", folder=folder)
    for user in ("cid", "dora"):
        Profile.of(user, "f00d", [], PRIOR).save(folder / f"{user}.json")
    users = Users(model, [folder])
    assert list(users.names) == ["ana", "bob", "eve"] and users.of(["cid"], MEAN).tolist() == [[0.5, 1]]
    said = "users count as unknown, because their profiles have no answer yet: 2 ('cid', 'dora')\n"
    assert capsys.readouterr().out == said
    with pytest.raises(ValueError, match="every sample needs one of the 3 users"):
        users.of(["cid"])
    for use in (
        lambda: Users(model, [folder / "cid.json"]),
        lambda: coefficients_for(model, None, folder / "cid.json"),
    ):
        with pytest.raises(ValueError, match="cid.json needs an answer of 'cid', got none, .*: ask them with"):
            use()
    assert coefficients_for(model, None, folder / "cid.json", MEAN) == pytest.approx([0.5, 1])


def test_profiles_that_do_not_fit_are_refused(model, profile, tmp_path):
    with pytest.raises(ValueError, match="profile for the model f00d, got one for beef"):
        Users(model, [profile("eve", fingerprint="beef")])
    (tmp_path / "empty").mkdir()
    for missing in ("nobody.json", "nowhere", "empty"):
        with pytest.raises(ValueError, match="profiles need a file, or a folder with .*.json files, got .*" + missing):
            Users(model, [tmp_path / missing])


def test_one_user_by_name_or_by_profile(model, profile):
    assert coefficients_for(model, "bob", None).tolist() == BOB
    assert coefficients_for(model, "bob", None, MEAN).tolist() == BOB  # the average is for the unknown alone
    assert coefficients_for(model, None, profile("eve")).tolist() == of_answers("eve", 1.0).coefficients.tolist()
    assert coefficients_for(model, "zoe", None, MEAN).tolist() == [0.5, 1]
    assert coefficients_for(model, None, None, MEAN).tolist() == [0.5, 1]
    with pytest.raises(ValueError, match="profile for the model f00d, got one for beef"):
        coefficients_for(model, None, profile("eve", fingerprint="beef"), MEAN)
    with pytest.raises(
        ValueError, match="^--user needs one of the 2 users of rm and its profiles, got 'zoe': or else$"
    ):
        coefficients_for(model, "zoe", None, remedies="or else")


def test_flags_can_import_it_without_torch():
    code = "import sys, openrlhf_pgrpo.models.users; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
