"""The experience maker: the host's own estimators untouched, ours instead of the reward shaping."""

import numpy as np
import pytest
import torch

from openrlhf_pgrpo.core.estimator import RewardBatch, advantage_estimators, make_advantage_estimator
from openrlhf_pgrpo.core.pgrpo import PGRPOOptions
from openrlhf_pgrpo.host.tags import TaggedPrompt

pytestmark = pytest.mark.host

STOCK = ("gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo", "flash_reinforce")
N = 4
STOCK_RUN = ("--rollout.n_samples_per_prompt", str(N), "--data.pref_group_key", "persona")
RUN = (*STOCK_RUN, "--pgrpo.min_count", "4")


def rewards(seed=0, prompts=6):
    return np.random.default_rng(seed).normal(2.0, 3.0, (prompts, N)).astype(np.float32)


def in_sample_order(experiences, field):
    """Values (B, ...) of `field` sorted by the host's sample index."""
    rows = {i: row for e in experiences for i, row in zip(e.index, getattr(e, field))}
    return torch.stack([rows[i] for i in sorted(rows)])


def core_advantages(name, values, **options):
    """What the estimator itself says of the same rewards, (B,)."""
    estimator = make_advantage_estimator(name, PGRPOOptions(min_count=4, **options))
    prompt = np.arange(values.size) // N
    groups = [("a", "b")[q % 2] for q in prompt]
    return estimator(RewardBatch(values.flatten(), prompt, groups, [None] * len(prompt), [""] * len(prompt)))


@pytest.mark.parametrize("name", STOCK)
def test_stock_estimators_are_bit_equal(name, host_args, make_maker, make_experiences):
    penalty = ("--reward.overlong_buffer_len", "2", "--rollout.max_new_tokens", "3")
    args = host_args("--algo.advantage.estimator", name, *STOCK_RUN, *penalty)
    ours = make_maker(args, kl_coef=0.1)
    (original,) = type(ours).__bases__
    outputs = []
    for cls in (type(ours), original):
        experiences = make_experiences(rewards(), kl=0.3)
        outputs.append(make_maker(args, cls, kl_coef=0.1).compute_advantages_and_returns(experiences))
    for with_addon, without in zip(*outputs, strict=True):
        assert with_addon.info.keys() == without.info.keys()
        for field in ("rewards", "advantages", "returns"):
            assert torch.equal(getattr(with_addon, field), getattr(without, field)), field
        for key in without.info:
            assert torch.equal(with_addon.info[key], without.info[key]), key
    assert ours.estimator is None


@pytest.mark.parametrize("name", advantage_estimators())
def test_our_advantages_reach_every_action_token_whatever_the_order(name, host_args, make_maker, make_experiences):
    maker = make_maker(host_args("--advantage_estimator", name, *RUN))
    experiences = maker.compute_advantages_and_returns(make_experiences(rewards(), seed=3))
    expected = torch.as_tensor(core_advantages(name, rewards()), dtype=torch.float32)
    found, mask = in_sample_order(experiences, "advantages"), in_sample_order(experiences, "action_mask")
    torch.testing.assert_close(found[mask], expected[:, None].expand_as(mask)[mask])


