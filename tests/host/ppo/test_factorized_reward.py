"""PPO with a factorized reward model: its flags, and the reward of each sample's user."""

from types import SimpleNamespace

import pytest
import torch

from openrlhf_pgrpo.host.ppo.estimators import make_user_rewards
from openrlhf_pgrpo.host.tags import TaggedPrompt
from openrlhf_pgrpo.models.folder import Folder

pytestmark = pytest.mark.host


KEYS = ("--data.user_key", "who")
LENGTH = ("--data.max_len", "256")  # as many positions as the model has
GROUPS = ("--data.pref_group_key", "persona")


@pytest.mark.parametrize(
    "words, message",
    [
        (("--reward.unknown_user", "mean"), "--reward.unknown_user needs a factorized reward model in --reward.model"),
        (("--reward.remote_url", "x", "--reward.profiles", "p"), "--reward.profiles needs a factorized reward model"),
        (("--reward.model_name_or_path", "FOLDER"), "needs --data.user_key, got none"),
        (
            ("--reward.model_name_or_path", "FOLDER", "--reward.unknown_user", "mean"),  # gae is the host's default
            "a critic cannot start from the base rewards of .*: name another model with --critic.model_name_or_path",
        ),
        (
            (
                "--advantage_estimator",
                "reinforce",
                *KEYS,
                "--reward.model_name_or_path",
                "FOLDER",
                "--data.max_len",
                "257",
            ),
            "--data.max_len needs at most 256 tokens, the longest text of the reward model .*, got 257: lower it",
        ),
    ],
)
def test_what_cannot_work_is_refused(host_args, factorized, words, message):
    with pytest.raises(ValueError, match=message):
        host_args(*(str(factorized) if word == "FOLDER" else word for word in words))


def test_a_factorized_reward_model_is_taken(host_args, factorized, tiny):
    model = ("--reward.model_name_or_path", str(factorized), *LENGTH)
    args = host_args("--advantage_estimator", "reinforce", *KEYS, *model)
    assert list(make_user_rewards(args).users.names) == ["ana", "bob", "cleo"]
    plain = host_args(*GROUPS, *KEYS, "--reward.model_name_or_path", str(tiny / "model"))
    assert make_user_rewards(plain) is None
    host_args("--advantage_estimator", "reinforce", *model, "--reward.unknown_user", "mean")
    host_args(*GROUPS, *KEYS, *model, "--critic.model_name_or_path", "another")


@pytest.mark.parametrize("estimator", ["pgrpo", "reinforce", "group_norm"])
def test_the_experience_maker_reduces_base_rewards(host_args, make_maker, factorized, monkeypatch, estimator):
    keys = (*GROUPS, *KEYS, "--rollout.n_samples_per_prompt", "2")
    args = host_args(
        "--advantage_estimator", estimator, *keys, "--reward.model_name_or_path", str(factorized), *LENGTH
    )
    maker = make_maker(args)
    users = ["ana", "ana", "cleo", "cleo"]
    base = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    halves = [
        SimpleNamespace(rewards=rows, info={"reward": rows}, prompts=[TaggedPrompt("p", "g", user) for user in some])
        for rows, some in zip(base.split(2), (users[:2], users[2:]))
    ]
    of_host = "openrlhf_pgrpo.host.ppo.experience_maker.RemoteExperienceMaker.make_experience"
    monkeypatch.setattr(of_host, lambda maker, samples: samples)
    table = dict(zip(("ana", "bob", "cleo"), Folder(factorized).coefficients))
    expected = torch.tensor([float(row.double().numpy() @ table[user]) for row, user in zip(base, users)])
    found = maker.make_experience(halves)
    for half, rewards in zip(found, expected.split(2)):
        assert half.rewards.shape == (2,) and torch.allclose(half.rewards, rewards, atol=1e-6)
        assert torch.equal(half.info["reward"], half.rewards)
    halves[1].rewards, halves[1].prompts[0] = base[:2], TaggedPrompt("p", "g", "eve")
    with pytest.raises(ValueError, match="every sample needs one of the 3 users of .*, got 'eve'"):
        maker.make_experience(halves[1:])
    halves[1].rewards, halves[1].prompts[0] = base[:2], "an agent's own prompt"
    with pytest.raises(ValueError, match="got None"):
        maker.make_experience(halves[1:])


def test_other_rewards_are_left_alone(host_args, make_maker, monkeypatch):
    maker = make_maker(host_args("--advantage_estimator", "reinforce", "--reward.remote_url", "http://127.0.0.1:1"))
    of_host = "openrlhf_pgrpo.host.ppo.experience_maker.RemoteExperienceMaker.make_experience"
    monkeypatch.setattr(of_host, lambda maker, samples: samples)
    assert maker.user_rewards is None and maker.make_experience("whatever") == "whatever"
