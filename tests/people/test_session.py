"""What a session asks, takes, keeps and shows."""

import json
import multiprocessing
import os
from copy import deepcopy

import numpy as np
import pytest
from common import places, scored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.special import expit

from openrlhf_pgrpo.core.posterior import Prior, posterior
from openrlhf_pgrpo.core.questions import next_question
from openrlhf_pgrpo.models.profiles import BOTH_BAD, SKIP, Answer, Profile, check_user
from openrlhf_pgrpo.models.users import Users, coefficients_for
from openrlhf_pgrpo.people.pool import Pair
from openrlhf_pgrpo.people.session import LEFT, RIGHT, TIE, NotNow, Session, profile_name
from openrlhf_pgrpo.people.terminal import question_text, summary
from openrlhf_pgrpo.people.web import view

pytestmark = pytest.mark.core


def loud(text):
    return text.count("!")


def louder(session):
    """The choice of a person who always wants it louder, and finds the rest equally good."""
    left, right = loud(session.question.left), loud(session.question.right)
    return LEFT if left > right else RIGHT if right > left else TIE


def answer_all(session, choose=louder):
    while session.question:
        session.answer(session.question.name, choose(session))


def on_disk(session):
    return json.loads(session.path.read_text())


def test_someone_who_likes_it_loud_is_known_after_ten_questions(session_of):
    session = session_of(questions=10)
    before = session.coefficients()
    answer_all(session)
    after = session.coefficients()
    assert after[0].low > 0 and after[0].mean > before[0].mean + 1
    assert all(then.high - then.low < now.high - now.low for then, now in zip(after, before))
    assert len(on_disk(session)["answers"]) == 10
    for _, ranked in session.ranking():
        assert loud(ranked[0].answer) == 3 and ranked[0].reward > 0 > ranked[-1].reward


def test_questions_are_those_of_core_and_the_profile_is_their_posterior(session_of, model, pairs):
    session = session_of(questions=5)
    features, asked, said = np.subtract(*scored(model, pairs)), [], []
    while session.question:
        row, _ = next_question(features, posterior(features[asked], said, Prior.of(model.coefficients)), asked)
        assert session.question.name == pairs[row].name
        assert {session.question.left, session.question.right} == {pairs[row].a, pairs[row].b}
        asked.append(row)
        said.append(1.0 if session.question.left == pairs[row].a else 0.0)
        session.answer(session.question.name, LEFT)
    fitted = posterior(features[asked], said, Prior.of(model.coefficients))
    assert session.profile.coefficients == pytest.approx(fitted.mean, rel=1e-12)
    assert [answer.preference for answer in session.profile.answers] == said
    assert [answer.features for answer in session.profile.answers] == [tuple(features[row]) for row in asked]


def test_sides_are_mixed_and_do_not_change_what_is_meant(session_of, pairs):
    session = session_of(questions=12)
    lefts = []
    while session.question:
        pair = pairs[session.rows[session.question.name]]
        lefts.append(session.question.left == pair.a)
        session.answer(session.question.name, LEFT if lefts[-1] else RIGHT)
    assert 2 < sum(lefts) < 10
    assert {answer.preference for answer in session.profile.answers} == {1.0}  # always the answer a


def test_it_is_enough_after_the_questions_at_the_level_or_at_the_end_of_the_pool(session_of):
    session = session_of("few", questions=3)
    answer_all(session)
    assert len(session.profile.answers) == 3
    session = session_of("all", questions=None)
    answer_all(session)
    assert len(session.profile.answers) == 12
    assert session_of("many", questions=99).questions == 12
    session = session_of("sure", questions=None, level=0.85)
    while session.question:
        assert session.entropy >= 0.85
        session.answer(session.question.name, louder(session))
    assert session.entropy < 0.85 and 0 < len(session.profile.answers) < 12


def test_every_answer_is_on_the_disk_and_a_new_session_goes_on(session_of):
    session = session_of(questions=4)
    assert not session.path.exists()
    for count in range(1, 4):
        session.answer(session.question.name, louder(session))
        assert len(on_disk(session)["answers"]) == count
    again = session_of(questions=4)
    assert again.question == session.question
    assert np.array_equal(again.profile.coefficients, session.profile.coefficients)
    answer_all(again)
    assert session_of(questions=4).question is None
    assert session_of(questions=5).question is not None


