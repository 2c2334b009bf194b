"""Rewards of users over HTTP, in the host's protocol."""

import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from transformers import AutoTokenizer

from openrlhf_pgrpo.cli.main import main
from openrlhf_pgrpo.host import doors
from openrlhf_pgrpo.host.user_rewards import UserRewards
from openrlhf_pgrpo.models.folder import Folder, write
from openrlhf_pgrpo.models.form import read
from openrlhf_pgrpo.models.scoring import load

pytestmark = pytest.mark.host


@pytest.fixture
def serve(host_parser, factorized, monkeypatch):
    """A client of our server, started with these flags. `serve.address` is what it listened at."""
    from fastapi.testclient import TestClient

    found = []

    def run(server, sockets):
        serve.address = sockets[0].getsockname()
        found.append(TestClient(server.config.app))

    monkeypatch.setattr("uvicorn.Server.run", run)
    monkeypatch.setattr("openrlhf.utils.utils.convert_to_torch_dtype", lambda name: torch.float32)

    def serve(*words, model=factorized):
        words = ["--reward.model_name_or_path", str(model), "--port", "0", *words]
        args = doors.SERVE.parse_args(host_parser(doors.SERVE.script), words)
        with pytest.raises(SystemExit) as done:  # it ends where the server ends, before the host starts its own
            doors.SERVE.prepare(args)
        if done.value.code:
            raise done.value
        return found[-1]

    return serve


QUERIES = ["p yes", "p no<eos>", "p yes"]


def ask(client, query, labels, **more):
    """The reply to one request, sent as the host sends it."""
    return client.post("/get_reward", content=json.dumps({"query": query, "labels": labels, **more}))


def refusal(reply, status=422) -> str:
    assert reply.status_code == status, reply.text
    return reply.json()["detail"]


# ---- rewards ----


@pytest.mark.parametrize("words", [(), ("--batch_size", "1"), ("--batch_size", "2")])
@pytest.mark.parametrize("prompts", [{}, {"prompts": ["p "] * 3}])
def test_a_label_says_whose_reward_is_asked_for(serve, factorized, words, prompts):
    labels = ["ana", {"user": "bob", "other": 1}, "cleo"]
    reply = ask(serve(*words), QUERIES, labels, **prompts)
    assert reply.status_code == 200
    model, found = load(factorized), reply.json()
    base = model.base_rewards(["p "] * 3, ["yes", "no", "yes"])
    expected = (base * model.coefficients).sum(1)
    assert np.allclose(found["rewards"], expected, atol=1e-5) and found["scores"] == found["rewards"]
    assert abs(expected[0] - expected[2]) > 0.1  # the same text for two users
    assert np.allclose([found["extra_logs"][f"base_reward_{number}"] for number in range(3)], base.T, atol=1e-5)


def test_the_key_of_the_user_and_numbers_as_labels(serve):
    client = serve("--data.user_key", "who", "--reward.unknown_user", "mean")

    def rewards(*labels):
        return ask(client, ["p"] * len(labels), labels).json()["rewards"]

    by_key, average, missing, number = rewards({"who": "ana"}, {"user": "ana"}, None, 7)
    assert by_key == pytest.approx(rewards("ana")[0], abs=1e-5)
    assert average == pytest.approx(missing, abs=1e-5) == pytest.approx(number, abs=1e-5)
    assert abs(by_key - average) > 0.01
    assert client.post("/get_reward", json={"query": ["p"]}).json()["rewards"] == pytest.approx([average], abs=1e-5)


def test_a4_a_long_prompt_is_cut_and_the_answer_stays(serve, factorized, capsys):
    """Two answers to a prompt beyond the context had one reward. Without `prompts`, the text is cut from the left."""
    client, long = serve(), "once upon a time " * 40
    queries = [f"{long}yes<eos>", f"{long}no<eos>"]
    model = load(factorized)
    expected = model.base_rewards([long] * 2, ["yes", "no"]) @ model.coefficients[0]
    assert abs(expected[0] - expected[1]) > 0.01
    for prompts in ({"prompts": [long] * 2}, {}):
        reply = ask(client, queries, ["ana", "ana"], **prompts)
        assert np.allclose(reply.json()["rewards"], expected, atol=1e-5)
        assert "2 of 2 texts were cut from the left to 256 tokens" in capsys.readouterr().err


