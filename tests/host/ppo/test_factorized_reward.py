"""PPO with a factorized reward model: its flags, and the reward of each sample's user."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from openrlhf_pgrpo.core.posterior import Prior
from openrlhf_pgrpo.host.ppo.estimators import make_user_rewards
from openrlhf_pgrpo.host.tags import TaggedPrompt
from openrlhf_pgrpo.models.folder import Folder, write
from openrlhf_pgrpo.models.form import KEY, PLAIN, read
from openrlhf_pgrpo.models.profiles import Answer, Profile

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
            ("--reward.model_name_or_path", "PLAIN", "--reward.normalize_enable"),
            "--reward.normalize_enable needs a mean and deviation of rewards in .*, got none",
        ),
        (
            ("--reward.model_name_or_path", "FOLDER", "--reward.normalize_enable"),
            "--reward.normalize_enable needs a mean and deviation of rewards in .*, got none",
        ),
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
def test_what_cannot_work_is_refused(host_args, factorized, tiny, words, message):
    folders = {"FOLDER": str(factorized), "PLAIN": str(tiny / "model")}
    with pytest.raises(ValueError, match=message):
        host_args(*(folders.get(word, word) for word in words))


@pytest.mark.parametrize("words", ["--ds.packing_samples", "--train.dynamic_batch_enable", "--ds.ring_attn_size 2"])
def test_packed_texts_are_refused_before_ray_starts(host_args, factorized, words):
    """The host packs for each of the three."""
    run = ("--advantage_estimator", "reinforce", *KEYS, *LENGTH, "--reward.model_name_or_path", str(factorized))
    flag, *_ = words.split()
    with pytest.raises(ValueError, match=f"needs one text in a row, got {flag} (True|2), which packs .*: leave that"):
        host_args(*run, *words.split())
    host_args(*run, "--ds.ring_attn_size", "1")


def test_a_factorized_reward_model_is_taken(host_args, factorized, tiny):
    policy = ("--actor.model_name_or_path", str(tiny / "model"))
    model = (*policy, "--reward.model_name_or_path", str(factorized), *LENGTH)
    args = host_args("--advantage_estimator", "reinforce", *KEYS, *model)
    assert list(make_user_rewards(args).users.names) == ["ana", "bob", "cleo"]
    plain = host_args(*policy, *GROUPS, *KEYS, "--reward.model_name_or_path", str(tiny / "model"))
    assert make_user_rewards(plain) is None
    host_args("--advantage_estimator", "reinforce", *model, "--reward.unknown_user", "mean")
    host_args(*GROUPS, *KEYS, *model, "--critic.model_name_or_path", "another")


@pytest.mark.parametrize("estimator", ["pgrpo", "reinforce", "group_norm"])
def test_the_experience_maker_reduces_base_rewards(host_args, make_maker, factorized, tiny, monkeypatch, estimator):
    keys = ("--actor.model_name_or_path", str(tiny / "model"), *GROUPS, *KEYS, "--rollout.n_samples_per_prompt", "2")
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


# ---- the texts of policy and reward model ----


@pytest.fixture
def look(host_args, tiny, tmp_path):
    """Takes the early look at a run of PPO with this policy and this local reward model."""
    from openrlhf_pgrpo.host import look

    rows = [{"input": [{"role": "user", "content": "why?"}], "who": "ana"}, {"input": "why?", "who": "ana"}]

    def take(policy, reward_model, *words, chat=False):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in (rows[:1] if chat else rows[1:]) * 16))
        run = ("--data.prompt_dataset", path, "--data.input_key", "input", "--vllm.num_engines", 1, *KEYS, *LENGTH)
        run += ("--rollout.batch_size", 8, "--train.batch_size", 8, "--advantage_estimator", "reinforce")
        run += ("--actor.model_name_or_path", policy, "--reward.model_name_or_path", reward_model)
        run += ("--data.apply_chat_template",) if chat else ()
        return look.ppo(host_args(*map(str, (*run, *words))))

    return take


def test_a_user_whom_nobody_knows_is_found_before_the_run(look, factorized, tiny, tmp_path):
    """Not in the step that draws the row."""
    rows = [{"input": "why?", "who": who} for who in ["ana"] * 11 + ["zed"] + ["bob"] * 4]
    (tmp_path / "users.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = tiny / "model", factorized, "--data.prompt_dataset", tmp_path / "users.jsonl"
    with pytest.raises(ValueError, match=r"every prompt .*row 11 of .*one of the 3 users of .*, got 'zed': ask them"):
        look(*words)
    look(*words, "--reward.unknown_user", "mean")
    model = Folder(factorized)
    answers = {"zed": [Answer("a pair", (0.1, 0.2, 0.3), 1.0)]}
    (zed,) = Profile.many(answers, model.fingerprint, Prior.of(model.coefficients))
    (tmp_path / "profiles").mkdir()
    zed.save(tmp_path / "profiles" / "zed.json")
    look(*words, "--reward.profiles", tmp_path / "profiles")


@pytest.fixture
def policy(tiny, tmp_path):
    """Copies the tiny model, with another tokenizer."""

    def policy(name, change):
        folder = tmp_path / name
        shutil.copytree(tiny / "model", folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        change(tokenizer)
        tokenizer.save_pretrained(folder)
        return folder

    return policy


def made_of(backbone, folder, form=PLAIN):
    write(folder, backbone, torch.ones(1, 64).numpy(), torch.ones(1, 1).numpy(), ["ana"], form=form)
    return folder


TEMPLATE = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def test_d9_a_local_reward_model_of_other_tokens_is_refused(look, factorized, tiny, policy):
    look(tiny / "model", factorized)
    more = policy("more", lambda tokenizer: tokenizer.add_tokens(["more"]))
    with pytest.raises(ValueError, match="needs the tokenizer of the policy .*, got another one in .*: serve it with"):
        look(more, factorized)
    with pytest.raises(ValueError, match="needs the tokenizer of the policy"):  # a plain reward model, too
        look(tiny / "model", more, "--advantage_estimator", "reinforce")
    other_end = policy("end", lambda tokenizer: setattr(tokenizer, "eos_token", "a"))
    with pytest.raises(ValueError, match="needs texts that end as those of the policy .*, with 'a', got '<eos>'"):
        look(other_end, factorized)


def test_a2_prompts_in_another_form_than_the_reward_models_are_refused(look, factorized, policy, tmp_path):
    chat = policy("chat", lambda tokenizer: setattr(tokenizer, "chat_template", TEMPLATE))
    other = policy("other", lambda tokenizer: setattr(tokenizer, "chat_template", TEMPLATE.replace(":", "=")))
    templated = made_of(chat, tmp_path / "rm", read(str(chat)))
    look(chat, templated, chat=True)
    for model, is_chat, message in (
        (factorized, True, "plain, got prompts written by a chat template: leave --data.apply_chat_template out, or"),
        (templated, False, "by a chat template, got prompts written plain: pass --data.apply_chat_template, or make"),
        (made_of(other, tmp_path / "rm2", read(str(other))), True, "got prompts written by a chat template, which is"),
    ):
        with pytest.raises(ValueError, match=f"needs prompts written as those of .*, {message}"):
            look(chat, model, chat=is_chat)
    with pytest.raises(ValueError, match="plain, got prompts written by the input template 'Q: {}': "):
        look(chat, factorized, "--data.input_template", "Q: {}")


def test_a_policy_whose_template_closes_answers_with_another_token_is_refused(look, policy, tmp_path):
    """The reward is read at the last token: that of a rollout would be one that the reward model never ends with."""
    closed = TEMPLATE.replace("eos_token", "'<end_of_turn>'")

    def change(tokenizer):
        tokenizer.add_tokens(["<end_of_turn>"])
        tokenizer.chat_template = closed

    chat = policy("chat", change)
    factorized = made_of(chat, tmp_path / "rm", read(str(chat)))
    look(chat, factorized, chat=True)  # a base model, say, which never learned to write that token
    end, other = AutoTokenizer.from_pretrained(chat).convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    GenerationConfig(eos_token_id=[end, other]).save_pretrained(chat)
    with pytest.raises(ValueError, match="which closes them with '<end_of_turn>', got '<eos>' in .*: serve it with"):
        look(chat, factorized, chat=True)
    GenerationConfig(eos_token_id=end).save_pretrained(chat)
    look(chat, factorized, chat=True)


def test_a2_a_reward_model_without_a_record_of_its_texts_needs_to_be_told(look, tiny, tmp_path):
    old = made_of(tiny / "model", tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != KEY}))
    with pytest.raises(
        ValueError, match="needs a record of how its texts are written.*say it with --chat_template pl"
    ):
        look(tiny / "model", old)
    look(tiny / "model", old, "--reward.chat_template", "plain")


def test_other_rewards_are_left_alone(host_args, make_maker, monkeypatch):
    maker = make_maker(host_args("--advantage_estimator", "reinforce", "--reward.remote_url", "http://127.0.0.1:1"))
    of_host = "openrlhf_pgrpo.host.ppo.experience_maker.RemoteExperienceMaker.make_experience"
    monkeypatch.setattr(of_host, lambda maker, samples: samples)
    assert maker.user_rewards is None and maker.make_experience("whatever") == "whatever"
