"""Group-robust estimators in the experience maker: weights on the final advantages of any base, and their state."""

import argparse
import json
import runpy

import numpy as np
import pytest
import torch

from openrlhf_pgrpo.core import estimator as registry
from openrlhf_pgrpo.core.estimator import RewardBatch, advantage_estimators
from openrlhf_pgrpo.host.ppo import estimators
from openrlhf_pgrpo.host.ppo import flags as ppo_flags
from openrlhf_pgrpo.host.ppo.estimators import ROBUST_ESTIMATORS
from openrlhf_pgrpo.host.resume import KEY

pytestmark = pytest.mark.host

STOCK = ("gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo", "flash_reinforce")
N = 4
RUN = ("--rollout.n_samples_per_prompt", str(N), "--data.pref_group_key", "persona")
BOUNDS = ("--robust.signal", "bounds", "--robust.bounds", "[-20, 20]", "--robust.eta", "2")


def rewards(seed=0, lead=6.0):
    """Five prompts: three of "a", which is ahead by `lead`, and two of "b"."""
    values = np.random.default_rng(seed).normal(2.0, 3.0, (5, N)).astype(np.float32)
    values[0::2] += np.float32(lead)
    return values


def batch_of(values):
    prompt = np.arange(values.size) // N
    groups = [("a", "b")[q % 2] for q in prompt]
    return RewardBatch(values.flatten(), prompt, groups, [None] * len(prompt), [""] * len(prompt))


def least(base):
    """A small batch is enough for the history of a base that has one."""
    return ("--pgrpo.min_count", "4") if base in advantage_estimators() else ()


def robust_args(host_args, *argv, base="group_norm"):
    """Those of a policy loss that counts samples; hosts before 0.11.2 have no flag for it."""
    argv = ("--robust.base", base, *least(base), *argv)
    args = host_args("--advantage_estimator", "group_robust", *RUN, *BOUNDS, *argv)
    args.actor.loss_agg_mode = "seq-mean-token-mean"
    return args


@pytest.mark.parametrize("base", [*STOCK, *advantage_estimators()])
def test_final_advantages_of_any_base_are_weighted(base, host_args, make_maker, make_experiences):
    clip = ("--reward.clip_range", "-2", "2", "--reward.overlong_buffer_len", "2", "--rollout.max_new_tokens", "3")
    plain = make_maker(host_args("--advantage_estimator", base, *RUN, *least(base), *clip), kl_coef=0.1)
    weighted = make_maker(robust_args(host_args, *clip, base=base), kl_coef=0.1)
    expected = plain.compute_advantages_and_returns(make_experiences(rewards(), kl=0.3))
    found = weighted.compute_advantages_and_returns(make_experiences(rewards(), kl=0.3))

    # What the weights have seen: raw rewards less the length penalty, no KL, no clip.
    losses = estimators.make_robust(weighted.args)
    ordered = torch.cat([e.rewards for e in expected])[np.argsort([i for e in expected for i in e.index])]
    weights = dict(zip(batch_of(rewards()).pref_groups, losses(batch_of(ordered.numpy().reshape(-1, N)))))
    assert weights["b"] > 2 * weights["a"]
    for one, other in zip(found, expected, strict=True):
        w = torch.tensor([weights[prompt.pref_group] for prompt in one.prompts], dtype=torch.float32)
        torch.testing.assert_close(one.advantages, other.advantages * w[:, None], rtol=1e-6, atol=0)
        assert torch.equal(one.returns, other.returns) and torch.equal(one.rewards, other.rewards)
        assert one.info.keys() == other.info.keys()


def test_equal_weights_change_no_bit(host_args, make_maker, make_experiences):
    # chi 0 and mu share: importance weights 1, whatever the losses
    equal = ("--robust.chi", "0", "--robust.mu", "share", "--robust.eta", "0.1")
    outputs = [
        make_maker(args).compute_advantages_and_returns(make_experiences(rewards()))
        for args in (robust_args(host_args, *equal), host_args("--advantage_estimator", "group_norm", *RUN))
    ]
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one.advantages, other.advantages)