def test_undo_takes_back_one_answer_after_the_other(session_of):
    session = session_of()
    first, start = session.question, session.profile
    session.answer(first.name, LEFT)
    second = session.question
    session.answer(second.name, TIE)
    session.undo()
    assert session.question == second and len(on_disk(session)["answers"]) == 1
    session.undo()
    assert session.question == first and np.array_equal(session.profile.coefficients, start.coefficients)
    with pytest.raises(NotNow, match="none yet"):
        session.undo()


def test_what_is_skipped_is_not_asked_again_and_teaches_nothing(session_of):
    session = session_of(questions=3)
    before, seen = session.profile, []
    for choice in (SKIP, BOTH_BAD):
        seen.append(session.question.name)
        session.answer(seen[-1], choice)
        assert np.array_equal(session.profile.coefficients, before.coefficients) and session.entropy < 1
    assert session.profile.answers == () and session.forecast() is None
    assert on_disk(session)["skipped"] == [
        {"pair": seen[0], "reason": "skip", "after": 0},
        {"pair": seen[1], "reason": "both bad", "after": 0},
    ]
    again = session_of(questions=3)
    assert again.question == session.question and again.question.name not in seen
    answer_all(again)
    names = [said.pair for said in again.profile.answers]
    assert len(names) == 3 and not set(names) & set(seen) and len(again.profile.skipped) == 2
    fitted = posterior([said.features for said in again.profile.answers], prefs(again), again.prior)
    assert np.array_equal(again.profile.coefficients, fitted.mean)


def prefs(session):
    return [said.preference for said in session.profile.answers]


def test_a_skip_is_no_tie(session_of):
    tie, skip = session_of("tie"), session_of("skip")
    tie.answer(tie.question.name, TIE)
    skip.answer(skip.question.name, SKIP)
    assert not np.array_equal(tie.profile.covariance, skip.profile.covariance)
    assert np.array_equal(skip.profile.covariance, skip.prior.covariance)


def test_undo_takes_back_the_last_act_whatever_it_was(session_of):
    session, opened = session_of(), []
    for choice in (SKIP, LEFT, BOTH_BAD, SKIP, RIGHT):
        opened.append(session.question)
        session.answer(session.question.name, choice)
    assert [(one.reason, one.after) for one in session.profile.skipped] == [(SKIP, 0), (BOTH_BAD, 1), (SKIP, 1)]
    for question in reversed(opened):
        session = session_of()  # the order is on the disk
        session.undo()
        assert session.question == question
    with pytest.raises(NotNow, match="none yet"):
        session.undo()
    assert session.profile.answers == session.profile.skipped == ()


def test_the_pool_ends_for_who_skips_it_all_and_has_no_answer(session_of, model, pairs):
    session = session_of(questions=10)
    while session.question:
        session.answer(session.question.name, SKIP)
        assert session.questions == min(10, 12 - len(session.profile.skipped))
    assert len(session.profile.skipped) == 12
    assert f"profile: {session.path}, without an answer yet, so it is refused" in summary(session)
    see_everything(session)
    with pytest.raises(ValueError, match="ana.json needs an answer of 'ana', got none"):
        Users(model, [session.path])
    with pytest.raises(ValueError, match="ana.json needs an answer of 'ana', got none"):
        coefficients_for(model, None, session.path)
    more = [*pairs, Pair("more", "a!", "b")]
    assert session_of(pool=more).question.name == more[-1].name


def test_a_profile_keeps_the_texts_as_they_were_given(session_of, pairs):
    session = session_of(questions=4)
    answer_all(session)
    by_name = {pair.name: pair for pair in pairs}
    for said, row in zip(session.profile.answers, on_disk(session)["answers"]):
        assert Pair(said.prompt, said.a, said.b) == by_name[said.pair]
        assert (row["prompt"], row["a"], row["b"]) == by_name[said.pair]


