"""Rewards of users over HTTP, in the host's protocol."""

import numpy as np
import pytest
import torch

from openrlhf_pgrpo.host import doors
from openrlhf_pgrpo.models.scoring import load

pytestmark = pytest.mark.host


@pytest.fixture
def serve(host_parser, factorized, monkeypatch):
    """A client of our server, started with these flags."""
    from fastapi.testclient import TestClient

    found = []
    monkeypatch.setattr("uvicorn.run", lambda app, **address: found.append(TestClient(app)))
    monkeypatch.setattr("openrlhf.utils.utils.convert_to_torch_dtype", lambda name: torch.float32)

    def serve(*words):
        words = ["--reward.model_name_or_path", str(factorized), *words]
        args = doors.SERVE.parse_args(host_parser(doors.SERVE.script), words)
        with pytest.raises(SystemExit) as done:  # it ends where the server ends, before the host starts its own
            doors.SERVE.prepare(args)
        assert not done.value.code
        return found[-1]

    return serve


QUERIES = ["p yes", "p no <eos>", "p yes"]


@pytest.mark.parametrize("words", [(), ("--batch_size", "1"), ("--batch_size", "2")])
def test_a_label_says_whose_reward_is_asked_for(serve, factorized, words):
    labels = ["ana", {"user": "bob", "other": 1}, "cleo"]
    reply = serve(*words).post("/get_reward", json={"query": QUERIES, "prompts": QUERIES, "labels": labels})
    assert reply.status_code == 200
    model, found = load(factorized), reply.json()
    base = model.base_rewards(["p "] * 3, ["yes", "no", "yes"])
    expected = (base * model.coefficients).sum(1)
    assert np.allclose(found["rewards"], expected, atol=1e-5) and found["scores"] == found["rewards"]
    assert abs(expected[0] - expected[2]) > 0.1  # the same text for two users
    assert np.allclose([found["extra_logs"][f"base_reward_{number}"] for number in range(3)], base.T, atol=1e-5)


def test_the_key_of_the_user_and_numbers_as_labels(serve):
    client = serve("--data.user_key", "who", "--reward.unknown_user", "mean")

    def ask(*labels):
        return client.post("/get_reward", json={"query": ["p"] * len(labels), "labels": labels}).json()["rewards"]

    by_key, average, missing, number = ask({"who": "ana"}, {"user": "ana"}, None, 7)
    assert by_key == pytest.approx(ask("ana")[0], abs=1e-5)
    assert average == pytest.approx(missing, abs=1e-5) == pytest.approx(number, abs=1e-5)
    assert abs(by_key - average) > 0.01
    assert client.post("/get_reward", json={"query": ["p"]}).json()["rewards"] == pytest.approx([average], abs=1e-5)


@pytest.mark.parametrize(
    "body, message",
    [
        ({"query": ["p"], "labels": ["eve"]}, "got 'eve': ask them"),
        ({"query": ["p"]}, "got None: ask them"),
        ({"query": ["p"], "labels": ["ana", "bob"]}, "got a list of 1 and a list of 2"),
        ({"query": "p", "labels": ["ana"]}, "got str and a list of 1"),
        ({"query": [], "labels": []}, "got a list of 0 and a list of 0"),
        ({"query": [1], "labels": ["ana"]}, "a list `query` of texts"),
        ([], "a request needs to be an object, got a list of 0"),
    ],
)
def test_the_reply_to_a_bad_request_says_what_is_wrong(serve, body, message):
    reply = serve().post("/get_reward", json=body)
    assert reply.status_code == 422 and message in reply.json()["detail"]


def test_what_is_not_json_is_refused(serve):
    assert serve().post("/get_reward", content=b'{"query"').status_code == 422


def test_the_hosts_rollout_makes_samples_of_the_reply(serve):
    """It asks for one text at a time, and its actor averages what it finds in `info`: one number each."""
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    reply = serve().post("/get_reward", json={"query": ["p yes"], "prompts": ["p "], "labels": ["ana"]}).json()
    response = {
        **dict(observation_tokens=[1, 2, 3], action_ranges=[(1, 3)], rollout_log_probs=None, prompt="p ", label="ana"),
        **dict(reward=reply["rewards"], scores=reply["scores"], extra_logs=reply["extra_logs"]),
    }
    sample = SamplesGenerator._process_response_into_experience(None, response)
    assert sample.rewards.shape == (1, 1)
    assert {f"base_reward_{number}" for number in range(3)} < sample.info.keys()
    assert all(value.numel() == 1 for value in sample.info.values())