def test_the_batch_names_the_group_and_user_of_each_sample(host_args, make_maker, make_experiences):
    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN))
    seen = []

    class Listening(type(maker.estimator)):
        def __call__(self, batch):
            seen.append(batch)
            return super().__call__(batch)

    maker.estimator = Listening(maker.estimator.options)
    experiences = maker.compute_advantages_and_returns(make_experiences(rewards(), seed=5))
    (batch,) = seen
    index = [i for e in experiences for i in e.index]
    assert batch.prompt_groups.tolist() == [i // N for i in index]
    assert list(batch.pref_groups) == [("a", "b")[i // N % 2] for i in index]
    assert batch.labels == [f"label {i // N}" for i in index]
    assert batch.users == ["u"] * len(index)


def test_group_reward_std_is_the_hosts(host_args, make_maker, make_experiences):
    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN))
    for e in maker.compute_advantages_and_returns(make_experiences(rewards())):
        expected = torch.as_tensor(rewards()).std(-1)[[i // N for i in e.index]]
        torch.testing.assert_close(e.info["group_reward_std"], expected)


def test_length_penalty_acts_on_the_raw_reward_and_the_log_keeps_it(host_args, make_maker, make_experiences):
    penalty = ("--reward.overlong_buffer_len", "2", "--rollout.max_new_tokens", "3")
    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN, *penalty))
    experiences = maker.compute_advantages_and_returns(make_experiences(rewards()))
    # lengths are 2 or 3 of at most 3, the buffer is 2: penalties 1/2 and 2/2
    lengths = in_sample_order(experiences, "response_length")
    expected = rewards() - (lengths - 1).float().numpy().reshape(-1, N) / 2
    assert torch.equal(torch.cat([e.info["reward"] for e in experiences]), torch.cat([e.rewards for e in experiences]))
    torch.testing.assert_close(in_sample_order(experiences, "rewards"), torch.as_tensor(expected.flatten()))
    first_token = in_sample_order(experiences, "advantages")[:, 0]
    torch.testing.assert_close(first_token, torch.as_tensor(core_advantages("pgrpo", expected), dtype=torch.float32))


def test_the_reward_clip_acts_on_the_advantage_as_for_group_norm(host_args, make_maker, make_experiences):
    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN, "--reward.clip_range", "-0.5", "0.5"))
    experiences = maker.compute_advantages_and_returns(make_experiences(rewards()))
    expected = core_advantages("pgrpo", rewards()).clip(-0.5, 0.5)
    assert np.abs(expected).max() == 0.5
    torch.testing.assert_close(
        in_sample_order(experiences, "advantages")[:, 0], torch.as_tensor(expected, dtype=torch.float32)
    )


def test_kl_is_subtracted_per_token_and_stays_out_of_the_history(host_args, make_maker, make_experiences):
    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN), kl_coef=0.1)
    experiences = maker.compute_advantages_and_returns(make_experiences(rewards(), kl=0.5))
    first = in_sample_order(experiences, "advantages")[:, 0]
    tokens = in_sample_order(experiences, "action_mask").sum(-1)
    expected = torch.as_tensor(core_advantages("pgrpo", rewards())) - 0.1 * 0.5 * tokens  # gamma = 1
    torch.testing.assert_close(first, expected.float())
    rows = maker.estimator.history.rows(["a", "b"])
    np.testing.assert_allclose(
        maker.estimator.history.mean[rows], [rewards()[0::2].mean(dtype=float), rewards()[1::2].mean(dtype=float)]
    )


def test_rewards_of_shape_b_1_are_flattened(host_args, make_maker, make_experiences):
    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN))
    experiences = make_experiences(rewards())
    for e in experiences:
        e.rewards = e.rewards[:, None]
    experiences = maker.compute_advantages_and_returns(experiences)
    torch.testing.assert_close(
        in_sample_order(experiences, "advantages")[:, 0],
        torch.as_tensor(core_advantages("pgrpo", rewards()), dtype=torch.float32),
    )


def test_metrics_per_preference_group(host_args, make_maker, make_experiences):
    values = rewards(prompts=5)  # prompts 0, 2, 4 are of "a", prompts 1, 3 of "b"
    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN))
    maker.compute_advantages_and_returns(make_experiences(values))
    a, expected = maker.pref_group_metrics["a"], core_advantages("pgrpo", values).reshape(-1, N)[0::2]
    assert a["samples"] == 12 and a["share"] == 0.6 and a["history_count"] == 12
    assert a["reward_mean"] == pytest.approx(values[0::2].mean()) == pytest.approx(a["history_mean"])
    assert a["reward_std"] == pytest.approx(values[0::2].std()) == pytest.approx(a["history_std"])
    assert a["advantage_mean"] == pytest.approx(expected.mean(), abs=1e-6)
    assert a["advantage_std"] == pytest.approx(expected.std(), rel=1e-5)
    assert set(maker.pref_group_metrics) == {"a", "b"}


def test_metrics_come_with_stock_estimators_too(host_args, make_maker, make_experiences):
    maker = make_maker(host_args("--advantage_estimator", "group_norm", *STOCK_RUN))
    maker.compute_advantages_and_returns(make_experiences(rewards()))
    assert maker.pref_group_metrics["b"]["reward_mean"] == pytest.approx(rewards()[1::2].mean(), rel=1e-5)
    assert "history_mean" not in maker.pref_group_metrics["b"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_reward_stops_before_the_history_changes(value, host_args, make_maker, make_experiences):
    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN))
    values = rewards()
    values[3, 1] = value
    with pytest.raises(ValueError, match=rf"got {value} for preference group 'b', prompt 'p3' \(1 of 24"):
        maker.compute_advantages_and_returns(make_experiences(values))
    assert len(maker.estimator.history) == 0


