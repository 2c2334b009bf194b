"""A person at the page, in a real headless Chromium: keys, mouse, undo, closing and coming back."""

import json
import re
import socket
import threading
from contextlib import ExitStack, contextmanager

import pytest

from openrlhf_pgrpo.models.profiles import Profile
from openrlhf_pgrpo.people import web
from openrlhf_pgrpo.people.pool import Pair

pytestmark = pytest.mark.core
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)><b>bold</b>\u2028\U0001f600 {{ 7*7 }}\nnext line"


@contextmanager
def serving(session, port=0, token="s3cret"):
    """The address of a session's page, as `serve` prints it."""
    listener = socket.create_server(("127.0.0.1", port))
    app = web.create_app(session, "127.0.0.1", token)
    server = web.server_of(app)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/?token={token}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture
def visited(visit):
    """Opens the page of a session."""

    @contextmanager
    def visited(session, **view):
        with serving(session) as address, visit(address, **view) as seen:
            yield seen

    return visited


def sides(page):
    return page.locator(".sides .text").all_text_contents()


def status(page):
    return page.locator(".status").text_content()


def wait_for(page, answered):
    """Waits for a state of the page, by selector: the page forbids the evaluation that waiting for a script needs."""
    page.locator(f"body:not([aria-busy]) .progress[aria-valuenow='{answered}']").wait_for(state="attached")


def problem(page):
    page.locator("body:not([aria-busy]) .problem:not(:empty)").wait_for()
    return page.locator(".problem").text_content()


def preferences(session):
    """What was said, for the left answer of each question."""
    answers = json.loads(session.path.read_text())["answers"]
    return [1 - one["preference"] if session._swapped(one["pair"]) else one["preference"] for one in answers]


def test_a_question_is_shown_with_two_answers_and_what_is_believed(visited, session_of):
    session = session_of(questions=5)
    with visited(session) as seen:
        page = seen.page
        assert page.locator(".prompt").text_content() == session.question.prompt
        assert sides(page) == [session.question.left, session.question.right]
        left, right = (article.bounding_box() for article in page.locator("article").all())
        assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
        assert status(page).startswith("Question 1 of 5 · ") and f"{session.entropy:.2f} bits" in status(page)
        assert page.locator(".bar").count() == 2
        shown = page.locator(".interval").all_text_contents()
        for text, one in zip(shown, session.coefficients()):
            assert [float(number) for number in re.findall(r"-?\d+\.\d\d", text)] == [
                pytest.approx(number, abs=0.0051) for number in (one.mean, one.low, one.high)
            ]
        assert page.locator(".undo").is_disabled() and page.locator(".done").is_hidden()
        assert "average user" in page.locator(".forecast").text_content()
        assert len(seen.requests) == 1 and seen.complaints == []


def test_keys_answer_take_back_and_reach_the_end(visited, session_of):
    session = session_of(questions=5)
    with visited(session) as seen:
        page = seen.page
        for count, key in enumerate(["1", "2", "=", "ArrowLeft"], 1):
            fourth = page.locator(".prompt").text_content(), sides(page)
            page.keyboard.press(key)
            wait_for(page, count)
            assert status(page).startswith(f"Question {count + 1} of 5")
        assert preferences(session) == [1, 0, 0.5, 1]
        page.keyboard.press("u")
        wait_for(page, 3)
        assert (page.locator(".prompt").text_content(), sides(page)) == fourth
        page.keyboard.press("ArrowRight")
        wait_for(page, 4)
        page.keyboard.press("x")
        page.keyboard.press("Control+1")
        page.keyboard.down("Shift")
        page.keyboard.down("u")
        wait_for(page, 3)
        page.keyboard.down("u")  # held down, it comes again and again
        page.keyboard.up("u")
        page.keyboard.up("Shift")
        page.keyboard.press("2")
        page.wait_for_timeout(150)
        wait_for(page, 4)
        assert preferences(session) == [1, 0, 0.5, 0]
        page.keyboard.press("1")
        wait_for(page, 5)
        assert page.locator(".asking").is_hidden() and page.locator(".done").is_visible()
        assert page.locator(".profile").text_content() == str(session.path)
        ranking = session.ranking()
        assert page.locator(".ranking h2").all_text_contents() == [prompt for prompt, _ in ranking]
        answers = [one.answer for _, ranked in ranking for one in ranked]
        assert page.locator(".ranking .text").all_text_contents() == answers
        assert f"{ranking[0][1][0].reward:.2f} ± {ranking[0][1][0].deviation:.2f}" == (
            page.locator(".ranking .reward").first.text_content()
        )
        page.keyboard.press("1")  # nothing is open
        page.keyboard.press("u")
        wait_for(page, 4)
        assert page.locator(".asking").is_visible() and page.locator(".done").is_hidden()
        assert seen.complaints == []