def test_a_profile_from_before_texts_were_kept_goes_on(session_of):
    session = session_of(questions=3)
    answer_all(session)
    answers = [Answer(said.pair, said.features, said.preference) for said in session.profile.answers]
    change_answers(session, answers)
    assert "prompt" not in session.path.read_text() and "skipped" not in session.path.read_text()
    again = session_of(questions=4)
    answer_all(again)
    assert [said.prompt is None for said in again.profile.answers] == [True] * 3 + [False]


def test_an_answer_to_another_question_changes_nothing(session_of):
    session = session_of(questions=1)
    name = session.question.name
    with pytest.raises(NotNow, match="answered already"):
        session.answer("0" * 32, LEFT)
    assert not session.path.exists()
    session.answer(name, LEFT)
    with pytest.raises(NotNow):
        session.answer(name, LEFT)
    assert len(on_disk(session)["answers"]) == 1


def test_two_sessions_cannot_lose_each_others_answers(session_of):
    one, other = session_of(), session_of()
    one.answer(one.question.name, LEFT)
    before, question = one.path.read_bytes(), other.question
    with pytest.raises(OSError, match="changed by another session"):
        other.answer(question.name, RIGHT)
    assert one.path.read_bytes() == before and other.question is question
    one.answer(one.question.name, LEFT)
    one.path.unlink()
    with pytest.raises(OSError, match="changed by another session"):
        one.undo()


def test_a_failed_save_leaves_the_question_open(session_of, monkeypatch):
    session = session_of()
    question, profile = session.question, session.profile

    def full(self, path):
        raise OSError("No space left on device")

    monkeypatch.setattr(Profile, "save", full)
    with pytest.raises(OSError):
        session.answer(question.name, LEFT)
    assert session.question is question and session.profile is profile


def test_the_forecast_is_that_from_before_the_answer(session_of, model):
    session, swapped = session_of(), set()
    assert session.forecast() is None
    for choice in (LEFT, RIGHT, TIE, RIGHT, LEFT):
        question, belief = session.question, session.profile
        left, right = model.base_rewards([""] * 2, [question.left, question.right])
        mean, variance = (left - right) @ belief.coefficients, (left - right) @ belief.covariance @ (left - right)
        draws = np.random.default_rng(0).normal(mean, np.sqrt(variance), 200_000)
        session.answer(question.name, choice)
        assert session.forecast().choice == choice
        assert session.forecast().left == pytest.approx(expit(draws).mean(), abs=5e-3)
        swapped.add(session._swapped(question.name))
    assert swapped == {True, False}


def test_a_ranking_of_unasked_prompts_first_by_hand(session_of, model):
    pool = [Pair("p", "a", "bbbb!"), Pair("p", "bbbb!", "cc"), Pair("q", "d!", "e")]
    session = session_of(pool=pool, questions=1)
    session.answer(session.question.name, TIE)
    asked = pool[session.rows[session.profile.answers[0].pair]].prompt
    ranking = session.ranking()
    assert [prompt for prompt, _ in ranking] == (["q", "p"] if asked == "p" else ["p", "q"])
    ranked = dict(ranking)["p"]
    # base rewards a (0, .1), bbbb! (1, .5), cc (0, .2), their mean (1/3, .8/3)
    texts = {"a": (-1 / 3, 0.1 - 0.8 / 3), "bbbb!": (2 / 3, 0.5 - 0.8 / 3), "cc": (-1 / 3, 0.2 - 0.8 / 3)}
    assert [one.reward for one in ranked] == sorted([one.reward for one in ranked], reverse=True)
    for one in ranked:
        v = np.array(texts[one.answer])
        assert one.reward == pytest.approx(v @ session.profile.coefficients)
        assert one.deviation == pytest.approx(np.sqrt(v @ session.profile.covariance @ v))


def test_coefficients_have_their_intervals_beside_the_usual_ones(session_of, model):
    prior = Prior.of(model.coefficients)
    for one, mean, variance in zip(session_of().coefficients(), prior.mean, np.diag(prior.covariance), strict=True):
        assert one.mean == pytest.approx(mean)
        assert [one.low, one.high] == pytest.approx([mean - 1.645 * variance**0.5, mean + 1.645 * variance**0.5])
        assert [one.usual_low, one.usual_high] == [one.low, one.high]