def test_a_prompt_without_its_preference_group_is_refused(host_args, make_maker, make_experiences):
    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN))
    experiences = make_experiences(rewards())
    experiences[1].prompts[0] = str(experiences[1].prompts[0])
    with pytest.raises(ValueError, match="needs to carry its preference group, got one without: 'p"):
        maker.compute_advantages_and_returns(experiences)
    assert not isinstance(experiences[1].prompts[0], TaggedPrompt)


def test_pgrpo_global_needs_no_preference_groups(host_args, make_maker, make_experiences):
    maker = make_maker(host_args("--advantage_estimator", "pgrpo_global", "--rollout.n_samples_per_prompt", str(N)))
    experiences = make_experiences(rewards())
    for e in experiences:
        e.prompts = [str(prompt) for prompt in e.prompts]
    experiences = maker.compute_advantages_and_returns(experiences)
    expected = (rewards() - rewards().mean(dtype=float)) / rewards().std(dtype=float)
    torch.testing.assert_close(
        in_sample_order(experiences, "advantages")[:, 0],
        torch.as_tensor(expected.flatten(), dtype=torch.float32),
        rtol=1e-5,
        atol=1e-5,
    )
    assert maker.pref_group_metrics == {}


@pytest.mark.parametrize("name", ["group_norm", "pgrpo_global"])
def test_users_without_preference_groups(name, host_args, make_maker, make_experiences):
    args = host_args("--advantage_estimator", name, "--data.user_key", "who", "--rollout.n_samples_per_prompt", str(N))
    maker, plain = make_maker(args), make_maker(args)
    experiences = make_experiences(rewards())
    for e in experiences:
        e.prompts = [TaggedPrompt(prompt, None, "ben") for prompt in e.prompts]
    found = maker.compute_advantages_and_returns(experiences)
    expected = plain.compute_advantages_and_returns(make_experiences(rewards()))
    assert torch.equal(in_sample_order(found, "advantages"), in_sample_order(expected, "advantages"))
    assert maker.pref_group_metrics == {}


def test_one_batch_is_built_in_a_step(host_args, make_maker, make_experiences, monkeypatch):
    from openrlhf_pgrpo.host.ppo import experience_maker

    built = []
    monkeypatch.setattr(
        experience_maker, "RewardBatch", lambda **columns: built.append(columns) or RewardBatch(**columns)
    )
    maker = make_maker(host_args("--advantage_estimator", "pgrpo_robust", *RUN))
    maker.compute_advantages_and_returns(make_experiences(rewards()))
    assert len(built) == 1


@pytest.mark.parametrize("wrong", [lambda batch: batch.rewards[1:], lambda batch: batch.rewards * np.nan])
def test_what_an_estimator_returns_is_checked(wrong, host_args, make_maker, make_experiences, monkeypatch):
    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN))
    monkeypatch.setattr(type(maker.estimator), "__call__", lambda self, batch: wrong(batch))
    with pytest.raises(ValueError, match=r"pgrpo.*(23,|sample 0)"):
        maker.compute_advantages_and_returns(make_experiences(rewards()))


def test_a12_infinite_advantages_of_a_host_estimator_name_estimator_group_and_prompt(
    host_args, make_maker, make_experiences
):
    """A clip range of NaN makes every advantage NaN; DeepSpeed would drop the updates silently."""
    maker = make_maker(host_args("--advantage_estimator", "group_norm", *STOCK_RUN))
    maker.args.reward.clip_range = (float("nan"), 10.0)
    with pytest.raises(
        ValueError, match="finite advantages.*group_norm for preference group '.', prompt 'p.*clip_range"
    ):
        maker.compute_advantages_and_returns(make_experiences(rewards()))