def test_a4_an_answer_that_does_not_fit_is_refused_with_its_number(serve):
    message = refusal(ask(serve(), ["p yes", "p " + "y" * 300], ["ana"] * 2, prompts=["p ", "p "]), 413)
    assert "fit into the 256 tokens that the model reads, got 301 with its end in text 1" in message


@pytest.mark.parametrize("length", [100, 2048])
def test_a_longest_text_other_than_the_models_is_refused(serve, length, capsys):
    """The model's folder knows it. A server with a length of its own gave other rewards than training."""
    with pytest.raises(SystemExit):
        serve("--data.max_len", str(length))
    assert "needs to be 256, the longest text that" in capsys.readouterr().err
    serve("--data.max_len", "256")


# ---- how texts are written ----

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "why?"}]


@pytest.fixture
def templated(tiny, tmp_path):
    """A policy with a chat template, and a factorized reward model on its backbone, of texts in that template."""
    policy, folder = tmp_path / "policy", tmp_path / "rm"
    shutil.copytree(tiny / "model", policy)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(policy)
    rng = np.random.default_rng(0)
    head, coefficients = rng.normal(size=(3, 64)), rng.normal(size=(2, 3))
    write(folder, policy, head, coefficients, ["ana", "bob"], form=read(str(policy)))
    return SimpleNamespace(folder=folder, tokenizer=tokenizer)


def test_a2_ppo_server_and_rerank_give_one_reward_to_the_same_messages_and_answer(serve, templated, tmp_path):
    tokenizer, model = templated.tokenizer, load(templated.folder)
    from openrlhf.datasets.prompts_dataset import preprocess_data

    prompt, _ = preprocess_data({"p": MESSAGES}, None, "p", None, tokenizer.apply_chat_template)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, "so it is")]
    sample = torch.tensor([[*ids[0], *ids[1], tokenizer.eos_token_id]])  # as a rollout makes it
    with torch.no_grad():
        base_rewards = model.model(sample, attention_mask=torch.ones_like(sample)).numpy()
    options = SimpleNamespace(unknown_user="error", profiles=None, normalize_enable=False)
    in_ppo = UserRewards(Folder(templated.folder), options)(base_rewards, ["bob"])[0]

    client, (query,) = serve(model=templated.folder), tokenizer.batch_decode(sample, skip_special_tokens=False)
    requests = (
        {"query": [query], "prompts": [prompt]},
        {"query": [query]},
        {"query": ["so it is"], "prompts": [MESSAGES]},
    )
    served = [
        client.post("/get_reward", json={"labels": ["bob"], **request}).json()["rewards"][0] for request in requests
    ]

    candidates, output = tmp_path / "candidates.jsonl", tmp_path / "ranked.jsonl"
    candidates.write_text(json.dumps({"prompt": MESSAGES, "responses": ["so it is", "no"]}) + "\n")
    words = [
        "--model",
        str(templated.folder),
        "--user",
        "bob",
        "--candidates",
        str(candidates),
        "--output",
        str(output),
    ]
    with pytest.raises(SystemExit) as ended:
        main(["rerank", *words])
    assert ended.value.code == 0
    ranked = json.loads(output.read_text())["rewards"][0]
    assert np.abs(np.array([*served, ranked]) - in_ppo).max() < 1e-4 < abs(in_ppo)


def test_a2_a_text_that_is_written_otherwise_is_refused(serve, templated, tiny, tmp_path):
    client = serve(model=templated.folder)
    message = refusal(ask(client, ["why? so<eos>"], ["ana"]))
    assert (
        "written by a chat template and need '<eos>\\n<|assistant|>' before the answer, got none in text 0" in message
    )
    for query, prompts in ((["so", "no"], [MESSAGES]), (["so"], [MESSAGES, MESSAGES])):  # one of them was lost
        assert "got a list of " in refusal(client.post("/get_reward", json={"query": query, "prompts": prompts}))
    plain = serve()
    assert "got a list of messages" in refusal(ask(plain, ["so"], ["ana"], prompts=[MESSAGES]))