@pytest.mark.parametrize(
    "mode, loss_type", [("token-mean", "ppo"), ("seq-mean-token-mean", "ppo"), ("token-mean", "gspo")]
)
def test_a_preference_group_gets_its_alpha_whatever_its_length(
    mode, loss_type, host_args, make_maker, make_experiences
):
    """Of the gradient of the host's own loss, which by default is a mean over tokens."""
    from openrlhf.models.loss import PolicyLoss

    fixed = ("--robust.chi", "0", "--robust.eta", "0.1")
    args = robust_args(host_args, *fixed, "--actor.policy_loss_type", loss_type, base="pgrpo_global")
    args.actor.loss_agg_mode = mode
    maker = make_maker(args)
    experiences = make_experiences(rewards(), tokens=40)
    for e in experiences:
        short = torch.tensor([prompt.pref_group == "a" for prompt in e.prompts])
        e.action_mask[short, 5:] = False
    found = maker.compute_advantages_and_returns(experiences)
    weights = torch.cat(
        [e.advantages.new_tensor([maker.robust.applied[p.pref_group] for p in e.prompts]) for e in found]
    )
    mask = torch.cat([e.action_mask for e in found])
    log_probs = torch.zeros(mask.shape, requires_grad=True)
    loss = PolicyLoss(token_level_loss=mode == "token-mean", policy_loss_type=loss_type)
    loss(log_probs, log_probs.detach(), weights[:, None].expand(mask.shape), mask)[0].backward()
    groups = np.array([prompt.pref_group for e in found for prompt in e.prompts])
    by_group = [-log_probs.grad[groups == name].sum().item() for name in "ab"]
    assert by_group == pytest.approx([0.5, 0.5], rel=1e-5)


@pytest.mark.parametrize("name, base", ROBUST_ESTIMATORS.items())
def test_the_host_sees_the_base_and_the_logs_the_name(name, base, host_args, make_maker):
    args = host_args("--advantage_estimator", name, *RUN)
    maker = make_maker(args)
    assert args.algo.advantage.estimator == maker.advantage_estimator == base
    assert estimators.estimator_name(args) == name and maker.robust is not None
    assert (maker.estimator is None) == (base in STOCK)


def test_without_a_robust_estimator_there_are_no_weights(host_args, make_maker):
    args = host_args("--advantage_estimator", "pgrpo", *RUN, *least("pgrpo"))
    assert make_maker(args).robust is None and estimators.estimator_name(args) == "pgrpo"
    assert not [name for name in estimators.settings(args) if name.startswith("robust")]


def test_the_hosts_own_check_of_samples_per_prompt_sees_the_base(host_parser, monkeypatch):
    # The host goes on with the namespace that our check leaves.
    parser = host_parser()
    ppo_flags.extend(parser)
    args = parser.parse_args(["--advantage_estimator", "group_robust", "--data.pref_group_key", "persona"])
    ppo_flags.check(args)
    assert vars(args)["algo.advantage.estimator"] == "group_norm"
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self: args)
    with pytest.raises(AssertionError, match="group_norm requires n_samples_per_prompt > 1"):
        runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")


def test_metrics_per_preference_group(host_args, make_maker, make_experiences):
    maker = make_maker(robust_args(host_args, "--robust.base", "pgrpo"))
    maker.compute_advantages_and_returns(make_experiences(rewards()))
    a, b = maker.pref_group_metrics["a"], maker.pref_group_metrics["b"]
    assert a["share"] == 0.6
    assert a["weight"] * 0.6 + b["weight"] * 0.4 == pytest.approx(1)
    assert a["robust_alpha"] + b["robust_alpha"] == pytest.approx(1)
    gap = (b["reward_mean"] - a["reward_mean"]) / 40  # bounds are 40 apart
    assert a["robust_loss"] - b["robust_loss"] == pytest.approx(gap)
    assert b["weight"] / a["weight"] == pytest.approx(np.exp(-2 * gap) * 0.6 / 0.4)
    assert "history_count" in a


# --- state ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(make_maker, make_experiences):
    def train(args):
        maker = make_maker(args)
        for step in range(2):
            maker.compute_advantages_and_returns(make_experiences(rewards(step)))
        return maker

    return train


def save(maker):
    maker.actor_model_group.async_run_method("save_checkpoint", client_states={})
    return maker.actor_model_group.saved


