"""What the server behind the page takes and refuses."""

import json
import socket
import threading
import time

import httpx
import pytest
from starlette.testclient import TestClient

from openrlhf_pgrpo.models.profiles import Profile
from openrlhf_pgrpo.people import web
from openrlhf_pgrpo.people.pool import Pair
from openrlhf_pgrpo.people.web import TOKEN, create_app, serve

pytestmark = pytest.mark.core

SECRET = "s3cret"
HEADERS = {TOKEN: SECRET}


@pytest.fixture
def session(session_of):
    return session_of(questions=3)


@pytest.fixture
def client(session):
    return TestClient(create_app(session, "127.0.0.1", SECRET), base_url="http://127.0.0.1:8000")


def post(client, session, choice="left", **more):
    body = {"question": session.question.name, "choice": choice}
    return client.post("/answer", **{"json": body, "headers": HEADERS, **more})


def saved(session):
    return json.loads(session.path.read_text())["answers"]


def test_an_answer_is_on_the_disk_when_the_next_question_comes(client, session, monkeypatch):
    first, order = session.question, []
    save = Profile.save
    monkeypatch.setattr(Profile, "save", lambda self, path: (save(self, path), order.append(len(self.answers))))
    answer = post(client, session)
    assert answer.status_code == 200 and order == [1] and len(saved(session)) == 1
    state = answer.json()
    assert state["answered"] == 1 and state["questions"] == 3 and state["ranking"] == []
    assert state["question"] == session.question._asdict() != first._asdict()
    assert state["forecast"]["choice"] == "left" and 0 < state["forecast"]["left"] < 1
    assert [one["mean"] for one in state["coefficients"]] == pytest.approx(session.profile.coefficients)


def test_from_the_first_question_to_the_ranking_and_back(client, session):
    for _ in range(3):
        state = post(client, session, "tie").json()
    assert state["question"] is None and state["answered"] == 3 and state["profile"] == str(session.path)
    assert [one["prompt"] for one in state["ranking"]] == [prompt for prompt, _ in session.ranking()]
    assert set(state["ranking"][0]["answers"][0]) == {"answer", "reward", "deviation"}
    state = client.post("/undo", json={}, headers=HEADERS).json()
    assert state["question"] and state["answered"] == 2 and len(saved(session)) == 2
    assert client.get("/state", headers=HEADERS).json() == state


def test_a_question_that_is_not_open_is_a_conflict_and_shows_the_state(client, session):
    name = session.question.name
    post(client, session)
    twice = client.post("/answer", json={"question": name, "choice": "left"}, headers=HEADERS)
    assert twice.status_code == 409 and len(saved(session)) == 1
    assert "answered already" in twice.json()["detail"] and twice.json()["question"] == session.question._asdict()
    client.post("/undo", headers=HEADERS)
    nothing = client.post("/undo", headers=HEADERS)
    assert nothing.status_code == 409 and "none yet" in nothing.json()["detail"]


def test_answers_at_the_same_time_count_once(client, session):
    body, codes = {"question": session.question.name, "choice": "left"}, []
    calls = [
        threading.Thread(target=lambda: codes.append(client.post("/answer", json=body, headers=HEADERS).status_code))
        for _ in range(8)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert sorted(codes) == [200] + [409] * 7 and len(saved(session)) == 1


def test_a_full_disk_is_reported_and_nothing_changes(client, session, monkeypatch):
    question = session.question

    def full(self, path):
        raise OSError("No space left on device")

    monkeypatch.setattr(Profile, "save", full)
    answer = post(client, session)
    assert answer.status_code == 500 and "not saved" in answer.json()["detail"]
    assert answer.json()["question"] == question._asdict() and saved(session) == []


@pytest.mark.parametrize(
    "headers", [{}, {TOKEN: ""}, {TOKEN: "s3cret "}, {TOKEN: "S3CRET"}, {"Authorization": SECRET}]
)
@pytest.mark.parametrize("method, path", [("GET", "/state"), ("POST", "/answer"), ("POST", "/undo")])
def test_without_the_token_nothing_is_shown_or_taken(client, session, headers, method, path):
    body = {"question": session.question.name, "choice": "left"}
    answer = client.request(method, f"{path}?token={SECRET}", json=body, headers=headers)
    assert answer.status_code == 403 and session.question.prompt not in answer.text and saved(session) == []


@pytest.mark.parametrize("query", ["", "?token=", "?token=wrong", "?token=s3cre", "?Token=s3cret", "?token=%FF%00"])
def test_the_page_needs_the_token_too(client, session, query):
    answer = client.get("/" + query)
    assert answer.status_code == 403 and session.question.prompt not in answer.text and SECRET not in answer.text
    assert client.get(f"/?token={SECRET}").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_foreign_hosts_are_refused_even_with_the_token(client, session, host):
    for method, path in (("GET", f"/?token={SECRET}"), ("GET", "/state"), ("POST", "/undo"), ("POST", "/answer")):
        answer = client.request(method, path, headers={**HEADERS, "Host": host})
        assert answer.status_code == 400 and session.question.prompt not in answer.text
    for own in ("127.0.0.1:1234", "localhost", "LOCALHOST:1"):
        assert client.get("/state", headers={**HEADERS, "Host": own}).status_code == 200


def test_other_origins_get_no_permission(client):
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    before = client.options("/answer", headers={**asked, "Access-Control-Request-Headers": TOKEN})
    answer = client.get("/state", headers={**HEADERS, **asked})
    assert before.status_code == 405
    assert not any(name.startswith("access-control") for one in (before, answer) for name in one.headers)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"question": "x"}',
        b'{"question": "x", "choice": "both"}',
        b'{"question": "x", "choice": 1}',
        b'{"question": 7, "choice": "left"}',
        b'{"question": "x", "choice": "left", "user": "../../etc"}',
        b"[" * 4000,
    ],
)
def test_bad_bodies_are_refused(client, session, content):
    answer = client.post("/answer", content=content, headers=HEADERS)
    assert answer.status_code == 422 and answer.json()["detail"] and saved(session) == []