def test_the_end_token_of_another_policy_is_no_part_of_an_answer(serve, factorized):
    message = refusal(ask(serve(), ["p yes", "p yes<|im_end|>"], ["ana"] * 2))
    assert "got '<|im_end|>' in text 1: start the server with --reward.end '<|im_end|>'" in message
    client = serve("--reward.end", "<|im_end|>")
    one, other = ask(client, ["p yes", "p yes<|im_end|>"], ["ana"] * 2).json()["rewards"]
    assert one == pytest.approx(other, abs=1e-6)


# ---- what a request may be ----


@pytest.mark.parametrize(
    "body, message",
    [
        ({"query": ["p"], "labels": ["eve"]}, "got 'eve': ask them"),
        ({"query": ["p"]}, "got None: ask them"),
        ({"query": ["p"], "labels": ["ana", "bob"]}, "got a list of 1 and a list of 2"),
        ({"query": ["p"], "labels": {"ana": 1}}, "got a list of 1 and dict"),
        ({"query": "p", "labels": ["ana"]}, "a list `query` of texts, got str"),
        ({"query": [], "labels": []}, "a list `query` of texts, got a list of 0"),
        ({"query": [1], "labels": ["ana"]}, "a list `query` of texts"),
        ({"query": [None], "labels": ["ana"]}, "a list `query` of texts"),
        ({"query": ["p"], "labels": ["ana"], "prompts": "p"}, "a list `prompts` of texts, got str"),
        ({"query": ["p"], "labels": ["ana"], "prompts": ["p", "p"]}, "and a list of 2 of prompts"),
        ({"query": ["p"], "labels": [["ana"]]}, "every label needs to name a user, got a list, ['ana'] in label 0"),
        ({"query": ["p"], "labels": [{"user": {"id": 1}}]}, "got a struct with the keys 'id' in label 0"),
        ({"query": ["p"], "labels": [{"user": " "}]}, "got a blank text, ' ' in label 0"),
        ({"query": ["p"], "labels": [float("nan")]}, "got float nan in label 0"),
        ({"query": ["p"], "labels": [10**400]}, "needs one of the 3 users"),
        ({"query": ["p\ud800"], "labels": ["ana"]}, "got half of one, '\\ud800', in text 0"),
        ({"query": ["p"], "labels": ["ana\ud800"]}, "needs one of the 3 users"),
        ([], "a request needs a JSON object, got list"),
    ],
)
def test_the_reply_to_a_bad_request_says_what_is_wrong(serve, body, message):
    assert message in refusal(serve().post("/get_reward", content=json.dumps(body)))


@pytest.mark.parametrize(
    "body, reason",
    [
        (b"", "Expecting value"),
        (b'{"query"', "Expecting ':' delimiter"),
        (b"\xff\xfe\xfd", "'utf-16-le' codec can't decode"),
        (b"[" * 100_000, "maximum recursion depth exceeded"),
        (b'{"a":' * 100_000, "maximum recursion depth exceeded"),
        (b'{"query": ["p"], "labels": [' + b"9" * 5000, "Exceeds the limit"),
    ],
    ids=["empty", "cut", "no text", "deep list", "deep object", "a huge number"],
)
def test_e3_what_is_not_json_is_refused(serve, body, reason):
    assert f"a request needs a JSON object, got {reason}" in refusal(serve().post("/get_reward", content=body))


