"""Many people at once, learned from choices that exist."""

import json
import threading
import time
from collections import Counter

import numpy as np
import pytest

from openrlhf_pgrpo.core.posterior import Prior
from openrlhf_pgrpo.files import locked
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.profiles import Answer, Profile
from openrlhf_pgrpo.models.scoring import load
from openrlhf_pgrpo.models.tables import Columns
from openrlhf_pgrpo.models.users import Users
from openrlhf_pgrpo.people import answers
from openrlhf_pgrpo.people.answers import learn
from openrlhf_pgrpo.people.pool import Pair
from openrlhf_pgrpo.people.session import profile_name

pytestmark = pytest.mark.core

NAMES = ["eve", "Ana Mar\u00eda", ".hidden", "..", "/", "../x", "a" * 300, "\U0001f600" * 99, "Eve", "CON", "a\nb"]


def choice(user, good, bad, prompt="p ", **more):
    return {"user": user, "prompt": prompt, "chosen": good, "rejected": bad, **more}


@pytest.fixture
def everybody(jsonl):
    """Each name with three choices, a number as a name, and a user whom the model knows."""
    rows = [choice(name, f"yes{number}", "no") for name in [*NAMES, 7, "ana"] for number in range(3)]
    return jsonl("choices.jsonl", rows)


def fitted(factorized, user, said):
    """The profile of a user who said so of pairs, fitted alone."""
    model = load(factorized)
    made = []
    for pair, preference in said:
        a, b = model.base_rewards([pair.prompt] * 2, [pair.a, pair.b])
        made.append(Answer(pair.name, tuple(a - b), preference, *pair))
    return Profile.of(user, model.fingerprint, made, Prior.of(model.coefficients))


def test_everybody_new_becomes_known_with_the_coefficients_of_their_answers(factorized, everybody, tmp_path, capsys):
    folder = tmp_path / "people"
    lines = learn(str(factorized), everybody, folder)
    assert lines == [
        f"{folder}: {len(NAMES) + 1} profiles of {3 * len(NAMES) + 3} answers",
        "users whom the model knows, so they have no profile: 1 ('ana')",
    ]
    assert "differ only in case, white space or characters without a width: 'eve', 'Eve'" in capsys.readouterr().out
    users = Users(Folder(factorized), [folder])
    assert set(users.names) == {"ana", "bob", "cleo", "7", *NAMES}
    assert {path.name for path in folder.iterdir()} == {profile_name(name) for name in [*NAMES, "7"]}
    alone = fitted(factorized, "eve", [(Pair("p ", f"yes{number}", "no"), 1.0) for number in range(3)])
    for profile in users.profiles:
        assert np.abs(profile.coefficients - alone.coefficients).max() < 1e-6  # another batch rounds otherwise
        assert [said.pair for said in profile.answers] == [said.pair for said in alone.answers]
        assert [said.prompt for said in profile.answers] == ["p "] * 3


def test_many_users_are_those_that_are_learned_one_by_one(factorized, jsonl, tmp_path):
    rng = np.random.default_rng(0)
    texts = [f"{word}{'!' * count}" for word in ("yes", "no", "so") for count in range(4)]
    rows = []
    for user in range(1000):
        for _ in range(rng.integers(1, 9)):
            good, bad = rng.choice(texts, 2, replace=False).tolist()
            rows.append(choice(f"u{user}", good, bad, preference=float(rng.choice([1, 0.8, 0.5]))))
    folder = tmp_path / "people"
    learn(str(factorized), jsonl("choices.jsonl", rows), folder)
    model = Folder(factorized)
    users = Users(model, [folder])  # checks each against the fit to its answers
    counts = Counter(row["user"] for row in rows)
    for profile in users.profiles:
        one = Profile.of(profile.user, model.fingerprint, profile.answers, Prior.of(model.coefficients))
        assert np.abs(profile.coefficients - one.coefficients).max() < 1e-9
        assert len(profile.answers) <= counts[profile.user]
    assert len(users.profiles) == 1000