def test_the_mouse_does_the_same(visited, session_of):
    session = session_of(questions=4)
    with visited(session) as seen:
        page = seen.page
        for count, name in enumerate(["left", "right", "tie"], 1):
            page.locator(f"[data-choice={name}]").click()
            wait_for(page, count)
        assert preferences(session) == [1, 0, 0.5]
        assert page.locator(".progress").get_attribute("aria-valuenow") == "3"
        share = "(bar) => bar.firstElementChild.getBoundingClientRect().width / bar.getBoundingClientRect().width"
        assert page.locator(".progress").evaluate(share) == pytest.approx(0.75, abs=0.01)
        page.locator(".undo").click()
        wait_for(page, 2)
        assert preferences(session) == [1, 0]


def test_skip_and_both_bad_by_key_and_mouse(visited, session_of):
    session = session_of(questions=4)
    with visited(session) as seen:
        page = seen.page
        first = sides(page)
        page.keyboard.press("s")
        page.get_by_text("Question 1 of 4 · 1 skipped").wait_for()
        page.keyboard.press("B")
        page.get_by_text("Question 1 of 4 · 2 skipped").wait_for()
        for number, name in ((3, "both bad"), (4, "skip")):
            page.locator(f"[data-choice='{name}']").click()
            page.get_by_text(f"Question 1 of 4 · {number} skipped").wait_for()
        reasons = [one["reason"] for one in json.loads(session.path.read_text())["skipped"]]
        assert reasons == ["skip", "both bad", "both bad", "skip"] and first != sides(page)
        assert "not answered yet" in page.locator(".forecast").text_content()
        for left in (3, 2, 1):
            page.keyboard.press("u")
            page.get_by_text(f"Question 1 of 4 · {left} skipped").wait_for()
        page.locator(".undo").click()
        page.get_by_text("Question 1 of 4 · uncertainty").wait_for()
        assert sides(page) == first and page.locator(".undo").is_disabled()
        assert seen.complaints == []


def test_the_forecast_and_the_intervals_follow_the_answers(visited, session_of):
    session = session_of()
    with visited(session) as seen:
        page = seen.page
        before = page.locator(".interval").all_text_contents()
        page.keyboard.press("2")
        wait_for(page, 1)
        assert f"{100 * (1 - session.forecast().left):.0f} %" in page.locator(".forecast").text_content()
        assert page.locator(".interval").all_text_contents() != before
        start, width = page.locator(".bar").first.evaluate("(b) => [b.getBoundingClientRect().left, b.offsetWidth]")
        numbers = session.coefficients()
        low = min(min(one.low, one.usual_low) for one in numbers)
        high = max(max(one.high, one.usual_high) for one in numbers)
        places = "(parts) => parts.map((part) => [part.getBoundingClientRect().left, part.offsetWidth])"
        for name, wanted in (("usual", "usual_low usual_high"), ("range", "low high")):
            for place, one in zip(page.locator(f".bar .{name}").evaluate_all(places), numbers, strict=True):
                begin, end = (getattr(one, which) for which in wanted.split())
                assert place[0] - start == pytest.approx(width * (begin - low) / (high - low), abs=1)
                assert place[1] == pytest.approx(width * (end - begin) / (high - low), abs=1)
        widths = "(bars) => bars.map((bar) => [bar.children[1].offsetWidth, bar.children[0].offsetWidth])"
        for own, usual in page.locator(".bar").evaluate_all(widths):
            assert own < usual
        page.keyboard.press("=")
        wait_for(page, 2)
        assert f"the left one a chance of {100 * session.forecast().left:.0f} %" in (
            page.locator(".forecast").text_content()
        )


def test_closing_the_browser_and_the_server_loses_nothing(visit, session_of):
    session = session_of(questions=5)
    with serving(session) as address:
        with visit(address) as seen:
            seen.page.keyboard.press("1")
            wait_for(seen.page, 1)
        with visit(address) as seen:  # another browser, the same server
            assert status(seen.page).startswith("Question 2 of 5")
            seen.page.keyboard.press("2")
            wait_for(seen.page, 2)
            shown = sides(seen.page)
            seen.page.reload()
            assert sides(seen.page) == shown and status(seen.page).startswith("Question 3 of 5")
    with visit_again(visit, session_of(questions=5)) as seen:  # another server
        assert status(seen.page).startswith("Question 3 of 5") and sides(seen.page) == shown
        assert seen.page.locator(".undo").is_enabled()
        seen.page.keyboard.press("u")
        wait_for(seen.page, 1)
    assert preferences(session) == [1]


@contextmanager
def visit_again(visit, session):
    with serving(session) as address, visit(address) as seen:
        yield seen


def test_two_windows_cannot_answer_the_same_question(visit, session_of):
    session = session_of(questions=5)
    with serving(session) as address, visit(address) as one, visit(address) as other:
        one.page.keyboard.press("1")
        wait_for(one.page, 1)
        other.page.keyboard.press("2")
        assert "answered already" in problem(other.page)
        assert sides(other.page) == sides(one.page) and preferences(session) == [1]
        other.page.keyboard.press("2")
        wait_for(other.page, 2)
        assert other.page.locator(".problem").text_content() == ""