def test_e3_a_request_of_one_long_and_many_short_texts_stays_small(serve, monkeypatch):
    """13 kB were one forward pass of 201 texts padded to 5,000 tokens: 20.9 GB, and the server was ended."""
    from openrlhf_pgrpo.host.serve.server import UserRewardProxy

    sizes, init = [], UserRewardProxy.__init__

    def count(self, *args):
        init(self, *args)
        forward = self.reward_model.forward
        self.reward_model.forward = lambda **batch: sizes.append(batch["input_ids"].shape) or forward(**batch)

    monkeypatch.setattr(UserRewardProxy, "__init__", count)
    queries = ["a b " * 2500] + [f"a{number}" for number in range(200)]
    reply = ask(serve(), queries, ["ana"] * 201)
    assert reply.status_code == 200 and len(reply.json()["rewards"]) == 201
    assert sum(texts for texts, _ in sizes) == 201 and max(texts * tokens for texts, tokens in sizes) <= 16384


@pytest.mark.parametrize(
    "words, queries, message",
    [
        (
            ("--max_texts", "2"),
            ["p"] * 3,
            "a request may have 2 texts, got 3: send fewer at once, or raise --max_texts",
        ),
        (
            ("--max_characters", "4"),
            ["p", "p" * 5],
            "a text may have 4 characters, got 5 in text 1: shorten it, or raise",
        ),
        (
            ("--max_body", "99"),
            ["p" * 99],
            "a request may have 99 bytes, got more: send fewer texts at once, or raise",
        ),
    ],
)
def test_e3_a_request_has_limits(serve, words, queries, message):
    client = serve(*words)
    assert message in refusal(ask(client, queries, ["ana"] * len(queries)), 413)
    assert ask(client, queries[:1], ["ana"]).status_code == (413 if "--max_body" in words else 200)
    assert ask(client, ["p"], ["ana"]).status_code == 200


@pytest.mark.parametrize("flag", ["--max_texts", "--max_characters", "--max_body"])
def test_e3_a_limit_of_nothing_is_refused(serve, flag, capsys):
    with pytest.raises(SystemExit):
        serve(flag, "0")
    assert f"argument {flag}: invalid positive value: '0'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--max_texts", "--max_characters", "--max_body"])
def test_e3_limits_of_a_plain_model_are_refused(serve, tiny, flag, capsys):
    """The host's script has none, so they would do nothing."""
    with pytest.raises(SystemExit):
        serve(flag, "7", model=tiny / "model")
    assert f"{flag} needs a factorized reward model" in capsys.readouterr().err


def test_rewards_that_are_not_finite_are_no_server_error(serve, monkeypatch):
    """JSON has no nan, so the reply failed with status 500."""
    from openrlhf_pgrpo.host.serve import server

    monkeypatch.setattr(server, "read", lambda *args: np.array([[1.0, 1.0, 1.0], [np.nan, 1.0, 1.0]]))
    message = refusal(ask(serve(), ["p", "q"], ["ana"] * 2))
    assert "every reward needs to be finite, got nan or inf for text 1" in message


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["ana", "p yes<eos>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["user", "a"]), inner, max_size=2),
    max_leaves=6,
)
TEXT = st.text(max_size=9) | st.sampled_from(["p yes", "p yes<eos>\n", "<eos>"])
ROWS = st.lists(st.tuples(TEXT, st.sampled_from(["ana", "bob"]) | JSON, TEXT), min_size=1, max_size=4)
RIGHT = ROWS.map(lambda rows: dict(zip(("query", "labels", "prompts"), map(list, zip(*rows)))))
WRONG = st.dictionaries(st.sampled_from(["query", "labels", "prompts"]), st.lists(TEXT, max_size=3) | JSON) | JSON


def test_e3_no_request_is_a_server_error(serve, record_property):
    """Any JSON gives rewards, one finite number for a text, or a sentence."""
    client, count, inputs = serve("--reward.unknown_user", "mean"), {200: 0, 422: 0}, set()

    @settings(max_examples=500, deadline=None)
    @given(RIGHT | WRONG)
    def check(body):
        text = json.dumps(body)
        inputs.add(text)
        reply = client.post("/get_reward", content=text)
        count[reply.status_code] += 1
        found = reply.json()
        if reply.status_code == 422:
            assert "need" in found["detail"] and "got" in found["detail"]
        else:
            assert len(found["rewards"]) == len(body["query"]) and np.isfinite(found["rewards"]).all()

    check()
    record_property("inputs", len(inputs))
    assert min(count.values()) > 20


