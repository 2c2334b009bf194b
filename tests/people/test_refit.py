"""Profiles after a retraining: what the new model makes of the answers that they keep."""

import json
from dataclasses import replace

import numpy as np
import pytest
from common import scored

from openrlhf_pgrpo.core.posterior import Prior
from openrlhf_pgrpo.models.folder import Folder, write
from openrlhf_pgrpo.models.profiles import BOTH_BAD, SKIP, Answer, Profile, Skipped
from openrlhf_pgrpo.models.scoring import load
from openrlhf_pgrpo.models.users import Users
from openrlhf_pgrpo.people.pool import Pair
from openrlhf_pgrpo.people.refit import refit
from openrlhf_pgrpo.people.session import LEFT, RIGHT, TIE, Session

pytestmark = pytest.mark.core

POOL = [Pair("p ", f"yes{'!' * number}", f"no{'?' * number}") for number in range(6)]
POOL += [Pair("and? ", "so", f"well {number}") for number in range(4)]


@pytest.fixture(scope="module")
def new(tiny, tmp_path_factory):
    """The model after a retraining: other base rewards, as many or not, and other users."""
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("new") / "model"
    write(folder, tiny / "model", rng.normal(0, 1, (4, 64)), rng.normal(0, 1, (5, 4)), [*"vwxy", "cleo"])
    return folder


def longer(session):
    """The choice of a person who likes it long."""
    left, right = len(session.question.left), len(session.question.right)
    return LEFT if left > right else RIGHT if right > left else TIE


def asked(model, folder, user, choose=longer, pool=POOL):
    """The session of a user who answered all pairs of the pool."""
    prior = Prior.of(model.coefficients)
    folder.mkdir(exist_ok=True)
    path = folder / f"{user}.json"
    session = Session(pool, *scored(model, pool), prior, user, model.fingerprint, path, None)
    while session.question:
        session.answer(session.question.name, choose(session))
    return session


def read(path, folder):
    model = Folder(folder)
    return Profile.load(path, model.fingerprint, Prior.of(model.coefficients))


def without_texts(profile):
    return replace(profile, answers=tuple(Answer(one.pair, one.features, one.preference) for one in profile.answers))