def test_a_pool_that_lost_its_pairs_still_counts_the_answers(session_of, pairs):
    session = session_of(questions=5)
    answer_all(session)
    names = {answer.pair for answer in session.profile.answers}
    rest = [pair for pair in pairs if pair.name not in names]
    assert session_of(pool=rest, questions=99).questions == 12
    again = session_of(pool=rest, questions=None)
    assert len(again.profile.answers) == 5 and again.question is not None and again.forecast() is not None
    answer_all(again)
    assert len(again.profile.answers) == 12


def test_answers_the_other_way_round_are_the_same_pair(session_of, pairs):
    session = session_of(questions=3)
    answer_all(session)
    turned = [Pair(pair.prompt, pair.b, pair.a) for pair in pairs]
    again = session_of(pool=turned, questions=4)
    assert len(again.profile.answers) == 3
    asked = {answer.pair for answer in again.profile.answers}
    answer_all(again)
    assert len(asked | {again.profile.answers[-1].pair}) == 4
    assert again.coefficients()[0].mean > 0


def test_somebody_elses_profile_is_refused(session_of, model, pairs, tmp_path):
    session = session_of("ana")
    session.answer(session.question.name, LEFT)
    rewards = scored(model, pairs)
    with pytest.raises(ValueError, match="needs a profile of 'ben', got one of 'ana'"):
        Session(pairs, *rewards, Prior.of(model.coefficients), "ben", model.fingerprint, tmp_path / "ana.json")
    with pytest.raises(ValueError, match="model beef, got one for f00d"):
        Session(pairs, *rewards, Prior.of(model.coefficients), "ana", "beef", tmp_path / "ana.json")
    with pytest.raises(OSError):
        Session(pairs, *rewards, Prior.of(model.coefficients), "ana", "beef", tmp_path / "nowhere" / "ana.json")
    bad = rewards[0].copy()
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match="finite"):
        Session(pairs, bad, rewards[1], Prior.of(model.coefficients), "eve", model.fingerprint, tmp_path / "eve.json")
    assert not (tmp_path / "eve.json").exists()


@pytest.mark.parametrize("name", ["ana", "Ana.B-2", "user_7", "ana@home", "\u00c5sa", "7", "a" * 64, "a+b"])
def test_plain_names_name_their_file(name):
    check_user(name)
    assert profile_name(name) == f"{name}.json"


ODD_NAMES = [
    *(
        "Ana Mar\u00eda",
        "user:1",
        "../x",
        "..",
        ".",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "a\0",
        "ana\n",
        "-x",
        "~",
        "%",
        "%2E",
    ),
    *(
        ".ana",
        "%sha256-0",
        "\U0001f600",
        "\U0001f600" * 99,
        "x" * 300,
        "x" * 301,
        "\u0939\u093f\u0928\u094d",
        "\u202eana",
    ),
]


def test_d16_any_name_has_a_file_of_its_own_in_this_folder(tmp_path):
    """Every name that is not blank is a user's; only the file's name is made safe, and no two users share one."""
    files = [profile_name(name) for name in ODD_NAMES]
    assert len(set(files)) == len(ODD_NAMES)
    for name, file in zip(ODD_NAMES, files):
        check_user(name)
        assert "/" not in file and "\\" not in file and not file.startswith((".", "-"))
        (tmp_path / file).touch()
    assert len(list(tmp_path.iterdir())) == len(ODD_NAMES)
    assert profile_name("Ana Mar\u00eda") == "Ana%20Mar\u00eda.json" and profile_name("../x") == "%2E.%2Fx.json"


@settings(max_examples=300, deadline=None)
@given(st.text(min_size=1, max_size=80), st.text(min_size=1, max_size=80))
def test_d16_two_names_never_share_a_file(one, other):
    """Safe, short and different, whatever the two names are."""
    names = [name for name in (one, other) if name.strip() and not any("\ud800" <= c <= "\udfff" for c in name)]
    files = {profile_name(name) for name in names}
    assert len(files) == len(set(names))
    assert all(len(os.fsencode(file)) < 240 and "/" not in file and file[0] not in ".-" for file in files)