def test_the_hosts_rollout_makes_samples_of_the_reply(serve):
    """It asks for one text at a time, and its actor averages what it finds in `info`: one number each."""
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    reply = serve().post("/get_reward", json={"query": ["p yes"], "prompts": ["p "], "labels": ["ana"]}).json()
    response = {
        **dict(observation_tokens=[1, 2, 3], action_ranges=[(1, 3)], rollout_log_probs=None, prompt="p ", label="ana"),
        **dict(reward=reply["rewards"], scores=reply["scores"], extra_logs=reply["extra_logs"]),
    }
    generator = SamplesGenerator.__new__(SamplesGenerator)
    generator.args = SimpleNamespace(reward=SimpleNamespace(remote_url=["http://a/get_reward"]))
    sample = generator._process_response_into_experience(response)
    assert sample.rewards.numel() == 1
    assert {f"base_reward_{number}" for number in range(3)} < sample.info.keys()
    assert all(value.numel() == 1 for value in sample.info.values())


# ---- where it listens ----


@pytest.mark.parametrize(
    "words, address, line",
    [
        ((), "127.0.0.1", "for this machine alone: --host 0.0.0.0 opens it to other machines"),
        (("--host", "0.0.0.0"), "0.0.0.0", "on all interfaces, for everybody who reaches it: it has no password"),
        (("--host", "0"), "0.0.0.0", "on all interfaces, for everybody who reaches it: it has no password"),
        (("--host", "localhost"), "127.0.0.1", "for this machine alone"),
    ],
)
def test_e3_it_listens_on_this_machine_alone_unless_asked(serve, capsys, words, address, line):
    """It listened on all interfaces, which only the web server's own line said."""
    serve(*words)
    assert serve.address[0] == address
    (said,) = (text for text in capsys.readouterr().out.splitlines() if text.startswith("[pgrpo] serves "))
    assert line in said and f"http://{address}:{serve.address[1]}/get_reward, " in said


def test_ctrl_c_ends_a_server_without_a_traceback(serve, monkeypatch):
    def interrupted(server, sockets):
        raise KeyboardInterrupt

    monkeypatch.setattr("uvicorn.Server.run", interrupted)
    with pytest.raises(SystemExit) as ended:
        serve()
    assert ended.value.code == 130


