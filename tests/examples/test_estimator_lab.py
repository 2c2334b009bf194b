"""The estimator lab: one run for all seeds is the runs of single seeds, and what it reports is what it says."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import estimator_lab as lab
from openrlhf_pgrpo.core.estimator import RewardBatch, make_advantage_estimator
from openrlhf_pgrpo.core.pgrpo import PGRPOOptions

pytestmark = pytest.mark.core

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "estimator_lab.py"


SMALL = lab.Scenario(difficulty=1.0, noise=0.5, drift=2.0, samples=3, prompts=8, steps=25, actions=6)
OURS = [*lab.OURS, "pgrpo_global"]
LEARNING = dict(difficulty=0.0, samples=4, prompts=16, steps=120, actions=8)


def run(world, text, rate=0.1):
    return lab.learn(world, lab.Contender.parse(text), np.full(len(world.taste), rate))


# --- one run for all seeds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *lab.HOST,
        *OURS,
        *lab.RELATIVES,
        "ebpo_per_group:labels=random",
        "pgrpo:labels=random",
        "pgrpo_eb:half_life=40,update=after",
    ],
)
def test_all_seeds_at_once_are_the_seeds_one_by_one(text):
    together = run(lab.World(SMALL, [3, 4, 9]), text)
    alone = np.concatenate([run(lab.World(SMALL, [seed]), text) for seed in (3, 4, 9)])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-9)
    assert np.abs(together[0] - together[1]).max() > 0.01  # seeds differ


@pytest.mark.parametrize("text", OURS)
def test_advantages_are_those_of_one_core_estimator_per_seed(text):
    seeds, prompts, samples, groups = 3, 12, 4, 2
    rng = np.random.default_rng(0)
    contender = lab.Contender.parse(text)
    advantages = contender.start(seeds, groups)
    each = [make_advantage_estimator(contender.name, contender.options) for _ in range(seeds)]
    for _ in range(4):
        rewards = rng.normal(rng.normal(size=(seeds, 1, 1)), 1, (seeds, prompts, samples))
        label = rng.integers(groups, size=(seeds, prompts))
        found = advantages(rewards, label)
        for estimator, own_rewards, own_label, own_found in zip(each, rewards, label, found):
            owners, nothing = np.repeat(own_label, samples).astype(str).tolist(), [None] * own_rewards.size
            prompt_groups = np.repeat(np.arange(prompts), samples)
            batch = RewardBatch(own_rewards.ravel(), prompt_groups, owners, nothing, nothing)
            np.testing.assert_allclose(own_found.ravel(), estimator(batch), rtol=1e-9, atol=1e-12)


def test_the_same_seed_has_the_same_chances_whatever_the_cell_adds():
    # noise of 2 is four times the noise of 0.5, draw for draw; prompts, dice and tastes do not change
    one, other = lab.World(SMALL, [5]), lab.World(replace(SMALL, noise=2.0, difficulty=0.0), [5])
    np.testing.assert_allclose(other.noise, 4 * one.noise)
    for name in ("taste", "features", "pref_group", "shuffled", "dice"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert not other.difficulty.any()


# --- the bandit ------------------------------------------------------------------------------------------------------


def test_the_world_has_the_shares_and_agreement_asked_for():
    world = lab.World(lab.Scenario(shares=(6, 3, 1), scales=(1, 1, 1), offsets=(0, 0, 0), agreement=0.3), range(40))
    # 40 * 200 * 32 prompts: a share of 0.6 is known to sqrt(.24/256000) = 0.001
    shares = np.bincount(world.pref_group.ravel()) / world.pref_group.size
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=0.004)
    correlation = np.mean([np.corrcoef(taste)[0, 1] for taste in world.taste])  # 40 * 64 values: error 0.02
    assert correlation == pytest.approx(0.3, abs=0.08)


def test_random_labels_keep_the_shares_of_each_step_and_nothing_else():
    world = lab.World(SMALL, range(30))
    np.testing.assert_array_equal(np.sort(world.shuffled, axis=-1), np.sort(world.pref_group, axis=-1))
    agree = (world.shuffled == world.pref_group).mean()
    assert agree == pytest.approx(sum(share**2 for share in SMALL.shares), abs=0.1)  # .39 by chance; 8 prompts add .08


def test_learning_starts_at_0_and_ends_near_1():
    world = lab.World(lab.Scenario(noise=0.1, **LEARNING), range(4))
    curve = run(world, "group_norm")
    assert np.abs(curve[:, 0]).max() < 0.3 and curve[:, -1].mean() > 0.9 and curve.max() <= 1


def test_rotated_features_give_no_preference_group_parameters_of_its_own():
    features = lab.World(SMALL, [0, 1]).features
    assert (np.abs(features) > 1e-3).all()
    # 1 for what is common plus 1 for what is the preference group's own, whatever the rotation
    products = features @ features.swapaxes(1, 2)
    np.testing.assert_allclose(products, np.broadcast_to(1 + np.eye(4), (2, 4, 4)), atol=1e-12)


def test_random_labels_take_the_gain_away():
    world = lab.World(lab.Scenario(noise=0.3, **LEARNING), range(6))
    worst = {text: run(world, text).mean(1).min(1).mean() for text in ("group_norm", "pgrpo", "pgrpo:labels=random")}
    assert worst["pgrpo"] > worst["group_norm"] > worst["pgrpo:labels=random"] + 0.1


def test_the_common_rate_is_used_and_the_best_rate_is_the_better_one():
    (pair,) = lab.run_cell(SMALL, [lab.Contender.parse("pgrpo")], 3, 0.01, [1e-5, 0.1])
    assert [outcome.rate for outcome in pair] == [0.01, 0.1]
    assert pair[1].mean.mean() > pair[0].mean.mean()


def test_an_outcome_by_hand(monkeypatch):
    # two preference groups, three steps, both seeds the same: areas 1.7/3 and .9/3; means .3, .3, .7
    curve = np.broadcast_to([[0.5, 0.1], [0.3, 0.3], [0.9, 0.5]], (2, 3, 2))
    monkeypatch.setattr(lab, "learn", lambda *_: curve)
    scenario = replace(SMALL, samples=2, prompts=5)
    outcome = lab.Outcome.of(lab.World(scenario, [0, 1]), None, 0.1)
    np.testing.assert_allclose(outcome.mean, [(1.7 + 0.9) / 6] * 2)
    np.testing.assert_allclose(outcome.worst, [0.3] * 2)
    assert outcome.samples == pytest.approx((2 + (0.5 - 0.3) / (0.7 - 0.3)) * 10)  # half of step 3, 10 samples each
    monkeypatch.setattr(lab, "learn", lambda *_: curve / 10)
    assert lab.Outcome.of(lab.World(scenario, [0, 1]), None, 0.1).samples == np.inf


# --- the report ------------------------------------------------------------------------------------------------------


def outcome(mean, samples=100.0):
    return lab.Outcome(0.1, np.array(mean), np.array(mean) / 2, samples)


def test_a_sign_needs_more_than_three_paired_standard_errors():
    base = np.array([0.5, 0.6, 0.7, 0.8])  # mean .65, error .1291/2
    assert lab.number(base, base) == ".650±.065 "
    # differences .1, .1, .1, .14: mean .11, error .02/2; 3 errors are .03
    assert lab.number(base + [0.1, 0.1, 0.1, 0.14], base) == ".760±.073+"
    assert lab.number(base - [0.1, 0.1, 0.1, 0.14], base).endswith("-")
    assert lab.shown.with_error(10.55, 0.25) == "10.550±.250"
    # differences .1, .1, -.1, .1: mean .05, error .05
    assert lab.number(base + [0.1, 0.1, -0.1, 0.1], base).endswith(" ")


def test_the_rival_is_the_best_of_the_hosts_or_the_same_estimator_without_options():
    outcomes = {"dr_grpo": outcome([0.4, 0.4]), "group_norm": outcome([0.5, 0.5]), "pgrpo": outcome([0.6, 0.6])}
    assert lab.rival("pgrpo", outcomes) is outcomes["group_norm"]
    variants = {"pgrpo": outcome([0.6, 0.6]), "pgrpo:eps=0.1": outcome([0.7, 0.7])}
    assert lab.rival("pgrpo:eps=0.1", variants) is variants["pgrpo"]
    weighted = {"pgrpo:eps=0.1": outcome([0.6, 0.6]), "pgrpo:eps=0.1+bounds": outcome([0.7, 0.7])}
    assert lab.rival("pgrpo:eps=0.1+bounds", weighted) is weighted["pgrpo:eps=0.1"]


def test_samples_are_reported_as_a_ratio_to_the_fastest_of_the_hosts():
    outcomes = {"dr_grpo": outcome([0.4, 0.4], 80.0), "group_norm": outcome([0.5, 0.5]), "pgrpo": outcome([0.6, 0.6])}
    assert lab.ratio("pgrpo", outcomes) == "1.25" and lab.ratio("dr_grpo", outcomes) == "1.00"
    never = {"dr_grpo": outcome([0.4, 0.4], np.inf), "pgrpo": outcome([0.6, 0.6])}
    assert (lab.ratio("dr_grpo", never), lab.ratio("pgrpo", never)) == ("never", "alone")


# --- the command -----------------------------------------------------------------------------------------------------

TINY = "--steps 4 --prompts 4 --actions 4 --seeds 2 --rates 0.1 --noise 0.3".split()


def test_the_command_prints_a_table_per_cell_and_writes_the_figure(tmp_path):
    figure = tmp_path / "lab.png"
    figure.write_text("an old figure")
    command = [sys.executable, SCRIPT, *TINY, "--samples", "2", "4", "--out", figure]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert out.count("2 samples per prompt") == 2 and "difficulty 2, noise 0.3" in out  # difficulty 0 and 2
    assert out.count("pgrpo:labels=random") == 2 + 2  # two cells, two averages
    assert "nan" not in out and max(map(len, out.splitlines())) <= 120
    assert figure.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [figure]


def test_the_stated_grid_and_the_options_are_what_the_docstring_says():
    _, scenarios, contenders = lab.parse([])
    assert {(s.difficulty, s.noise, s.samples) for s in scenarios} == {
        (d, e, n) for d in (0.0, 2.0) for e in (0.3, 3.0) for n in (2, 4, 8)
    }
    assert set(lab.HOST) | set(OURS) | set(map(lab.with_random_labels, lab.OURS)) == set(contenders)
    _, scenarios, contenders = lab.parse(["--options"])
    assert {s.drift for s in scenarios} == {0.0, 6.0}
    assert contenders["pgrpo:half_life=512"].options == PGRPOOptions(half_life=512.0)
    _, _, contenders = lab.parse(["--relatives"])
    assert set(contenders) > {"pgrpo_eb", *lab.RELATIVES}


def test_the_contender_centred_on_prompts_differs_by_its_baseline_alone():
    assert lab.Contender.parse(lab.CENTRED) == ("pgrpo", PGRPOOptions(center="prompt"), False)
    both = lab.Contender.parse(lab.with_random_labels(lab.CENTRED))
    assert both == ("pgrpo", PGRPOOptions(center="prompt"), True)
    assert lab.with_random_labels("pgrpo") == "pgrpo:labels=random" and lab.STYLES.keys() >= lab.LABELS.keys()


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--shares 1 0 1 1", "--shares needs positive numbers, got (1.0, 0.0, 1.0, 1.0)"),
        ("--scales 1 2", "need one number per preference group, got {'shares': 4, 'scales': 2, 'offsets': 4}"),
        ("--noise -1", "--noise needs a finite number >= 0, got -1.0"),
        ("--difficulty nan", "--difficulty needs a finite number >= 0, got nan"),
        ("--drift inf", "--drift needs finite numbers, got inf"),
        ("--samples 0", "--samples needs at least 1, got 0"),
        ("--samples 1", "group_norm needs --samples 2 or more, got 1"),
        ("--samples 1 --estimators pgrpo pgrpo:center=prompt", "pgrpo:center=prompt needs --samples 2 or more, got 1"),
        ("--actions 1", "--actions needs at least 2, got 1"),
        ("--agreement 2", "--agreement needs a number from 0 to 1, got 2.0"),
        ("--seeds 1", "--seeds needs at least 2 for a standard error, got 1"),
        ("--rates 0.1 0", "--rate and --rates need positive numbers, got 0.05 and [0.1, 0.0]"),
        ("--out nowhere/lab.png", "--out needs a .png, .svg or .pdf in a folder that exists, got nowhere/lab.png"),
        ("--out lab.txt", "--out needs a .png, .svg or .pdf in a folder that exists, got lab.txt"),
        ("--estimators ppo", "got 'ppo'"),
        ("--estimators pgrpo:halflife=3", "'labels'], each once, got 'pgrpo:halflife=3'"),
        ("--estimators group_norm:eps=1", "group_norm needs options from [], each once, got 'group_norm:eps=1'"),
        ("--estimators pgrpo:min_count=4,min_count=16", "each once, got 'pgrpo:min_count=4,min_count=16'"),
        ("--prompts 1 --estimators jspo", "jspo compares with other prompts: --prompts needs 2 or more, got 1"),
        ("--opt", "unrecognized arguments: --opt"),
        ("--estimators pgrpo:update=never", "update needs one of before, after, got 'never'"),
        ("--estimators pgrpo:labels=wrong", "pgrpo needs labels=true or labels=random, got 'pgrpo:labels=wrong'"),
    ],
)
def test_a_bad_argument_is_refused_with_what_was_needed(argv, message, capsys):
    with pytest.raises(SystemExit):
        lab.parse(argv.split())
    assert message in capsys.readouterr().err


def test_one_sample_per_prompt_is_enough_for_the_paper():
    _, (scenario, *_), contenders = lab.parse("--samples 1 --estimators pgrpo reinforce".split())
    world = lab.World(replace(scenario, steps=10), [0, 1])
    assert all(np.isfinite(lab.learn(world, c, np.full(2, 0.1))).all() for c in contenders.values())