@pytest.mark.parametrize("name", ["", " ", "\n\t", "\u3000", "\ud800", "ana\udcff"])
def test_d16_what_is_no_name_is_refused(name):
    """A blank name, or one that UTF-8 cannot hold."""
    with pytest.raises(ValueError, match="a user needs a name that is not blank, in UTF-8, got"):
        check_user(name)


def test_d16_a_session_of_an_odd_name_keeps_it(session_of, model, pairs, tmp_path):
    """The name in the profile is the one that was given; it is made safe in the file's name alone."""
    user, rewards, prior = "Ana Mar\u00eda / x", scored(model, pairs), Prior.of(model.coefficients)
    path = tmp_path / profile_name(user)
    for _ in range(2):
        session = Session(pairs, *rewards, prior, user, model.fingerprint, path)
        session.answer(session.question.name, LEFT)
        assert on_disk(session)["user"] == session.profile.user == user
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a14_who_opened_and_left_has_no_profile(session_of):
    """A profile without answers made a user known, with the coefficients of the average one."""
    session = session_of()
    see_everything(session)
    assert not session.path.exists() and summary(session).endswith("profile: none before the first choice")
    session.answer(session.question.name, LEFT)
    assert session.path.exists() and summary(session).endswith(f"profile: {session.path}")
    session.undo()
    assert session.path.exists() and f"profile: {session.path}, without an answer yet" in summary(session)


def test_messages_are_shown_with_their_roles(session_of):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    loud_one, calm_one = ([{"role": "assistant", "content": text}] for text in ("So!", "<b>Well.</b>"))
    pool = [Pair(chat, loud_one, calm_one), Pair("And then?", "Yes!", "No.")]
    session = session_of(pool=pool, questions=2)
    seen = []
    while session.question:
        seen.append(session.question)
        assert view(session)["question"] == session.question._asdict()
        session.answer(session.question.name, LEFT)
    prompt = "system: Be kind.\n\nuser: Why?"
    (question,) = [one for one in seen if one.prompt == prompt]
    assert {question.left, question.right} == {"assistant: So!", "assistant: <b>Well.</b>"}
    ranking = dict(session.ranking())
    assert {one.answer for one in ranking[prompt]} == {question.left, question.right} and "And then?" in ranking
    assert "  system: Be kind." in summary(session) and "user: Why?" in summary(session)


# --- B4: two sessions ------------------------------------------------------------------------------------------------


def answer_at_machine_speed(make, until, saved):
    """Answers until the profile holds enough, starts again when told that another session was faster."""
    while True:
        session = make()
        try:
            while len(session.profile.answers) < until:
                name = session.question.name
                session.answer(name, LEFT)
                saved.put(name)
        except OSError:
            continue
        saved.put(None)
        return


def test_b4_two_sessions_at_machine_speed_lose_no_answer(model, tmp_path):
    """No answer that was reported as saved is gone, though two processes write one profile as fast as they can."""
    rng = np.random.default_rng(0)
    pool = [Pair("p", f"a{number}", f"b{number}") for number in range(80)]
    a, b = rng.normal(0, 1, (2, 80, 2))

    def make():
        return Session(
            pool, a, b, Prior.of(model.coefficients), "ana", model.fingerprint, tmp_path / "ana.json", questions=60
        )

    fork = multiprocessing.get_context("fork")
    saved = fork.Queue()
    workers = [fork.Process(target=answer_at_machine_speed, args=(make, 60, saved)) for _ in range(2)]
    for worker in workers:
        worker.start()
    ended, names = 0, []
    while ended < 2:
        name = saved.get(timeout=60)
        ended, names = (ended + 1, names) if name is None else (ended, [*names, name])
    for worker in workers:
        worker.join()
    profile = Profile.load(tmp_path / "ana.json", model.fingerprint, Prior.of(model.coefficients))
    kept = [answer.pair for answer in profile.answers]
    assert sorted(names) == sorted(kept) and len(kept) == 60
    assert [path.name for path in tmp_path.iterdir()] == ["ana.json"]