def test_twenty_tabs_answer_each_question_once(visit, session_of):
    session = session_of(questions=5)
    with serving(session) as address, visit(address) as seen:
        tabs = [seen.page, *(seen.page.context.new_page() for _ in range(19))]
        for tab in tabs[1:]:
            tab.goto(address)
        for answered in (1, 2, 3):
            for tab in tabs:
                tab.keyboard.press("1")  # returns at once: all of them still show the same question
            for tab in tabs:
                wait_for(tab, answered)
            assert preferences(session) == [1] * answered
        shown = [(sides(tab), status(tab)) for tab in tabs]
        assert shown == [shown[0]] * 20 and status(tabs[0]).startswith("Question 4 of 5")


def test_the_page_waits_until_the_answer_is_saved(visited, session_of, monkeypatch):
    session, go = session_of(questions=5), threading.Event()
    save = Profile.save
    monkeypatch.setattr(Profile, "save", lambda self, path: (go.wait(20), save(self, path)))
    with visited(session) as seen:
        page = seen.page
        before = sides(page), page.locator(".prompt").text_content()
        page.keyboard.press("1")
        page.keyboard.press("1")
        page.wait_for_timeout(200)
        assert status(page).startswith("Question 1 of 5")
        assert (sides(page), page.locator(".prompt").text_content()) == before
        go.set()
        wait_for(page, 1)
        page.wait_for_timeout(100)
        assert preferences(session) == [1]  # the second key came while the first was being saved
        assert page.locator(".problem").text_content() == ""


def test_errors_are_shown(visit, session_of, monkeypatch):
    session = session_of(questions=5)

    def full(self, path):
        raise OSError("No space left on device")

    server = ExitStack()
    with server, visit(server.enter_context(serving(session))) as seen:
        page = seen.page
        port = int(re.search(r":(\d+)/", page.url)[1])
        with monkeypatch.context() as patch:
            patch.setattr(Profile, "save", full)
            page.keyboard.press("1")
            assert "No space left" in problem(page)
        page.keyboard.press("1")
        wait_for(page, 1)
        server.close()
        page.keyboard.press("1")
        assert "does not answer" in problem(page)
        with serving(session, port, "another"):
            page.keyboard.press("1")
            page.get_by_text("this page needs its token").wait_for()
        with serving(session, port):
            page.keyboard.press("1")
            wait_for(page, 2)


def test_a14_without_an_answer_no_profile_is_named(visited, session_of):
    """It is enough before the first question, so nothing is on the disk."""
    session = session_of(level=1.0)
    assert session.question is None and not session.path.exists()
    with visited(session) as seen:
        assert seen.page.get_by_text("Thank you").is_visible() and not seen.page.locator(".kept").is_visible()
        assert seen.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_are_only_texts(visited, session_of, dark):
    session = session_of("<b>ana", pool=[Pair(EVIL + "?", EVIL + " one", EVIL + " other")], questions=3)
    with visited(session, dark=dark) as seen:
        page = seen.page
        assert page.locator(".prompt").text_content() == EVIL + "?"
        assert sides(page) == [session.question.left, session.question.right]
        page.keyboard.press("1")
        wait_for(page, 1)
        assert page.locator(".done").is_visible()
        assert page.locator(".ranking .text").first.text_content() in (EVIL + " one", EVIL + " other")
        assert page.locator("img, b").count() == 0
        assert seen.dialogs == [] and seen.complaints == []
        assert {request.split("?")[0].split("/", 3)[-1] for request in seen.requests} == {"", "answer"}


def test_nothing_is_wider_than_a_telephone(visited, session_of):
    long = "w" * 3000
    session = session_of(pool=[Pair(long, long + "1", long + "2")])
    with visited(session, width=380) as seen:
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 380
        left, right = (article.bounding_box() for article in seen.page.locator("article").all())
        assert left["y"] + left["height"] <= right["y"]
        seen.page.keyboard.press("1")
        wait_for(seen.page, 1)
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 380


def test_another_page_cannot_reach_it(visit, session_of):
    """From a page of another origin, even with the token: the browser asks for a permission that nobody gives."""
    session = session_of()
    with serving(session) as address, serving(session_of("ben")) as other, visit(other) as seen:
        call = f"""fetch('{address.split("?")[0]}undo', {{method: 'POST', headers: {{'{web.TOKEN}': 's3cret'}}}})
            .then(() => 'reached', () => 'refused')"""
        page = seen.page.context.new_page()
        page.goto("about:blank")
        assert page.evaluate(call) == "refused"
        assert seen.page.evaluate(call) == "refused"  # and from its own kind: the policy of the page