def test_refit_gives_what_the_new_model_would_have_learned_by_asking(factorized, new, tmp_path):
    old, folder, after = load(factorized), tmp_path / "old", tmp_path / "new"
    for user, choose in (("eve", longer), ("dan", lambda session: LEFT)):
        asked(old, folder, user, choose)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert refit(str(new), [folder], after) == [f"{after}: 2 profiles of 20 answers"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    direct = asked(load(new), tmp_path / "direct", "eve").profile
    eve = read(after / "eve.json", new)
    assert np.abs(eve.coefficients - direct.coefficients).max() < 1e-9
    assert np.abs(eve.covariance - direct.covariance).max() < 1e-9
    assert len(eve.coefficients) == 4 and len(eve.answers) == 10
    assert set(Users(Folder(new), [after]).names) == {*"vwxy", "cleo", "eve", "dan"}
    # and back again: nothing was lost
    refit(str(factorized), [after / "eve.json", after / "dan.json"], tmp_path / "back")
    back = read(tmp_path / "back" / "eve.json", factorized)
    # Texts are read in other batches than when they were asked about: equal to the precision of float32.
    assert np.abs(back.coefficients - read(folder / "eve.json", factorized).coefficients).max() < 1e-5


def test_what_was_skipped_is_skipped_under_the_new_model_too(factorized, new, tmp_path):
    choices = iter([SKIP, LEFT, BOTH_BAD, RIGHT, SKIP, TIE, *[LEFT] * 4])
    session = asked(load(factorized), tmp_path / "old", "eve", lambda session: next(choices))
    refit(str(new), [session.path], tmp_path / "new")
    eve = read(tmp_path / "new" / "eve.json", new)
    assert eve.skipped == session.profile.skipped and len(eve.answers) == 7
    again = asked(load(new), tmp_path / "new", "eve")
    assert again.profile.answers == eve.answers and again.question is None


def test_who_skipped_everything_is_carried_along_without_an_answer(factorized, new, tmp_path):
    session = asked(load(factorized), tmp_path / "old", "eve", lambda session: SKIP)
    refit(str(new), [session.path], tmp_path / "new")
    with pytest.raises(ValueError, match="eve.json needs an answer of 'eve', got none"):
        Users(Folder(new), [tmp_path / "new" / "eve.json"])
    assert len(read(tmp_path / "new" / "eve.json", new).skipped) == len(POOL)


def test_profiles_from_before_texts_were_kept_need_the_pool(factorized, new, jsonl, tmp_path):
    session = asked(load(factorized), tmp_path / "old", "eve")
    without_texts(session.profile).save(session.path)
    read(session.path, factorized)  # its own model still takes it
    with pytest.raises(
        ValueError,
        match="eve.json needs the texts of its answers, got 10 of 10 without, .*: give the pool .* --pool, or",
    ):
        refit(str(new), [session.path], tmp_path / "new")
    pool = jsonl("pool.jsonl", [pair._asdict() for pair in POOL])
    refit(str(new), [session.path], tmp_path / "new", pool)
    direct = asked(load(new), tmp_path / "direct", "eve").profile
    assert np.abs(read(tmp_path / "new" / "eve.json", new).coefficients - direct.coefficients).max() < 1e-9
    part = jsonl("part.jsonl", [pair._asdict() for pair in POOL[1:]])
    with pytest.raises(ValueError, match="got 1 of 10 without, .*part.jsonl lacks them, name another, or ask again"):
        refit(str(new), [session.path], tmp_path / "newer", part)
    assert not (tmp_path / "newer").exists()


def test_people_of_the_new_model_need_no_profile(factorized, new, tmp_path):
    for user in ("eve", "x"):
        asked(load(factorized), tmp_path / "old", user)
    lines = refit(str(new), [tmp_path / "old"], tmp_path / "new")
    assert lines[1:] == ["users whom the model was trained on, so they need no profile: 1 ('x')"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["eve.json"]
    with pytest.raises(ValueError, match="--profile needs people whom the model was not trained on, got none in 1 "):
        refit(str(new), [tmp_path / "old" / "x.json"], tmp_path / "newer")


def save(folder, user, *answers, skipped=()):
    """A profile of an old model that we do not have any more."""
    folder.mkdir(exist_ok=True)
    said = [Answer(Pair(*texts).name, (1.0, 2.0), 1.0, *texts) for texts in answers]
    prior = Prior(np.zeros(2), np.eye(2))
    Profile.of(user, "beef", said, prior, skipped).save(folder / f"{user}.json")


def test_answers_that_the_model_cannot_read_are_left_out(new, tmp_path):
    skipped = [Skipped("s", SKIP, after) for after in (0, 2, 5)]
    odd = [("p ", "y" * 300, "no"), ("p ", "yes", " <eos>"), ("p ", "yes", "yes<eos>")]
    save(tmp_path / "old", "eve", odd[0], ("p ", "yes", "no"), odd[1], odd[2], ("q ", "so", "no"), skipped=skipped)
    lines = refit(str(new), [tmp_path / "old"], tmp_path / "new")
    assert lines[1] == "answers left out, because the model cannot read them or tell them apart: 3"
    eve = read(tmp_path / "new" / "eve.json", new)
    assert [said.prompt for said in eve.answers] == ["p ", "q "] and [one.after for one in eve.skipped] == [0, 1, 2]
    save(tmp_path / "old", "dan", *odd)
    with pytest.raises(ValueError, match="dan.json needs an answer that the model can read, got none among 3: "):
        refit(str(new), [tmp_path / "old"], tmp_path / "newer")
    assert not (tmp_path / "newer").exists()


def test_both_orders_of_a_pair_mean_what_they_say(new, tmp_path):
    save(tmp_path / "old", "eve", ("p ", "yes", "no"))
    save(tmp_path / "old", "dan", ("p ", "no", "yes"))
    refit(str(new), [tmp_path / "old"], tmp_path / "new")
    eve, dan = (read(tmp_path / "new" / f"{user}.json", new).answers[0] for user in ("eve", "dan"))
    assert eve.pair == dan.pair and np.array(eve.features) == pytest.approx(-np.array(dan.features))


def test_what_does_not_fit_is_named_all_at_once_and_nothing_is_written(new, tmp_path):
    folder = tmp_path / "old"
    save(folder, "eve", ("p ", "yes", "no"))
    (folder / "twin.json").write_bytes((folder / "eve.json").read_bytes())
    (folder / "broken.json").write_text("{")
    save(folder, "dan", ("p ", "yes", "no"))
    content = json.loads((folder / "dan.json").read_text())
    content["answers"][0]["a"] = "edited"
    (folder / "dan.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        refit(str(new), [folder], tmp_path / "new")
    lines = str(caught.value).splitlines()
    assert "broken.json needs to be a whole profile" in lines[0]
    assert "dan.json needs the texts that were asked, got others in answer 0: restore it" in lines[1]
    assert "twin.json needs to be of a user of its own, got 'eve', as in " in lines[2] and len(lines) == 3
    save(tmp_path / "chats", "eve", ([{"role": "user", "content": "p"}], "yes", "no"))
    with pytest.raises(
        ValueError, match="answer 0 of .*eve.json: a prompt needs to be a text, .* got a list of messages"
    ):
        refit(str(new), [tmp_path / "chats"], tmp_path / "new")
    with pytest.raises(ValueError, match="profiles need a file, or a folder with .*.json files, got .*nobody"):
        refit(str(new), [tmp_path / "nobody"], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_old_profiles_and_other_files_are_never_written_over(new, tmp_path):
    folder = tmp_path / "old"
    save(folder, "eve", ("p ", "yes", "no"))
    before = (folder / "eve.json").read_bytes()
    with pytest.raises(ValueError, match="--output needs a folder without other files of these names, got .*eve.json"):
        refit(str(new), [folder], folder)
    assert (folder / "eve.json").read_bytes() == before
    refit(str(new), [folder], tmp_path / "new")
    whole = (tmp_path / "new" / "eve.json").read_bytes()
    save(folder, "dan", ("p ", "yes", "so"))
    refit(str(new), [folder], tmp_path / "new")  # what is there stays, what is missing is added
    assert (tmp_path / "new" / "eve.json").read_bytes() == whole and (tmp_path / "new" / "dan.json").exists()
    save(folder, "eve", ("p ", "yes", "no"), ("p ", "so", "no"))
    with pytest.raises(
        ValueError, match=r"--output needs a folder without profiles .* other answers, got 1 \('eve'\)"
    ):
        refit(str(new), [folder], tmp_path / "new")
    assert (tmp_path / "new" / "eve.json").read_bytes() == whole


def test_a_model_of_messages_reads_the_messages_as_they_were_given(tiny, tmp_path):
    """Texts are kept as people gave them, so another chat template can write them."""
    from openrlhf_pgrpo.models.form import Form

    rng = np.random.default_rng(2)
    for name, opening in (("one", "<u>"), ("two", "<user>")):
        form = Form("{% for m in messages %}" + opening + "{{ m['content'] }}{% endfor %}")
        write(tmp_path / name, tiny / "model", rng.normal(0, 1, (2, 64)), rng.normal(0, 1, (3, 2)), "xyz", form=form)
    chats = [Pair([{"role": "user", "content": f"why {n}?"}], "so", "no") for n in range(3)]
    session = asked(load(tmp_path / "one"), tmp_path / "old", "eve", pool=chats)
    refit(str(tmp_path / "two"), [session.path], tmp_path / "new")
    direct = asked(load(tmp_path / "two"), tmp_path / "direct", "eve", pool=chats).profile
    eve = read(tmp_path / "new" / "eve.json", tmp_path / "two")
    assert np.abs(eve.coefficients - direct.coefficients).max() < 1e-9
    assert [said.prompt for said in eve.answers][0][0]["role"] == "user"


def test_an_edited_profile_in_the_way_is_refused_by_name(new, tmp_path):
    """It was reported as fitted again, and everybody else refused it."""
    save(tmp_path / "old", "eve", ("p ", "yes", "no"))
    refit(str(new), [tmp_path / "old"], tmp_path / "new")
    path = tmp_path / "new" / "eve.json"
    content = json.loads(path.read_text())
    content["coefficients"][0] += 5
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="--output needs a folder without other files .* got .*eve.json, .* edited one"
    ):
        refit(str(new), [tmp_path / "old"], tmp_path / "new")
    assert json.loads(path.read_text()) == content