def test_b4_a_change_within_one_tick_of_the_clock_is_seen(session_of):
    """The content is compared, since a file's time and number may be the same after it was written again."""
    session = session_of()
    session.answer(session.question.name, LEFT)
    before = session.path.stat()
    changed = session.path.read_bytes().replace(b"ana", b"eve")
    session.path.write_bytes(changed)
    os.utime(session.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(OSError, match="changed by another session"):
        session.answer(session.question.name, LEFT)
    assert session.path.read_bytes() == changed


def test_b4_two_links_to_one_profile_are_one_file(session_of, model, pairs, tmp_path):
    """A link is followed, so that the sessions see each other, and it stays a link."""
    one, link = session_of(), tmp_path / "link.json"
    link.symlink_to("ana.json")
    other = Session(pairs, *scored(model, pairs), Prior.of(model.coefficients), "ana", model.fingerprint, link)
    one.answer(one.question.name, LEFT)
    with pytest.raises(OSError, match="changed by another session"):
        other.answer(other.question.name, LEFT)
    assert link.is_symlink() and len(on_disk(one)["answers"]) == 1


# --- E5: profiles that were changed ----------------------------------------------------------------------------------


def change_profile(session, **changes):
    session.profile.save(session.path)  # there is no file before the first answer
    session.path.write_text(json.dumps({**on_disk(session), **changes}))


def change_answers(session, answers):
    """As if the session had taken these answers."""
    Profile.of("ana", session.profile.fingerprint, answers, session.prior).save(session.path)


def see_everything(session):
    """Everything that page and terminal show. JSON without nan proves that it is finite."""
    json.dumps(view(session), allow_nan=False)
    assert "nan" not in summary(session) and "inf" not in summary(session)
    for _, ranked in session.ranking():
        json.dumps(ranked, allow_nan=False)
    return session.question and question_text(session)


@pytest.mark.parametrize("size", [1e5, 1e99, 1e101, 1e300])
def test_e5_features_that_nothing_finite_follows_from_are_refused_when_read(session_of, size):
    """Such a profile was accepted, and then every page was status 500."""
    session = session_of()
    answer = {"pair": "x", "features": [size, -size], "preference": 1.0}
    change_profile(session, answers=[answer])
    before = session.path.read_bytes()
    with pytest.raises(ValueError, match="ana.json needs .*: restore it or ask again"):
        session_of()
    assert session.path.read_bytes() == before


def test_e5_a_pair_that_was_answered_twice_ends_no_session(session_of, pairs):
    """The end of the pool is counted in pairs, not in answers."""
    session = session_of(questions=None)
    for _ in range(3):
        session.answer(session.question.name, LEFT)
    change_answers(session, session.profile.answers * 4)
    again = session_of(questions=None)
    assert again.question is not None and len(again.profile.answers) == len(pairs)


def test_e5_a_profile_with_another_number_of_coefficients_is_refused(session_of):
    """Features of three numbers were cut into pairs of two."""
    session = session_of()
    answers = [{"pair": name, "features": [1.0, 2.0, 3.0], "preference": 1.0} for name in "xy"]
    change_profile(session, answers=answers, coefficients=[0.0] * 3, covariance=np.eye(3).tolist())
    with pytest.raises(ValueError, match="ana.json needs 2 coefficients, as the model has, got 3"):
        session_of()
    with pytest.raises(ValueError):
        Profile.of("ana", "f00d", [Answer("x", (1.0, 2.0, 3.0), 1.0)] * 2, session.prior)


def test_a_profile_whose_coefficients_are_not_those_of_its_answers_is_refused(session_of):
    """`elicit` would go on from the answers, `rerank` from the coefficients."""
    session = session_of()
    session.answer(session.question.name, LEFT)
    change_profile(session, coefficients=[9.0, 9.0])
    before = session.path.read_bytes()
    with pytest.raises(ValueError, match="ana.json needs the coefficients that follow from its 1 answers, got 9 "):
        session_of()
    assert session.path.read_bytes() == before


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_e5_base_rewards_that_no_model_gives_are_refused(model, pairs, tmp_path, bad):
    """The same number in both answers has no effect on the features, but on the ranking at the end."""
    a, b = scored(model, pairs)
    a[3] = b[3] = bad
    path = tmp_path / "eve.json"
    with pytest.raises(ValueError, match="finite base rewards, got .* for pair 3"):
        Session(pairs, a, b, Prior.of(model.coefficients), "eve", model.fingerprint, path)
    with pytest.raises(ValueError, match=r"base rewards of shape \(12, 2\), got \(11, 2\)"):
        Session(pairs, a[1:], b, Prior.of(model.coefficients), "eve", model.fingerprint, path)
    assert not path.exists()


NUMBERS = st.sampled_from(
    [0, 1, -1, 0.5, 1e-320, 1e-30, 1e3, 3e3, 1e5, -1e9, 1e30, 1e99, 1e155, 1.7e308, 10**25, 10**400]
)
VALUES = (
    NUMBERS
    | st.floats()
    | st.sampled_from(
        [None, True, "", " ", "x", "ana", "\ud800", [], {}, [1.0, 2.0], [[1.0, 0.0], [0.0, 1.0]], [[1e9]]]
    )
)


@st.composite
def changes(draw, profile):
    """A profile with one to three changes: a value replaced, scaled, left out, or doubled."""
    profile = deepcopy(profile)
    for _ in range(draw(st.integers(1, 3))):
        if not (found := list(places(profile))):
            break
        *above, key = draw(st.sampled_from(found))
        owner = profile
        for step in above:
            owner = owner[step]
        action = draw(st.sampled_from(["replace", "scale", "scale", "delete", "double", "other"]))
        if action == "scale" and type(owner[key]) is float:
            owner[key] *= draw(st.sampled_from([-1, 0, 1e-200, 1e-9, 1.001, 10, 1e3, 1e6, 1e50, 1e150]))
        elif action == "delete":
            del owner[key]
        elif action == "double" and isinstance(owner, list):
            owner.insert(key, deepcopy(owner[key]))
        elif action == "other":
            other = profile
            for step in draw(st.sampled_from(found)):
                other = (
                    other[step]
                    if isinstance(other, (dict, list))
                    and step in (other if isinstance(other, dict) else range(len(other)))
                    else other
                )
            owner[key] = deepcopy(other)
        else:
            owner[key] = deepcopy(draw(VALUES))  # a later change must not reach the next profile
    return profile


def fit(profile, prior):
    """Gives a changed profile the coefficients that follow from its answers, where any do."""
    try:
        answers = [Answer(**answer) for answer in profile["answers"]]
        profile["coefficients"] = Profile.of("ana", "f00d", answers, prior).coefficients.tolist()
    except (KeyError, TypeError, ValueError, ArithmeticError):
        pass


def test_e5_a_changed_profile_is_refused_by_name_or_works_to_the_end(session_of, monkeypatch, record_property):
    """Profiles with changed, lost and doubled values. What is accepted can be shown and gone on with."""
    session = session_of()
    for choice in (LEFT, SKIP, RIGHT, TIE, BOTH_BAD, LEFT):
        session.answer(session.question.name, choice)
    whole, path = on_disk(session), session.path
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here has to outlive the machine
    inputs, counts = set(), {"refused": 0, "accepted": 0}

    @settings(max_examples=700, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changes(whole), st.booleans())
    def every(profile, fitting):
        if fitting:
            fit(profile, session.prior)
        text = json.dumps(profile)
        if text in inputs:
            return
        inputs.add(text)
        path.write_text(text)
        try:
            again = session_of(questions=6)
        except ValueError as error:
            assert "ana.json" in str(error) and str(error).isprintable()
            counts["refused"] += 1
            return
        counts["accepted"] += 1
        see_everything(again)
        if again.question:
            again.answer(again.question.name, RIGHT)
            see_everything(again)
        while again.profile.answers or again.profile.skipped:
            again.undo()
        see_everything(again)

    every()
    record_property("inputs", len(inputs))
    assert len(inputs) > 400 and min(counts.values()) > 5, counts
