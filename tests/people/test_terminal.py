"""A person at the keyboard: every key, leaving and coming back, and texts that try to steer the terminal."""

import pytest

from openrlhf_pgrpo.models.profiles import Profile
from openrlhf_pgrpo.people.pool import Pair
from openrlhf_pgrpo.people.terminal import ask, plain

pytestmark = pytest.mark.core


def run(session, *keys):
    """What is shown to a person who types `keys` and then closes the terminal."""
    left, shown = list(keys), []

    def read(prompt):
        if not left:
            raise EOFError
        return left.pop(0)

    ask(session, read, shown.append)
    return "\n".join(shown)


def test_keys_mean_what_they_say(session_of):
    session = session_of(questions=3)
    questions = []

    def read(prompt):
        questions.append(session.question)
        return ["1", "2 ", "="][len(questions) - 1]

    ask(session, read, lambda text: None)
    for question, answer, left in zip(questions, session.profile.answers, (1.0, 0.0, 0.5)):
        row = session.rows[question.name]
        assert answer.preference == (left if question.left == session.pairs[row].a else 1 - left)


def test_a_question_shows_its_number_prompt_and_both_answers(session_of):
    session = session_of(questions=3)
    _, prompt, left, right = session.question
    shown = run(session)
    assert "Question 1 of 3" in shown and prompt in shown
    assert shown.index(prompt) < shown.index("\n1\n") < shown.index(left) < shown.index("\n2\n") < shown.index(right)
    assert shown.endswith("0 answers saved; the same command goes on from here")


def test_undo_and_unknown_keys(session_of):
    session = session_of(questions=2)
    shown = run(session, "u", "x", "", "1", "U", "2", "Q", "1")
    assert shown.count("undo needs an answer to take back") == 1
    assert shown.count("1 or 2: the better answer") == 3  # at first, and for x and nothing
    assert shown.count("taken back") == 1 and shown.count("Question 1 of 2") == 2
    assert shown.endswith("1 answer saved; the same command goes on from here")
    assert len(session.profile.answers) == 1


def test_skip_and_both_bad(session_of):
    session = session_of(questions=2)
    first = session.question
    shown = run(session, "s", "B ", "1", "u", "u")
    assert "noted: skip\n" in shown and "noted: both bad\n" in shown and shown.count("taken back") == 2
    assert shown.endswith("0 answers, 1 skipped saved; the same command goes on from here")
    assert [one.pair for one in session.profile.skipped] == [first.name]
    shown = run(session_of(questions=2), "b", "1", "2")
    assert "\n2 answers, 2 skipped. What the model believes" in shown and f"profile: {session.path}" in shown


def test_ctrl_c_leaves_and_the_next_start_goes_on(session_of):
    session = session_of(questions=3)

    def interrupted(prompt):
        raise KeyboardInterrupt

    run(session, "1")
    ask(session, interrupted, lambda text: None)
    again = session_of(questions=3)
    assert len(again.profile.answers) == 1
    shown = run(again, "1", "1")
    assert "Question 2 of 3" in shown and "3 answers. What the model believes" in shown
    assert f"profile: {again.path}" in shown


def test_the_end_shows_intervals_and_a_ranking(session_of):
    session = session_of(questions=4)
    shown = run(session, *"1111")
    for one in session.coefficients():
        assert f"{one.mean:+.2f}  [{one.low:+.2f}, {one.high:+.2f}]" in shown
    bars = [line[6:37] for line in shown.splitlines() if "[" in line and "]" in line]
    assert len(bars) == 2 and all(bar.count("o") == 1 and "=" in bar and len(bar) == 31 for bar in bars)
    for prompt, ranked in session.ranking():
        assert prompt in shown
        assert f"1. {ranked[0].reward:+.2f} ± {ranked[0].deviation:.2f}\n       {ranked[0].answer}" in shown


def test_the_forecast_comes_after_the_answer(session_of):
    session = session_of(questions=3)
    assert "chance" not in run(session)
    shown = run(session, "1")
    assert f"the model gave that a chance of {session.forecast().left:.0%}" in shown
    shown = run(session, "2")
    assert f"the model gave that a chance of {1 - session.forecast().left:.0%}" in shown
    shown = run(session, "=")
    assert f"the model gave 1 a chance of {session.forecast().left:.0%}" in shown


def test_a_full_disk_leaves_the_question_open(session_of, monkeypatch):
    session = session_of(questions=2)

    def full(self, path):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Profile, "save", full)
        shown = run(session, "1")
    assert "not saved, so the question stays open: No space left on device" in shown
    assert "2 answers." in run(session, "1", "1")


def test_texts_cannot_steer_the_terminal(session_of):
    evil = "\x1b[2J\x1b]0;title\x07 \x9b31m line\rover\ntabs\tstay, \u200d and \u00e9 too\x00"
    shown = run(session_of(pool=[Pair(evil, evil + "1", "2" + evil)], questions=1), "1")
    assert not set(shown) & set("\x1b\x07\x9b\r\x00")
    assert "\u200d and \u00e9 too" in shown


def test_e8_texts_cannot_turn_the_line_or_break_the_output():
    """Characters that turn the direction of writing, and halves of surrogate pairs, in texts and in file names."""
    evil = "a\u202eb\u2066c\u2069d\ud800e\udcfff\x85g"
    assert plain(evil) == "a\ufffdb\ufffdc\ufffdd\ufffde\ufffdf\ufffdg"
    plain(evil).encode("utf-8")
    assert plain("\u05d0\u0628 \u200f\u00e9") == "\u05d0\u0628 \u200f\u00e9"
