"""Rewards of users: in PPO, where the experience maker makes them, and over HTTP, in the host's protocol."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openrlhf_pgrpo.core.elicitation import Profile
from openrlhf_pgrpo.host import doors
from openrlhf_pgrpo.host.prompts import TaggedPrompt
from openrlhf_pgrpo.host.user_rewards import UserRewards, factorized_folder
from openrlhf_pgrpo.models.factorized_reward import Folder, load

pytestmark = pytest.mark.host

BASE = np.array([[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]])


def options(unknown_user="error", profiles=None, normalize_enable=False):
    return SimpleNamespace(unknown_user=unknown_user, profiles=profiles, normalize_enable=normalize_enable)


# ---- users ----------------------------------------------------------------------------------------------------------


def test_a_reward_is_that_of_the_samples_user(factorized):
    folder = factorized_folder(str(factorized))
    ana, bob, cleo = folder.coefficients
    rewards = UserRewards(folder, options())
    assert np.array_equal(rewards(BASE, ["cleo", "ana"]), [BASE[0] @ cleo, BASE[1] @ ana])
    with pytest.raises(ValueError, match=r"needs a user of the reward model .*, got 'eve' \(1 of 2 samples\)"):
        rewards(BASE, ["bob", "eve"])
    with pytest.raises(ValueError, match=r"got None \(2 of 2 samples\): name a user of its 3"):
        rewards(BASE, [None, None])


def test_the_average_user_stands_in_only_where_that_is_asked_for(factorized):
    folder = Folder(factorized)
    average = UserRewards(folder, options("mean"))
    expected = [BASE[0] @ folder.coefficients.mean(0), BASE[1] @ folder.coefficients[1]]
    assert np.allclose(average(BASE, ["eve", "bob"]), expected, rtol=1e-12)
    assert np.allclose(average(BASE, [None, "bob"]), expected, rtol=1e-12)


def test_rewards_are_normalised_after_the_users_weighed_them(factorized):
    folder = Folder(factorized)
    folder.config.mean, folder.config.std = 2.0, 4.0
    plain, normal = (UserRewards(folder, options(normalize_enable=on))(BASE, ["ana", "bob"]) for on in (False, True))
    assert np.allclose(normal, (plain - 2) / 4, rtol=1e-12)


def test_profiles_add_users(factorized, tmp_path):
    folder = Folder(factorized)
    profile = Profile("eve", folder.fingerprint, np.array([1.0, 0.0, -1.0]), np.eye(3), ())
    profile.save(tmp_path / "eve.json")
    rewards = UserRewards(folder, options(profiles=str(tmp_path)))
    assert np.allclose(rewards(BASE, ["eve", "ana"]), [1.0 - 3.0, BASE[1] @ folder.coefficients[0]])
    Profile("ana", folder.fingerprint, np.ones(3), np.eye(3), ()).save(tmp_path / "ana.json")
    with pytest.raises(ValueError, match="to be of a user who is not known yet, got 'ana'"):
        UserRewards(folder, options(profiles=str(tmp_path)))
    Profile("ina", "another model", np.ones(3), np.eye(3), ()).save(tmp_path / "ana.json")
    with pytest.raises(ValueError, match="got one for another model"):
        UserRewards(folder, options(profiles=str(tmp_path)))


# ---- PPO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["pgrpo", "reinforce", "group_norm"])
def test_the_experience_maker_reduces_base_rewards(host_args, make_maker, factorized, monkeypatch, estimator):
    keys = ("--pgrpo.group_key", "persona", "--pgrpo.user_key", "who", "--rollout.n_samples_per_prompt", "2")
    args = host_args("--advantage_estimator", estimator, *keys, "--reward.model_name_or_path", str(factorized))
    maker = make_maker(args)
    users = ["ana", "ana", "cleo", "cleo"]
    base = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    halves = [
        SimpleNamespace(rewards=rows, info={"reward": rows}, prompts=[TaggedPrompt("p", "g", user) for user in some])
        for rows, some in zip(base.split(2), (users[:2], users[2:]))
    ]
    of_host = "openrlhf_pgrpo.host.experience_maker.RemoteExperienceMaker.make_experience"
    monkeypatch.setattr(of_host, lambda maker, samples: samples)
    table = dict(zip(("ana", "bob", "cleo"), Folder(factorized).coefficients))
    expected = torch.tensor([float(row.double().numpy() @ table[user]) for row, user in zip(base, users)])
    found = maker.make_experience(halves)
    for half, rewards in zip(found, expected.split(2)):
        assert half.rewards.shape == (2,) and torch.allclose(half.rewards, rewards, atol=1e-6)
        assert torch.equal(half.info["reward"], half.rewards)
    halves[1].rewards, halves[1].prompts[0] = base[:2], TaggedPrompt("p", "g", "eve")
    with pytest.raises(ValueError, match="needs a user of the reward model .*, got 'eve'"):
        maker.make_experience(halves[1:])
    halves[1].rewards, halves[1].prompts[0] = base[:2], "an agent's own prompt"
    with pytest.raises(ValueError, match="got None"):
        maker.make_experience(halves[1:])


def test_other_rewards_are_left_alone(host_args, make_maker, monkeypatch):
    maker = make_maker(host_args("--advantage_estimator", "reinforce", "--reward.remote_url", "http://127.0.0.1:1"))
    of_host = "openrlhf_pgrpo.host.experience_maker.RemoteExperienceMaker.make_experience"
    monkeypatch.setattr(of_host, lambda maker, samples: samples)
    assert maker.user_rewards is None and maker.make_experience("whatever") == "whatever"


# ---- HTTP -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(host_parser, factorized, monkeypatch):
    """A client of our server, started with these flags."""
    from fastapi.testclient import TestClient

    from openrlhf_pgrpo.host import reward_server

    found = []
    monkeypatch.setattr(reward_server.uvicorn, "run", lambda app, **address: found.append(TestClient(app)))
    monkeypatch.setattr("openrlhf.utils.utils.convert_to_torch_dtype", lambda name: torch.float32)

    def serve(*words):
        with pytest.raises(SystemExit) as done:  # it ends where the server ends, before the host starts its own
            words = ["--reward.model_name_or_path", str(factorized), *words]
            doors.parse_args(host_parser("openrlhf.cli.serve_rm"), words)
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
    client = serve("--reward.user_key", "who", "--reward.unknown_user", "mean")

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
        ({"query": ["p"], "labels": ["eve"]}, "got 'eve' (1 of 1 samples)"),
        ({"query": ["p"]}, "got None (1 of 1 samples)"),
        ({"query": ["p"], "labels": ["ana", "bob"]}, "got a list of 1 and a list of 2"),
        ({"query": "p", "labels": ["ana"]}, "got str and a list of 1"),
        ({"query": [], "labels": []}, "got a list of 0 and a list of 0"),
        ({"query": [1], "labels": ["ana"]}, "a list `query` of texts"),
        ([], "a request needs to be an object, got a list of 0"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(serve, body, message):
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