def test_a12_an_estimators_error_names_the_prompt(host_args, make_maker, make_experiences, monkeypatch):
    """The methods know a sample by its number; the message has the prompt."""
    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN))
    monkeypatch.setattr(type(maker.estimator), "__call__", lambda self, batch: batch.rewards * np.nan)
    with pytest.raises(ValueError, match="pgrpo.*got nan for sample 0 .*; it is of preference group '.', prompt 'p"):
        maker.compute_advantages_and_returns(make_experiences(rewards()))


def test_a12_a_reward_that_is_not_finite_is_refused_for_host_estimators_too(host_args, make_maker, make_experiences):
    """It would make the advantages of its whole prompt group, or batch, NaN."""
    values = rewards()
    values[2, 1] = np.nan
    maker = make_maker(host_args("--advantage_estimator", "reinforce_baseline", *STOCK_RUN))
    with pytest.raises(ValueError, match="needs a finite reward, got nan for preference group 'a', prompt 'p2'"):
        maker.compute_advantages_and_returns(make_experiences(values))


@pytest.mark.parametrize("name", ["pgrpo", "group_norm"])
def test_a17_a_sample_without_an_action_token_enters_nothing(name, host_args, make_maker, make_experiences):
    """Its whole reward would enter baseline and history while it trains no token."""
    maker = make_maker(host_args("--advantage_estimator", name, *STOCK_RUN))
    samples = make_experiences(rewards())
    samples[3].action_mask[:] = False
    with pytest.raises(ValueError, match=r"needs an action token, got none for preference.*--data.max_len is \d+ and"):
        maker.make_experience_batch(samples)


def test_a19_response_length_counts_action_tokens(host_args, make_maker, make_experiences):
    """Tokens of a tool lie between those of the policy and are none of its own."""
    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN))
    experiences = make_experiences(rewards(), tokens=5)
    for experience in experiences:
        experience.action_mask[:, 1:3] = False
        experience.response_length[:] = 5
    maker.compute_advantages_and_returns(experiences)
    lengths = [group["response_length_mean"] for group in maker.pref_group_metrics.values()]
    assert all(2 <= length <= 3 for length in lengths)


def test_d6_logs_that_only_some_samples_have_count_where_they_are(host_args, make_maker):
    """Keys per domain: means over the samples that have the key, and nothing partial for the host to batch."""
    from openrlhf.trainer.ppo_utils.experience import Experience, split_experience_batch

    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN))
    logs = [{"math": 1.0, "all": 1.0}, {"math": 3.0, "all": 2.0}, {"code": 5.0, "all": 3.0}, {"all": 4.0}]
    samples = [
        Experience(
            sequences=torch.ones(1, 4, dtype=torch.long),
            attention_mask=torch.ones(1, 4, dtype=torch.long),
            action_mask=torch.ones(1, 3, dtype=torch.bool),
            rewards=torch.tensor([1.0]),
            prompts=[TaggedPrompt("p", "a", "u")],
            labels=[""],
            info={"reward": torch.tensor([1.0]), **{key: torch.tensor([value]) for key, value in log.items()}},
        )
        for log in logs
    ]
    maker.make_experience = lambda batches: batches
    maker.compute_advantages_and_returns = lambda batches: batches
    maker.args.rollout.micro_batch_size = 4
    maker.tokenizer.pad_token_id = 0
    (whole,) = maker.make_experience_batch(samples)
    assert maker.partial_logs == {"math": 2.0, "code": 5.0}
    assert set(whole.info) == {"reward", "all"} and whole.info["all"].tolist() == [1, 2, 3, 4]
    assert len(split_experience_batch(whole)) == 4


def test_e7_the_prompt_of_an_outlier_is_named_and_a_refused_run_may_be_resumed_with_clip(
    host_args, make_maker, make_experiences
):
    """The choice about outliers is no setting that gives a history its meaning."""
    values = rewards()
    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN))
    maker.compute_advantages_and_returns(make_experiences(values))
    state = {"schema": 2, **maker.checkpoint_state()}
    values[3, 1] = 3e38
    with pytest.raises(ValueError, match="got 3e.38 for sample .* of preference group 'b'.*prompt 'p3'"):
        maker.compute_advantages_and_returns(make_experiences(values))
    clipping = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN, "--pgrpo.outliers", "clip"))
    clipping.restore(state)
    with pytest.warns(RuntimeWarning, match="clipped"):
        clipping.compute_advantages_and_returns(make_experiences(values))
    assert clipping.estimator.history.spread()[2].max() < 100