def test_an_address_that_is_taken_is_refused_before_the_model_is_loaded(serve, monkeypatch, capsys):
    monkeypatch.setattr("openrlhf_pgrpo.host.serve.server.UserRewardProxy", lambda *args: pytest.fail("it was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SystemExit):
        serve("--port", str(other.getsockname()[1]))
    assert "Address already in use" in capsys.readouterr().err


# ---- many clients ----


@contextmanager
def running(proxy, monkeypatch, slowest=60.0):
    """The real web server around a stand-in for the model; gives its address."""
    import uvicorn

    from openrlhf_pgrpo.host.serve import server

    monkeypatch.setattr(server, "SLOWEST", slowest)
    app = server.application(proxy, server.Limits(9, 99, 9999))
    web = uvicorn.Server(uvicorn.Config(app, http=server.PatientProtocol, ws="none", log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=web.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            web.should_exit = True
            thread.join(20)


def post(address, body=b"{}"):
    request = urllib.request.Request(f"http://127.0.0.1:{address[1]}/get_reward", body)
    with urllib.request.urlopen(request, timeout=20) as reply:
        return json.load(reply)


def one_reward(requests):
    return [([1.0], np.ones((1, 1)))] * len(requests)


def test_e3_idle_and_slow_clients_are_sent_away(monkeypatch):
    """uvicorn waits for ever for the first request of a connection, for the rest of a header, and for a body."""
    head = b"POST /get_reward HTTP/1.1\r\nHost: a\r\n"
    with running(SimpleNamespace(get_rewards=one_reward), monkeypatch, slowest=1.0) as address:
        idle = [socket.create_connection(address, timeout=20) for _ in range(50)]
        slow, late, between = (socket.create_connection(address, timeout=20) for _ in range(3))
        slow.sendall(head)
        late.sendall(head + b"Content-Length: 9\r\n\r\n{")
        between.sendall(head + b"Content-Length: 2\r\n\r\n{}")
        assert b"200 OK" in between.recv(9999)
        between.sendall(head)
        assert post(address)["rewards"] == [1.0]
        assert all(connection.recv(99) == b"" for connection in [*idle, slow, between])
        assert b"408" in late.recv(9999)
        assert post(address)["rewards"] == [1.0]
        for connection in (*idle, slow, late, between):
            connection.close()


def test_e3_what_comes_while_texts_are_scored_is_heard_and_scored_together_next(monkeypatch):
    """A forward pass stopped the whole server: nobody else had an answer, not even a refusal."""
    begun, go_on, at_once, calls = threading.Event(), threading.Event(), [], []

    def get_rewards(requests):
        at_once.append(1)
        calls.append(len(requests))
        begun.set()
        assert go_on.wait(20) and len(at_once) == 1
        at_once.pop()
        return one_reward(requests)

    with running(SimpleNamespace(get_rewards=get_rewards), monkeypatch) as address:
        replies = []

        def ask(body=b"{}"):
            try:
                replies.append(post(address, body)["rewards"])
            except urllib.error.HTTPError as error:
                replies.append(error.code)

        def start(*bodies):
            clients = [threading.Thread(target=ask, args=[body]) for body in bodies]
            for client in clients:
                client.start()
            return clients

        clients = start(b"{}")
        assert begun.wait(20)
        clients += start(*[b"{}"] * 4, b"no JSON", b"{" + b" " * 9990 + b"}", b"{" + b" " * 9000 + b"}")
        time.sleep(0.5)
        with pytest.raises(urllib.error.HTTPError, match="413"):  # heard while a text is scored
            post(address, b" " * 10_000)
        monkeypatch.setattr("openrlhf_pgrpo.host.serve.server.LONGEST_LINE", 1)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            post(address)
        monkeypatch.undo()
        gone = socket.create_connection(address, timeout=20)
        gone.sendall(b"POST /get_reward HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}")
        time.sleep(0.5)
        gone.close()  # nobody waits for its reward, so it is not computed
        go_on.set()
        for client in clients:
            client.join(20)
        assert sorted(map(str, replies)) == ["422", *["[1.0]"] * 7]
        # The two long ones do not fit into one request together, so they are not scored together either.
        assert calls[0] == 1 and sum(calls) == 7 and 3 <= len(calls) <= 4


def test_what_is_scored_together_is_as_if_alone(serve, monkeypatch):
    """Of requests that are read in one forward pass each has its own rewards, or its own refusal."""
    from openrlhf_pgrpo.host.serve import server

    proxies = []
    real = server.application
    monkeypatch.setattr(server, "application", lambda proxy, limits: proxies.append(proxy) or real(proxy, limits))
    client = serve()
    (proxy,) = proxies
    requests = [
        dict(query=QUERIES, labels=["ana", "bob", "cleo"]),
        dict(query=QUERIES, labels=["ana"]),
        dict(query=["p no"], labels=["dora"]),
        dict(query=["p " + "x" * 300], labels=["bob"], prompts=["p "]),
        dict(query=["p no"], labels=["bob"]),
    ]
    together = proxy.get_rewards(requests)
    for request, found in zip(requests, together):
        (alone,) = proxy.get_rewards([request])
        if isinstance(found, ValueError):
            assert str(found) == str(alone) == refusal(ask(client, **request), 413 if "fit" in str(found) else 422)
        else:
            np.testing.assert_allclose(found[0], alone[0], rtol=1e-5)
            np.testing.assert_allclose(found[1], alone[1], rtol=1e-5, atol=1e-6)
    assert [isinstance(found, ValueError) for found in together] == [False, True, True, True, False]
    assert proxy.get_rewards([]) == []