def test_half_a_surrogate_pair_is_just_another_question(client, session):
    answer = client.post("/answer", content=b'{"question": "\\ud800", "choice": "left"}', headers=HEADERS)
    assert answer.status_code in (409, 422) and saved(session) == []


@pytest.mark.parametrize("path", ["/answer", "/undo"])
def test_oversized_bodies_are_refused_whether_they_say_so_or_not(client, session, path):
    post(client, session)
    body = json.dumps({"question": session.question.name, "choice": "left"}).encode()
    huge = body + b" " * (web.LARGEST_BODY + 1 - len(body))
    assert client.post(path, content=huge, headers=HEADERS).status_code == 413
    assert client.post(path, content=iter([huge[:100], huge[100:]]), headers=HEADERS).status_code == 413
    assert len(saved(session)) == 1
    assert client.post(path, content=huge[:-1], headers=HEADERS).status_code == 200


def test_an_endless_body_is_cut_off_and_not_collected(session):
    """With uvicorn, which reads as the application does; a client that never stops is answered."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    server = web.uvicorn.Server(web.uvicorn.Config(create_app(session, "127.0.0.1", SECRET), log_level="error"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        with socket.create_connection(address, timeout=10) as connection:
            head = ("POST /answer HTTP/1.1", "Host: 127.0.0.1", f"{TOKEN}: {SECRET}", "Transfer-Encoding: chunked")
            body = ("1000", " " * 0x1000, "10", " " * 0x10, "")
            connection.sendall("\r\n".join((*head, "", *body)).encode())
            assert connection.recv(12) == b"HTTP/1.1 413"
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/redoc", "/../../etc/passwd", "/static/x", "/%2e%2e/x"])
def test_there_is_nothing_else(client, path):
    assert client.get(path, headers=HEADERS).status_code == 404


def test_the_page_forbids_what_it_does_not_need(client):
    answers = [client.get(f"/?token={SECRET}") for _ in range(2)]
    policies = [answer.headers["Content-Security-Policy"] for answer in answers]
    assert policies[0] != policies[1]  # the nonce is new each time
    for answer, policy in zip(answers, policies):
        assert policy.startswith("default-src 'none'; script-src 'nonce-") and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Referrer-Policy"] == "no-referrer" and "http" not in answer.text
    assert client.get("/state", headers=HEADERS).headers["X-Content-Type-Options"] == "nosniff"


def test_texts_are_data_in_the_page(session_of):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}\u2028"
    session = session_of(pool=[Pair(evil, evil + "a", evil + "b")])
    page = TestClient(create_app(session, "127.0.0.1", SECRET), base_url="http://127.0.0.1").get(f"/?token={SECRET}")
    assert page.status_code == 200 and page.text.count("<script") == 2 and "<img" not in page.text
    assert "{{ 7*7 }}" in page.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_all_addresses_at_once_are_refused(session, host):
    with pytest.raises(ValueError, match="--host needs one address of this machine"):
        serve(session, host, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_serve_prints_the_address_with_a_token_and_listens_on_it_alone(session, host, monkeypatch, capsys):
    seen = {}

    def run(server, sockets):
        address = capsys.readouterr().out.split()[1]
        thread = threading.Thread(target=inner, args=(server, sockets))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            seen["page"] = httpx.get(address)
            seen["without"] = httpx.get(address.partition("?")[0])
            seen["bound"] = sockets[0].getsockname()[0]
        finally:
            server.should_exit = True
            thread.join()

    inner = web.uvicorn.Server.run
    monkeypatch.setattr(web.uvicorn.Server, "run", run)
    serve(session, host, 0)
    assert seen["page"].status_code == 200 and session.question.prompt in seen["page"].text
    assert seen["without"].status_code == 403 and seen["bound"] == host


def test_a_port_that_is_taken_is_an_error(session):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError):
        serve(session, "127.0.0.1", taken.getsockname()[1])