def resume(maker, saved):
    maker.actor_model_group.saved = saved
    maker.actor_model_group.async_run_method(method_name="get_checkpoint_states")


@pytest.mark.parametrize("base", ["reinforce_baseline", "pgrpo_eb"])
@pytest.mark.parametrize("signal", ["quantiles", "bounds", "excess", "improvement"])
def test_a_resumed_run_goes_on_bit_by_bit(base, signal, trained, host_args, make_maker, make_experiences):
    bounds = ("--robust.bounds", "[-20, 20]") if signal == "bounds" else ()
    argv = ("--advantage_estimator", "group_robust", "--robust.base", base, "--robust.signal", signal)
    argv = (*argv, *bounds, *RUN, *least(base))
    argv = (*argv, "--robust.eta", "1", *(("--robust.reference_samples", "8") if signal == "excess" else ()))
    maker = trained(host_args(*argv))
    resumed = make_maker(host_args(*argv))
    resume(resumed, save(maker))
    steps = [m.compute_advantages_and_returns(make_experiences(rewards(7))) for m in (maker, resumed)]
    for one, other in zip(*steps, strict=True):
        assert torch.equal(one.advantages, other.advantages)
    assert maker.pref_group_metrics == resumed.pref_group_metrics
    assert abs(maker.pref_group_metrics["a"]["robust_alpha"] - 0.5) > 0.01


def test_the_saved_state_is_a_copy(trained, host_args, make_experiences):
    maker = trained(robust_args(host_args))
    saved = save(maker)
    before = saved[KEY]["robust"]["weights"]["log_alpha"].copy()
    maker.compute_advantages_and_returns(make_experiences(rewards(5)))
    assert (saved[KEY]["robust"]["weights"]["log_alpha"] == before).all()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--robust.eta", "3"), r"robust.eta 2.0 in the checkpoint, 3.0 now"),
        (("--robust.base", "rloo"), r"robust.base 'group_norm' in the checkpoint, 'rloo' now"),
        (("--robust.bounds", "[-30, 20]"), r"robust.bounds '\[-20, 20\]' in the checkpoint, '\[-30, 20\]' now"),
    ],
)
def test_other_settings_are_refused_with_both_values(flags, message, trained, host_args, make_maker):
    saved = save(trained(robust_args(host_args)))
    other = make_maker(robust_args(host_args, *flags))
    with pytest.raises(ValueError, match=message):
        resume(other, saved)
    assert not len(other.robust.weights)


def test_a_plain_run_does_not_resume_as_a_robust_one_but_the_host_does_from_it(trained, host_args, make_maker):
    plain = save(trained(host_args("--advantage_estimator", "group_norm", *RUN)))
    with pytest.raises(ValueError, match="advantage_estimator 'group_norm' in the checkpoint, 'group_robust' now"):
        resume(make_maker(robust_args(host_args)), plain)
    robust = save(trained(robust_args(host_args)))
    stock = make_maker(host_args("--advantage_estimator", "group_norm", *RUN))
    resume(stock, robust)
    assert save(stock)[KEY].keys() == {"schema", "settings", "estimator", "kl_coef"}


def test_fresh_history_starts_with_equal_weights(trained, host_args, make_maker):
    saved = save(trained(robust_args(host_args)))
    fresh = make_maker(robust_args(host_args, "--pgrpo.fresh_history", "--ckpt.load_enable"))
    resume(fresh, saved)
    assert not len(fresh.robust.weights)


# --- refusals ------------------------------------------------------------------------------------------------------

