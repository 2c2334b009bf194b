"""What a session asks, takes, keeps and shows."""

import json

import numpy as np
import pytest
from scipy.special import expit

from openrlhf_pgrpo.core.posterior import Prior, posterior
from openrlhf_pgrpo.core.questions import next_questions
from openrlhf_pgrpo.models.profiles import Profile
from openrlhf_pgrpo.people.pool import Pair, score_pool
from openrlhf_pgrpo.people.session import LEFT, RIGHT, TIE, NotNow, Session, check_user

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
    features, asked, said = np.subtract(*score_pool(model, pairs)), [], []
    while session.question:
        (row,) = next_questions(features, posterior(features[asked], said, Prior.of(model.coefficients)), asked)
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
    assert on_disk(session)["answers"] == []
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


def test_an_answer_to_another_question_changes_nothing(session_of):
    session = session_of(questions=1)
    name, before = session.question.name, session.path.read_bytes()
    with pytest.raises(NotNow, match="answered already"):
        session.answer("0" * 32, LEFT)
    assert session.path.read_bytes() == before
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
    session_of("ana")
    scored = score_pool(model, pairs)
    with pytest.raises(ValueError, match="needs a profile of 'ben', got one of 'ana'"):
        Session(pairs, *scored, Prior.of(model.coefficients), "ben", model.fingerprint, tmp_path / "ana.json")
    with pytest.raises(ValueError, match="model beef, got one for f00d"):
        Session(pairs, *scored, Prior.of(model.coefficients), "ana", "beef", tmp_path / "ana.json")
    with pytest.raises(OSError):
        Session(pairs, *scored, Prior.of(model.coefficients), "ana", "beef", tmp_path / "nowhere" / "ana.json")
    bad = scored[0].copy()
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match="finite"):
        Session(pairs, bad, scored[1], Prior.of(model.coefficients), "eve", model.fingerprint, tmp_path / "eve.json")
    assert not (tmp_path / "eve.json").exists()


@pytest.mark.parametrize("name", ["ana", "Ana.B-2", "user_7", "ana@home", "\u00c5sa", "7", "a" * 64, "a+b"])
def test_names_of_users(name):
    check_user(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../ana", "a/b", "a\\b", "/etc/x", ".ana", "a\0", "a\n", "ana\n", "a b", "-x", "a" * 65, "~"],
)
def test_path_tricks_in_names_are_refused(name):
    with pytest.raises(ValueError, match="a user needs a name of 1 to 64 letters"):
        check_user(name)
