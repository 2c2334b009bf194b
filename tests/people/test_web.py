"""What the server behind the page takes and refuses."""

import json
import os
import resource
import socket
import threading
import time
from contextlib import ExitStack

import httpx
import pytest
from common import scored
from starlette.testclient import TestClient

from openrlhf_pgrpo.core.posterior import Prior
from openrlhf_pgrpo.models.profiles import Profile
from openrlhf_pgrpo.people import connections, web
from openrlhf_pgrpo.people.pool import Pair
from openrlhf_pgrpo.people.session import Session
from openrlhf_pgrpo.people.web import TOKEN, create_app, listen, serve, server_of

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
    return json.loads(session.path.read_text())["answers"] if session.path.exists() else []


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


@pytest.mark.parametrize("choice", ["skip", "both bad"])
def test_a_skipped_question_is_saved_and_can_be_taken_back(client, session, choice):
    first = session.question._asdict()
    state = post(client, session, choice).json()
    assert (state["answered"], state["skipped"], state["forecast"]) == (0, 1, None)
    assert state["question"] not in (None, first) and saved(session) == []
    assert [one["reason"] for one in json.loads(session.path.read_text())["skipped"]] == [choice]
    state = client.post("/undo", json={}, headers=HEADERS).json()
    assert (state["skipped"], state["question"]) == (0, first)


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


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "", " ", "[::]", "[]", "0", "0x0", "00.0.0.0", "0.0", "::0", "::ffff:0.0.0.0", "224.0.0.1"],
)
def test_e6_all_addresses_at_once_are_refused_however_they_are_written(host):
    """The address that is bound counts, not its spelling."""
    with pytest.raises(ValueError, match="--host needs one address of this machine"):
        listen(host, 0)


def test_e6_a_name_that_means_all_addresses_is_refused(monkeypatch):
    """A name may stand for 0.0.0.0."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("0.0.0.0", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ValueError, match="got 'all.example', which is 0.0.0.0"):
        listen("all.example", 0)


@pytest.mark.parametrize("host", ["no such host", "a" * 300, "a..b", "\0", "\ud800"])
def test_e6_what_is_no_address_is_refused(host):
    """With the flag named."""
    with pytest.raises(ValueError, match="--host needs one address of this machine, got"):
        listen(host, 0)
    with pytest.raises(ValueError, match="--port needs a number from 0 to 65535, got 70000"):
        listen("127.0.0.1", 70000)


@pytest.mark.parametrize(
    "host, bound",
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("0x7f000001", "127.0.0.1"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
    ],
)
def test_e6_serve_prints_an_address_that_opens_and_listens_on_it_alone(session, host, bound, monkeypatch, capsys):
    """However it was written: the page opens at the printed address, with its token."""
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
    with listen(host, 0) as listener:
        serve(session, listener)
    assert seen["page"].status_code == 200 and session.question.prompt in seen["page"].text
    assert seen["without"].status_code == 403 and seen["bound"] == bound


def test_a_port_that_is_taken_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError):
        listen("127.0.0.1", taken.getsockname()[1])


# --- E8: clients that keep a connection ------------------------------------------------------------------------------


@pytest.fixture
def many_files():
    """Both ends of 1,200 connections are files of this process; many shells allow 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"needs 4096 open files, the hard limit is {hard}")
    if soft != resource.RLIM_INFINITY and soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def served(session):
    """The address of a real server of the session's page."""
    with listen("127.0.0.1", 0) as listener:
        server = server_of(create_app(session, "127.0.0.1", SECRET))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()


def ended(connection, seconds=5):
    """Whether the other side ends the connection in that time; what it sends before is read."""
    connection.settimeout(seconds)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_e8_idle_connections_without_a_token_do_not_keep_the_person_waiting(many_files, served, session):
    """Far more than the server takes: the page opens, answers are saved, and those that ask for nothing give way."""
    url = f"http://127.0.0.1:{served[1]}"
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=url, headers=HEADERS, timeout=5))
        assert client.get("/state").status_code == 200
        idle = []
        for _ in range(24):
            idle += [stack.enter_context(socket.create_connection(served, timeout=5)) for _ in range(50)]
            time.sleep(0.02)  # the server's thread has to take them; for those too many, the kernel waits a second
        assert httpx.get(f"{url}/?token={SECRET}", timeout=5).status_code == 200
        body = {"question": session.question.name, "choice": "left"}
        assert client.post("/answer", json=body).status_code == 200 and len(saved(session)) == 1
        assert ended(idle[0])


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ",
        b"POST /undo HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{",
        b"POST /undo HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Elicit-Token: s3cret\r\nContent-Length: 9\r\n\r\n{",
    ],
)
def test_e8_a_request_that_does_not_come_is_not_waited_for(session, monkeypatch, sent, request):
    """Neither its head nor its body, with the token or without."""
    monkeypatch.setattr(connections, "PATIENCE", 0.2)
    monkeypatch.setattr(web, "PATIENCE", 0.2)
    address = request.getfixturevalue("served")
    with socket.create_connection(address) as connection:
        connection.sendall(sent)
        assert ended(connection)


def test_e8_a_head_that_never_ends_is_refused(served):
    """It is not collected in memory."""
    with socket.create_connection(served, timeout=5) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 40000)
        assert connection.recv(12) == b"HTTP/1.1 400"


def test_e8_a_file_name_that_is_no_utf8_can_be_shown(model, pairs, tmp_path):
    """On the page, in its replies and in the errors about the file."""
    path = tmp_path / os.fsdecode(b"ana\xff.json")
    session = Session(pairs, *scored(model, pairs), Prior.of(model.coefficients), "ana", model.fingerprint, path)
    client = TestClient(create_app(session, "127.0.0.1", SECRET), base_url="http://127.0.0.1:8000")
    assert client.get(f"/?token={SECRET}").status_code == 200
    assert post(client, session).status_code == 200
    path.unlink()
    answer = post(client, session)
    assert answer.status_code == 500 and "changed by another session" in answer.json()["detail"]