ROBUST = ("--advantage_estimator", "pgrpo_robust", "--data.pref_group_key", "persona")
REFUSALS = {
    "pgrpo_robust needs --data.pref_group_key, got none": ("--advantage_estimator", "pgrpo_robust"),
    "--robust.base, --robust.eta needs --advantage_estimator group_robust or pgrpo_robust, got gae": (
        *("--robust.base", "rloo", "--robust.eta", "1"),
    ),
    "--robust.bounds needs --advantage_estimator": ("--advantage_estimator", "rloo", "--robust.bounds", "[0, 1]"),
    "--robust.chi needs a number from 0 to 1, got 1.5": (*ROBUST, "--robust.chi", "1.5"),
    "--robust.improvement_lambda needs a finite number >= 0, got -1.0": (
        *(*ROBUST, "--robust.signal", "improvement", "--robust.improvement_lambda", "-1"),
    ),
    "--robust.mu needs numbers": (*ROBUST, "--robust.mu", '{"ann": 0.9, "bob": 0.9}'),
    "need each other, got signal 'bounds' and bounds None": (*ROBUST, "--robust.signal", "bounds"),
    "needs finite low < high, got {'all': [1, 0]}": (
        *ROBUST, "--robust.signal", "bounds", "--robust.bounds", "[1, 0]",
    ),
    "pgrpo with these options needs --rollout.n_samples_per_prompt >= 2": (
        *ROBUST, "--pgrpo.center", "prompt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSALS)
def test_bad_values_are_refused(message, host_args):
    with pytest.raises(ValueError) as refusal:
        host_args(*REFUSALS[message])
    assert message in str(refusal.value)


@pytest.mark.parametrize("base", ["group_robust", "nobody"])
def test_a_base_is_one_that_exists_and_is_not_robust(base, host_args, capsys):
    with pytest.raises(SystemExit):
        host_args(*ROBUST, "--robust.base", base)
    assert f"--robust.base: invalid choice: '{base}'" in capsys.readouterr().err


def test_a_plugin_may_be_the_base(host_args, tmp_path, monkeypatch, make_maker):
    monkeypatch.setattr(registry, "_estimators", dict(registry._estimators))
    (tmp_path / "mine.py").write_text(
        "from openrlhf_pgrpo.core.pgrpo import PGRPO\n"
        "from openrlhf_pgrpo.core.estimator import register_advantage_estimator\n"
        "register_advantage_estimator('mine')(type('Mine', (PGRPO,), {'__module__': 'mine'}))\n"
    )
    registry.load_plugin(str(tmp_path / "mine.py"))
    maker = make_maker(host_args(*ROBUST, *RUN, "--robust.base", "mine"))
    assert type(maker.estimator).__name__ == "Mine" and maker.robust is not None


@pytest.mark.parametrize("base", ["group_norm", "pgrpo_global", "pgrpo"])
def test_a_prompt_without_its_preference_group_is_refused(base, host_args, make_maker, make_experiences):
    maker = make_maker(robust_args(host_args, "--robust.base", base))
    experiences = make_experiences(rewards())
    experiences[1].prompts[0] = str(experiences[1].prompts[0])
    with pytest.raises(ValueError, match="needs to carry its preference group, got one without: 'p"):
        maker.compute_advantages_and_returns(experiences)
    assert not len(maker.robust.weights)


@pytest.mark.parametrize("base", ["group_norm", "pgrpo"])
def test_a_reward_that_is_not_finite_is_refused_for_any_base(base, host_args, make_maker, make_experiences):
    maker = make_maker(robust_args(host_args, "--robust.base", base))
    values = rewards()
    values[3, 1] = np.nan
    with pytest.raises(ValueError, match="needs a finite reward, got nan for preference group 'b', prompt 'p3'"):
        maker.compute_advantages_and_returns(make_experiences(values))
    assert not len(maker.robust.weights)


@pytest.mark.parametrize("flag", ["mu", "bounds"])
def test_a_group_of_the_data_that_mu_or_bounds_leave_out_is_refused_at_the_start(flag, host_args, tmp_path):
    from openrlhf.datasets import utils

    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"input": "hi", "persona": name}) + "\n" for name in ("ann", "bob", "cleo")))
    given = {
        "mu": ("--robust.chi", "0.5", "--robust.mu", '{"ann": 0.5, "bob": 0.5}'),
        "bounds": ("--robust.signal", "bounds", "--robust.bounds", '{"ann": [0, 1], "bob": [0, 1]}'),
    }
    args = host_args(*ROBUST, *given[flag], "--data.prompt_dataset", str(path))
    strategy = argparse.Namespace(args=args, print=lambda *words: None, is_rank_0=lambda: True)
    with pytest.raises(ValueError, match=f"--robust.{flag} needs every preference group, got none of 'cleo'"):
        utils.blending_datasets(str(path), None, strategy, 42)