def test_a_pair_that_was_answered_twice_counts_as_the_mean(factorized, jsonl, tmp_path):
    rows = [
        choice("eve", "yes", "no"),
        choice("eve", "no", "yes", preference=0.75),
        choice("ben", "no", "yes"),
        choice("ben", "so", "no"),
    ]
    learn(
        str(factorized), jsonl("c.jsonl", [{**row, "preference": row.get("preference", 1)} for row in rows]), tmp_path
    )
    eve, ben = (json.loads((tmp_path / f"{user}.json").read_text()) for user in ("eve", "ben"))
    # Whoever saw which answer first, a and b are in alphabetical order.
    assert [said["preference"] for said in eve["answers"]] == [1 - (1 + 0.25) / 2]
    assert [(said["a"], said["b"], said["preference"]) for said in ben["answers"]] == [
        ("no", "yes", 1),
        ("no", "so", 0),
    ]
    alone = fitted(factorized, "ben", [(Pair("p ", "yes", "no"), 0.0), (Pair("p ", "so", "no"), 1.0)])
    assert ben["coefficients"] == pytest.approx(alone.coefficients.tolist(), abs=1e-6)


def test_ratings_and_conversations_are_choices_too(factorized, jsonl, tmp_path):
    rated = [
        {"who": "eve", "prompt": "p ", "response": text, "stars": n} for n, text in enumerate(("no", "so", "yes"))
    ]
    named = Columns(user="who", rating="stars")
    assert learn(str(factorized), jsonl("r.jsonl", rated), tmp_path, columns=named)[0].endswith(
        "1 profile of 3 answers"
    )
    said = json.loads((tmp_path / "eve.json").read_text())["answers"]
    assert {(one["a"], one["b"], one["preference"]) for one in said} == {
        ("no", "so", 0),
        ("no", "yes", 0),
        ("so", "yes", 0),
    }


def test_what_the_model_cannot_read_is_left_out_and_counted(factorized, jsonl, tmp_path, capsys):
    rows = [choice("eve", "yes", "no"), choice("eve", "y" * 300, "no"), choice("ben", "y" * 300, "no")]
    rows.append(choice("cid", "yes", "yes<eos>"))
    lines = learn(str(factorized), jsonl("c.jsonl", rows), tmp_path / "people")
    said = capsys.readouterr().out
    assert "1 of 3 pairs are left out: they have an answer of more than the " in said
    assert "1 of 2 pairs are the same to the model and are left out\n" in said
    assert lines[1:] == ["users without an answer that the model can read: 2 ('ben', 'cid')"]
    assert [path.name for path in (tmp_path / "people").iterdir()] == ["eve.json"]


def test_scores_are_kept(factorized, everybody, tmp_path, capsys):
    for folder in ("one", "two"):
        learn(str(factorized), everybody, tmp_path / folder, tmp_path / "scores")
    assert capsys.readouterr().out.count("scoring") == 1
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    "rows, message",
    [
        ([choice(" ", "a", "b")], "line 1 of .* needs a user in 'user', a text or a number, got a blank text"),
        (
            [choice("eve", "a", "b"), choice("\ud83d", "a", "b")],
            "line 2 of .* needs a user .* of whole characters, got",
        ),
        ([choice("ana", "a", "b")], "--answers needs people whom the model does not know, got none among the 1 in "),
        ([choice("eve", "a", "b", preference=2)], "line 1 of .* needs a number from 0 .* got int 2|got 2"),
        ([choice("eve", "a", " <eos>")], "line 1 of .* needs answers with words, got one that is nothing but its end"),
        ([choice("eve", "a", [{"role": "assistant", "content": "b"}])], "line 1 of .*: a response needs to be a text"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_written(factorized, jsonl, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        learn(str(factorized), jsonl("c.jsonl", rows), tmp_path / "people")
    assert not (tmp_path / "people").exists()


def test_files_in_the_way_are_refused_and_stay(factorized, everybody, jsonl, tmp_path):
    folder = tmp_path / "people"
    learn(str(factorized), everybody, folder)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    (folder / "eve.json").rename(tmp_path / "kept.json")
    learn(str(factorized), everybody, folder)  # as after an interruption: what is there stays, the rest is written
    assert {path: path.read_bytes() for path in folder.iterdir()} == {path: text for path, (text, _) in before.items()}
    assert all(path.name == "eve.json" or path.stat().st_mtime_ns == time for path, (_, time) in before.items())
    other = jsonl("other.jsonl", [choice("new", "yes", "no"), choice("eve", "no", "yes0")])
    with pytest.raises(
        ValueError, match=r"--profiles needs a folder without profiles .* other answers, got 1 \('eve'\)"
    ):
        learn(str(factorized), other, folder)
    assert not (folder / "new.json").exists()
    (folder / "new.json").write_text("my notes")
    with pytest.raises(
        ValueError, match="needs a folder without other files of these names, got .*new.json, which is no"
    ):
        learn(str(factorized), other, folder)
    assert (folder / "new.json").read_text() == "my notes"
    with pytest.raises(ValueError, match="--profiles needs a folder, got .*choices.jsonl, a file: name another"):
        learn(str(factorized), everybody, everybody)
    with pytest.raises(ValueError, match="--profiles needs a folder that exists, got .*nowhere: make it"):
        learn(str(factorized), everybody, tmp_path / "nowhere" / "people")
    config = factorized / "config.json"
    whole = config.read_bytes()
    with pytest.raises(
        ValueError, match="--profiles needs a folder without a model, got .*, which holds one: name an"
    ):
        learn(str(factorized), jsonl("c.jsonl", [choice("config", "a", "b")]), factorized)
    assert sorted(path.name for path in folder.iterdir() if "config" in path.name) == []
    learn(str(factorized), jsonl("c.jsonl", [choice("config", "a", "b")]), folder)
    learn(str(factorized), jsonl("c.jsonl", [choice("ida", "a", "b")]), folder)  # a config.json alone is no model
    assert config.read_bytes() == whole


def test_a_full_disk_leaves_whole_files_and_the_same_command_goes_on(factorized, everybody, tmp_path, monkeypatch):
    save, left = Profile.save, [5]

    def full(self, path):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("No space left on device")
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(answers.Profile, "save", full)
        with pytest.raises(OSError):
            learn(str(factorized), everybody, tmp_path / "people")
    assert len(list((tmp_path / "people").iterdir())) == 5
    learn(str(factorized), everybody, tmp_path / "people")
    assert len(Users(Folder(factorized), [tmp_path / "people"]).profiles) == len(NAMES) + 1


def test_a_profile_that_somebody_writes_in_the_meantime_stays_and_is_named(
    factorized, everybody, tmp_path, monkeypatch
):
    """Whoever was asked while texts were scored lost their answers."""
    folder, held, score = tmp_path / "people", threading.Event(), answers.base_rewards
    folder.mkdir()

    def ask_eve():
        with locked(folder / "eve.json"):
            held.set()
            time.sleep(0.2)
            (folder / "eve.json").write_text("of another process")

    def slowly(*given):
        session.start()
        held.wait()
        return score(*given)

    session = threading.Thread(target=ask_eve)
    monkeypatch.setattr(answers, "base_rewards", slowly)
    with pytest.raises(ValueError, match=r"got 1 \('eve'\) that came into .*, which stays; the others are written"):
        learn(str(factorized), everybody, folder)
    session.join()
    assert (folder / "eve.json").read_text() == "of another process"
    assert {path.name for path in folder.iterdir()} == {profile_name(name) for name in [*NAMES, "7"]}


def test_the_same_choices_in_another_order_are_no_other_choices(factorized, jsonl, tmp_path):
    """A growing file of choices could not go on, because who came first decided which answer was a."""
    rows = [choice("eve", "yes", "no"), choice("eve", "so", "yes"), choice("ben", "no", "yes")]
    learn(str(factorized), jsonl("c.jsonl", rows), tmp_path / "profiles")
    before = {path.name: path.read_bytes() for path in (tmp_path / "profiles").iterdir()}
    more = [choice("zoe", "no", "yes"), *rows[::-1]]
    learn(str(factorized), jsonl("c.jsonl", more), tmp_path / "profiles")
    after = {path.name: path.read_bytes() for path in (tmp_path / "profiles").iterdir()}
    assert len(after) == 3 and before.items() <= after.items()


@pytest.mark.parametrize("edit", [lambda x: x["coefficients"].__setitem__(0, 9.0), lambda x: x.update(answers=[])])
def test_a_profile_that_others_would_refuse_is_no_success(factorized, everybody, tmp_path, edit):
    """It was counted as written, and every other command refused it."""
    folder = tmp_path / "people"
    learn(str(factorized), everybody, folder)
    content = json.loads((folder / "eve.json").read_text())
    edit(content)
    (folder / "eve.json").write_text(json.dumps(content))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        ValueError, match="other files of these names, got .*eve.json, which is no .* or an edited one"
    ):
        learn(str(factorized), everybody, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
